"""The row table: all per-row differences within a UNet batch, as tensors.

A row is (request, image, guidance branch). Styles are nothing but columns of this table, so requests with different
styles share one UNet call, strengths change without a recompile, and styles compose.

**Pages.** A page is a set of reference keys and values. Page `p < rows` is row `p` of the same batch (a live
reference); page `p >= rows` is page `p - rows` of the batch's style bank pool; -1 is none.

**Columns** are declared once, as the fields of `RowTable`: the buffers of a step, the inputs of exported graphs, the
tests' tables and the table in docs/architecture.md are derived from `COLUMNS`.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch

from stylefast.kernels.shared_attention import CONCAT, PLAIN, SWAP

__all__ = ["COLUMNS", "CONCAT", "NO_PAGE", "PLAIN", "SWAP", "Column", "RowTable"]

NO_PAGE = -1
I64, F32, BOOL = torch.int64, torch.float32, torch.bool
TEXT, SHARING, IMAGE = "text", "sharing", "image"


class Column(NamedTuple):
    """What a column of the row table is.

    dims: names of sizes ("rows", "references", "segments", "layers", "modules"; "norm_rows" is rows, or 0 where no row
    shares group norms) or numbers. idle: the value where no style writes; None numbers the last dimension. part: what a
    graph without references, or without image segments, lacks; writer, meaning: for people.
    """

    dtype: torch.dtype
    dims: tuple[str | int, ...]
    idle: float | None
    part: str
    writer: str
    meaning: str

    def shape(self, sizes: Mapping[str, Any]) -> tuple:
        """Return the dimensions with the names in `sizes` replaced, by numbers or by other names."""
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.dims)

    def filled(self, shape: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
        """Return a tensor of idle values. Works on the symbolic sizes of a trace."""
        if any(isinstance(dim, int) and dim == 0 for dim in shape):
            return torch.empty(tuple(shape), dtype=self.dtype, device=device)
        if self.idle is None:
            return torch.arange(shape[-1], dtype=self.dtype, device=device).expand(tuple(shape)).clone()
        return torch.full(tuple(shape), self.idle, dtype=self.dtype, device=device)


_ALIGNED, _INSTANT, _PROMPT = "StyleAligned", "InstantStyle", "the prompt, DreamStyler"
_PER_REFERENCE, _PER_SEGMENT = ("rows", "references"), ("rows", "segments")


class RowTable(NamedTuple):
    """Columns for `rows` rows; L self-attention layers, M attention modules, R reference and S image segments.

    Layers are in registry order, modules in execution order (`models.layout`). A NamedTuple of tensors is a pytree,
    so `torch.compile` and `torch.export` accept it directly.
    """

    # self-attention
    self_page: Annotated[
        torch.Tensor,
        Column(I64, _PER_REFERENCE, NO_PAGE, SHARING, _ALIGNED, "pages that a row attends to besides itself; -1: none"),
    ]
    self_mode: Annotated[
        torch.Tensor,
        Column(I64, ("rows",), PLAIN, SHARING, _ALIGNED, "PLAIN, CONCAT (own and reference tokens), SWAP (only those)"),
    ]
    self_layers: Annotated[
        torch.Tensor,
        Column(BOOL, ("rows", "layers"), False, SHARING, _ALIGNED, "layers on which the mode and AdaIN apply"),
    ]
    self_scale: Annotated[
        torch.Tensor, Column(F32, _PER_REFERENCE, 1, SHARING, _ALIGNED, "multiplies the logits of a reference")
    ]
    self_shift: Annotated[
        torch.Tensor, Column(F32, _PER_REFERENCE, 0, SHARING, _ALIGNED, "added to them after scaling; -inf hides them")
    ]
    adain_page: Annotated[
        torch.Tensor,
        Column(I64, ("rows",), NO_PAGE, SHARING, _ALIGNED, "whose token statistics AdaIN takes, in rows with a page"),
    ]
    adain_strength: Annotated[
        torch.Tensor,
        Column(F32, ("rows", 3), 0, SHARING, _ALIGNED, "0 to 1, for queries, keys and values"),
    ]
    norm_page: Annotated[
        torch.Tensor,
        Column(I64, ("norm_rows",), NO_PAGE, SHARING, _ALIGNED, "whose statistics group norms pool with; -1: none"),
    ]
    # cross-attention
    text_page: Annotated[
        torch.Tensor, Column(I64, ("rows",), 0, TEXT, _PROMPT, "index into the text's keys and values")
    ]
    image_page: Annotated[
        torch.Tensor,
        Column(I64, _PER_SEGMENT, NO_PAGE, IMAGE, _INSTANT, "index into the image prompts' keys and values; -1: none"),
    ]
    image_strength: Annotated[
        torch.Tensor,
        Column(F32, ("rows", "segments", "modules"), 0, IMAGE, _INSTANT, "weight of a segment's output in each module"),
    ]
    image_group: Annotated[
        torch.Tensor,
        Column(I64, _PER_SEGMENT, None, IMAGE, _INSTANT, "segments of a row with equal numbers share one softmax"),
    ]
    image_mask: Annotated[
        torch.Tensor, Column(I64, _PER_SEGMENT, -1, IMAGE, _INSTANT, "index into the masks; -1: everywhere")
    ]

    def to(self, device: torch.device | str) -> "RowTable":
        """Return the same table on another device."""
        return RowTable(*(column.to(device) for column in self))


def _declared() -> dict[str, Column]:
    hints = get_type_hints(RowTable, include_extras=True)
    return {name: hints[name].__metadata__[0] for name in RowTable._fields}


COLUMNS = _declared()
