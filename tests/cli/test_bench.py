"""`stylefast bench`: it measures in a checkout, tunes on a GPU, and says so where it can't."""

import json

import pytest

from stylefast.commands import bench


def test_it_measures_the_kernels_and_writes_the_figures(stylefast, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    code, _, _ = stylefast("bench", "kernels", "--quick", "--threads", "1", "--out", tmp_path / "figures.json")
    assert code == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["device"] == "cpu" and found["environment"]["threads"] == 1 and len(found["results"]) > 10


def test_outside_a_checkout_it_says_where_the_benchmarks_are(stylefast, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    code, _, err = stylefast("bench", "kernels")
    assert code == 1 and "checkout" in err and str(tmp_path) in err


@pytest.mark.parametrize(
    "words, code, part",
    [
        ((), 2, "either what to measure"),
        (("kernels", "--tune"), 2, "either what to measure"),
        (("kernels", "--operation", "geglu"), 2, "--operation needs --tune"),
        (("--tune", "--minutes", "0"), 2, "--minutes is 0"),
        (("--tune",), 1, "CUDA device"),
    ],
)
def test_what_it_cannot_do_is_an_error_of_one_line(stylefast, monkeypatch, words, code, part):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found, _, err = stylefast("bench", *words)
    assert found == code and part in err and err.count("\n") == 1


def test_tuning_writes_the_file_and_says_how_it_is_used(stylefast, tmp_path, monkeypatch):
    from stylefast.kernels.gpu import tune

    content = {"gpu": "Some GPU", "capability": 90, "measured": {}, "operations": {"geglu": []}}
    asked = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(tune, "tune", lambda operations, minutes: asked.append((operations, minutes)) or content)
    words = ("--tune", "--operation", "geglu", "--operation", "layer_norm", "--minutes", "3", "--out", tmp_path)
    code, out, _ = stylefast("bench", *words)
    assert code == 0 and asked == [(["geglu", "layer_norm"], 3.0)]
    assert json.loads((tmp_path / "some-gpu.json").read_text()) == content and "STYLEFAST_TUNING" in out


def test_the_help_shows_an_example(stylefast):
    code, out, _ = stylefast("bench", "--help")
    assert code == 0 and "stylefast bench kernels" in out
