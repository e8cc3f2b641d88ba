"""What a style says in words, as columns of numbers: the rows of one group of pictures.

Rows stand picture by picture, branch by branch. They stay the same from step to step until a window opens or closes,
so they are made once per such phase and kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stylefast.errors import StyleError
from stylefast.models.layout import AttentionLayout
from stylefast.models.row_table import CONCAT, NO_PAGE, PLAIN, SWAP
from stylefast.runtime.plan.sample import Sample
from stylefast.runtime.steps.conditions import Conditions, ImageSegment
from stylefast.sampling.guidance import BRANCHES
from stylefast.styles.bank import StyleBank
from stylefast.styles.style import ReferenceStyle, Rows, Style, asking

LIVE = -1


@dataclass(frozen=True)
class Reference:
    """What one row looks at beside itself: a picture of its group, or a page of a bank."""

    picture: int  # place in the group; LIVE's counterpart, -1, for a bank's page
    bank: StyleBank | None = None
    number: int = 0  # which of the bank's references


@dataclass(frozen=True, eq=False)
class GroupRows:
    """The rows of a group while nothing but the step changes: `rows` rows, `pictures` pictures."""

    picture: np.ndarray  # [rows] int64: place in the group
    branch: np.ndarray  # [rows] int64: place in BRANCHES
    text_page: np.ndarray  # [steps, rows] int64
    references: list[list[Reference]]  # per row
    columns: Rows  # what styles have written
    segments: list[list[ImageSegment]]  # per row
    weights: np.ndarray  # [pictures, 4] float32 of the branches
    mutual: bool  # whether references may have references

    @property
    def rows(self) -> int:
        return len(self.picture)

    @property
    def width(self) -> int:
        """Most references of a row."""
        return max(map(len, self.references), default=0)

    @property
    def segment_width(self) -> int:
        """Most image segments of a row."""
        return max(map(len, self.segments), default=0)


def rows_key(samples: Sequence[Sample], conditions: Conditions, step: int) -> tuple:
    """Equal for steps of one group that have equal rows."""
    branches = branches_at(samples, step)
    segments = [
        s.style.active(step, sample.schedule.steps)
        for sample in samples
        for b in sample.branches
        for s in conditions.image_segments[sample, b]
    ]
    writing = [style.active(step, sample.schedule.steps) for sample in samples for style in sample.request.style]
    weights = tuple(tuple(sample.step_weights[step]) for sample in samples)
    return (
        tuple(branches.values()),
        weights,
        tuple(sample.shares(step) for sample in samples),
        tuple(segments),
        tuple(writing),
    )


def make_group_rows(samples: Sequence[Sample], conditions: Conditions, layout: AttentionLayout, step: int) -> GroupRows:
    """Return the rows of a group at `step`, and at all steps of an equal `rows_key`."""
    number = {sample: i for i, sample in enumerate(samples)}
    rows = [(sample, branch) for sample, branches in branches_at(samples, step).items() for branch in branches]
    columns = Rows.idle(len(rows), len(layout.layers))
    group_rows = GroupRows(
        picture=np.array([number[sample] for sample, _ in rows], dtype=np.int64),
        branch=np.array([BRANCHES.index(branch) for _, branch in rows], dtype=np.int64),
        text_page=np.stack([conditions.text_pages[row] for row in rows], axis=1),
        references=[_references(sample, number) if sample.shares(step) else [] for sample, _ in rows],
        columns=columns,
        segments=[
            [s for s in conditions.image_segments[row] if s.style.active(step, row[0].schedule.steps)] for row in rows
        ],
        weights=np.zeros((len(samples), len(BRANCHES)), dtype=np.float32),
        mutual=any(sample.reader is not None and sample.reader.reads.mutual for sample in samples),
    )
    for row, (sample, branch) in enumerate(rows):
        group_rows.weights[number[sample], group_rows.branch[row]] = sample.step_weights[step].get(branch, 0.0)
        for style in _writing(sample, step):
            if group_rows.references[row] or not isinstance(style, ReferenceStyle):
                with asking(type(style), "write_rows"):
                    style.write_rows(columns, row, layout, sample.leads)
    if not np.isin(columns.self_mode, (PLAIN, CONCAT, SWAP)).all():
        raise StyleError(f"a style wrote the mode {columns.self_mode.max()}; it must be PLAIN, CONCAT or SWAP")
    return group_rows


def _writing(sample: Sample, step: int) -> list[Style]:
    """Return the styles of a sample that may write its rows at a step; of two, the later one has the last word."""
    return [style for style in sample.request.style if style.active(step, sample.schedule.steps)]


def branches_at(samples: Sequence[Sample], step: int) -> dict[Sample, tuple[str, ...]]:
    """Return the branches that each sample has rows in: its own, and for a reference those of its readers."""
    if all(sample.step_weights[step] == sample.weights for sample in samples):
        return {sample: sample.branches for sample in samples}
    needed = {sample: set(sample.step_weights[step]) for sample in samples}
    # full sharing is mutual, so do it twice
    for _ in range(2):
        for sample in samples:
            for reference in sample.references:
                needed[reference] |= needed[sample]
    return {sample: tuple(b for b in BRANCHES if b in needed[sample]) for sample in samples}


def _references(sample: Sample, number: dict[Sample, int]) -> list[Reference]:
    if sample.bank is not None:
        return [Reference(LIVE, sample.bank, i) for i in range(sample.bank.info.references)]
    return [Reference(number[reference]) for reference in sample.references]


__all__ = ["NO_PAGE", "GroupRows", "Reference", "branches_at", "make_group_rows", "rows_key"]
