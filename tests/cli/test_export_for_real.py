"""Exports through the real commands, each in a process of its own, with nothing in the caches.

The two that export for the first time start Python anew, the others fork (tests/support/forked.py).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

import stylefast as sf
from stylefast.export.manifest import MANIFEST, check_files, read_manifest
from tests.support import forked
from tests.support.scene import psnr
from tests.support.small_checkpoints import write_folder
from tests.support.small_graphs import one_layer_pipeline

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

CHECKOUT = Path(__file__).resolve().parents[2]
# caches that the machine's owner may have moved
_MOVED = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "STYLEFAST_DEBUG")


class Done(NamedTuple):
    out: str
    err: str


class Machine:
    """A folder that is home and cache to the processes run in it."""

    def __init__(self, folder: Path):
        self.folder, self.cache = folder, folder / "cache"

    def start(self, *words) -> Done:
        """`stylefast` with some words, on one thread, in a new Python; it must end well."""
        command = [sys.executable, "-m", "stylefast.cli", *map(str, words)]
        done = subprocess.run(command, env=self._environment(), cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return Done(done.stdout, done.stderr)

    def __call__(self, *words, code: int = 0) -> Done:
        """`stylefast` with some words, on one thread, in a fork; it must end with this code."""
        found, out, err = forked.stylefast(list(map(str, words)), self._environment(), self.folder)
        assert found == code, err
        return Done(out, err)

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in _MOVED}
        return kept | {
            "HOME": str(self.folder),
            "STYLEFAST_CACHE": str(self.cache),
            "PYTHONPATH": str(CHECKOUT),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }

    def pixels(self, *words) -> np.ndarray:
        """Of the picture that `stylefast generate` makes of a fish in four steps."""
        done = self("generate", "a fish", "--steps", 4, "--seed", 0, "--quiet", "--out", "pictures", *words)
        assert done.err == ""
        with Image.open(self.folder / done.out.strip()) as picture:
            return np.asarray(picture.convert("RGB")).astype(float)


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    return Machine(tmp_path_factory.mktemp("home"))


def by_pytorch(model) -> np.ndarray:
    """Pixels of the picture that `Machine.pixels` makes, drawn here and without a graph."""
    with sf.Engine.from_pretrained(model, device="cpu", backend="torch") as engine:
        (picture,) = engine.generate("a fish", steps=4, seed=0).images
    found = np.asarray(picture.convert("RGB")).astype(float)
    assert np.ptp(found) > 50, "a picture of one colour hides mistakes"
    return found


@pytest.fixture(scope="module")
def nano(machine):
    """A folder with a model that attends in one layer, for what is the same with any."""
    return write_folder(one_layer_pipeline(), machine.folder / "nano")


@pytest.fixture(scope="module", params=["nano", pytest.param("tiny", marks=pytest.mark.slow)])
def fresh(request, nano, tmp_path_factory):
    """(a machine with empty caches, a model): a small one, or the embedded one."""
    return Machine(tmp_path_factory.mktemp("home")), nano if request.param == "nano" else "tiny"


@pytest.fixture(scope="module")
def first(fresh):
    """The first picture through ONNX Runtime, for which the model is exported."""
    machine, model = fresh
    assert not machine.cache.exists()
    return machine.start(
        "generate", "a fish", "--model", model, "--steps", 4, "--backend", "onnxruntime", "--out", "first"
    )


def test_onnxruntime_exports_the_model_once_and_says_so(fresh, first):
    machine, model = fresh
    said = [line for line in first.err.splitlines() if "is exported once to" in line]
    assert len(said) == 1 and str(machine.cache / "engines") in said[0]
    assert said[0].startswith(f"warning: {Path(model).name} ")
    assert "Warning" not in first.err and "torchvision" not in first.err
    (folder,) = (machine.cache / "engines").iterdir()
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    assert manifest.kind == "onnx" and {g.flavour for g in manifest.graphs} >= {"plain", "live", "banked"}
    assert list(machine.folder.glob("first/*.png"))


def test_the_second_start_finds_the_export_and_makes_none(fresh, first):
    machine, model = fresh
    before = (machine.cache / "engines").stat().st_mtime_ns
    assert psnr(machine.pixels("--model", model, "--backend", "onnxruntime"), by_pytorch(model), 255) >= 40
    assert (machine.cache / "engines").stat().st_mtime_ns == before


def test_pictures_through_an_export_folder_are_those_of_pytorch(machine, nano):
    done = machine(
        "export",
        "onnx",
        "--model",
        nano,
        "--flavour",
        "plain",
        "--components",
        "unet,text_projector",
        "--out",
        "graphs",
    )
    folder = machine.folder / "graphs"
    assert done.out == f"{folder}\n" and "use it with" in done.err
    drawn = machine.pixels("--model", nano, "--backend", "onnxruntime", "--engines", "graphs")
    assert psnr(drawn, by_pytorch(nano), 255) >= 40
    assert not [path.name for path in machine.folder.iterdir() if path.name.startswith("graphs.")]


def test_a_weight_file_that_was_altered_is_refused_in_one_line(fresh, first):
    machine, model = fresh
    (folder,) = (machine.cache / "engines").iterdir()
    damaged = machine.folder / "damaged"
    shutil.copytree(folder, damaged)
    weights = max(damaged.iterdir(), key=lambda path: path.stat().st_size)
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    words = ("generate", "a fish", "--model", model, "--steps", 4, "--quiet", "--backend", "onnxruntime")
    done = machine(*words, "--engines", damaged, "--out", "unmade", code=1)
    assert done.err.startswith("error: altered: ") and weights.name in done.err and done.err.count("\n") == 1
    assert done.out == "" and not list(machine.folder.glob("unmade/*"))
    told = machine("info", "--engines", damaged, code=1)
    assert f"altered: {weights}" in told.out


def test_an_engine_for_an_rtx_chip_is_built_without_a_gpu(machine, nano):
    pytest.importorskip("tensorrt_rtx")
    done = machine.start("export", "tensorrt", "--model", nano, "--target", "sm89", "--flavour", "live")
    folder = machine.folder / "nano-tensorrt"
    assert done.out == f"{folder}\n"
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    assert manifest.digest in done.err and "estimate: " in done.err and "--backend tensorrt" in done.err
    assert (manifest.kind, manifest.target, manifest.dtype) == ("tensorrt", "sm89", "float16")
    (graph,) = manifest.graphs
    build = graph.extra["build"]
    assert graph.file == "unet-live.sm89.engine" and build["layers"]["fused_attentions"] > 0
    assert not build["network"]["plugins"] and not build["layers"]["plugins"]
    assert {path.name for path in folder.iterdir()} == {MANIFEST, graph.file, "timing.cache"}

    told = json.loads(machine("info", "--engines", folder, "--json").out)
    assert told["unaltered"] and told["untrusted"] is None and told["digest"] == manifest.digest
    # an engine is for GPUs, and there is none
    refused = machine(
        "generate",
        "a fish",
        "--model",
        nano,
        "--backend",
        "tensorrt",
        "--engines",
        folder,
        "--dtype",
        "float16",
        "--quiet",
        code=1,
    )
    assert "TensorRT runs on NVIDIA GPUs" in refused.err and refused.err.count("\n") == 1
