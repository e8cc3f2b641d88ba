"""What an export is asked for, checked at the door; what it is made from; what it will take."""

import re

import pytest
import torch

from stylefast.errors import InvalidRequest, ModelError
from stylefast.export import options
from stylefast.export.options import NATIVE, Options, estimate_export, load_source
from tests.support.small_sdxl import sdxl_unet_config, small_unet_config


def test_defaults_depend_on_the_kind():
    assert Options("onnx").flavours == ("live", "banked", "plain") and Options("onnx").components == ("all",)
    engines = Options("tensorrt", targets=["sm89", "sm120"])
    assert engines.flavours == ("live", "banked") and engines.components == ("unet",)
    shapes = Options("aoti", targets=("cpu",), references=3, segments=0).shapes
    assert [(shape.flavour, shape.references, shape.segments) for shape in shapes] == [
        ("live", 3, 0),
        ("banked", 3, 0),
        ("plain", 0, 0),
    ]


@pytest.mark.parametrize(
    "given, message",
    [
        ({"kind": "wasm"}, "kind is 'wasm'; choose one of onnx, tensorrt, aoti, triton-repo"),
        ({"kind": "onnx", "dtype": "int8"}, "dtype is 'int8'; choose one of float32, float16, bfloat16"),
        ({"kind": "onnx", "flavours": ("live", "dead")}, "flavours is 'dead'; choose one of plain, live, banked"),
        ({"kind": "onnx", "flavours": ("live", "live")}, "flavours has 'live' twice"),
        ({"kind": "onnx", "components": ("lung",)}, "components is 'lung'; choose one of unet, vae_decoder"),
        ({"kind": "onnx", "components": ("all", "unet")}, "give all, or names of single ones"),
        ({"kind": "onnx", "references": 0}, "references is 0; it must be a whole number from 1 to 16"),
        ({"kind": "onnx", "segments": 17}, "segments is 17"),
        ({"kind": "onnx", "lora_rank": 129}, "lora_rank is 129; it must be a whole number from 0 to 128"),
        ({"kind": "onnx", "lora_rank": 16, "lora_slots": 33}, "lora_slots is 33"),
        ({"kind": "onnx", "lora_slots": 2}, "lora_rank is 0 and lora_slots 2; give both above 0, or none"),
        ({"kind": "onnx", "lora_rank": 16, "lora_slots": 0}, "lora_rank is 16 and lora_slots 0"),
        ({"kind": "onnx", "max_text_chunks": 0}, "max_text_chunks is 0; it must be a whole number from 1 to 16"),
        ({"kind": "triton-repo", "lora_rank": 16}, "lora_rank belongs to exports of kind onnx and tensorrt and aoti"),
        ({"kind": "onnx", "opset": 19}, "opset is 19; graphs in float32 are written in opsets 20 to 23"),
        ({"kind": "onnx", "opset": True}, "opset is True"),
        ({"kind": "onnx", "size": (1024, 1023)}, "height is 1023; it must be divisible by 8"),
        ({"kind": "onnx", "size": "big"}, "size is 'big'"),
        ({"kind": "onnx", "targets": ("sm89",)}, "exports of kind onnx have no target"),
        ({"kind": "onnx", "refit": True}, "refit belongs to exports of kind tensorrt, not onnx"),
        ({"kind": "onnx", "onnx": "folder"}, "onnx belongs to exports of kind tensorrt and triton-repo"),
        ({"kind": "onnx", "runner": "onnxruntime"}, "runner onnxruntime belongs to exports of kind triton-repo"),
        ({"kind": "aoti", "targets": ("cpu",), "attention": "plugin"}, "attention plugin belongs to"),
        ({"kind": "aoti", "targets": ("cpu",), "profiles": ("rows=1",)}, "profiles belongs to"),
        ({"kind": "aoti", "targets": ("cpu",), "components": ("all",)}, "exports of kind aoti hold the unet alone"),
        ({"kind": "aoti"}, "target is missing; AOTInductor compiles for one of cpu, cuda"),
        ({"kind": "aoti", "targets": ("cpu", "cuda")}, "target is cpu, cuda"),
        ({"kind": "tensorrt"}, "say which, e.g. --target sm89"),
        ({"kind": "tensorrt", "targets": ("rtx",)}, "there is no target 'rtx'; there are sm75"),
        ({"kind": "tensorrt", "targets": ("sm89", "sm89")}, "sm89"),
        ({"kind": "tensorrt", "targets": ("sm89",), "profiles": ("rows=3:2:1",)}, "3:2:1"),
        ({"kind": "tensorrt", "targets": ("sm89",), "attention": "flash"}, "attention is 'flash'"),
        ({"kind": "tensorrt", "targets": ("sm89",), "onnx": "x", "size": NATIVE}, "are those of the graphs in onnx"),
        ({"kind": "tensorrt", "targets": ("sm89",), "onnx": "x", "attention": "plugin"}, "needs graphs of its own"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused(given, message):
    with pytest.raises(InvalidRequest, match=re.escape(message)):
        Options(**given)


def test_what_decides_the_files_is_in_the_json_and_overwriting_is_not():
    options = Options("tensorrt", targets=("sm89",))
    assert options.to_json() == Options("tensorrt", targets=("sm89",), overwrite=True).to_json()
    every = ({"targets": ("sm86",)}, {"refit": True}, {"segments": 1}, {"profiles": ("rows=1:2:4",)})
    for change in (*every, {"lora_rank": 16}, {"lora_rank": 16, "lora_slots": 1}, {"max_text_chunks": 2}):
        assert Options(**{"kind": "tensorrt", "targets": ("sm89",)} | change).to_json() != options.to_json()


def test_ranks_are_counted_in_whole_units_and_two_loras_are_the_default():
    options = Options("onnx", lora_rank=20, max_text_chunks=3)
    assert options == Options("onnx", lora_rank=32, lora_slots=2, max_text_chunks=3)
    assert {(shape.lora_rank, shape.lora_slots, shape.text_chunks) for shape in options.shapes} == {(32, 2, 3)}
    assert {(shape.lora_rank, shape.lora_slots) for shape in Options("aoti", targets=("cpu",)).shapes} == {(0, 0)}


@pytest.fixture(scope="module")
def source():
    return load_source("tiny", "float16", version="0.1.0")


def test_a_source_is_what_the_engine_loads(source):
    from stylefast.engine import Engine

    engine = Engine.from_pretrained("tiny", dtype="float16", device="cpu")
    assert source.fingerprint == engine.fingerprint and source.name == engine.name
    assert source.native_size == engine.native_size and set(source.adapters) == set(engine.adapters)
    assert source.unet.dtype is torch.float16 and source.unet.layout == engine.unet.layout


def test_a_source_is_told_from_one_in_another_type(source):
    other = load_source("tiny", "float32", version="0.1.0")
    assert other.identity() != source.identity()
    assert load_source("tiny", "float16", version="0.1.0").identity() == source.identity()
    assert other.other_bytes > 1.2 * source.other_bytes  # the VAE keeps its own type


def test_a_change_of_the_code_or_of_an_exporter_is_told(tmp_path, monkeypatch):
    (tmp_path / "unet.py").write_text("inputs = ('latents',)")
    monkeypatch.setattr(options.models, "__path__", [str(tmp_path)])
    options.code_digest.cache_clear()
    before = options.code_digest()
    (tmp_path / "unet.py").write_text("inputs = ('latents', 'time_ids')")
    assert options.code_digest() == before  # looked at once a process
    options.code_digest.cache_clear()
    assert options.code_digest() != before
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    assert options._versions()["onnx"] == "9.9"
    monkeypatch.undo()
    options.code_digest.cache_clear()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_source_is_told_from_one_that_differs_in_any_one_tensor(part):
    other = load_source("tiny", "float16", version="0.1.0")
    module = other.text_encoder.encoders[1] if part == "text_encoder" else getattr(other, part)
    for name, value in list(module.named_parameters())[::37]:
        before, saved = other.identity(), value.detach().clone()
        value.data.add_(1)
        assert other.identity() != before, name
        value.data.copy_(saved)


def test_sizes_are_in_pixels_outside_and_in_latents_inside(source):
    width, height = source.native_size
    side = source.unet.config["sample_size"]
    assert source.fixed(Options("onnx")) == {}
    assert source.fixed(Options("onnx", size=NATIVE)) == {"height": side, "width": side}
    scale = width // side
    assert source.fixed(Options("onnx", size=(2 * width, height))) == {
        "height": height // scale,
        "width": 2 * width // scale,
    }


def test_components_that_need_an_adapter_are_left_out_without_one(source):
    from dataclasses import replace

    assert "image_projector" in source.components(Options("onnx"))
    bare = replace(source, adapters={})
    assert "image_projector" not in bare.components(Options("onnx")) and "unet" in bare.components(Options("onnx"))
    with pytest.raises(ModelError, match="has no image_encoder; give an IP-Adapter"):
        bare.components(Options("onnx", components=("image_encoder",)))


def test_the_estimate_of_full_size_is_what_was_measured():
    config = sdxl_unet_config()
    graph = estimate_export(config, torch.float16, ["live"], "onnx")
    engine = estimate_export(config, torch.float16, ["live"], "tensorrt", from_onnx=True)
    assert graph.memory == pytest.approx(5.7e9, rel=0.05) and graph.disk == pytest.approx(5.2e9, rel=0.05)
    # the builder's process beside the one that has let the weights go
    assert engine.memory == pytest.approx(17.3e9 + 0.6e9, rel=0.05) and engine.disk == pytest.approx(5.18e9, rel=0.05)
    assert graph.weights == 2 * 2_567_463_684


def test_flavours_share_weights_in_graphs_and_have_their_own_in_engines():
    config, flavours = sdxl_unet_config(), ["live", "plain", "banked"]

    def disk(kind, names, **options):
        return estimate_export(config, torch.float16, names, kind, **options).disk / 5.13e9

    assert disk("onnx", flavours) == pytest.approx(disk("onnx", ["live"]), rel=0.02)
    assert disk("tensorrt", flavours, from_onnx=True) == pytest.approx(3, rel=0.05)
    assert disk("tensorrt", flavours) == pytest.approx(4, rel=0.05)
    assert disk("triton-repo", flavours) == pytest.approx(2 * disk("triton-repo", flavours, from_onnx=True), rel=0.02)
    assert disk("aoti", flavours) < 0.05


def test_the_estimate_grows_with_the_type_and_with_what_else_is_written():
    config = small_unet_config()
    half = estimate_export(config, torch.float16, ["live"], "onnx")
    full = estimate_export(config, torch.float32, ["live"], "onnx")
    more = estimate_export(config, torch.float16, ["live"], "onnx", other_weights=10**6)
    assert full.weights == 2 * half.weights and full.memory > half.memory and full.disk > half.disk
    assert more.disk - half.disk == 1_020_000 and more.memory - half.memory == 10**6
    assert estimate_export(config, torch.float16, [], "onnx", other_weights=10**6).disk == 1_020_000
    with pytest.raises(InvalidRequest, match="kind is 'wasm'"):
        estimate_export(config, torch.float16, ["live"], "wasm")


def test_a_warning_names_what_is_missing_only_where_it_is():
    estimate = estimate_export(sdxl_unet_config(), torch.float16, ["live"], "tensorrt")
    assert estimate.warning(None) is None and estimate.warning(13 * 10**9) is None
    assert "12.8 GB more memory than is in use now, and 2 GB are free" in estimate.warning(2 * 10**9)
