"""Lower layers never import upper ones."""

import ast
from pathlib import Path

import pytest

BELOW_ENGINE = {
    "errors",
    "values",
    "_extension",
    "code_caches",
    "whole_files",
    "slots",
    "kernels",
    "models",
    "export",
    "styles",
    "sampling",
    "runtime",
    "options",
}

# area -> what it may import beside itself; a name with dots is a single module or folder of an area
ALLOWED = {
    "__init__": {"errors", "threads"},
    "errors": set(),
    "threads": set(),
    "values": {"errors"},
    "whole_files": set(),
    "slots": set(),
    "_C": set(),
    "code_caches": {"errors", "values"},
    "options": {"errors", "values"},
    "_extension": {"_C"},
    "kernels": {"errors", "values", "_extension", "code_caches"},
    "models": {"errors", "values", "options", "slots", "kernels", "sampling.noise_levels"},
    "sampling": {"errors", "values", "kernels"},
    "styles": {"errors", "values", "whole_files", "kernels", "models", "sampling.guidance"},
    "runtime": BELOW_ENGINE,
    # the package itself, for the version that goes into a LoRA's metadata
    "training": {"errors", "values", "whole_files", "models", "sampling", "stylefast"},
    "infotext": {"errors", "values", "models.prompt_syntax", "sampling"},
    "record_values": {"errors", "values", "models", "styles"},
    "record": BELOW_ENGINE | {"record_values"},
    # the package itself, for the version that goes into a picture's metadata
    "engine": BELOW_ENGINE | {"record", "record_values", "explanation", "stylefast", "threads"},
    "naive": {"errors", "kernels", "models", "sampling", "styles", "runtime.plan.request"},
    "presentation": {"errors", "values"},
    "explanation": {"errors", "values", "whole_files", "presentation"},
    # the package itself, for the version that pictures name
    "provenance": {"errors", "values", "stylefast"},
    "export": {"errors", "values", "code_caches", "whole_files", "slots", "threads", "kernels", "models"},
    # the package itself, for the version that it tells
    "serving": BELOW_ENGINE | {"engine", "record", "record_values", "infotext", "provenance", "stylefast"},
    # `commands` for the options of `stylefast serve`
    "integrations": {"errors", "values", "engine", "serving", "commands", "stylefast"},
}
TOP = {"cli", "commands", "__main__"}  # these may import everything but tests and benchmarks
# programs that are copied out and run beside an installed stylefast, and that nobody imports
PROGRAMS = (Path("export/triton_repo/models"),)


def area_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).parts
    return Path(parts[1] if parts[0] == "stylefast" else parts[0]).stem


def module_of(path: Path, root: Path) -> list[str]:
    parts = list(path.relative_to(root).with_suffix("").parts)
    parts = parts if parts[0] == "stylefast" else ["stylefast", *parts]
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path: Path, root: Path) -> list[tuple[int, list[str]]]:
    """Line and dotted name, split, of everything that a file imports, inside functions too, but not for types alone."""
    names, tree = [], ast.parse(path.read_text(encoding="utf-8"))
    for_types = {id(inner) for node in ast.walk(tree) if _is_for_types(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                package = module_of(path, root) if path.stem == "__init__" else module_of(path, root)[:-1]
                base = package[: len(package) - node.level + 1] + base
            names += [(node.lineno, [*base, alias.name]) for alias in node.names]
    return names


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def violations(root: Path) -> list[str]:
    """One line for each import that goes against `ALLOWED`."""
    found = []
    paths = [path for folder in ("stylefast", "kernels", "export") for path in sorted((root / folder).rglob("*.py"))]
    for path in paths:
        where = path.relative_to(root)
        area = "__main__" if where.parent in PROGRAMS else area_of(path, root)
        if area not in ALLOWED and area not in TOP:
            found.append(f"{where}: the area {area!r} is in no table; add it to ALLOWED and to docs/architecture.md")
            continue
        for line, name in imported(path, root):
            if name[0] in ("tests", "benchmarks", "kernels", "export") or "triton_repo.models" in ".".join(name):
                found.append(f"{where}:{line}: imports {'.'.join(name)}")
            if name[0] != "stylefast" or area in TOP:
                continue
            known = len(name) > 1 and (name[1] in ALLOWED or name[1] in TOP)
            target = name[1] if known else "stylefast"
            around = {".".join(name[1:end]) for end in range(3, len(name) + 1)}  # the modules and folders it lies in
            if not ({target} | around) & (ALLOWED[area] | {area}):
                found.append(f"{where}:{line}: {area} may not import {'.'.join(name)}")
    return found


def plant(root: Path, file: str, source: str) -> Path:
    path = root / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return root


def test_no_layer_of_the_project_imports_one_above_it(checkout):
    assert violations(checkout) == []


@pytest.mark.parametrize(
    "file, source",
    [
        ("stylefast/models/unet.py", "from stylefast.runtime import loop"),
        ("stylefast/models/unet.py", "def f():\n    import stylefast.engine"),
        ("stylefast/models/unet.py", "from ..styles import presets"),
        ("stylefast/models/unet.py", "from stylefast import Engine"),
        ("stylefast/models/__init__.py", "from ..styles import presets"),
        ("stylefast/styles/presets.py", "from stylefast.sampling.schedule import make_schedule"),
        ("stylefast/sampling/schedule.py", "import stylefast.models.layout"),
        ("stylefast/errors.py", "from stylefast import kernels"),
        ("stylefast/naive.py", "from stylefast.runtime.plan import sample"),
        ("kernels/shared_attention.py", "from stylefast.models.layout import AttentionLayout"),
        ("kernels/shared_attention.py", "from ..models import layout"),
        ("stylefast/engine.py", "from tests.conftest import checkout"),
        ("stylefast/cli.py", "import benchmarks.run"),
        ("stylefast/models/unet.py", "from kernels import shared_attention"),
        ("stylefast/helpers/misc.py", "import math"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, source):
    assert len(violations(plant(tmp_path, file, source))) == 1


@pytest.mark.parametrize(
    "file, source",
    [
        ("stylefast/models/unet.py", "import torch\nfrom stylefast.kernels.shared_attention import shared_attention"),
        ("stylefast/models/unet.py", "from .layout import AttentionLayout\nfrom stylefast import errors"),
        ("stylefast/styles/presets.py", "from stylefast.sampling.guidance import StyleContextGuidance"),
        ("stylefast/styles/presets.py", "from stylefast.sampling import guidance"),
        ("stylefast/cli.py", "import stylefast\nfrom stylefast.engine import Engine"),
        ("stylefast/serving/app.py", "import stylefast as sf"),
        ("stylefast/naive.py", "from stylefast.runtime.plan.request import Request"),
        ("kernels/shared_attention.py", "from stylefast._extension import extension"),
    ],
)
def test_an_allowed_import_is_let_through(tmp_path, file, source):
    assert violations(plant(tmp_path, file, source)) == []
