"""One file in the original layout: other depths, other spellings of the projection, weights in fewer bits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stylefast.errors import ModelFormatError
from stylefast.models.checkpoint import load_components
from stylefast.models.quantised import check_storage, dequantised
from stylefast.models.single_file import convert_text_encoders, infer_unet_config
from stylefast.models.stored_tensors import load_weights
from stylefast.models.unet import UNet
from stylefast.models.weight_files import WeightHeader, read_header
from tests.support.small_checkpoints import original_unet, write_folder, write_single_file
from tests.support.small_families import PUBLISHED, family_config
from tests.support.small_sdxl import small_pipeline, small_tokenizer

PROJECTION = "conditioner.embedders.1.model.text_projection"
WIDE = {
    "block_out_channels": (64, 64, 128),
    "attention_head_dim": (1, 1, 2),
    "cross_attention_dim": 128,
    "projection_class_embeddings_input_dim": 64 + 6 * 8,
}  # heads 64 wide, which files are read with


@pytest.fixture(scope="module")
def pipeline():
    return small_pipeline(seed=3)


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    return write_folder(pipeline, tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="module")
def state(pipeline, tmp_path_factory):
    """All tensors of a single file in float32."""
    return load_file(write_single_file(pipeline, tmp_path_factory.mktemp("single") / "small.safetensors"))


def load(state, folder, path, **options):
    save_file(state, path)
    return load_components(path, config=folder, **options)


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_config_of_a_smaller_relative_is_read_off_its_keys(family):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**family_config(family, **WIDE))
    shapes = {f"model.diffusion_model.{name}": ("F32", tuple(x.shape)) for name, x in original_unet(unet).items()}
    config = infer_unet_config(WeightHeader(Path("a.safetensors"), shapes | {PROJECTION: ("F32", (64, 64))}, {}))
    with torch.device("meta"):
        found = UNet(config)
    expected = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in found.state_dict().items()} == expected
    assert config["mid_block_type"] == unet.config.mid_block_type


def test_a_smaller_relative_in_one_file_has_the_weights_of_its_pipeline(tmp_path):
    pipeline = small_pipeline(seed=5, unet_config=family_config("ssd_1b", **WIDE), text_width=64, text_heads=1)
    path = write_single_file(pipeline, tmp_path / "model.safetensors")
    small_tokenizer().save_pretrained(tmp_path / "clip")
    found = load_components(path, tokenizer=tmp_path / "clip").unet_state
    expected = pipeline.unet.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_unet_that_diffusers_config_can_not_describe_is_refused(tmp_path):
    names = ["input_blocks.1.0.out_layers.3", "input_blocks.1.1.proj_in", "input_blocks.2.0.out_layers.3"]
    state = {f"model.diffusion_model.{name}.weight": torch.zeros(64, 64) for name in names}
    state["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(64, 4, 3, 3)
    state["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"] = torch.zeros(64, 64)
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(ModelFormatError, match="have attention in some layers but not in others"):
        infer_unet_config(read_header(tmp_path / "odd.safetensors"))


# text encoders


def transformers_layout(state, pipeline, prefix, tower="text_model."):
    """The file with its second text encoder under transformers' names."""
    kept = {name: value for name, value in state.items() if not name.startswith("conditioner.embedders.1.")}
    for name, value in pipeline.text_encoder_2.state_dict().items():
        bare = name.removeprefix("text_model.")
        kept[prefix + (bare if bare.startswith("text_projection") else tower + bare)] = value.clone()
    return kept


@pytest.mark.parametrize(
    "spelling",
    [
        "a linear layer's",
        "transformers' layout",
        "transformers' without text_model",
        "transformers' under a second prefix",
        "transformers' with OpenCLIP's matrix",
        "first encoder without text_model",
    ],
)
def test_every_spelling_of_the_text_encoders_gives_the_same_tensors(spelling, state, pipeline):
    canonical = convert_text_encoders(state, {"hidden_size": 32})
    state, second = dict(state), "conditioner.embedders.1."
    if spelling == "a linear layer's":
        state[f"{PROJECTION}.weight"] = state.pop(PROJECTION).T.contiguous()
    elif spelling == "first encoder without text_model":
        state = {
            name.replace("embedders.0.transformer.text_model.", "embedders.0.transformer."): value
            for name, value in state.items()
        }
    elif spelling == "transformers' without text_model":
        state = transformers_layout(state, pipeline, f"{second}transformer.", tower="")
    elif spelling == "transformers' under a second prefix":
        state = transformers_layout(state, pipeline, f"{second}model.transformer.")
        state[f"{PROJECTION}.weight"] = state.pop(f"{second}model.transformer.text_projection.weight")
    else:
        state = transformers_layout(state, pipeline, f"{second}transformer.")
        if "matrix" in spelling:
            linear = state.pop(f"{second}transformer.text_projection.weight")
            state[f"{second}transformer.text_projection"] = linear.T.contiguous()
    for found, expected in zip(convert_text_encoders(state, {"hidden_size": 32}), canonical, strict=True):
        assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_file_with_transformers_names_loads(state, pipeline, folder, tmp_path):
    state = transformers_layout(state, pipeline, "conditioner.embedders.1.transformer.")
    found = load(state, folder, tmp_path / "model.safetensors").text_encoders[1].state_dict()
    assert all(torch.equal(value, found[name]) for name, value in pipeline.text_encoder_2.state_dict().items())


def test_a_file_without_projection_says_so(state, folder, tmp_path):
    shorn = {name: value for name, value in state.items() if not name.startswith(PROJECTION)}
    save_file(shorn, tmp_path / "model.safetensors")
    with pytest.raises(ModelFormatError, match="text_projection"):
        load_components(tmp_path / "model.safetensors", tokenizer=folder)


# weights in fewer bits


def eight_bits(state, spelling, channels):
    """Matrices of the UNet in float8 with factors; (what the file holds, what it stands for)."""
    held, meant = {}, {}
    for name, value in state.items():
        held[name] = meant[name] = value
        layer, _, last = name.rpartition(".")
        if not name.startswith("model.diffusion_model.") or last != "weight" or value.ndim < 2:
            continue
        rows = value.flatten(1)
        factor = (rows.abs().amax(1) if channels else rows.abs().max()) / 448.0
        shape = (-1, *[1] * (value.ndim - 1)) if channels else ()
        held[name] = (value / factor.reshape(shape)).to(torch.float8_e4m3fn)
        meant[name] = held[name].float() * factor.reshape(shape)
        held[f"{layer}.{spelling}"] = factor.reshape(-1, 1) if channels else factor
        if spelling == "weight_scale":
            note = json.dumps({"format": "float8_e4m3fn"}).encode()
            held[f"{layer}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
            held[f"{layer}.input_scale"] = torch.tensor(0.5)
        else:
            held[f"{layer}.scale_input"] = torch.tensor(0.5)
    if spelling == "scale_weight":
        held["model.diffusion_model.scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    return held, meant


@pytest.mark.parametrize("channels", [False, True], ids=["one factor", "a factor for each channel"])
@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_scaled_float8_weights_are_multiplied_out(spelling, channels, tmp_path):
    draw = torch.Generator().manual_seed(0)
    shapes = {"conv.weight": (6, 4, 3, 3), "conv.bias": (6,), "to_q.weight": (8, 4), "norm.weight": (8,)}
    state = {f"model.diffusion_model.{n}": torch.randn(shape, generator=draw) for n, shape in shapes.items()}
    held, meant = eight_bits(state, spelling, channels)
    save_file(held, tmp_path / "held.safetensors")
    found = load_weights(tmp_path / "held.safetensors", dtype=torch.float32, device="cpu")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in meant.items())
    assert all((found[name] - value).abs().max() < 0.07 * value.abs().max() for name, value in state.items())


def test_a_whole_file_in_scaled_float8_loads(state, folder, tmp_path):
    held, meant = eight_bits(state, "scale_weight", False)
    found = load(held, folder, tmp_path / "held.safetensors").unet_state
    name = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    assert torch.equal(found["down_blocks.0.resnets.0.conv1.weight"], meant[name])
    assert not torch.equal(meant[name], state[name])


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_plain_float8_files_are_read_as_they_are(kind, state, folder, tmp_path):
    held = {name: value.to(kind) for name, value in state.items()}
    found = load(held, folder, tmp_path / "model.safetensors", dtype="bfloat16")
    name = "model.diffusion_model.out.2.weight"
    assert torch.equal(found.unet_state["conv_out.weight"], held[name].to(torch.bfloat16))


@pytest.mark.parametrize(
    "extra, said",
    [
        ({"a.weight.quant_state.bitsandbytes__nf4": "U8"}, "bitsandbytes \\(nf4"),
        ({"a.weight.absmax": "F32"}, "bitsandbytes \\(nf4"),
        ({"a.SCB": "F32", "a.weight": "I8"}, "bitsandbytes \\(int8"),
        ({"a.qweight": "I32", "a.qzeros": "I32"}, "GPTQ"),
        ({"a.weight": "U8", "a.weight_scale": "F8_E4M3", "a.weight_scale_2": "F32"}, "nvfp4"),
        ({"a.weight._data": "I8", "a.weight._scale": "F32"}, "quanto"),
        ({"a.weight": "I8", "a.weight_scale": "F32"}, "a.weight as I8"),
        ({"a.scale_weight": "F32"}, "without the weight"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_weights_packed_in_another_way_are_refused_by_the_formats_name(extra, said):
    with pytest.raises(ModelFormatError, match=f"model.safetensors.*{said}"):
        check_storage({name: (kind, (4, 4)) for name, kind in extra.items()}, "model.safetensors")


def test_factors_for_blocks_of_a_weight_are_refused():
    tensors = {"a.weight": ("F8_E4M3", (4, 64)), "a.weight_scale": ("F32", (4, 2))}
    with pytest.raises(ModelFormatError, match=r"\[4, 64\] by factors \[4, 2\]"):
        check_storage(tensors, "model.safetensors")


@pytest.mark.parametrize(
    "note",
    [
        b'{"format": "mxfp8"}',
        b"not json",
        b"[]",
        b"{}",
        b'{"format": 1, "format": 2}',
        b"[" * 9000,
        b" " * 20_000,
    ],
    ids=lambda note: note[:30].decode(),
)
def test_a_note_of_a_format_that_is_not_read_is_refused(note):
    tensors = {"a.weight": torch.zeros(2, 2), "a.comfy_quant": torch.tensor(list(note), dtype=torch.uint8)}
    with pytest.raises(ModelFormatError, match=r"a\.comfy_quant"):
        dequantised(tensors, torch.float32, "model.safetensors")
