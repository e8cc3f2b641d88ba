"""Encoding and decoding equal diffusers' pipelines for every kind of VAE, and never give NaN silently."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from stylefast.errors import InvalidRequest, ModelFormatError, ModelNotFound, NumericsError
from stylefast.models import vae as vaes
from stylefast.models.checkpoint import TINY
from stylefast.models.vae import decode, decoding_dtype, downscale, encode, load_vae
from stylefast.models.vae_copies import copied_bytes, working_decoder, working_encoder
from tests.support.fp64 import close, measured
from tests.support.small_checkpoints import original_vae, write_vae_folder
from tests.support.small_sdxl import small_pipeline, small_tiny_vae, small_vae_config

CPU = {"dtype": torch.float32, "device": "cpu"}
HALF = {"dtype": torch.float16, "device": "cpu"}


@pytest.fixture(scope="module")
def vae():
    return small_pipeline(seed=2).vae


def seeded(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def decoded(vae, latents):
    """Pictures by diffusers' own VAE."""
    return (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def encoded(vae, pictures):
    """Latents by diffusers' own VAE."""
    return vae.encode(pictures).latent_dist.mode() * vae.config.scaling_factor


def test_decoding_equals_diffusers_pipeline():
    @torch.no_grad()
    def theirs(pipeline, latents):
        images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        return pipeline.image_processor.postprocess(images, output_type="pt")

    pipeline, latents = small_pipeline(seed=2), seeded(2, 4, 6, 10)
    close(decode(pipeline.vae, latents), measured(theirs, pipeline, latents))


def test_encoding_is_the_scaled_mean(vae):
    pictures = seeded(2, 3, 24, 40).clamp(-1, 1)
    assert vae.config.scaling_factor == 0.13025
    close(encode(vae, pictures), measured(encoded, vae, pictures))


def test_means_and_deviations_of_latents_are_applied_when_the_config_has_them():
    mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 2.0, 1.0, 0.8]
    vae = small_pipeline(vae_config=small_vae_config(latents_mean=mean, latents_std=std)).vae
    latents, pictures = seeded(1, 4, 4, 4), seeded(1, 3, 16, 16)
    m, s = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))

    @torch.no_grad()
    def moved(vae, latents, m, s):
        return (vae.decode(latents * s / 0.13025 + m).sample / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def moved_back(vae, pictures, m, s):
        return (vae.encode(pictures).latent_dist.mean - m) * 0.13025 / s

    close(decode(vae, latents), measured(moved, vae, latents, m, s))
    close(encode(vae, pictures), measured(moved_back, vae, pictures, m, s))


def test_the_tiny_vae_equals_diffusers():
    vae = small_tiny_vae()
    latents, pictures = seeded(2, 4, 5, 7), seeded(1, 3, 16, 24).clamp(-1, 1)
    assert downscale(vae) == 4 and vae.config.scaling_factor == 1
    close(decode(vae, latents), measured(decoded, vae, latents))

    @torch.no_grad()
    def latents_of(vae, pictures):
        return vae.encode(pictures).latents

    close(encode(vae, pictures), measured(latents_of, vae, pictures))


def test_a_stock_vae_in_half_precision_is_held_in_float32_and_an_fp16_fix_is_not(vae, tmp_path):
    stock = load_vae(write_vae_folder(vae, tmp_path / "stock"), **HALF)
    fixed = load_vae(write_vae_folder(vae, tmp_path / "fixed", force_upcast=False), **HALF)
    assert next(stock.parameters()).dtype == torch.float32
    assert next(fixed.parameters()).dtype == torch.float16
    assert next(load_vae(tmp_path / "stock", dtype=torch.bfloat16, device="cpu").parameters()).dtype == torch.bfloat16


def test_a_pipelines_half_precision_vae_is_decoded_in_float32_and_stays_untouched(vae):
    half = AutoencoderKL(**small_vae_config())
    half.load_state_dict(vae.state_dict())
    half.to(torch.float16)
    places = [parameter.data_ptr() for parameter in half.parameters()]
    full = AutoencoderKL(**small_vae_config())
    full.load_state_dict({name: value.float() for name, value in half.state_dict().items()})
    latents, pictures = seeded(1, 4, 4, 4), seeded(1, 3, 16, 16)
    assert torch.equal(decode(half, latents), decode(full, latents))
    assert torch.equal(encode(half, pictures), encode(full, pictures))
    assert [parameter.data_ptr() for parameter in half.parameters()] == places
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}


def test_files_in_both_layouts_give_the_same_vae(vae, tmp_path):
    latents = seeded(1, 4, 4, 4)
    expected = measured(decoded, vae, latents)
    folder = write_vae_folder(vae, tmp_path / "folder")
    (tmp_path / "bare").mkdir()
    save_file(load_file(folder / "diffusion_pytorch_model.safetensors"), tmp_path / "bare" / "diffusers.safetensors")
    original = {name: value.contiguous().clone() for name, value in original_vae(vae).items()}
    save_file(original, tmp_path / "bare" / "original.safetensors")
    whole = {f"first_stage_model.{name}": value for name, value in original.items()}
    save_file(whole, tmp_path / "bare" / "prefixed.safetensors")
    for source in (folder, folder / "diffusion_pytorch_model.safetensors", *sorted((tmp_path / "bare").iterdir())):
        loaded = load_vae(source, **CPU)
        close(decode(loaded, latents), expected)
        assert loaded.config["force_upcast"]


def test_a_config_beside_a_file_in_the_original_layout_says_whether_to_upcast(vae, tmp_path):
    write_vae_folder(vae, tmp_path, force_upcast=False)
    original = {name: value.contiguous().clone() for name, value in original_vae(vae).items()}
    save_file(original, tmp_path / "fixed.vae.safetensors")
    assert next(load_vae(tmp_path / "fixed.vae.safetensors", **HALF).parameters()).dtype == torch.float16


def test_vaes_with_attention_named_as_in_early_diffusers_load(vae, tmp_path):
    folder = write_vae_folder(vae, tmp_path / "old")
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    for new, old in names.items():
        state = {name.replace(new, old): value for name, value in state.items()}
    assert any(".query." in name for name in state)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    latents = seeded(1, 4, 4, 4)
    close(decode(load_vae(folder, **CPU), latents), measured(decoded, vae, latents))


def test_a_tiny_vae_folder_and_file_load(tmp_path):
    vae = small_tiny_vae()
    folder = write_vae_folder(vae, tmp_path / "taesd")
    latents = seeded(1, 4, 4, 4)
    for source in (folder, folder / "diffusion_pytorch_model.safetensors"):
        close(decode(load_vae(source, **CPU), latents), measured(decoded, vae, latents))
    assert next(load_vae(folder, **HALF).parameters()).dtype == torch.float16


def test_nan_in_one_picture_is_named():
    vae = small_pipeline().vae
    latents = seeded(3, 4, 4, 4)
    latents[1, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match="decoded picture 1 of 3.*fp16-fix"):
        decode(vae, latents)
    pictures = seeded(2, 3, 16, 16)
    pictures[0] = float("inf")
    with pytest.raises(NumericsError, match="encoded picture 0 of 2"):
        encode(vae, pictures)


@pytest.mark.parametrize("shape", [(1, 3, 17, 16), (1, 1, 16, 16), (3, 16, 16)])
def test_pictures_of_wrong_shape_are_refused(vae, shape):
    with pytest.raises(InvalidRequest, match="divisible by 4"):
        encode(vae, torch.zeros(shape))


def test_latents_of_wrong_shape_are_refused(vae):
    with pytest.raises(InvalidRequest, match=r"\[n, 4, h, w\]"):
        decode(vae, torch.zeros(1, 16, 4, 4))


def test_what_is_no_vae_is_refused(tmp_path):
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1, 1)}, tmp_path / "style.safetensors")
    with pytest.raises(ModelFormatError, match="style.safetensors is a LoRA, not a VAE"):
        load_vae(tmp_path / "style.safetensors", **CPU)
    with pytest.raises(ModelNotFound, match="contains no VAE"):
        load_vae(tmp_path, **CPU)
    with pytest.raises(ModelNotFound, match="no VAE at"):
        load_vae(tmp_path / "absent.safetensors", **CPU)


def test_missing_weights_are_named(vae, tmp_path):
    folder = write_vae_folder(vae, tmp_path / "vae")
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    state.pop("decoder.conv_in.bias")
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ModelFormatError, match="1 missing .decoder.conv_in.bias"):
        load_vae(folder, **CPU)


def with_weights_as(dtype, vae):
    return copy.deepcopy(vae).to(dtype)


def overflowing(vae):
    """A copy whose decoder passes float16's range inside, as the stock SDXL VAE does; in float32 it decodes well."""
    changed = copy.deepcopy(vae)
    with torch.no_grad():
        changed.decoder.conv_in.weight *= 1e5
        changed.decoder.conv_in.bias *= 1e5
    return changed


def steps_apart(a, b):
    """Mean distance in steps of an 8-bit picture."""
    return (a - b).abs().mean().item() * 255


def test_float16_is_replaced_by_a_type_the_vae_and_the_device_can_bear(vae, monkeypatch):
    half, fixed = with_weights_as(torch.float16, vae), AutoencoderKL(**small_vae_config(force_upcast=False))
    assert [decoding_dtype(half), decoding_dtype(vae, torch.float16), decoding_dtype(fixed, torch.float16)] == (
        [torch.float32] * 3  # on the CPU
    )
    assert decoding_dtype(vae) == torch.float32
    assert decoding_dtype(half, torch.bfloat16) == torch.bfloat16
    on_cuda = copy.deepcopy(half).to("meta")
    assert decoding_dtype(on_cuda) == torch.float32  # no bfloat16 there
    monkeypatch.setattr(vaes, "_has_bfloat16", lambda device: True)
    assert decoding_dtype(on_cuda) == torch.bfloat16
    assert decoding_dtype(fixed.to("meta"), torch.float16) == torch.float16


@pytest.mark.parametrize("model", ["embedded", "random"])
def test_decoding_in_bfloat16_moves_colours_by_less_than_a_step_of_255_on_average(model):
    if model == "embedded":
        vae = load_vae(TINY, **CPU)
    else:
        torch.manual_seed(3)
        config = small_vae_config(block_out_channels=(64, 64, 64, 64), layers_per_block=2)
        config |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(**config).eval().requires_grad_(False)
    latents = seeded(2, 4, 16, 12)
    apart = steps_apart(decode(vae, latents, decode_dtype=torch.bfloat16), decode(vae, latents))
    assert 0 < apart < 1


def test_a_copy_in_another_type_is_made_once_until_the_weights_change(vae):
    half = with_weights_as(torch.float16, vae)
    latents = seeded(1, 4, 5, 4)
    before = decode(half, latents)
    made = working_decoder(half, torch.float32)
    decode(half, latents)
    assert working_decoder(half, torch.float32) is made
    with torch.no_grad():
        half.decoder.conv_out.bias += 0.25
    assert working_decoder(half, torch.float32) is not made
    close(decode(half, latents), measured(decoded, with_weights_as(torch.float32, half), latents))
    assert steps_apart(decode(half, latents), before) > 1


def test_a_copy_takes_the_bytes_it_says_and_goes_with_its_vae(vae):
    half = with_weights_as(torch.float16, vae)
    assert copied_bytes(half) == 0
    made = working_encoder(half, torch.float32)
    assert copied_bytes(half) == 4 * sum(p.numel() for p in made.parameters())
    working_decoder(half, torch.float32)
    assert copied_bytes(half) == 4 * sum(p.numel() for p in half.parameters())
    kept = [weakref.ref(part) for part in (half, working_decoder(half, torch.float32))]
    del half
    gc.collect()
    assert [part() for part in kept] == [None, None]


def test_a_vae_in_the_right_type_is_used_without_a_copy(vae):
    fresh = copy.deepcopy(vae)
    decode(fresh, seeded(1, 4, 4, 4)), encode(fresh, seeded(1, 3, 16, 16))
    assert copied_bytes(fresh) == 0
    assert next(working_decoder(fresh, torch.float32).parameters()) is fresh.post_quant_conv.weight


def test_copies_made_in_inference_mode_serve_outside_it(vae):
    half, latents = with_weights_as(torch.float16, vae), seeded(1, 4, 4, 4)
    with torch.inference_mode():
        inside = decode(half, latents)
    torch.testing.assert_close(decode(half, latents), inside.clone(), rtol=0, atol=0)
    assert not any(p.is_inference() for p in working_decoder(half, torch.float32).parameters())


def test_a_picture_that_overflows_in_float16_is_decoded_in_float32_with_one_warning(vae, caplog):
    large, latents = overflowing(vae), seeded(3, 4, 3, 5)
    expected = measured(decoded, large, latents)
    with caplog.at_level(logging.INFO, logger="stylefast.models.vae"):
        for _ in range(2):
            close(decode(large, latents, decode_dtype=torch.float16), expected)
    levels = [record.levelno for record in caplog.records if "overflows in torch.float16" in record.getMessage()]
    assert levels == [logging.WARNING, logging.INFO]


def test_only_the_picture_that_overflows_is_decoded_again(vae, monkeypatch):
    latents, calls = seeded(3, 4, 4, 4), []
    whole = vaes.decode_unchecked

    def spoiling(vae, latents, dtype, *rest):
        images = whole(vae, latents, dtype, *rest)
        calls.append((len(latents), dtype))
        if dtype != torch.float32:
            images[1, 0, 2, 3] = float("inf")
        return images

    monkeypatch.setattr(vaes, "decode_unchecked", spoiling)
    again = decode(vae, latents, decode_dtype=torch.bfloat16)
    assert calls == [(3, torch.bfloat16), (1, torch.float32)]
    close(again[1], measured(decoded, vae, latents)[1])
    assert not torch.equal(again[0], decode(vae, latents)[0])


def test_what_is_bad_in_float32_too_is_an_error_and_bad_latents_are_not_tried_twice(vae, monkeypatch):
    broken = overflowing(vae)
    with torch.no_grad():
        broken.decoder.conv_out.bias[0] = float("nan")
    with pytest.raises(NumericsError, match="decoded picture 0, 1 of 2 .VAE in torch.float32"):
        decode(broken, seeded(2, 4, 4, 4), decode_dtype=torch.bfloat16)
    latents, types = seeded(2, 4, 4, 4), []
    latents[1] = float("nan")
    whole = vaes.decode_unchecked
    monkeypatch.setattr(vaes, "decode_unchecked", lambda v, z, dtype, *rest: types.append(dtype) or whole(v, z, dtype))
    with pytest.raises(NumericsError, match="picture 1 of 2"):
        decode(vae, latents, decode_dtype=torch.bfloat16)
    assert types == [torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "float16"])
def test_types_that_no_vae_decodes_in_are_refused(vae, dtype):
    with pytest.raises(InvalidRequest, match="decodes in torch.float32, torch.bfloat16, torch.float16"):
        decode(vae, seeded(1, 4, 4, 4), decode_dtype=dtype)


@pytest.mark.gpu
def test_on_a_gpu_the_decoder_is_in_channels_last_and_the_users_module_is_untouched(vae):
    mine = copy.deepcopy(vae).to("cuda", torch.float16)
    latents = seeded(2, 4, 16, 16).cuda()
    half = decode(mine, latents)
    assert steps_apart(half, decode(mine, latents, decode_dtype=torch.float32)) < 1
    made = working_decoder(mine, decoding_dtype(mine))
    weights = [p for p in made.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    assert all(p.is_contiguous() for p in mine.parameters())
    assert {p.dtype for p in mine.parameters()} == {torch.float16}
