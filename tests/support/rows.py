"""Row tables written by hand, column by column, from the contract in `stylefast.models.row_table` alone."""

import torch

from stylefast.models.layout import AttentionLayout
from stylefast.models.row_table import COLUMNS, CONCAT, SWAP, RowTable
from stylefast.models.unet import ImageKV, UNet
from tests.support.oracle.instant_style import Segment
from tests.support.oracle.style_aligned import Sharing, plain_layers
from tests.support.small_unet import Inputs


def plain_rows(layout: AttentionLayout, rows: int, references: int = 1, segments: int = 1) -> RowTable:
    """`rows` rows without any style; row i reads text page i."""
    sizes = {"rows": rows, "norm_rows": rows, "references": references, "segments": segments, "loras": 0}
    sizes |= {"layers": len(layout.layers), "modules": len(layout.modules)}
    columns = {name: column.filled(column.shape(sizes)) for name, column in COLUMNS.items()}
    return RowTable(**columns | {"text_page": torch.arange(rows)})


def share(table: RowTable, layout: AttentionLayout, sharing: Sharing, rows=None) -> RowTable:
    """Write StyleAligned's columns; only for `rows` if they are given. A row that names itself stays plain."""
    table = RowTable(*(column.clone() for column in table))
    plain = plain_layers(len(layout.layers), sharing.only_self_level)
    active = torch.tensor(
        [
            not alone and any(part in f"{layer.name}.attn1.processor" for part in sharing.layers)
            for layer, alone in zip(layout.layers, plain, strict=True)
        ]
    )
    for row in range(len(table.self_page)) if rows is None else rows:
        reference = sharing.references[row]
        if sharing.full_attention_share:
            mine = sharing.groups[row]
            others = [other for other, group in enumerate(sharing.groups) if group == mine and other != row]
            table.self_page[row, : len(others)] = torch.tensor(others, dtype=torch.int64)
            table.self_mode[row], table.self_layers[row] = CONCAT, active
        elif reference != row:
            table.self_layers[row] = active
            table.adain_page[row] = reference
            table.adain_strength[row] = torch.tensor([sharing.adain.get(name, 0.0) for name in "qkv"])
            table.self_mode[row] = SWAP if sharing.mode == "swap" else CONCAT
            table.self_page[row, 0] = reference
            table.self_scale[row, 0] = sharing.scale
            # statistics without tokens: AdaIN stays, and the reference's tokens weigh nothing
            table.self_shift[row, 0] = sharing.shift if sharing.share_attention else -torch.inf
        if sharing.share_group_norm and reference != row:
            table.norm_page[row] = reference
    return table


def image_columns(
    table: RowTable, layout: AttentionLayout, unet: UNet, segments: list[Segment], sizes, groups=None
) -> tuple[RowTable, ImageKV, tuple[torch.Tensor, ...]]:
    """Write the image columns for `segments`, with their keys, values and mask vectors made here.

    Every segment has one page a row, so page number = segment * rows + row. Masks come from diffusers.
    """
    from diffusers.image_processor import IPAdapterMaskProcessor

    rows = len(table.text_page)
    longest = max(segment.tokens.shape[1] for segment in segments)
    table = RowTable(*(column.clone() for column in table))
    masked = [index for index, segment in enumerate(segments) if segment.mask is not None]
    masks = tuple(
        torch.cat(
            [torch.ones(0, height * width)]
            + [
                IPAdapterMaskProcessor.downsample(segments[index].mask[None], 1, height * width, 1)[..., 0]
                for index in masked
            ]
        )
        for height, width in sizes
    )
    for index, segment in enumerate(segments):
        table.image_page[:, index] = index * rows + torch.arange(rows)
        for module, strength in segment.strengths.items():
            table.image_strength[:, index, layout.modules.index(module)] = strength
        if segment.mask is not None:
            table.image_mask[:, index] = masked.index(index)
        if groups is not None:
            table.image_group[:, index] = groups[index]
    layers = []
    for layer in range(len(layout.layers)):
        pair = []
        for kind in "kv":
            pages = []
            for segment in segments:
                weight = segment.adapter["ip_adapter"][f"{2 * layer + 1}.to_{kind}_ip.weight"]
                page = (segment.tokens @ weight.T).unflatten(-1, (layout.layers[layer].heads, -1))
                # what lies beyond a page's length must never be read
                pages.append(torch.nn.functional.pad(page, (0, 0, 0, 0, 0, longest - page.shape[1]), value=torch.nan))
            pair.append(torch.cat(pages))
        layers.append(tuple(pair))
    lengths = torch.tensor([segment.tokens.shape[1] for segment in segments for _ in range(rows)])
    return table, ImageKV(tuple(layers), lengths), masks


def run(unet: UNet, inputs: Inputs, table: RowTable, image_kv=None, masks=()) -> torch.Tensor:
    """Our UNet on `inputs`, with text page i made of row i's text."""
    with torch.no_grad():
        time = unet.embed(inputs.timesteps, inputs.pooled, inputs.time_ids)
        return unet(inputs.latents, time, unet.project_text(inputs.text), image_kv, table, masks=masks)
