"""The benchmark of style banks runs, counts what it says, and measures pages that really came."""

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import banks
from benchmarks.runtime.models import unet_config
from stylefast.sampling.guidance import BRANCHES
from stylefast.styles.bank_size import BankShapes, bank_bytes

SMALL = {"cross_dim": 128, "pooled_dim": 64, "time_dim": 16, "side": 8, "depth": (1, 1, 2)}
SIZE = (64, 64)


@pytest.fixture(scope="module")
def config():
    return banks.whole_config(unet_config((32, 64, 128), **SMALL))


@pytest.fixture(scope="module")
def unet(config):
    return banks.projecting_unet(config)


def test_a_quick_run_measures_every_kind_of_storage_and_writes_its_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "banks.json"
    monkeypatch.setattr(sys, "argv", ["banks", "--quick", "--rounds", "1", "--out", str(path)])
    banks.main()
    content = json.loads(path.read_text())
    assert [(mode["store"], mode["type"]) for mode in content["modes"]] == banks.MODES and content["quick"]
    for mode in content["modes"]:
        assert ("fetch" in mode) == (mode["store"] != "latents")
        assert mode["error"]["latents"] < content["no_style"]["latents"] and mode["error"]["max_255"] <= 255
    exact = [mode["error"]["latents"] for mode in content["modes"] if mode["type"] == "fp32"]
    assert max(exact) < 1e-4 < content["modes"][3]["error"]["latents"]
    out = capsys.readouterr().out
    assert banks.modes_table(content) in out and banks.layers_table(content) in out and f"wrote {path}" in out
    assert {"date", "commit", "cpu", "threads", "load_before"} <= content["environment"].keys()


def test_an_impossible_number_of_rounds_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["banks", "--rounds", "0"])
    with pytest.raises(SystemExit) as stop:
        banks.main()
    assert stop.value.code == 2 and "--rounds is 0" in capsys.readouterr().err


def test_a_bank_is_its_steps_and_the_last_latents(config):
    for mode in banks.counted_modes(config, 1000, SIZE, steps=7):
        extra = 1 if mode["store"] == "latents" else 0
        latents = 4 * 4 * 8 * 8
        assert mode["bytes"] == (7 + extra) * mode["step_bytes"] + (0 if extra else latents)


def test_projections_are_counted_as_pytorch_counts_them(config, unet):
    shapes = BankShapes.from_config(config, SIZE)
    with banks.FlopCounterMode(display=False) as counter:
        for layer, shape in zip(unet.layout.layers, shapes.layers, strict=True):
            attention = unet.get_submodule(layer.name).attn1
            hidden = torch.zeros(2, shape.tokens, shape.channels)
            hidden @ attention.to_k.weight.T, hidden @ attention.to_v.weight.T
    modes = {mode["store"]: mode["added_flop"] for mode in banks.counted_modes(config, 5, SIZE)}
    assert modes == {"kv": 0, "hidden": counter.get_total_flops(), "latents": 10}


def test_fewer_layers_are_those_of_their_blocks(config):
    rows = {(row["what"], row["type"]): row for row in banks.counted_layers(config, SIZE, steps=2)}
    names = [layer.name for layer in banks.AttentionLayout.from_config(config).layers]
    up = [i for i, name in enumerate(names) if name.startswith("up_blocks.")]
    found = rows["up_blocks, both halves", "fp8"]
    assert found["layers"] == len(up) and found["bytes"] == bank_bytes(
        config, SIZE, 2, store="kv", dtype="float8_e4m3fn", layers=up
    )
    half, whole = rows["all layers, without guidance", "fp16"], rows["all layers, both halves", "fp16"]
    assert 2 * half["step_bytes"] == whole["step_bytes"]
    expected = {"pcie5": whole["step_bytes"] / 55e6, "pcie4": whole["step_bytes"] / 25e6}
    assert whole["bus_ms"] == pytest.approx(expected, abs=0.05)


def test_the_pages_that_are_timed_hold_what_the_bank_holds(unet, tmp_path):
    shapes = BankShapes.from_config(unet.config, SIZE)
    features = banks._features(shapes)
    pages = banks.BankPages(unet, shapes.latents[1:], slots=2)
    for store, kind, tolerance in (("kv", "fp32", 0.0), ("kv", "fp8", 0.07), ("hidden", "fp32", 1e-5)):
        bank = banks._written(tmp_path / f"{store}-{kind}.bank", unet, shapes, features, store, kind)
        slots = pages.hold([banks.PageKey(bank, 0, BRANCHES.index(half), 0) for half in banks.HALVES])
        assert np.unique(slots).size == 2
        for i, layer in enumerate(unet.layout.layers):
            k = features.layers[i].k
            if store == "hidden":
                k = unet.get_submodule(layer.name).attn1.to_k(features.layers[i].hidden[None]).view_as(k)
            for slot in slots:
                assert (pages.pages.layers[i][0][slot] - k).abs().max() <= tolerance * k.abs().max()
        pages.release([banks.PageKey(bank, 0, BRANCHES.index(half), 0) for half in banks.HALVES])
        pages.clear()


def test_errors_are_of_bytes_and_of_the_largest_latent():
    def result(latent, byte):
        return type("R", (), {"latents": [torch.tensor([1.0, latent])], "images": [np.full((2, 2), byte, np.uint8)]})

    found = banks._apart([result(-3.0, 7), result(2.0, 9)], [result(-4.0, 10), result(2.0, 9)])
    assert found == {"latents": 0.25, "max_255": 3, "mean_255": 1.5}
