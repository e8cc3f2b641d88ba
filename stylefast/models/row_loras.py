"""LoRAs per row: what each layer of the UNet adds for the rows of a batch, as inputs of the operation `row_lora`.

A row adds `scale * (x A) B` of every LoRA it uses to a layer's own product, so rows with different LoRAs share one UNet
call and the model's weights stay unchanged. Factors come in units of rank 16. All layers with equal widths share one
pool of units, and a table says which units a LoRA uses in which layer: LoRAs of any rank, and several on one row, are
numbers in a table.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stylefast.kernels.row_lora import RANK, LoraPool, LoraRows
from stylefast.models.lora_factors import Factors
from stylefast.models.prepacked import Conv2d, Linear

NO_UNIT = -1
# of a layer in a table of units: compiled code treats sizes of 0 and 1 separately
LEAST_WIDTH = 2
# names of the text encoders in LoRA files
TEXT_PARTS = ("text_encoder", "text_encoder_2")


def table_width(units: int) -> int:
    """Return the width of a table for LoRAs of up to `units` units in a layer: a power of two, so it seldom grows."""
    return 1 << (max(LEAST_WIDTH, units) - 1).bit_length()


class LayerKind(NamedTuple):
    """The sizes that layers with a common pool share."""

    taps: int  # kernel height times width; 1 for linear layers
    channels_in: int
    channels_out: int


class LoraLayout:
    """The layers of a UNet that take LoRAs, in module order, and their kinds.

    Sets `place` of every layer: (number of the layer, number of its kind).
    """

    def __init__(self, unet: nn.Module):
        self.names: list[str] = []
        self.kinds: list[LayerKind] = []
        self.kind_of: list[int] = []
        for name, layer in unet.named_modules():
            if isinstance(layer, (Linear, Conv2d)):
                out, inner, *kernel = layer.weight.shape
                kind = LayerKind(int(np.prod(kernel, dtype=int)), inner, out)
                if kind not in self.kinds:
                    self.kinds.append(kind)
                layer.place = (len(self.names), self.kinds.index(kind))
                self.names.append(name)
                self.kind_of.append(layer.place[1])
        self.number = {name: i for i, name in enumerate(self.names)}

    def unit_bytes(self, kind: int, dtype: torch.dtype) -> int:
        """Return the bytes of one unit of a kind."""
        taps, inner, out = self.kinds[kind]
        return RANK * (taps * inner + out) * dtype.itemsize


class LoraInputs(NamedTuple):
    """The LoRAs that `row_lora` adds to one layer, or to layers with one input, such as queries, keys and values."""

    pool: LoraPool
    rows: LoraRows  # whose parts are the layers


class BlockLoras(NamedTuple):
    """LoRAs of a transformer block's layers."""

    self_attention: tuple[LoraInputs, LoraInputs]  # of queries, keys and values; of the output
    cross_attention: tuple[LoraInputs, LoraInputs]  # of queries; of the output. Text's keys and values are ready
    feed_forward: tuple[LoraInputs, LoraInputs]


class ResnetLoras(NamedTuple):
    """LoRAs of a resnet's layers."""

    conv1: LoraInputs
    time: LoraInputs
    conv2: LoraInputs
    shortcut: LoraInputs | None


class RowLoras(NamedTuple):
    """The LoRAs that a batch may use, on its device.

    Layers and kinds are numbered as in `LoraLayout`; LoRAs by their places in `units`.
    """

    down: tuple[Tensor, ...]  # per kind [units, taps, in, 16]
    up: tuple[Tensor, ...]  # per kind [units, 16, out]
    units: Tensor  # [LoRAs, layers, N] int64; -1: none

    def of_rows(self, lora: Tensor, scale: Tensor) -> "StepLoras":
        """Return what rows add, from the row table's columns `lora` and `lora_scale` [rows, K]."""
        units = torch.where(lora[:, :, None, None] >= 0, self.units[lora.clamp(min=0)], NO_UNIT)  # [rows, K, layers, N]
        unit = units.permute(2, 0, 1, 3).flatten(2).contiguous()  # one layout, whatever K is, for compiled code
        return StepLoras(self.down, self.up, unit, scale.repeat_interleave(self.units.shape[2], dim=1))


class StepLoras(NamedTuple):
    """The LoRAs of the rows of one UNet call."""

    down: tuple[Tensor, ...]
    up: tuple[Tensor, ...]
    unit: Tensor  # [layers, rows, K * N] int64
    scale: Tensor  # [rows, K * N] fp32

    def of(self, layer: Linear | Conv2d, layers: int = 1) -> LoraInputs:
        """Return the inputs of a layer, or of `layers` layers numbered from it, which have its kind and its input."""
        number, kind = layer.place
        pool = LoraPool(self.down[kind], self.up[kind])
        return LoraInputs(pool, LoraRows(self.unit[number : number + layers], self.scale))


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """The factors of one LoRA in host memory, in the model's type, ready to be copied into pools.

    Layer i of the layout uses `counts[i]` units of its kind, from `starts[i]`. `text` holds, for each text encoder, the
    factors by module name.
    """

    down: tuple[Tensor, ...]  # per kind [units, taps, in, 16]
    up: tuple[Tensor, ...]  # per kind [units, 16, out]
    starts: np.ndarray  # [layers] int64
    counts: np.ndarray  # [layers] int64
    text: tuple[Mapping[str, Factors], ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all factors."""
        text = [factor for found in self.text for pair in found.values() for factor in pair]
        return sum(x.nbytes for x in (*self.down, *self.up, *text))

    @property
    def rank(self) -> int:
        """Return the largest number of ranks of a layer, in whole units; 0 if no layer of the UNet changes."""
        return RANK * int(self.counts.max(initial=0))

    def units(self) -> list[int]:
        """Return the number of units of each kind."""
        return [len(up) for up in self.up]


class LoraProducts(NamedTuple):
    """LoRAs with their strengths, for layers outside the steps, whose factors are in host memory."""

    used: tuple[tuple[LoraFactors, float], ...]

    def added(self, out: Tensor, x: Tensor, layer: Linear) -> Tensor:
        """Return out [.., out_features] plus what the LoRAs add to a layer's output for x [.., in_features]."""
        number, kind = layer.place
        pairs = []
        for factors, scale in self.used:
            units = slice(factors.starts[number], factors.starts[number] + factors.counts[number])
            if factors.counts[number] and scale:
                down, up = factors.down[kind][units, 0], factors.up[kind][units]
                pairs.append((down.transpose(0, 1).flatten(1), up.flatten(0, 1), scale))
        return add_products(out, x, pairs)


def add_products(out: Tensor, x: Tensor, products: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """Return out + sum of scale * (x A) B for x [.., in], A [in, rank], B [rank, out], summed in fp32."""
    if not products:
        return out
    exact = torch.promote_types(out.dtype, torch.float32)
    total, seen = out.to(exact), x.to(exact)
    for down, up, scale in products:
        total = total + scale * (seen @ down.to(x.device, exact)) @ up.to(x.device, exact)
    return total.to(out.dtype)
