"""The benchmark of exported engines holds pictures against the peer, skips what is not here, and says why."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import exports
from benchmarks.__main__ import BENCHMARKS
from benchmarks.exports import Bench
from benchmarks.runtime import cases
from stylefast.errors import ExportError, MissingDependency
from stylefast.export.manifest import FileEntry, GraphEntry, Manifest

MANIFEST = Manifest(
    "onnx",
    "1",
    "tiny",
    "f" * 64,
    "float32",
    "any",
    {"onnx": "1"},
    (GraphEntry("unet", "a.onnx", ("a.onnx", "w"), {"flavour": "live"}, extra={"seconds": 2.0}),),
    (FileEntry("a.onnx", 1000, "0" * 64), FileEntry("w", 1_999_000, "0" * 64)),
)


class Draws:
    """Stands in for a scene: every style gives the same picture, or one that is `off` by so much."""

    def __init__(self, off: float, latents: bool):
        self.off, self.latents = off, latents
        self.model = SimpleNamespace(engine=SimpleNamespace(references=dict, styles=dict))

    def plain(self, n):
        return lambda: self._drawn(n)

    def _drawn(self, n):
        x = np.linspace(0, 1, 48).reshape(4, 4, 3) + self.off
        return [torch.tensor(x) if self.latents else x] * n


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Makes the command run on stand-ins: `off` by backend, `absent` ones and those that `fail`; (code, results)."""

    def main(*words, off=None, absent=(), fail=()):
        off = off or {}
        path = tmp_path / "exports.json"

        def export(self, backend):
            if backend in fail:
                raise ExportError("the compiler gave up")
            self.made[backend] = self.folder / backend
            return 12.0, MANIFEST

        def options(self, backend):
            if backend in absent:
                raise MissingDependency(f"{backend} is not installed")

        def scene(self, name, side=None):
            return Draws(off.get(name, 0), self.device == "cuda")

        def styled(scene):
            return {style: scene.plain(2) for style in exports.STYLES}

        monkeypatch.setattr(Bench, "export", export)
        monkeypatch.setattr(Bench, "options", options)
        monkeypatch.setattr(Bench, "scene", scene)
        monkeypatch.setattr(cases.gc, "collect", int)  # between samples, where nothing is timed here
        monkeypatch.setattr(exports, "_styled", styled)
        code = exports.main([*words, "--out", str(path)])
        found = json.loads(path.read_text()) if path.is_file() else None
        return code, found and {result["case"]: result for result in found["results"]}

    return main


def figures(result) -> dict:
    return {figure["what"]: figure for figure in result["figures"]}


def test_every_case_has_its_figures_and_goals(bench):
    code, found = bench()
    sizes = [f"{side} px n={n}" for side in (64, 256) for n in (1, 4)]
    assert code == 0 and list(found) == [
        "export onnx",
        "export aoti",
        "export tensorrt",
        "onnxruntime pictures",
        "aoti pictures",
        *sizes,
    ]
    made = found["export onnx"]
    assert figures(made)["seconds"]["value"] == 12 and figures(made)["size"]["value"] == 2
    assert made["details"]["graphs"] == {"unet-live": {"bytes": 1000, "seconds": 2.0}}
    for backend in ("onnxruntime", "aoti"):
        judged = figures(found[f"{backend} pictures"])
        assert tuple(judged) == exports.STYLES and {f["goal"] for f in judged.values()} == {40.0}
        assert {f["verdict"] for f in judged.values()} == {"met"}
    for size in sizes:
        assert {"torch", "onnxruntime", "aoti"} == found[size]["times"].keys()
        assert all(len(times["samples_s"]) == 5 for times in found[size]["times"].values())
        assert {"torch / aoti", "torch / onnxruntime", "aoti, a picture"} <= figures(found[size]).keys()


def test_pictures_that_are_off_miss_the_goal(bench, capsys):
    code, found = bench(off={"aoti": 0.02})
    judged = figures(found["aoti pictures"])["mixed batch of 8"]
    assert code == 1 and judged["verdict"] == "MISSED" and judged["value"] == pytest.approx(33.98, abs=0.01)
    assert figures(found["onnxruntime pictures"])["plain"]["verdict"] == "met"
    assert "aoti pictures: plain 33.98 dB, goal >= 40 dB" in capsys.readouterr().out


def test_an_export_that_fails_is_no_figure_and_its_pictures_are_not_measured(bench):
    code, found = bench(fail=("aoti",))
    assert code == 1 and "the compiler gave up" in figures(found["export aoti"])["seconds"]["note"]
    assert {f["note"] for f in figures(found["aoti pictures"]).values()} == {"was not exported"}
    assert found["64 px n=1"]["times"].keys() == {"torch", "onnxruntime"}
    assert found["64 px n=1"]["details"]["skipped"] == {"aoti": "was not exported"}


def test_on_a_gpu_what_is_not_installed_is_skipped_with_the_reason_and_is_no_failure(bench, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr(exports, "device_name", lambda device: "some-gpu")
    real = exports.run
    # without a GPU's own facts
    monkeypatch.setattr(exports, "run", lambda chosen, device, *rest: real(chosen, "cpu", *rest))
    code, found = bench("--device", "cuda", absent=("tensorrt", "onnxruntime"), off={"aoti": 0.1})
    assert code == 0
    assert list(found) == ["export onnx", "export aoti", "export tensorrt", "1024 px n=1", "1024 px n=4"]
    assert "tensorrt is not installed" in found["export tensorrt"]["details"]["skipped"]
    assert not found["export tensorrt"]["figures"]
    times = found["1024 px n=4"]
    assert times["times"].keys() == {"compile", "aoti"} and "compile / aoti" in figures(times)
    assert times["details"]["skipped"].keys() == {"onnxruntime", "tensorrt"}
    assert figures(times)["aoti, latents apart"]["value"] == pytest.approx(0.1 / np.sqrt(1 / 3), rel=0.02)


def test_the_lowest_of_several_pictures_counts():
    a, b = np.zeros((2, 2, 3)), np.full((2, 2, 3), 0.01)
    assert exports.psnr([a, a], [a, b]) == pytest.approx(40) and exports.psnr([a], [a]) == pytest.approx(200)


@pytest.mark.parametrize(
    "words, part",
    [
        (("--device", "cuda"), "needs a CUDA device"),
        (("--minutes", "0"), "--minutes is 0"),
        (("--backends", "tensorrt"), "on cpu there are onnxruntime, aoti"),
    ],
    ids=["no GPU", "no time", "a backend that does not run here"],
)
def test_bad_arguments_exit_with_two_and_one_line(bench, monkeypatch, capsys, words, part):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, found = bench(*words)
    err = capsys.readouterr().err
    assert code == 2 and found is None and part in err and err.count("\n") == 1


def test_the_options_of_a_gpu_name_its_chip_and_skip_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = Bench("cuda", tmp_path)
    assert "the package 'tensorrt' can't be loaded" in found.why_not("tensorrt")
    assert "ONNX Runtime, which is not installed" in found.why_not("onnxruntime") and found.why_not("aoti") == ""
    options = found.options("aoti")
    assert (options.flavours, options.targets, options.dtype) == (("live",), ("cuda",), "float16")


def test_the_benchmark_has_a_command():
    assert BENCHMARKS["exports"] == "benchmarks.exports"
