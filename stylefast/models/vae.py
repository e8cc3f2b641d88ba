"""Between pictures and latents: loading a VAE, and `encode` and `decode` that hide the differences between kinds.

AutoencoderKL and AutoencoderTiny are diffusers'. The stock SDXL VAE overflows in float16 (its config says
`force_upcast`); it is then run in float32, as diffusers' pipelines do. The fp16-fix VAE says False and is run as it is.
"""

import json
from pathlib import Path

import torch
from torch import nn

from stylefast.errors import InvalidRequest, ModelFormatError, ModelNotFound, NumericsError
from stylefast.models.hub import hub_folder, is_hub_id, pick_weights, wanted_files
from stylefast.models.weight_files import WeightHeader, load_weights, read_header, recognise

SDXL_SCALING_FACTOR = 0.13025


def load_vae(source, *, dtype: torch.dtype, device, variant="auto", local_files_only=False, config=None) -> nn.Module:
    """Load a VAE: a folder (or one with `vae/` in it), a `.safetensors` file in either layout, or a hub id.

    A module is given back as it is. A file takes its config from `config` (a dict), from a `config.json` beside it, or
    from its shapes; in the last case `force_upcast` is assumed, since no key tells an fp16-fix VAE from the stock one.
    In float16, a VAE with `force_upcast` is held in float32. Raises ModelNotFound, ModelFormatError.
    """
    if isinstance(source, nn.Module):
        return source
    path = Path(source).expanduser()
    if path.is_file():
        return _from_file(path, dtype, device, config)
    if not path.is_dir():
        if not is_hub_id(str(source)):
            raise ModelNotFound(f"no VAE at {path}; give a folder, a .safetensors file or a hub id such as "
                                "'madebyollin/sdxl-vae-fp16-fix'")
        half = dtype != torch.float32
        path = hub_folder(
            str(source), lambda folder: _vae_folder(folder) is not None,
            lambda names: wanted_files(names, half, variant, ("", "vae")), local_files_only,
        )
    folder = _vae_folder(path)
    if folder is None:
        raise ModelNotFound(f"{path} holds no VAE: neither config.json nor vae/config.json names an autoencoder")
    return vae_from_folder(folder, dtype=dtype, device=device, variant=variant)


def vae_from_folder(folder: Path, *, dtype: torch.dtype, device, variant="auto") -> nn.Module:
    """Load the VAE whose `config.json` lies in `folder`."""
    config = json.loads((folder / "config.json").read_text())
    files = pick_weights([file.name for file in folder.iterdir()], dtype != torch.float32, variant)
    if not files:
        raise ModelNotFound(f"{folder} holds no .safetensors weights of variant {variant!r}")
    state = {}
    for file in files:
        read_header(folder / file)
        state |= load_weights(folder / file, dtype=_held_in(config, dtype), device=device)
    return build_vae(config, state, str(folder))


def build_vae(config, state: dict[str, torch.Tensor], what: str) -> nn.Module:
    """Make the module of a config (AutoencoderKL unless it names AutoencoderTiny) around the tensors of `state`."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    kinds = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    kind = config.get("_class_name", "AutoencoderKL")
    if kind not in kinds:
        raise ModelFormatError(f"{what} is an {kind}; SDXL works with {' or '.join(kinds)}")
    with torch.device("meta"):
        vae = kinds[kind].from_config({k: v for k, v in config.items() if k != "_class_name"})
    # VAEs saved by early diffusers name the attention of the middle block in another way
    old = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0"))
    for before, after in old:
        state = {
            name.replace(f".{before}.", f".{after}.") if ".attentions." in name else name: value
            for name, value in state.items()
        }
    return fill(vae, state, what)


def fill(module: nn.Module, state: dict[str, torch.Tensor], what: str) -> nn.Module:
    """Give a module built on the meta device the tensors of `state` (no copy), and say what is missing or too much."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_state(expected, state, what)
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def check_state(expected: dict[str, tuple], state: dict[str, torch.Tensor], what: str) -> None:
    """Raise ModelFormatError unless `state` has exactly the names and shapes of `expected`."""
    missing, extra = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    wrong = [f"{n}: {tuple(state[n].shape)} instead of {shape}" for n, shape in expected.items()
             if n in state and tuple(state[n].shape) != shape]
    parts = [f"{len(names)} {label} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
             for label, names in (("missing", missing), ("unexpected", extra), ("of wrong shape", wrong)) if names]
    if parts:
        raise ModelFormatError(f"the weights of {what} do not fit its config: {'; '.join(parts)}")


def downscale(vae: nn.Module) -> int:
    """Pixels per latent along one side (8 for SDXL)."""
    config = vae.config
    widths = config.get("block_out_channels") or config["encoder_block_out_channels"]
    return 2 ** (len(widths) - 1)


def encode(vae: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Latents of pictures: the mean of the posterior, scaled as the UNet expects.

    images: [n, 3, H, W] in -1..1, H and W divisible by `downscale(vae)`. Returns float32 [n, C, H/f, W/f].
    """
    factor = downscale(vae)
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
        raise InvalidRequest(
            f"pictures of shape {tuple(images.shape)} can't be encoded: [n, 3, H, W] is needed, with H and W divisible "
            f"by {factor}"
        )
    with torch.no_grad():
        encoded = _run(_Encode(vae), images)
    shift, scale = _affine(vae, encoded)
    return _finite((encoded.float() - shift) * scale, vae, "encoded")


def decode(vae: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Pictures of latents [n, C, h, w]: float32 [n, 3, H, W] in 0..1. Raises NumericsError at NaN or infinity."""
    channels = vae.config["latent_channels"]
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise InvalidRequest(
            f"latents of shape {tuple(latents.shape)} can't be decoded: this VAE needs [n, {channels}, h, w]"
        )
    shift, scale = _affine(vae, latents)
    with torch.no_grad():
        images = _run(_Decode(vae), latents.float() / scale + shift)
    return (_finite(images.float(), vae, "decoded") / 2 + 0.5).clamp(0, 1)


def infer_vae_config(header: WeightHeader, prefix: str = "") -> dict:
    """AutoencoderKL config from a file's shapes, in the original layout (`prefix` cut off) or in diffusers'."""
    original = f"{prefix}decoder.mid.block_1.conv1.weight" in header.tensors
    level = "encoder.down.{}.block.{}" if original else "encoder.down_blocks.{}.resnets.{}"
    widths = []
    while (name := prefix + level.format(len(widths), 0) + ".conv1.weight") in header.tensors:
        widths.append(header.shape(name)[0])
    depth = 0
    while prefix + level.format(0, depth) + ".conv1.weight" in header.tensors:
        depth += 1
    if not widths:
        raise ModelFormatError(f"{header.path.name} holds no VAE encoder; give vae= a whole one")
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


def vae_from_original(config, state: dict[str, torch.Tensor], what: str) -> nn.Module:
    """Make the module from tensors in the original (ldm) layout, with or without the prefix `first_stage_model.`"""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    return build_vae(config, convert_ldm_vae_checkpoint(state, config), what)


def _from_file(path: Path, dtype, device, config) -> nn.Module:
    header = read_header(path)
    kind = recognise(header)
    if kind not in ("VAE", "tiny VAE", "SDXL checkpoint"):
        raise ModelFormatError(f"{path.name} is a {kind}, not a VAE")
    beside = path.parent / "config.json"
    if config is None and beside.is_file():
        found = json.loads(beside.read_text())
        config = found if found.get("_class_name", "").startswith("Autoencoder") else None
    prefix = "first_stage_model." if header.has("first_stage_model.") else ""
    if config is None:
        config = {"_class_name": "AutoencoderTiny"} if kind == "tiny VAE" else infer_vae_config(header, prefix)
    state = load_weights(path, dtype=_held_in(config, dtype), device=device, prefix=prefix)
    if f"{prefix}decoder.mid.block_1.conv1.weight" in header.tensors:
        return vae_from_original(config, state, path.name)
    return build_vae(config, state, path.name)


def _vae_folder(path: Path) -> Path | None:
    """The folder with an autoencoder's config and weights: `path` itself, or `vae` in it."""
    for folder in (path, path / "vae"):
        file = folder / "config.json"
        if not file.is_file() or not json.loads(file.read_text()).get("_class_name", "").startswith("Autoencoder"):
            continue
        if pick_weights([item.name for item in folder.iterdir()], half=False):
            return folder
    return None


def _held_in(config, dtype: torch.dtype) -> torch.dtype:
    """float32 for a VAE that overflows in float16; AutoencoderTiny and fp16-fix do not."""
    tiny = config.get("_class_name") == "AutoencoderTiny"
    return torch.float32 if dtype == torch.float16 and not tiny and config.get("force_upcast", True) else dtype


class _Encode(nn.Module):
    """`vae.encode` as a forward pass, so that it can be called with other weights than its own."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, images):
        encoded = self.vae.encode(images)
        return encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latents


class _Decode(_Encode):
    """`vae.decode` as a forward pass."""

    def forward(self, latents):
        return self.vae.decode(latents, return_dict=False)[0]


def _run(call: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    """Call in the VAE's own dtype; a float16 VAE that must not run in float16 gets float32 copies of its weights."""
    weight = next(call.parameters())
    held = _held_in({"_class_name": type(call.vae).__name__, **call.vae.config}, weight.dtype)
    if held == weight.dtype:
        return call(tensor.to(weight.device, weight.dtype))
    # the module may belong to a user's pipeline, so it is not cast in place
    upcast = {n: t.to(held) for n, t in call.state_dict().items() if t.is_floating_point()}
    return torch.func.functional_call(call, upcast, (tensor.to(weight.device, held),))


def _affine(vae: nn.Module, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(shift, scale), both [1, C, 1, 1] or scalars: latents = (encoded - shift) * scale."""
    config = vae.config
    scale = torch.tensor(float(config["scaling_factor"]), device=latents.device)
    shift = torch.zeros((), device=latents.device)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        shift = torch.tensor(config["latents_mean"], device=latents.device).view(1, -1, 1, 1)
        scale = scale / torch.tensor(config["latents_std"], device=latents.device).view(1, -1, 1, 1)
    return shift, scale


def _finite(tensor: torch.Tensor, vae: nn.Module, done: str) -> torch.Tensor:
    finite = torch.isfinite(tensor).flatten(1).all(1)
    if not bool(finite.all()):
        bad = [i for i, good in enumerate(finite.tolist()) if not good]
        held = next(vae.parameters()).dtype
        raise NumericsError(
            f"NaN or infinity in {done} picture {', '.join(map(str, bad))} of {len(tensor)} (VAE in {held}); if what "
            "went in was finite, the VAE overflows in this type: use vae='madebyollin/sdxl-vae-fp16-fix' or "
            "dtype='float32'"
        )
    return tensor
