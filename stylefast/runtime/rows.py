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
from stylefast.runtime.conditions import Conditions, ImageSegment
from stylefast.runtime.trajectory import Trajectory
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
class Phase:
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


def phase_key(trajectories: Sequence[Trajectory], conditions: Conditions, step: int) -> tuple:
    """Equal for steps of one group that have equal rows."""
    branches = branches_at(trajectories, step)
    segments = [
        s.style.active(step, t.schedule.steps)
        for t in trajectories
        for b in t.branches
        for s in conditions.image_segments[t, b]
    ]
    writing = [style.active(step, t.schedule.steps) for t in trajectories for style in t.request.style]
    weights = tuple(tuple(t.step_weights[step]) for t in trajectories)
    return (
        tuple(branches.values()),
        weights,
        tuple(t.shares(step) for t in trajectories),
        tuple(segments),
        tuple(writing),
    )


def make_phase(trajectories: Sequence[Trajectory], conditions: Conditions, layout: AttentionLayout, step: int) -> Phase:
    """Return the rows of a group at `step`, and at all steps of an equal `phase_key`."""
    number = {t: i for i, t in enumerate(trajectories)}
    rows = [(t, branch) for t, branches in branches_at(trajectories, step).items() for branch in branches]
    columns = Rows.idle(len(rows), len(layout.layers))
    phase = Phase(
        picture=np.array([number[t] for t, _ in rows], dtype=np.int64),
        branch=np.array([BRANCHES.index(branch) for _, branch in rows], dtype=np.int64),
        text_page=np.stack([conditions.text_pages[row] for row in rows], axis=1),
        references=[_references(t, number) if t.shares(step) else [] for t, _ in rows],
        columns=columns,
        segments=[
            [s for s in conditions.image_segments[row] if s.style.active(step, row[0].schedule.steps)] for row in rows
        ],
        weights=np.zeros((len(trajectories), len(BRANCHES)), dtype=np.float32),
        mutual=any(t.reader is not None and t.reader.reads.mutual for t in trajectories),
    )
    for row, (t, branch) in enumerate(rows):
        phase.weights[number[t], phase.branch[row]] = t.step_weights[step].get(branch, 0.0)
        for style in _writing(t, step):
            if phase.references[row] or not isinstance(style, ReferenceStyle):
                with asking(type(style), "write_rows"):
                    style.write_rows(columns, row, layout, t.leads)
    if not np.isin(columns.self_mode, (PLAIN, CONCAT, SWAP)).all():
        raise StyleError(f"a style wrote the mode {columns.self_mode.max()}; it must be PLAIN, CONCAT or SWAP")
    return phase


def _writing(t: Trajectory, step: int) -> list[Style]:
    """Return the styles of a trajectory that may write its rows at a step; of two, the later one has the last word."""
    return [style for style in t.request.style if style.active(step, t.schedule.steps)]


def branches_at(trajectories: Sequence[Trajectory], step: int) -> dict[Trajectory, tuple[str, ...]]:
    """Return the branches that each trajectory has rows in: its own, and for a reference those of its readers."""
    if all(t.step_weights[step] == t.weights for t in trajectories):
        return {t: t.branches for t in trajectories}
    needed = {t: set(t.step_weights[step]) for t in trajectories}
    # full sharing is mutual, so do it twice
    for _ in range(2):
        for t in trajectories:
            for reference in t.references:
                needed[reference] |= needed[t]
    return {t: tuple(b for b in BRANCHES if b in needed[t]) for t in trajectories}


def _references(t: Trajectory, number: dict[Trajectory, int]) -> list[Reference]:
    if t.bank is not None:
        return [Reference(LIVE, t.bank, i) for i in range(t.bank.info.references)]
    return [Reference(number[reference]) for reference in t.references]


__all__ = ["NO_PAGE", "Phase", "Reference", "branches_at", "make_phase", "phase_key"]
