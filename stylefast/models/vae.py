"""Loading of VAEs, and `encode` and `decode`, which hide the differences between their kinds.

AutoencoderKL and AutoencoderTiny are diffusers'. The stock SDXL VAE overflows in float16 (its config sets
`force_upcast`); `decoding_dtype` returns the type used instead. The fp16-fix VAE has it off and runs in float16.
"""

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from weakref import WeakSet

import torch
from torch import nn

from stylefast import values
from stylefast.errors import InvalidRequest, ModelFormatError, ModelNotFound, NumericsError
from stylefast.models.config_check import check_vae
from stylefast.models.config_files import build, config_of, read_config
from stylefast.models.hub import AS_USUAL, HubOptions, hub_folder, is_hub_id, pick_weights, present, wanted_files
from stylefast.models.stored_tensors import load_weights
from stylefast.models.vae_copies import working_decoder, working_encoder
from stylefast.models.vae_tiles import decode_tiles, plan_decode
from stylefast.models.weight_files import WeightHeader, available_memory, read_header, recognise

SDXL_SCALING_FACTOR = 0.13025
DECODE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FREE_SHARE = 0.8

# maps unscaled latents [n, C, h, w] to pictures [n, 3, H, W] around -1..1
DecoderRun = Callable[[torch.Tensor], torch.Tensor]

logger = logging.getLogger(__name__)
_overflowed: WeakSet[nn.Module] = WeakSet()


def load_vae(
    source: str | Path | nn.Module,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    variant: str | None = "auto",
    hub: HubOptions = AS_USUAL,
    config: Mapping | None = None,
) -> nn.Module:
    """Load a VAE: a folder (or one with `vae/` in it), a `.safetensors` file in either layout, or a hub id.

    A module is returned unchanged. A file's config comes from `config` (a dict), from a `config.json` next to it, or
    from its shapes; the last assumes `force_upcast`, since no key distinguishes an fp16-fix VAE from the stock one.
    In float16, a VAE with `force_upcast` is loaded as float32. Raises ModelNotFound, ModelFormatError.
    """
    if isinstance(source, nn.Module):
        return source
    path = values.path("the VAE (vae=, preview=)", source)
    if os.path.isfile(path):
        return _from_file(path, dtype, device, config)
    if not os.path.isdir(path):
        if not is_hub_id(str(source)):
            raise ModelNotFound(
                f"no VAE at {values.shown_path(path)}; give a folder, a .safetensors file or a hub id "
                "such as 'madebyollin/sdxl-vae-fp16-fix'"
            )
        half = dtype != torch.float32
        path = hub_folder(
            str(source),
            lambda folder: _vae_folder(folder) is not None,
            lambda names: wanted_files(names, half, variant, ("", "vae")),
            hub,
        )
    folder = _vae_folder(path)
    if folder is None:
        raise ModelNotFound(f"{path} contains no VAE: neither config.json nor vae/config.json names an autoencoder")
    return vae_from_folder(folder, dtype=dtype, device=device, variant=variant)


def vae_from_folder(
    folder: Path, *, dtype: torch.dtype, device: torch.device | str, variant: str | None = "auto"
) -> nn.Module:
    """Load the VAE from the folder of its `config.json`. Raises ModelNotFound, ModelFormatError."""
    config = read_config(folder / "config.json", folder)
    files = present(folder, dtype != torch.float32, variant)
    state = {}
    for file in files:
        read_header(folder / file)
        state |= load_weights(folder / file, dtype=_held_in(config, dtype), device=device)
    return build_vae(config, state, str(folder))


def build_vae(config: Mapping, state: dict[str, torch.Tensor], what: str) -> nn.Module:
    """Build the module of a config (AutoencoderKL unless it names AutoencoderTiny) around the tensors of `state`.

    Raises ModelFormatError.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

    kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    kind = config.get("_class_name", "AutoencoderKL")
    if kind not in kinds:
        raise ModelFormatError(f"{what} is an {kind}; SDXL works with {' or '.join(kinds)}")
    check_vae(config, what)
    plain = {k: v for k, v in config.items() if k != "_class_name"}
    vae = build(lambda: kinds[kind].from_config(plain), plain, len(state), what)
    assert isinstance(vae, nn.Module)  # the library declares a tuple too, which nothing asked for
    # VAEs saved by early diffusers use other names for the middle block's attention
    old = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
    for before, after in old:
        state = {
            name.replace(f".{before}.", f".{after}.") if ".attentions." in name else name: value
            for name, value in state.items()
        }
    return fill(vae, state, what)


def fill(module: nn.Module, state: dict[str, torch.Tensor], what: str) -> nn.Module:
    """Assign the tensors of `state`, without copying, to a module built on the meta device.

    Raises ModelFormatError, naming missing and unexpected tensors, if they don't fit.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_state(expected, state, what)
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def check_state(expected: dict[str, tuple], state: dict[str, torch.Tensor], what: str) -> None:
    """Raise ModelFormatError unless `state` has exactly the names and shapes of `expected`."""
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = [
        f"{n}: {tuple(state[n].shape)} instead of {shape}"
        for n, shape in expected.items()
        if n in state and tuple(state[n].shape) != shape
    ]
    parts = [
        f"{len(names)} {label} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for label, names in (("missing", missing), ("unexpected", extra), ("of wrong shape", wrong))
        if names
    ]
    if parts:
        raise ModelFormatError(f"the weights of {what} do not fit its config: {'; '.join(parts)}")


def downscale(vae: nn.Module) -> int:
    """Return the pixels per latent along one side (8 for SDXL)."""
    config = config_of(vae)
    widths = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return 2 ** (len(widths) - 1)


def encode(vae: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Encode pictures to latents: the posterior's mean, scaled as the UNet expects.

    images: [n, 3, H, W] in -1..1, H and W divisible by `downscale(vae)`. Returns float32 [n, C, H/f, W/f].
    Raises InvalidRequest for another shape, NumericsError for NaN or infinity.
    """
    factor = downscale(vae)
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
        raise InvalidRequest(
            f"pictures of shape {tuple(images.shape)} can't be encoded: the shape must be [n, 3, H, W], with H and "
            f"W divisible by {factor}"
        )
    _onload(vae)
    weight = next(vae.parameters())
    # never bfloat16 instead of float16: precision matters more than speed here, since these latents affect a whole run
    held = _held_in({"_class_name": type(vae).__name__, **config_of(vae)}, weight.dtype)
    with torch.no_grad():
        encoded = working_encoder(vae, held)(images.to(weight.device, held))
    channels = config_of(vae)["latent_channels"]
    encoded = encoded[:, :channels].float()  # an AutoencoderKL's moments are means, then log variances
    shift, scale = _affine(vae, encoded)
    return _finite((encoded - shift) * scale, "encoded", held)


def decoding_dtype(vae: nn.Module, asked: torch.dtype | None = None) -> torch.dtype:
    """Return the decoding type of a VAE for a model in `asked` (None: the type of the VAE's own weights).

    It is `asked` itself, except for float16: a VAE with `force_upcast` then runs in bfloat16 on CUDA devices that have
    it, which changes colours by less than one step of 255 on average, and in float32 on others. On the CPU float16
    always becomes float32, since float16 convolutions are far slower there.
    """
    weight = next(vae.parameters())
    asked = asked or weight.dtype
    if asked != torch.float16:
        return asked
    if weight.device.type == "cpu":
        return torch.float32
    upcast = _held_in({"_class_name": type(vae).__name__, **config_of(vae)}, asked) != asked
    if not upcast:
        return asked
    return torch.bfloat16 if _has_bfloat16(weight.device) else torch.float32


def decode(
    vae: nn.Module,
    latents: torch.Tensor,
    *,
    tile: int | str | None = None,
    memory: int | None = None,
    decode_dtype: torch.dtype | None = None,
    run: DecoderRun | None = None,
) -> torch.Tensor:
    """Decode latents [n, C, h, w] to pictures: float32 [n, 3, H, W] in 0..1.

    tile: None decodes each picture whole; a number of pixels is the side of overlapping tiles; "auto" decodes pictures
    of up to 2048x2048 pixels whole, as many at a time as fit into `memory` bytes (None: four fifths of the device's
    free memory), and others in the largest tiles that fit. A tile's norms and attention only cover that tile: tests
    bound the difference from whole pictures, for the embedded model and tiles of half the side, to 3 steps of 255 on
    average and 60 at most, and for a picture composed of four different ones to 7 and 90.
    decode_dtype: float32, bfloat16 or float16, used as given; None: `decoding_dtype(vae)`.
    run: decoder in that type that replaces the VAE's own, such as an exported graph.
    If a picture of finite latents is not finite in a half type, the VAE itself decodes it again in float32, with one
    warning per VAE. Raises NumericsError for NaN or infinity that remain, OutOfMemory if not even small tiles fit,
    InvalidRequest for other arguments.
    """
    channels = config_of(vae)["latent_channels"]
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise InvalidRequest(
            f"latents of shape {tuple(latents.shape)} can't be decoded: this VAE needs [n, {channels}, h, w]"
        )
    if decode_dtype is not None and decode_dtype not in DECODE_DTYPES:
        raise InvalidRequest(f"decode_dtype is {decode_dtype}; a VAE decodes in {', '.join(map(str, DECODE_DTYPES))}")
    _onload(vae)
    dtype = decode_dtype or decoding_dtype(vae)
    images = decode_unchecked(vae, latents, dtype, tile, memory, run)
    if dtype != torch.float32:
        overflown = ~_finite_rows(images) & _finite_rows(latents).to(images.device)
        if bool(overflown.any()):
            _warn_once(vae, dtype)
            again = decode_unchecked(vae, latents[overflown.to(latents.device)], torch.float32, tile, memory)
            images[overflown] = again
            dtype = torch.float32
    return (_finite(images, "decoded", dtype) / 2 + 0.5).clamp_(0, 1)


@torch.no_grad()
def decode_unchecked(
    vae: nn.Module,
    latents: torch.Tensor,
    dtype: torch.dtype,
    tile: int | str | None = None,
    memory: int | None = None,
    run: DecoderRun | None = None,
) -> torch.Tensor:
    """Decode latents [n, C, h, w] to raw pictures around -1..1, finite or not: float32 [n, 3, H, W].

    Values are not checked, so there is no device synchronisation; arguments as in `decode`.
    """
    factor, device = downscale(vae), next(vae.parameters()).device
    run = run or _own_decoder(vae, dtype)
    shift, scale = _affine(vae, latents)
    encoded = (latents.float() / scale + shift).to(device, dtype)
    budget = _budget(device, memory) if tile == "auto" else None
    plan = plan_decode(vae, encoded.shape, factor, dtype, tile, budget)
    if plan.tile is not None:
        logger.info("decoding %d pictures in tiles of %d pixels", len(encoded), plan.tile * factor)
        return decode_tiles(run, encoded, plan.tile, factor)
    images = [run(part).float().contiguous() for part in encoded.split(max(1, plan.pictures))]
    return images[0] if len(images) == 1 else torch.cat(images)


def _own_decoder(vae: nn.Module, dtype: torch.dtype) -> DecoderRun:
    decoder = working_decoder(vae, dtype)
    on_gpu = next(vae.parameters()).device.type == "cuda"
    layout = torch.channels_last if on_gpu else torch.contiguous_format
    return lambda part: decoder(part.contiguous(memory_format=layout))


def infer_vae_config(header: WeightHeader, prefix: str = "") -> dict:
    """Infer an AutoencoderKL config from a file's shapes, in the original layout or in diffusers', after `prefix`.

    Raises ModelFormatError.
    """
    original = f"{prefix}decoder.mid.block_1.conv1.weight" in header.tensors
    level = "encoder.down.{}.block.{}" if original else "encoder.down_blocks.{}.resnets.{}"
    widths = []
    while (name := prefix + level.format(len(widths), 0) + ".conv1.weight") in header.tensors:
        widths.append(header.shape(name)[0])
    depth = 0
    while prefix + level.format(0, depth) + ".conv1.weight" in header.tensors:
        depth += 1
    if not widths:
        raise ModelFormatError(f"{header.path.name} contains no VAE encoder; give a complete one as vae=")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": header.shape(prefix + "decoder.conv_in.weight")[1],
        "block_out_channels": widths,
        "layers_per_block": depth,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "norm_num_groups": 32,
        "sample_size": 128 * 2 ** (len(widths) - 1),
        "scaling_factor": SDXL_SCALING_FACTOR,
        "force_upcast": True,
    }


def vae_from_original(config: Mapping, state: dict[str, torch.Tensor], what: str) -> nn.Module:
    """Build the module from tensors in the original (ldm) layout, with or without the prefix `first_stage_model.`.

    Raises ModelFormatError.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    return build_vae(config, convert_ldm_vae_checkpoint(state, config), what)


def _from_file(path: Path, dtype, device, config) -> nn.Module:
    header = read_header(path)
    kind = recognise(header)
    if kind not in ("VAE", "tiny VAE", "SDXL checkpoint"):
        raise ModelFormatError(f"{path.name} is a {kind}, not a VAE")
    beside = path.parent / "config.json"
    if config is None and beside.is_file():
        found = read_config(beside, path.parent)
        config = found if _names_autoencoder(found) else None
    prefix = "first_stage_model." if header.has("first_stage_model.") else ""
    if config is None:
        config = {"_class_name": "AutoencoderTiny"} if kind == "tiny VAE" else infer_vae_config(header, prefix)
    state = load_weights(path, dtype=_held_in(config, dtype), device=device, prefix=prefix)
    if f"{prefix}decoder.mid.block_1.conv1.weight" in header.tensors:
        return vae_from_original(config, state, path.name)
    return build_vae(config, state, path.name)


def _vae_folder(path: Path) -> Path | None:
    """Return the folder with an autoencoder's config and weights, `path` itself or its `vae`, or None."""
    for folder in (path, path / "vae"):
        file = folder / "config.json"
        if not file.is_file() or not _names_autoencoder(read_config(file, folder)):
            continue
        if pick_weights([item.name for item in folder.iterdir()], half=False):
            return folder
    return None


def _names_autoencoder(config) -> bool:
    return str(config.get("_class_name", "")).startswith("Autoencoder")


def _held_in(config, dtype: torch.dtype) -> torch.dtype:
    """Return `dtype`, or float32 for a VAE that overflows in float16, unlike AutoencoderTiny and fp16-fix."""
    tiny = config.get("_class_name") == "AutoencoderTiny"
    return torch.float32 if dtype == torch.float16 and not tiny and config.get("force_upcast", True) else dtype


def _onload(vae: nn.Module) -> None:
    """Move weights offloaded by accelerate back to the device, as diffusers' own `encode` and `decode` do."""
    pre_forward = getattr(getattr(vae, "_hf_hook", None), "pre_forward", None)
    if pre_forward is not None:
        pre_forward(vae)


def _has_bfloat16(device: torch.device) -> bool:
    """Return whether `device` multiplies bfloat16 matrices in hardware."""
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def _budget(device: torch.device, memory: int | None) -> int | None:
    if memory is not None:
        return memory
    free = available_memory(device)
    if free is None:
        return None
    if device.type == "cuda":
        # the device counts memory that PyTorch's allocator caches as used
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(FREE_SHARE * free)


def _warn_once(vae: nn.Module, dtype: torch.dtype) -> None:
    level = logging.INFO if vae in _overflowed else logging.WARNING
    _overflowed.add(vae)
    logger.log(
        level,
        "the VAE overflows in %s; the affected pictures are decoded again in float32. Use "
        "vae='madebyollin/sdxl-vae-fp16-fix', or decode in float32 from the start",
        dtype,
    )


def _affine(vae: nn.Module, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (shift, scale), both [1, C, 1, 1] or scalars: latents = (encoded - shift) * scale."""
    config = config_of(vae)
    scale = torch.tensor(float(config["scaling_factor"]), device=latents.device)
    shift = torch.zeros((), device=latents.device)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        shift = torch.tensor(config["latents_mean"], device=latents.device).view(1, -1, 1, 1)
        scale = scale / torch.tensor(config["latents_std"], device=latents.device).view(1, -1, 1, 1)
    return shift, scale


def _finite_rows(tensor: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(tensor).flatten(1).all(1)


def _finite(tensor: torch.Tensor, done: str, dtype: torch.dtype) -> torch.Tensor:
    finite = _finite_rows(tensor)
    if not bool(finite.all()):
        bad = [i for i, good in enumerate(finite.tolist()) if not good]
        raise NumericsError(
            f"NaN or infinity in {done} picture {', '.join(map(str, bad))} of {len(tensor)} (VAE in {dtype}); if "
            "the input was finite, the VAE overflows in this type: use vae='madebyollin/sdxl-vae-fp16-fix' or "
            "dtype='float32'"
        )
    return tensor
