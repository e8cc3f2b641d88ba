"""Weights stored in fewer bits: 8-bit floats are read, with scales if any; other packed formats are rejected by name.

A layer's scaled float8 weight w comes with a factor s, one for the tensor or one for each output channel, and means
s * w. ComfyUI uses two spellings: `layer.scale_weight` with a marker `scaled_fp8` for the whole model, and
`layer.weight_scale` with a note `layer.comfy_quant` on the format. Input scales (`scale_input`, `input_scale`) are only
for float8 arithmetic; computing in 16 or 32 bits does not need them.
"""

import re
from collections.abc import Iterable, Mapping

import torch

from stylefast import values
from stylefast.errors import ModelFormatError

_SCALES = ("scale_weight", "weight_scale")
_UNUSED = ("scale_input", "input_scale", "comfy_quant", "scaled_fp8")
_KNOWN_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_LONGEST_NOTE = 10_000  # bytes
WAY_OUT = "get the edition in float16, bfloat16 or float8, or convert it with the tool that made it"

# (pattern of tensor names specific to a packed format, name of the format)
_PACKED = (
    (re.compile(r"\.quant_state\.bitsandbytes__|\.(nested_)?absmax$"), "4-bit weights of bitsandbytes (nf4, fp4)"),
    (re.compile(r"(^|\.)(SCB|weight_format)$"), "8-bit weights of bitsandbytes (int8)"),
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "packed integers of GPTQ or AWQ"),
    (re.compile(r"\.weight_scale_2$"), "4-bit floats in blocks (nvfp4)"),
    (re.compile(r"\.(smooth_factor|wscales)$"), "4-bit weights of SVDQuant (nunchaku)"),
    (re.compile(r"\.weight\._(data|scale)$"), "integers of optimum-quanto"),
)


def check_storage(tensors: Mapping[str, tuple[str, tuple[int, ...]]], what: str) -> None:
    """Raise ModelFormatError for weights that are not plain or scaled floats, naming the format.

    tensors: name -> (type as safetensors spells it, shape). what: the file's name, for the message.
    """
    check_names(tensors, what)
    for name, (kind, shape) in tensors.items():
        if not name.endswith((".weight", ".bias")):
            continue
        if not kind.startswith(("F", "BF")) or kind.startswith(("F4", "F6", "F8_E8M0")):
            raise ModelFormatError(f"{what} holds {name} as {kind}, quantised in an unsupported way; {WAY_OUT}")
        layer, _, _ = name.rpartition(".")
        scale = next((f"{layer}.{spelling}" for spelling in _SCALES if f"{layer}.{spelling}" in tensors), None)
        if scale is not None and name.endswith(".weight") and not _fits(shape, tensors[scale][1]):
            raise ModelFormatError(
                f"{what} scales {name} {list(shape)} by factors {list(tensors[scale][1])}; only one, or one for "
                f"each output channel, is supported: {WAY_OUT}"
            )
    bare = [n for n in tensors if n.endswith(_SCALES) and f"{n.rpartition('.')[0]}.weight" not in tensors]
    if bare:
        raise ModelFormatError(f"{what} contains the factor {bare[0]} without the weight that it scales; {WAY_OUT}")


def check_names(names: Iterable[str], what: str) -> None:
    """Raise ModelFormatError for names specific to packed weights, naming the format."""
    for mark, meaning in _PACKED:
        found = next((name for name in names if mark.search(name)), None)
        if found is not None:
            raise ModelFormatError(f"{what} contains {meaning} ({found[:200]}), which are not supported; {WAY_OUT}")


def dequantised(tensors: dict[str, torch.Tensor], dtype: torch.dtype, what: str) -> dict[str, torch.Tensor]:
    """Return the model's own tensors, floating ones in `dtype`, with scales applied in float32 and notes dropped.

    Raises ModelFormatError if a note names an unsupported format.
    """
    plain = {}
    for name, value in tensors.items():
        layer, _, last = name.rpartition(".")
        if last == "comfy_quant":
            _check_note(name, value, what)
        if last in _SCALES or last in _UNUSED:
            continue
        factors = [tensors[f"{layer}.{s}"] for s in _SCALES if f"{layer}.{s}" in tensors] if last == "weight" else []
        if factors:
            factor = factors[0].float()
            # per-channel factors apply along the first dimension
            factor = factor.reshape(-1, *[1] * (value.ndim - 1)) if factor.numel() > 1 else factor.reshape(())
            value = value.float() * factor
        plain[name] = value.to(dtype) if value.is_floating_point() else value
    return plain


def _fits(weight: tuple[int, ...], factor: tuple[int, ...]) -> bool:
    count = 1
    for side in factor:
        count *= side
    rows = weight[0] if weight else 1
    return count == 1 or (count == rows and factor[0] == rows)


def _check_note(name: str, value: torch.Tensor, what: str) -> None:
    if value.numel() > _LONGEST_NOTE:
        raise ModelFormatError(f"{what} holds a note {name} of {value.numel()} bytes; {WAY_OUT}")
    note = values.load_json(
        bytes(value.to(torch.uint8).flatten().tolist()), f"the note {name} of {what}", kind=dict, error=ModelFormatError
    )
    kind = note.get("format")
    if kind not in _KNOWN_FORMATS:
        raise ModelFormatError(f"{what} holds weights in the format {values.quoted(kind)} ({name}); {WAY_OUT}")
