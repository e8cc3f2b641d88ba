"""`stylefast.kernels` and `stylefast.export` import from every kind of install, from the root and from elsewhere.

Both live in folders beside `stylefast`, and Hugging Face ships a package that is called `kernels` too.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

PROJECT = ["pyproject.toml", "setup.py", "LICENSE", "README.md", "csrc", "stylefast", "kernels", "export"]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")

# the origins of the packages, without running the operations and so without torch, which the extension alone loads
ORIGINS = """
import importlib.util, json, sys
import stylefast, stylefast.export
assert "torch" not in sys.modules, "import stylefast loaded torch"
origins = {"stylefast": stylefast.__file__, "export": stylefast.export.__file__}
origins["kernels"] = importlib.util.find_spec("stylefast.kernels").origin
print(json.dumps(origins))
"""
EXTENSION = """
import json
from stylefast._extension import extension, extension_error
print(json.dumps([extension() is not None, extension_error()]))
"""
FOREIGN = 'import sys\nname = "of Hugging Face"\nfrom kernels.layer import mode\n'


@dataclass
class Place:
    """An interpreter whose site-packages hold some install of a checkout."""

    python: Path
    site: Path
    checkout: Path

    def pip(self, *arguments: str, **variables: str) -> None:
        command = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(self.python),
            "install",
            "-q",
            "--no-deps",
            "--no-compile",
            "--no-build-isolation",
            "--no-index",
            "--ignore-installed",
            "--disable-pip-version-check",
        ]
        done = subprocess.run(
            [*command, *arguments], cwd=self.site, env={**os.environ, **variables}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, code: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run(
            [str(self.python), "-c", code], cwd=cwd, env={**environment, **variables}, capture_output=True, text=True
        )

    def origins(self, cwd: Path, **variables: str) -> dict[str, Path]:
        """Where each package is imported from by a program that is run in a folder."""
        done = self.run(ORIGINS, cwd, **variables)
        assert done.returncode == 0, done.stderr
        return {name: Path(origin) for name, origin in json.loads(done.stdout).items()}

    def extension(self, cwd: Path) -> tuple[bool, str]:
        """Whether the C++ extension loads, and if not, why."""
        done = self.run(EXTENSION, cwd)
        assert done.returncode == 0, done.stderr
        return tuple(json.loads(done.stdout))


def copy_project(source: Path, target: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors", "*.egg-info")
    target.mkdir()
    for name in PROJECT:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, ignore=ignore)
        elif (source / name).exists():
            shutil.copy(source / name, target / name)
    return target


@pytest.fixture(scope="module")
def make_place(checkout, tmp_path_factory):
    def make() -> Place:
        folder = tmp_path_factory.mktemp("place")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
        python = folder / "venv" / "bin" / "python"
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        site = Path(subprocess.run([str(python), "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
        # what the tests run with, seen from the new environment; its own .pth files are not read on this way
        (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return Place(python, site, copy_project(checkout, folder / "checkout"))

    return make


@pytest.fixture(scope="module")
def bare(make_place):
    return make_place()


@pytest.fixture(scope="module")
def editable(make_place):
    place = make_place()
    place.pip("-e", str(place.checkout), STYLEFAST_EXTENSION="0")
    return place


@pytest.fixture(scope="module")
def strict(make_place):
    place = make_place()
    place.pip("-e", str(place.checkout), "--config-settings", "editable_mode=strict", STYLEFAST_EXTENSION="0")
    return place


def put_where_a_build_looks(extension: Path, checkout: Path) -> None:
    """Put what was built for one checkout where another's build finds it; no older than the sources, it is taken."""
    platform = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    folder = checkout / "build" / platform / "stylefast"
    folder.mkdir(parents=True)
    shutil.copy2(extension, folder)


@pytest.fixture(scope="module")
def normal(make_place, checkout):
    place = make_place()
    # `make extension` has compiled the same sources with the same command
    for built in checkout.glob(f"stylefast/_C{sysconfig.get_config_var('EXT_SUFFIX')}"):
        put_where_a_build_looks(built, place.checkout)
    place.pip(str(place.checkout), STYLEFAST_EXTENSION="keep")
    return place


def test_a_bare_checkout_imports_from_its_root(bare):
    origins = bare.origins(bare.checkout)
    assert all(origin.is_relative_to(bare.checkout) for origin in origins.values()), origins
    assert origins["kernels"] == bare.checkout / "kernels" / "__init__.py"
    assert "make extension" in bare.extension(bare.checkout)[1]


def test_a_bare_checkout_on_the_path_imports_from_elsewhere(bare, tmp_path):
    origins = bare.origins(tmp_path, PYTHONPATH=str(bare.checkout))
    assert all(origin.is_relative_to(bare.checkout) for origin in origins.values()), origins


@pytest.mark.parametrize("at_root", [True, False], ids=["from its root", "from elsewhere"])
def test_an_editable_install_imports_the_checkout(editable, tmp_path, at_root):
    origins = editable.origins(editable.checkout if at_root else tmp_path)
    assert all(origin.is_relative_to(editable.checkout) for origin in origins.values()), origins


@pytest.mark.parametrize("at_root", [True, False], ids=["from its root", "from elsewhere"])
def test_a_strict_editable_install_imports_the_checkout(strict, tmp_path, at_root):
    origins = strict.origins(strict.checkout if at_root else tmp_path)
    assert all(origin.resolve().is_relative_to(strict.checkout) for origin in origins.values()), origins


def test_a_normal_install_imports_itself_from_elsewhere(normal, tmp_path):
    origins = normal.origins(tmp_path)
    assert all(origin.is_relative_to(normal.site) for origin in origins.values()), origins
    extension, reason = normal.extension(tmp_path)
    assert extension == (COMPILER is not None), reason


@pytest.mark.slow
def test_an_install_where_nothing_was_built_compiles_the_extension(make_place, tmp_path):
    place = make_place()
    place.pip(str(place.checkout))
    extension, reason = place.extension(tmp_path)
    assert extension == (COMPILER is not None), reason


def test_a_normal_install_leaves_the_word_to_the_checkout_at_its_root(normal):
    origins = normal.origins(normal.checkout)
    assert all(origin.is_relative_to(normal.checkout) for origin in origins.values()), origins


def test_a_checkout_takes_its_own_kernels_beside_an_editable_install_of_another(editable, bare):
    origins = editable.origins(bare.checkout)
    assert all(origin.is_relative_to(bare.checkout) for origin in origins.values()), origins


def test_the_operations_load_from_a_bare_checkout(bare):
    code = "import stylefast.kernels as k; f = k.shared_attention; print(k.__file__, f.__module__, callable(f))"
    done = bare.run(code, bare.checkout)
    expected = f"{bare.checkout / 'kernels' / '__init__.py'} stylefast.kernels.shared_attention True\n"
    assert done.stdout == expected, done.stderr


def test_every_subpackage_and_data_folder_reaches_the_install(normal, checkout):
    for file in [*checkout.glob("stylefast/**/*.py"), *checkout.glob("stylefast/errors.py")]:
        assert (normal.site / file.relative_to(checkout)).is_file(), f"{file.relative_to(checkout)} was not installed"
    for file in checkout.glob("kernels/*.py"):
        assert (normal.site / "stylefast" / "kernels" / file.name).is_file()
    for file in checkout.glob("export/**/*.py"):
        assert (normal.site / "stylefast" / file.relative_to(checkout)).is_file()
    # all of the embedded model but its weights, which places leave out
    data = [path for path in (checkout / "stylefast" / "models" / "tiny").rglob("*.*") if path.suffix != ".safetensors"]
    for file in [*data, *(checkout / "stylefast" / "serving" / "playground").glob("*.*")]:
        assert (normal.site / file.relative_to(checkout)).is_file(), f"{file.name} was not installed"
    assert not (normal.site / "kernels").exists() and not (normal.site / "export").exists()


def test_without_a_compiler_the_install_is_pure_python_and_says_why(make_place, tmp_path):
    place = make_place()
    place.pip(str(place.checkout), CC="no-such-compiler", CXX="no-such-compiler")
    assert place.origins(tmp_path)["stylefast"].is_relative_to(place.site)
    extension, reason = place.extension(tmp_path)
    assert not extension
    assert "compiler" in reason and "make extension" in reason


def test_without_torch_at_build_time_the_install_is_pure_python_and_says_why(make_place, tmp_path):
    place = make_place()
    (tmp_path / "torch.py").write_text("raise ImportError('hidden')\n")
    place.pip(str(place.checkout), PYTHONPATH=str(tmp_path))
    assert place.origins(tmp_path.parent)["stylefast"].is_relative_to(place.site)
    extension, reason = place.extension(tmp_path.parent)
    assert not extension
    assert "torch" in reason and "--no-build-isolation" in reason


def test_taking_something_from_kernels_at_the_root_names_the_right_package(bare):
    done = bare.run("from kernels import get_kernel", bare.checkout)
    assert done.returncode != 0
    assert "import get_kernel from `stylefast.kernels`" in done.stderr


def test_transformers_and_diffusers_do_not_take_our_folder_for_hugging_faces_package(bare):
    code = (
        "import transformers.utils.import_utils as t, diffusers.utils.import_utils as d;"
        "print(t.is_kernels_available(), d.is_kernels_available())"
    )
    done = bare.run(code, bare.checkout)
    assert done.stdout == "False False\n", done.stderr


@pytest.fixture
def foreign(normal):
    """Hugging Face's package beside the installed stylefast."""
    folder = normal.site / "kernels"
    (folder / "layer").mkdir(parents=True)
    (folder / "__init__.py").write_text(FOREIGN)
    (folder / "layer" / "__init__.py").write_text("mode = 3\n")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("at_root", [True, False], ids=["from the root", "from elsewhere"])
def test_hugging_faces_kernels_package_stays_itself_beside_ours(normal, foreign, tmp_path, at_root):
    cwd = normal.checkout if at_root else tmp_path
    code = (
        "import importlib.util, kernels, kernels.layer; print(kernels.name, kernels.mode, kernels.layer.mode);"
        "import stylefast; print(importlib.util.find_spec('stylefast.kernels').origin)"
    )
    done = normal.run(code, cwd)
    ours = normal.checkout / "kernels" if at_root else normal.site / "stylefast" / "kernels"
    assert done.stdout == f"of Hugging Face 3 3\n{ours / '__init__.py'}\n", done.stderr
