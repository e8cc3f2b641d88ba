"""From a LoRA's file to factors in units, and the places of units in a pool."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stylefast.errors import AdapterError
from stylefast.kernels.row_lora import RANK
from stylefast.models.digests import all_finite
from stylefast.models.lora_factors import Factors, row_factors
from stylefast.models.lora_file import LoraFile
from stylefast.models.row_loras import NO_UNIT, TEXT_PARTS, LoraFactors, LoraLayout, RowLoras, table_width


def lora_factors(lora: LoraFile, layout: LoraLayout, dtype: torch.dtype) -> LoraFactors:
    """Convert a LoRA as read to units in `dtype`.

    Raises AdapterError for changes that are not low-rank, and for values that are too large for `dtype`.
    """
    per_kind: list[list[tuple[int, Factors]]] = [[] for _ in layout.kinds]
    text: tuple[dict[str, Factors], ...] = ({}, {})
    for (part, name), (down, up) in row_factors(lora).items():
        module, where = name.removesuffix(".weight"), f"{lora.name}: {part}.{name}"
        pair = Factors(_stored(down, dtype, where), _stored(up, dtype, where))
        if part in TEXT_PARTS:
            text[TEXT_PARTS.index(part)][module] = pair
        else:
            number = layout.number[module]
            per_kind[layout.kind_of[number]].append((number, pair))
    starts, counts = (np.zeros(len(layout.names), dtype=np.int64) for _ in range(2))
    downs, ups = [], []
    for (taps, inner, out), members in zip(layout.kinds, per_kind, strict=True):
        used = 0
        for number, pair in members:
            starts[number], counts[number] = used, -(-len(pair.up) // RANK)
            used += int(counts[number])
        down, up = torch.zeros(used, taps, inner, RANK, dtype=dtype), torch.zeros(used, RANK, out, dtype=dtype)
        for number, pair in members:
            for i in range(counts[number]):
                ranks = slice(i * RANK, min((i + 1) * RANK, len(pair.up)))
                down[starts[number] + i, :, :, : ranks.stop - ranks.start] = pair.down[:, :, ranks]
                up[starts[number] + i, : ranks.stop - ranks.start] = pair.up[ranks]
        downs.append(down)
        ups.append(up)
    return LoraFactors(tuple(downs), tuple(ups), starts, counts, text)


def unit_table(
    layout: LoraLayout, starts: np.ndarray, counts: np.ndarray, units: Sequence[np.ndarray], width: int
) -> np.ndarray:
    """Return the units of each layer, [layers, width], -1 beyond `counts`.

    units[kind][i] is the place of a kind's unit i in the pool.
    """
    places, table = np.arange(width), np.full((len(layout.names), width), NO_UNIT, dtype=np.int64)
    kinds = np.array(layout.kind_of)
    for kind, own in enumerate(units):
        layers = np.flatnonzero((kinds == kind) & (counts > 0))
        used = places < counts[layers, None]
        table[layers] = np.where(used, own[np.where(used, starts[layers, None] + places, 0)], NO_UNIT)
    return table


def joined(layout: LoraLayout, used: Sequence[LoraFactors]) -> RowLoras:
    """Return LoRAs as a batch reads them, by their places in `used`, in pools of exactly their units."""
    ends = np.cumsum([[0] * len(layout.kinds), *(factors.units() for factors in used)], axis=0)  # [LoRAs + 1, kinds]
    width = table_width(max(factors.rank for factors in used) // RANK)
    tables = []
    for factors, firsts, lasts in zip(used, ends, ends[1:]):
        places = [np.arange(first, last) for first, last in zip(firsts, lasts)]
        tables.append(unit_table(layout, factors.starts, factors.counts, places, width))
    down, up = (tuple(map(torch.cat, zip(*pools))) for pools in zip(*((one.down, one.up) for one in used)))
    return RowLoras(down, up, torch.from_numpy(np.stack(tables)))


def _stored(factor: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    found = factor.to(dtype)
    if not all_finite(found):
        raise AdapterError(
            f"{where} has values up to {float(factor.abs().max()):g}, too large for {dtype}; load the model in float32 "
            "or bfloat16"
        )
    return found
