"""The row table: all per-row differences within a UNet batch, as tensors; and each layer's inputs, sliced from it.

A row is (sample, guidance branch). Styles are nothing but columns of this table, so requests with different
styles share one UNet call, strengths change without a recompile, and styles compose.

**Pages.** A page is a set of reference keys and values. Page `p < rows` is row `p` of the same batch (a live
reference); page `p >= rows` is page `p - rows` of the batch's style bank pool; -1 is none.

**Columns** are declared once, as the fields of `RowTable`: the buffers of a step, the inputs of exported graphs, the
tests' tables and the table in docs/architecture.md are derived from `COLUMNS`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple, get_type_hints

import torch

from stylefast.kernels.gated_cross_attention import ImageSegments
from stylefast.kernels.shared_attention import CONCAT as CONCAT
from stylefast.kernels.shared_attention import PLAIN, Pool, References
from stylefast.kernels.shared_attention import SWAP as SWAP
from stylefast.models.prepacked import Conv2d, Linear
from stylefast.models.row_features import Recorder
from stylefast.models.row_loras import LoraInputs, StepLoras

KeyValue = tuple[torch.Tensor, torch.Tensor]  # two tensors [pages, tokens, heads, d]
NO_PAGE = -1
I64, F32, BOOL = torch.int64, torch.float32, torch.bool
TEXT, SHARING, IMAGE, LORA = "text", "sharing", "image", "lora"


class Column(NamedTuple):
    """A column of the row table.

    dims: names of sizes ("rows", "references", "segments", "loras", "layers", "modules"; "norm_rows" is rows, or 0
    where no row shares group norms) or numbers. idle: the value where no style writes; None numbers the last dimension.
    part: what a graph without references, image segments or LoRAs lacks; writer, meaning: for people. styled: whether
    a style's `write_rows` sets it, with one value for all references of a row; a name: it sets a flag of that name, by
    which the row takes the page of its first reference.
    """

    dtype: torch.dtype
    dims: tuple[str | int, ...]
    idle: float | None
    part: str
    writer: str
    meaning: str
    styled: bool | str = False

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
_PER_REF, _PER_SEGMENT, _PER_LORA = ("rows", "references"), ("rows", "segments"), ("rows", "loras")
_REQUEST = "the request"


class RowTable(NamedTuple):
    """Columns for `rows` rows; L self-attention layers, M attention modules, R reference and S image segments,
    K LoRAs.

    Layers are in registry order, modules in execution order (`models.layout`). A NamedTuple of tensors is a pytree,
    so `torch.compile` and `torch.export` accept it directly.
    """

    # self-attention
    self_page: Annotated[
        torch.Tensor,
        Column(I64, _PER_REF, NO_PAGE, SHARING, _ALIGNED, "pages that a row attends to besides itself; -1: none"),
    ]
    self_mode: Annotated[
        torch.Tensor,
        Column(I64, ("rows",), PLAIN, SHARING, _ALIGNED, "PLAIN, CONCAT (with own tokens), SWAP (without)", True),
    ]
    self_layers: Annotated[
        torch.Tensor,
        Column(BOOL, ("rows", "layers"), False, SHARING, _ALIGNED, "layers on which the mode and AdaIN apply", True),
    ]
    self_scale: Annotated[
        torch.Tensor, Column(F32, _PER_REF, 1, SHARING, _ALIGNED, "multiplies the logits of a reference", True)
    ]
    self_shift: Annotated[
        torch.Tensor, Column(F32, _PER_REF, 0, SHARING, _ALIGNED, "added to them after scaling; -inf hides them", True)
    ]
    adain_page: Annotated[
        torch.Tensor,
        Column(I64, ("rows",), NO_PAGE, SHARING, _ALIGNED, "whose statistics AdaIN takes; -1: none", "takes_adain"),
    ]
    adain_strength: Annotated[
        torch.Tensor,
        Column(F32, ("rows", 3), 0, SHARING, _ALIGNED, "0 to 1, for queries, keys and values", True),
    ]
    norm_page: Annotated[
        torch.Tensor,
        Column(I64, ("norm_rows",), NO_PAGE, SHARING, _ALIGNED, "whose group norms it pools; -1: none", "takes_norms"),
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
    # all layers
    lora: Annotated[
        torch.Tensor, Column(I64, _PER_LORA, -1, LORA, _REQUEST, "places of the LoRAs that a row uses; -1: none")
    ]
    lora_scale: Annotated[torch.Tensor, Column(F32, _PER_LORA, 0, LORA, _REQUEST, "their strengths")]

    def to(self, device: torch.device | str) -> "RowTable":
        """Return the same table on another device."""
        return RowTable(*(column.to(device) for column in self))


def _declared() -> dict[str, Column]:
    hints = get_type_hints(RowTable, include_extras=True)
    return {name: hints[name].__metadata__[0] for name in RowTable._fields}


COLUMNS = _declared()


class ImageKV(NamedTuple):
    """Image keys and values of every layer, padded to one token count."""

    layers: tuple[KeyValue, ...]
    lengths: torch.Tensor  # [image pages] int64: number of valid tokens


class StylePages(NamedTuple):
    """One step of a style bank: the features of reference rows that need not run."""

    layers: tuple[KeyValue, ...]  # raw keys and values per self-attention layer
    means: tuple[torch.Tensor, ...]  # per layer [3, pages, heads, d]: token means of queries, keys, values
    variances: tuple[torch.Tensor, ...]
    norm_means: tuple[torch.Tensor, ...]  # per group norm [pages, groups], in module order
    norm_variances: tuple[torch.Tensor, ...]
    norm_elements: tuple[int | None, ...]  # elements per statistic; None: as many as in the reading row


class SelfInputs(NamedTuple):
    """Columns of the row table for one self-attention layer, and the pages it may read."""

    references: References  # mode is PLAIN if the layer is inactive
    adain_page: torch.Tensor  # [rows], NO_PAGE if the layer is inactive
    adain_strength: torch.Tensor  # [rows, 3]
    pool: Pool | None = None
    pool_stats: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)  # means, variances
    keep: Callable[..., None] | None = None  # method of a `Recorder`, while a step is recorded


class CrossInputs(NamedTuple):
    """Inputs of one cross-attention layer: text, and image segments if any."""

    text_k: torch.Tensor  # [text pages, tokens, heads, d]
    text_v: torch.Tensor
    text_page: torch.Tensor  # [rows]
    text_lengths: torch.Tensor | None = None  # [text pages]: tokens in use; None: all
    images: ImageSegments | None = None
    keep: Callable[..., None] | None = None


class NormInputs(NamedTuple):
    """Pages whose statistics one group norm pools with its own."""

    page: torch.Tensor | None  # [rows]; None if no row shares
    pool: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)  # means, variances [pages, groups]
    pool_elements: int | None = 0  # elements per statistic; None: as many as in the reading row
    keep: Callable[..., None] | None = None


class LayerInputs(NamedTuple):
    """All inputs of a block other than the feature map, split by layer.

    Layers take plain tensors and no layer index, so that blocks of equal shape share one compiled region.
    """

    time: torch.Tensor  # [rows, time channels], after SiLU
    rows: RowTable
    text_kv: tuple[KeyValue, ...]
    image_kv: ImageKV | None
    pages: StylePages | None
    masks: tuple[torch.Tensor, ...]  # per attention level [masks, tokens]
    recorder: Recorder | None = None
    # computed for all layers at once: per layer, these small operations would cost as much as a small batch's attention
    modes: torch.Tensor | None = None  # [layers, rows], PLAIN if a layer is inactive
    adain_pages: torch.Tensor | None = None  # [layers, rows], NO_PAGE if a layer is inactive
    loras: StepLoras | None = None  # None if no row uses a LoRA
    text_lengths: torch.Tensor | None = None  # [text pages]; None: every page has all tokens

    @classmethod
    def of(
        cls,
        time: torch.Tensor,
        rows: RowTable,
        text_kv: tuple[KeyValue, ...],
        image_kv: ImageKV | None,
        pages: StylePages | None,
        masks: tuple[torch.Tensor, ...],
        recorder: Recorder | None = None,
        loras: StepLoras | None = None,
        text_lengths: torch.Tensor | None = None,
    ) -> "LayerInputs":
        """Build with the modes and AdaIN pages of every layer computed."""
        modes = adain_pages = None
        if rows.self_page.shape[1]:
            active = rows.self_layers.T
            modes = torch.where(active, rows.self_mode, PLAIN)
            adain_pages = torch.where(active, rows.adain_page, NO_PAGE)
        return cls(time, rows, text_kv, image_kv, pages, masks, recorder, modes, adain_pages, loras, text_lengths)

    def lora(self, layer: Linear | Conv2d) -> LoraInputs | None:
        """Return what the rows' LoRAs add to a layer; None if no row uses one."""
        return None if self.loras is None else self.loras.of(layer)

    def self_attention(self, layer: int) -> SelfInputs:
        """Return the inputs of self-attention `layer`."""
        rows, pages, recorder = self.rows, self.pages, self.recorder
        mode, adain_page, pool, pool_stats = rows.self_mode, rows.adain_page, None, (None, None)
        if self.modes is not None and self.adain_pages is not None:
            mode, adain_page = self.modes[layer], self.adain_pages[layer]
            if pages is not None:
                pool, pool_stats = Pool(*pages.layers[layer]), (pages.means[layer], pages.variances[layer])
        references = References(rows.self_page, mode, rows.self_scale, rows.self_shift)
        keep = None if recorder is None else partial(recorder.keep_attention, layer)
        return SelfInputs(references, adain_page, rows.adain_strength, pool, pool_stats, keep)

    def cross_attention(self, layer: int, module: int, level: int) -> CrossInputs:
        """Return the inputs of cross-attention `layer` in attention module `module` at attention level `level`."""
        rows, images = self.rows, None
        if self.image_kv is not None:
            images = ImageSegments(
                *self.image_kv.layers[layer],
                self.image_kv.lengths,
                rows.image_page,
                rows.image_strength[:, :, module],
                rows.image_group,
                self.masks[level] if self.masks else None,
                rows.image_mask,
            )
        keep = None if self.recorder is None else partial(self.recorder.keep_cross, layer)
        return CrossInputs(*self.text_kv[layer], rows.text_page, self.text_lengths, images, keep)

    def norm(self, index: int) -> NormInputs:
        """Return the inputs of group norm `index`."""
        keep = None if self.recorder is None else partial(self.recorder.keep_norm, index)
        if self.rows.norm_page.shape[0] == 0:
            return NormInputs(None, keep=keep)
        if self.pages is None:
            return NormInputs(self.rows.norm_page, keep=keep)
        pool = (self.pages.norm_means[index], self.pages.norm_variances[index])
        return NormInputs(self.rows.norm_page, pool, self.pages.norm_elements[index], keep)
