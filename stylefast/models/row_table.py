"""The row table: everything that tells one row of a UNet batch from another, as tensors.

A row is (request, image, guidance branch). Styles are columns of this table and nothing else, which is why requests
of different styles share one UNet call, strengths change without a recompile, and styles compose.

**Pages.** A page is a set of reference keys and values. Page `p < rows` is row `p` of this very batch (a live
reference); page `p >= rows` is page `p - rows` of the style bank's pool that accompanies the batch; -1 is none.
"""

from typing import NamedTuple

import torch

from stylefast.kernels.shared_attention import CONCAT, PLAIN, SWAP

__all__ = ["CONCAT", "NO_PAGE", "PLAIN", "SWAP", "RowTable"]

NO_PAGE = -1


class RowTable(NamedTuple):
    """Columns for `rows` rows; L self-attention layers, M attention modules, R reference and S image segments.

    Layers are counted in registry order, modules in execution order (`models.layout`). A NamedTuple of tensors is a
    pytree: `torch.compile` and `torch.export` take it as it is.
    """

    # self-attention
    self_page: torch.Tensor  # [rows, R] int64: the references a row attends to beside itself; -1: none
    self_mode: torch.Tensor  # [rows] int64: PLAIN, CONCAT (own and reference tokens), SWAP (reference tokens only)
    self_layers: torch.Tensor  # [rows, L] bool: layers on which the mode and AdaIN apply; elsewhere the row is plain
    self_scale: torch.Tensor  # [rows, R] float32: multiplies the logits against a reference
    self_shift: torch.Tensor  # [rows, R] float32: added to them, after scaling
    # whose token statistics AdaIN takes, in rows that attend to a page; for AdaIN alone, hide it by a shift of -inf
    adain_page: torch.Tensor  # [rows] int64; -1: none
    adain_strength: torch.Tensor  # [rows, 3] float32 in [0, 1]: for queries, keys, values
    norm_page: torch.Tensor  # [rows] int64: whose statistics group norms pool with; -1: none; [0] if no row shares
    # cross-attention
    text_page: torch.Tensor  # [rows] int64: index into the text keys and values
    image_page: torch.Tensor  # [rows, S] int64: index into the image keys and values; -1: none
    image_strength: torch.Tensor  # [rows, S, M] float32: weight of a segment's attention output in each module
    image_group: torch.Tensor  # [rows, S] int64: segments of a row with equal numbers share one softmax
    image_mask: torch.Tensor  # [rows, S] int64: index into the masks; -1: everywhere

    def to(self, device: torch.device | str) -> "RowTable":
        """The same table on another device."""
        return RowTable(*(column.to(device) for column in self))
