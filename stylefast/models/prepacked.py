"""Linear layers and convolutions that also keep weights packed in the layout of the CPU's matrix kernels.

PyTorch reorders a convolution's weights at every call and sends float32 matrix products to a library that is slow on
some CPUs. PyTorch's bundled oneDNN was faster on all CPUs measured if it keeps a packed copy of the weights. The copy
doubles a layer's memory; the weights themselves stay unchanged and shared, and a copy is remade after its weights were
written (by a LoRA). The packed kernels accumulate longer chains of products than the others, so their rounding error is
a few times larger (tests/engine/test_prepacked.py has the bounds).
"""

import logging
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from stylefast.kernels.row_lora import LoraPool, LoraRows
from stylefast.kernels.row_lora import operation as row_lora
from stylefast.models.weight_files import available_memory

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16)
# share of free memory for packed copies
_SHARE = 0.5
# number of picture sizes for which a convolution keeps packed weights
_MOST_COPIES = 4
_Loras = tuple[LoraPool, LoraRows]  # row_loras.LoraInputs


class _Packable:
    """Base of `Linear` and `Conv2d` with lazily made packed copies, one per input shape key."""

    weight: torch.Tensor
    place: tuple[int, int] = (-1, -1)  # number of the layer and of its kind, see `row_loras.LoraLayout`
    _wanted = False
    _copies: dict[tuple, torch.Tensor]
    _stamp: tuple = ()

    def packed(self, x: torch.Tensor, key: tuple) -> torch.Tensor | None:
        """Return the packed weights for an input, remade if the weights changed; None if the layer is not packed."""
        if not self._wanted or torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
            return None
        if self._stamp != _stamp(self.weight):
            self._copies, self._stamp = {}, _stamp(self.weight)
        if key not in self._copies:
            if len(self._copies) >= _MOST_COPIES:
                self._copies.pop(next(iter(self._copies)))
            self._copies[key] = self._pack(x)
        return self._copies[key]

    def _pack(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def pack(self) -> None:
        """Use packed weights from now on."""
        self._wanted, self._copies, self._stamp = True, {}, ()

    def unpack(self) -> None:
        """Drop the packed copies."""
        self._wanted, self._copies = False, {}

    @property
    def packed_bytes(self) -> int:
        """Return the bytes of the packed copies."""
        return len(self._copies) * self.weight.numel() * self.weight.element_size() if self._wanted else 0


class Linear(_Packable, nn.Linear):
    """`nn.Linear` with optional packing, to whose output LoRAs of rows may be added."""

    def forward(self, x: torch.Tensor, loras: _Loras | None = None):  # [rows, .., in_features]
        out = self._product(x)
        if loras is not None:
            pool, rows = loras
            if x.ndim == 2:
                out = out[:, None]
                row_lora.run(x[:, None], *pool, *rows, 1, 0, [out])
                return out[:, 0]  # of the view that was written: a traced graph may not know that both share memory
            else:
                row_lora.run(x, *pool, *rows, 1, 0, [out])
        return out

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        # also for few rows, where a plain product is faster but rounds a row depending on its position in the batch
        weight = self.packed(x, ())
        if weight is None and self._few_rows(x):
            weight = (
                self.weight
            )  # oneDNN without packing is as fast as MKL, which on AVX2 sums the last rows differently
        if weight is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")

    def _few_rows(self, x: torch.Tensor) -> bool:
        """Return whether an input has one row per picture, as in the time embedding, and oneDNN supports it."""
        return (
            x.ndim == 2
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.compiler.is_compiling()
            and not torch.is_grad_enabled()
            and torch.backends.mkldnn.is_available()
            and bool(torch.backends.mkldnn.enabled)
        )

    def _pack(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)


class Conv2d(_Packable, nn.Conv2d):
    """`nn.Conv2d` with optional packing and LoRAs of rows; packed convolutions return channels-last tensors."""

    def forward(self, x: torch.Tensor, loras: _Loras | None = None):  # [rows, in_channels, h, w]
        out = self._product(x)
        if loras is not None:
            pool, rows = loras
            row_lora.run(x, *pool, *rows, self.stride[0], int(self.padding[0]), [out])
        return out

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        # a copy packed for another picture size can be far slower than no copy
        packed = self.packed(x, tuple(x.shape[2:]))
        if packed is None:
            return self._conv_forward(x, self.weight, self.bias)
        return torch.ops.mkldnn._convolution_pointwise(
            x, packed, self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )

    def _pack(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.mkldnn_reorder_conv2d_weight(
            self.weight.detach().to_mkldnn(), self.padding, self.stride, self.dilation, self.groups, list(x.shape)
        )


def pack(module: nn.Module, room: int | None = None) -> bool:
    """Pack all layers of a module on a CPU. Returns whether it was done; logs the reason if not.

    room: bytes that the copies may take; None: half of the free memory.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _Packable)]
    why = _refusal(layers, room)
    if why:
        logger.info("weights are not packed for the CPU: %s", why)
        return False
    for layer in layers:
        layer.pack()
    return True


def wants_channels_last(device: torch.device) -> bool:
    """Return whether convolutions on a device are fastest with channels last, the layout of GPU matrix units."""
    return device.type == "cuda"


def channels_last(state: Mapping[str, torch.Tensor]) -> None:
    """Convert convolution weights to channels last if that is fastest on their device; activations follow.

    The tensor objects stay the same, so modules, state dicts and pipelines that share an object still share it. For a
    module, pass its parameters, not its state dict, which holds other objects.
    """
    for weight in state.values():
        if weight.ndim == 4 and wants_channels_last(weight.device):
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def unpack(module: nn.Module) -> None:
    """Drop all packed copies of a module."""
    for layer in module.modules():
        if isinstance(layer, _Packable):
            layer.unpack()


def packed_bytes(module: nn.Module) -> int:
    """Return the bytes of all packed copies of a module."""
    return sum(layer.packed_bytes for layer in module.modules() if isinstance(layer, _Packable))


def unfolds(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether convolutions materialise all windows of their input, nine values for each: on CPUs without oneDNN.

    PyTorch uses oneDNN for 16-bit types only if the CPU has instructions for them, and ONEDNN_MAX_CPU_ISA allows them.
    """
    if device.type != "cpu":
        return False
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return True
    if dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return False


def _refusal(layers, room: int | None) -> str:
    weights = [layer.weight for layer in layers]
    if not weights or weights[0].device.type != "cpu":
        return "the model is not on a CPU"
    if not torch.backends.mkldnn.is_available():
        return "this build of PyTorch has no oneDNN"
    if weights[0].dtype not in DTYPES:
        return f"oneDNN packs float32 and bfloat16, not {weights[0].dtype}"
    if weights[0].dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16 instructions"
    if any(weight.is_inference() for weight in weights):
        return "the weights are inference tensors, whose changes are not tracked"
    needed = sum(w.numel() * w.element_size() for w in weights)
    if room is None:
        free = available_memory("cpu")
        room = needed if free is None else int(_SHARE * free)
    if needed > room:
        return f"the copies take {needed / 2**30:.2f} GiB, but only {room / 2**30:.2f} GiB may be used"
    return ""


def _stamp(weight: torch.Tensor) -> tuple:
    return id(weight), weight._version, weight.data_ptr()
