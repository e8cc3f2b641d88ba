"""What PyTorch compiled, kept in files for the next process: found again, refused when damaged, bounded."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from stylefast.errors import InvalidRequest
from stylefast.runtime.backends import compile_cache
from stylefast.runtime.backends.compile_cache import CompileCache


@pytest.fixture
def cache(tmp_path):
    return CompileCache(tmp_path, {"width": 32}, torch.float32, torch.device("cpu"))


@pytest.fixture
def artifacts(monkeypatch):
    """PyTorch's store of artifacts, as a list that a test fills; what was loaded is in `loaded`."""

    class Info:
        def __init__(self, keys):
            self.artifacts = {"inductor": list(keys)}

    class Store:
        keys, loaded = [], []

        def save(self):
            return ("|".join(self.keys).encode(), Info(self.keys)) if self.keys else None

        def load(self, payload):
            if payload == b"unreadable":
                return None
            self.loaded = self.loaded + payload.decode().split("|")
            return Info(payload.decode().split("|"))

    store = Store()
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", store.save)
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", store.load)
    return store


def _again(cache):
    """The cache as another process finds it."""
    other = CompileCache.__new__(CompileCache)
    other.__dict__ |= cache.__dict__ | {"_loaded": set(), "_saved": None}
    return other


def test_a_cache_file_is_found_by_the_next_process(cache, artifacts):
    assert cache.save() is None
    artifacts.keys = ["a", "b"]
    assert cache.save().stat().st_mode & 0o077 == 0
    assert _again(cache).load() == 2 and artifacts.loaded == ["a", "b"]


def test_one_process_has_one_file_and_leaves_those_of_others(cache, artifacts):
    artifacts.keys = ["a"]
    cache.save()
    artifacts.keys = ["a", "b"]
    cache.save()
    other = _again(cache)
    other.load()
    artifacts.keys = ["a", "b"]
    assert other.save() is None  # nothing new
    artifacts.keys = ["b", "c"]
    other.save()
    assert len(list(cache.folder.glob("*.bin"))) == 2
    assert _again(cache).load() == 3


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty", "foreign", "another's", "unreadable"])
def test_a_file_that_can_not_be_used_is_ignored_with_a_warning(cache, artifacts, caplog, damage):
    artifacts.keys = ["a", "b"]
    path = cache.save()
    whole = path.read_bytes()
    contents = {"truncated": whole[:-1], "altered": whole[:-1] + b"c", "empty": b"", "foreign": b"PK\3\4" + whole}
    if damage in contents:
        path.write_bytes(contents[damage])
    elif damage == "another's":
        path.chmod(0o666)
    else:
        compile_cache._write(path, b"unreadable")
    with caplog.at_level(logging.WARNING, "stylefast"):
        assert _again(cache).load() == 0
    assert "ignored" in caplog.text and not artifacts.loaded


def test_a_folder_that_can_not_be_written_is_told_once(tmp_path, artifacts, caplog):
    (tmp_path / "compile").write_text("a file where the folder should be")
    cache = CompileCache(tmp_path, {}, torch.float32, torch.device("cpu"))
    artifacts.keys = ["a"]
    with caplog.at_level(logging.WARNING, "stylefast"):
        assert cache.save() is None
        assert cache.save() is None
    assert len([r for r in caplog.records if r.name.startswith("stylefast")]) == 1


def test_models_types_and_devices_have_folders_of_their_own(tmp_path):
    def folder(config=None, dtype=torch.float32):
        return CompileCache(tmp_path, config or {"width": 32}, dtype, torch.device("cpu")).folder

    assert folder() == folder()
    assert len({folder(), folder({"width": 64}), folder(dtype=torch.bfloat16)}) == 3


@pytest.mark.parametrize("fact, there", [("cpu_instructions", ["avx2"]), ("machine", "Linux riscv64")])
def test_another_cpu_has_a_folder_of_its_own(tmp_path, monkeypatch, fact, there):
    here = CompileCache(tmp_path, {"width": 32}, torch.float32, torch.device("cpu")).folder
    monkeypatch.setattr(compile_cache, fact, lambda: there)
    assert CompileCache(tmp_path, {"width": 32}, torch.float32, torch.device("cpu")).folder != here


def test_old_files_go_when_there_are_many(cache, artifacts, monkeypatch):
    monkeypatch.setattr(compile_cache, "_MOST_FILES", 2)
    for i in range(4):
        artifacts.keys = [f"key {i}"]
        path = _again(cache).save()
        os.utime(path, (1000 + i, 1000 + i))
    assert len(list(cache.folder.glob("*.bin"))) <= 3
    assert path.exists()


def test_the_environment_names_the_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("STYLEFAST_CACHE", str(tmp_path))
    assert compile_cache.default_folder() == tmp_path
    monkeypatch.setenv("STYLEFAST_CACHE", "here")
    with pytest.raises(InvalidRequest, match="STYLEFAST_CACHE=here"):
        compile_cache.default_folder()
    monkeypatch.delenv("STYLEFAST_CACHE")
    assert compile_cache.default_folder().name == "stylefast"


def test_pytorchs_own_folder_is_back_after_compiling(cache, monkeypatch, tmp_path):
    variable = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.delenv(variable, raising=False)
    with cache.compiling():
        assert os.environ[variable].startswith(str(cache.folder))
    assert os.environ[variable] == default_cache_dir()
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    with cache.compiling():
        assert os.environ[variable] == str(tmp_path / "elsewhere")


def test_a_folder_that_others_can_write_to_gives_no_code_and_takes_none(tmp_path, artifacts, caplog):
    def cache():
        return CompileCache(tmp_path / "shared", {"width": 32}, torch.float32, torch.device("cpu"))

    artifacts.keys = ["a"]
    planted = cache().save()
    (tmp_path / "shared").chmod(0o777)
    with caplog.at_level(logging.WARNING, "stylefast"):
        other = cache()
    assert other.load() == 0 and not artifacts.loaded
    assert other.save().parent != planted.parent and "another user could have written" in caplog.text


def test_the_folder_is_made_before_others_can_make_it(tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    folder = CompileCache(tmp_path / "tmp" / "mine", {}, torch.float32, torch.device("cpu")).folder
    made = [folder, *folder.parents][:3]
    assert [path.stat().st_mode & 0o777 for path in made] == [0o700] * 3 and made[-1] == tmp_path / "tmp" / "mine"


def test_planted_shared_objects_beside_the_files_are_not_where_pytorch_looks(cache, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    planted = cache.folder / "inductor" / "ab" / "cab.so"
    planted.parent.mkdir(parents=True)
    planted.write_bytes(b"ELF")
    planted.chmod(0o666)
    with cache.compiling():
        assert not os.path.samefile(os.environ["TORCHINDUCTOR_CACHE_DIR"], planted.parent.parent)


START = """
import sys
import torch
from torch._dynamo.utils import counters
from stylefast.models.unet import UNet
from stylefast.runtime.backends.compiled import CompileBackend
from tests.support.small_sdxl import small_unet_config

torch.manual_seed(0)
config = small_unet_config(widths=(32, 32, 32), head_width=32, layers_per_block=1)
with torch.device("meta"):
    shapes = {name: x.shape for name, x in UNet(config).state_dict().items()}
unet = UNet.from_state(config, {name: torch.randn(shape) for name, shape in shapes.items()})
backend = CompileBackend(unet, cache=sys.argv[1])
print(backend.warm_up((4, 8, 8), [2]))
print(counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"])
"""


@pytest.mark.slow
def test_a_second_process_generates_no_code(tmp_path, checkout):
    """Two starts that share nothing but the cache's folder."""
    found = []
    for start in ("cold", "warm"):
        (tmp_path / start).mkdir()
        environment = os.environ | {"TMPDIR": str(tmp_path / start), "PYTHONPATH": str(checkout)}
        environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
        done = subprocess.run(
            [sys.executable, "-c", START, str(tmp_path / "cache")],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append([int(word) for word in done.stdout.split()])
    (regions, _, misses), (again, hits, none) = found
    assert regions == misses == again == hits > 0 and none == 0
