"""A VAE's encoder and decoder in the type and memory format in which they run, without changing the VAE itself.

The module may belong to a user's pipeline, so if its weights have another type or layout, a private copy of that half
is made once and kept for the lifetime of the VAE. At SDXL's size a decoder copy takes 99 MB in half precision and
198 MB in float32, an encoder copy 137 MB in float32.
"""

import copy
from dataclasses import dataclass
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import nn


@dataclass(frozen=True)
class _Copy:
    stamp: tuple
    half: nn.Sequential


_copies: WeakKeyDictionary[nn.Module, dict[tuple, _Copy]] = WeakKeyDictionary()
_making = Lock()


def working_decoder(vae: nn.Module, dtype: torch.dtype) -> nn.Sequential:
    """Return the decoder in `dtype`, from unscaled latents `[n, C, h, w]` to pictures `[n, 3, H, W]` around -1..1.

    It shares the VAE's weights if they have this type already and, on CUDA, are in channels_last.
    """
    post = getattr(vae, "post_quant_conv", None)
    halves = [*([] if post is None else [post]), vae.get_submodule("decoder")]
    return _working(vae, "decoder", nn.Sequential(*halves), dtype, channels_last=_device(vae).type == "cuda")


def working_encoder(vae: nn.Module, dtype: torch.dtype) -> nn.Sequential:
    """Return the encoder in `dtype`, from pictures `[n, 3, H, W]` to moments (AutoencoderTiny: to latents)."""
    quant = getattr(vae, "quant_conv", None)
    halves = [vae.get_submodule("encoder"), *([] if quant is None else [quant])]
    return _working(vae, "encoder", nn.Sequential(*halves), dtype, channels_last=False)


def copied_bytes(vae: nn.Module) -> int:
    """Return the bytes that private copies of this VAE's weights currently take."""
    shared = {t.data_ptr() for t in (*vae.parameters(), *vae.buffers())}
    with _making:
        kept = list(_copies.get(vae, {}).values())
    copied = [t for one in kept for t in one.half.state_dict().values() if t.data_ptr() not in shared]
    return sum(t.numel() * t.element_size() for t in copied)


def weights_stamp(module: nn.Module) -> tuple:
    """Return a key that changes if a weight is replaced, moved or written in place (except through `.data`)."""
    return tuple(
        (t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version)
        for t in (*module.parameters(), *module.buffers())
    )


def _working(vae, name: str, half: nn.Sequential, dtype, channels_last: bool) -> nn.Sequential:
    if all(_fits(t, dtype, channels_last) for t in (*half.parameters(), *half.buffers())):
        return half
    key = (name, dtype, channels_last)
    with _making:
        kept = _copies.setdefault(vae, {})
        stamp = weights_stamp(half)
        if key not in kept or kept[key].stamp != stamp:
            kept.pop(key, None)  # free the outdated copy before the new one takes memory
            kept[key] = _Copy(stamp, _copy(half, dtype, channels_last))
        return kept[key].half


def _copy(half: nn.Sequential, dtype, channels_last: bool) -> nn.Sequential:
    """Make a deep copy, converting weights one by one so that no second copy in the old type is needed."""
    with torch.inference_mode(False), torch.no_grad():
        converted = {}
        for tensor in (*half.parameters(), *half.buffers()):
            new = _converted(tensor.detach(), dtype, channels_last)
            # a tensor that needs no conversion shares its storage
            converted[id(tensor)] = nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new
        made = copy.deepcopy(nn.Sequential(*map(_unwrapped, half)), converted).eval()
    if (device := next(made.parameters()).device).type == "cuda":
        # wait for the copy, since later calls may use other streams
        torch.cuda.current_stream(device).synchronize()
    return made


def _fits(tensor: torch.Tensor, dtype, channels_last: bool) -> bool:
    typed = tensor.dtype == dtype or not tensor.is_floating_point()
    layout = not channels_last or tensor.ndim != 4 or tensor.is_contiguous(memory_format=torch.channels_last)
    return typed and layout


def _converted(tensor: torch.Tensor, dtype, channels_last: bool) -> torch.Tensor:
    """Convert a tensor's type and layout; return the tensor itself if both are right already."""
    tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if channels_last and tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the module wrapped by `torch.compile`, since the wrapper can't be copied with other weights."""
    return getattr(module, "_orig_mod", module)


def _device(vae: nn.Module) -> torch.device:
    return next(vae.parameters()).device
