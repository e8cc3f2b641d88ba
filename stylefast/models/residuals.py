"""What control networks add to a UNet's feature maps, and where."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Residuals(NamedTuple):
    """What a control network adds to a UNet's feature maps, for some rows: [n, channels, h, w].

    rows [n] int64: their places in the batch, of which one may occur several times.
    """

    rows: Tensor
    # a ControlNet's: to each map that is kept for the up blocks, and to the middle block's
    kept: Sequence[Tensor] = ()
    # a T2I-Adapter's: within each down block, and to the middle block's
    inside: Sequence[Tensor] = ()


def with_inside(x: Tensor, residuals: Sequence[Residuals], block: int) -> Tensor:
    """Return the feature map of a down block with what T2I-Adapters add.

    It is added where they were trained: behind the last layer of a block that attends, else to the block's end.
    """
    for one in residuals:
        if one.inside:
            x = _with(x, one.rows, one.inside[block])
    return x


def with_kept(x: Tensor, skips: list[Tensor], residuals: Sequence[Residuals]) -> tuple[Tensor, list[Tensor]]:
    """Return the middle block's feature map, and those kept for the up blocks, with what is added to them."""
    for one in residuals:
        x = _with(x, one.rows, (one.kept or one.inside)[-1])
        if one.kept:
            skips = [_with(skip, one.rows, part) for skip, part in zip(skips, one.kept[:-1], strict=True)]
    return x, skips


def _with(x: Tensor, rows: Tensor, part: Tensor) -> Tensor:
    # in place, since only these rows change, unless a gradient needs the map as it was
    return x.index_add(0, rows, part) if torch.is_grad_enabled() else x.index_add_(0, rows, part)
