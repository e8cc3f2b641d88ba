"""Trajectories to rows: the row table of one step.

Rows stand picture by picture, branch by branch. What a style says in words becomes numbers here: which page a row
attends to, in which layers, how strongly, which text and which image segments it sees.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stylefast.models.layout import AttentionLayout
from stylefast.models.row_table import CONCAT, NO_PAGE, PLAIN, SWAP, RowTable
from stylefast.runtime.conditions import Conditions
from stylefast.runtime.planner import LIVE, plan_segments
from stylefast.runtime.trajectory import Trajectory
from stylefast.sampling.guidance import BRANCHES
from stylefast.styles.style_aligned import PARTS


@dataclass(frozen=True)
class BatchTable:
    """The rows of one step and how pictures relate to them."""

    rows: RowTable
    picture: torch.Tensor  # [rows] int64: the picture (trajectory) a row belongs to
    branch_rows: torch.Tensor  # [pictures, 4] int64: row of each branch; -1: none
    branch_weights: torch.Tensor  # [pictures, 4] fp32
    text_page: torch.Tensor  # [rows] int64


class TableBuilder:
    """Builds the table of a step for the trajectories still running, and reuses it while nothing changes."""

    def __init__(self, conditions: Conditions, layout: AttentionLayout, device: torch.device):
        self.conditions, self.layout, self.device = conditions, layout, device
        self._key, self._table = None, None
        self._layer_masks: dict[int, torch.Tensor] = {}

    def build(self, active: Sequence[Trajectory], step: int) -> BatchTable:
        """The table of step `step` for `active` trajectories, in their order."""
        rows = [(t, branch) for t in active for branch in t.branches]
        pages = [self.conditions.text_pages[row][step] for row in rows]
        segments = [[s for s in self.conditions.image_segments[t, b] if s.style.active(step, t.schedule.steps)]
                    for t, b in rows]  # fmt: skip
        sharing = [t.references if _shares(t, step) else [] for t, _ in rows]
        key = (rows, pages, [[id(s) for s in row] for row in segments], [[id(r) for r in row] for row in sharing])
        if key != self._key:
            self._key, self._table = key, self._make(active, rows, pages, segments, sharing)
        return self._table

    def _make(self, active, rows, text_pages, segments, sharing) -> BatchTable:
        number = {t: i for i, t in enumerate(active)}
        self_columns = self._self_attention(rows, sharing, number)
        image_columns = self._images(rows, segments)
        text_page = torch.tensor(text_pages)
        table = RowTable(*self_columns, text_page, *image_columns).to(self.device)

        branch_rows = torch.full((len(active), len(BRANCHES)), -1)
        weights = torch.zeros(len(active), len(BRANCHES))
        for row, (t, branch) in enumerate(rows):
            branch_rows[number[t], BRANCHES.index(branch)] = row
            weights[number[t], BRANCHES.index(branch)] = t.weights.get(branch, 0.0)
        picture = torch.tensor([number[t] for t, _ in rows])
        return BatchTable(table, *(x.to(self.device) for x in (picture, branch_rows, weights, text_page)))

    def _self_attention(self, rows, sharing, number) -> tuple[torch.Tensor, ...]:
        count = len(rows)
        segments = plan_segments(
            [number[t] for t, _ in rows],
            [BRANCHES.index(branch) for _, branch in rows],
            [[(number[r], LIVE) for r in references] for references in sharing],
            mutual=any(t.aligned is not None and t.aligned.full_attention_share for t, _ in rows),
        )
        page = torch.from_numpy(segments.page)
        mode = torch.full((count,), PLAIN)
        layers = torch.zeros(count, len(self.layout.layers), dtype=torch.bool)
        scale, shift = torch.ones(page.shape), torch.zeros(page.shape)
        adain_page, adain_strength = torch.full((count,), NO_PAGE), torch.zeros(count, len(PARTS))
        norm_page = torch.full((count,), NO_PAGE)
        for row, (t, _) in enumerate(rows):
            if not sharing[row]:
                continue
            style = t.aligned
            mode[row] = SWAP if style.mode == "swap" else CONCAT
            layers[row] = self._layers_of(style)
            # the leader of a group is what the others take statistics from
            if style.share_group_norm and not t.leads:
                norm_page[row] = page[row, 0]
            if style.full_attention_share:
                continue
            scale[row], shift[row] = style.scale, style.shift if style.share_attention else -math.inf
            adain_page[row] = page[row, 0]
            strengths = style.adain_strengths()
            adain_strength[row] = torch.tensor([strengths.get(part, 0.0) for part in PARTS])
        if not (norm_page >= 0).any():
            norm_page = norm_page[:0]
        return page, mode, layers, scale, shift, adain_page, adain_strength, norm_page

    def _layers_of(self, style) -> torch.Tensor:
        if id(style) not in self._layer_masks:
            self._layer_masks[id(style)] = style.layer_mask(self.layout)
        return self._layer_masks[id(style)]

    def _images(self, rows, segments) -> tuple[torch.Tensor, ...]:
        count, width = len(rows), max(map(len, segments), default=0)
        page, mask = torch.full((count, width), NO_PAGE), torch.full((count, width), -1)
        strength = torch.zeros(count, width, len(self.layout.modules))
        group = torch.arange(width).expand(count, -1).clone()
        for row, row_segments in enumerate(segments):
            for s, segment in enumerate(row_segments):
                page[row, s], mask[row, s], strength[row, s] = segment.page, segment.mask, segment.strength
        return page, strength, group, mask


def _shares(t: Trajectory, step: int) -> bool:
    if t.aligned is None or not t.references:
        return False
    start, end = t.aligned.window
    return start <= step / t.schedule.steps < end
