"""All inputs of one step of a batch, in buffers with fixed addresses.

A UNet call and the sampler's update read some twenty small tensors: the row table, the rows of each picture, and the
coefficients of this step. They are views of a few flat buffers, one per element type, so that a step needs only that
many small copies to the device, and a captured graph finds them at the same addresses at every replay.

`plan_pages` orders the rows and resolves their references to pages. It checks its arguments and plans in C++;
`plan_pages_ref` is the same in plain Python, which is used where the extension is not built, says what is wrong with
a batch, and is what tests compare with.
"""

import math
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from stylefast._extension import extension
from stylefast.errors import InvalidRequest
from stylefast.models.control_net import ControlNet, ControlRows, map_weights
from stylefast.models.row_table import COLUMNS, NO_PAGE, RowTable
from stylefast.models.t2i_adapter import T2IAdapter
from stylefast.runtime.banks.bank_pages import PageKey
from stylefast.runtime.plan.sample import GroupRows, SampleGroup
from stylefast.runtime.steps.conditions import ControlUse
from stylefast.sampling.guidance import BRANCHES
from stylefast.styles.style import Rows
from stylefast.values import quoted

# host buffers in flight: a lagging device still reads older ones
_RING = 4
# max row layouts of recent batches that are kept
_PLANS = 8
# noise has its own buffer, since it is by far the largest and most samplers need none
_KINDS = {"int": torch.int64, "float": torch.float32, "bool": torch.bool, "noise": torch.float32}
_KIND_OF = {torch.int64: "int", torch.float32: "float", torch.bool: "bool"}

LIVE = -1  # instead of a bank page: the reference is a picture of this batch
BANK_PAGES = 2**31  # exclusive limit of a bank page's index

_NONE = -1
_BRANCHES = 4
_own = threading.local()  # a C++ planner keeps scratch memory, so every thread has its own


class BatchShape(NamedTuple):
    """The sizes for which a compiled step is specialised."""

    rows: int
    pictures: int
    references: int  # columns of self_page
    segments: int  # columns of image_page
    loras: int  # columns of lora
    norms: bool  # whether any row may share group norms
    layers: int
    modules: int
    latents: tuple[int, int, int]  # (channels, h, w)


class StepColumns(NamedTuple):
    """The tensors of one step."""

    table: RowTable
    row_picture: torch.Tensor  # [rows] int64: the picture of a row
    slot: torch.Tensor  # slot of a picture's latents
    branch_rows: torch.Tensor  # [pictures, 4] int64
    branch_weights: torch.Tensor  # [pictures, 4]
    timestep: torch.Tensor  # [pictures]
    input_scale: torch.Tensor  # [pictures]
    time_ids: torch.Tensor  # [pictures, 6]
    rescale: torch.Tensor  # [pictures]
    denoised: torch.Tensor  # [pictures, 2]
    update: torch.Tensor  # [pictures, 2, 6]
    noise: torch.Tensor  # [pictures, channels, h, w]


class StepBuffers:
    """The buffers of one shape, filled from groups."""

    def __init__(self, shape: BatchShape, device: torch.device):
        self.shape, self._device = shape, device
        r, p = shape.rows, shape.pictures
        sizes = shape._asdict() | {"norm_rows": r if shape.norms else 0}
        self._layout = {name: (_KIND_OF[column.dtype], column.shape(sizes)) for name, column in COLUMNS.items()} | {
            "row_picture": ("int", (r,)),
            "slot": ("int", (p,)),
            "branch_rows": ("int", (p, len(BRANCHES))),
            "branch_weights": ("float", (p, len(BRANCHES))),
            "timestep": ("float", (p,)),
            "input_scale": ("float", (p,)),
            "time_ids": ("float", (p, 6)),
            "rescale": ("float", (p,)),
            "denoised": ("float", (p, 2)),
            "update": ("float", (p, 2, 6)),
            "noise": ("noise", (p, *shape.latents)),
        }
        on_host = device.type == "cpu"
        self._hosts = [self._buffers(torch.device("cpu"), pinned=not on_host) for _ in range(1 if on_host else _RING)]
        self._events: list[torch.cuda.Event | None] = [None] * len(self._hosts)
        self._flat = self._hosts[0] if on_host else self._buffers(device, pinned=False)
        columns = self._views(self._flat)
        rows = RowTable(*(columns.pop(name) for name in RowTable._fields))
        self.columns = StepColumns(rows, **columns)
        self._arrays = [{k: v.numpy() for k, v in self._views(flat).items()} for flat in self._hosts]
        self._turn, self._noisy = 0, False
        self._written: list[tuple] = [()] * len(self._hosts)  # ids of the groups and rows that a host buffer holds
        self._plans: dict[tuple, _Plan] = {}
        self.controls: tuple[ControlRows, ...] = ()  # of the step that was written last

    @property
    def nbytes(self) -> int:
        """Return the bytes of the buffers, on the device and on the host."""
        flats = [*self._hosts, self._flat] if len(self._hosts) > 1 else self._hosts
        return sum(x.numel() * x.element_size() for flat in flats for x in flat.values())

    def fill(self, groups: Sequence[SampleGroup], pages: Sequence[np.ndarray]) -> None:
        """Write the current step of `groups`; `pages[i]` are the pool's slots of group i's bank references.

        Those slots are in the order of `bank_keys`. Rows and pictures beyond those of the groups become idle ones:
        plain, on slot 0, with unused results.
        """
        turn = self._turn = (self._turn + 1) % len(self._hosts)
        event = self._events[turn]
        if event is not None:
            event.synchronize()  # long passed, unless the device lags by the whole ring
        arrays, all_rows = self._arrays[turn], [g.rows_at() for g in groups]
        key = tuple((id(g), id(group_rows)) for g, group_rows in zip(groups, all_rows))
        if self._written[turn] != key or key not in self._plans:
            self._written[turn] = key
            if len(self._plans) >= _PLANS:
                self._plans.clear()
            # the plan keeps groups and their rows alive, so that their ids stay unique
            self._plans[key] = self._write_rows(arrays, groups, all_rows)
        self._write_step(arrays, self._plans[key], groups, all_rows, pages)
        self.controls = tuple(one.rows(self._device) for one in self._plans[key].controls)
        if len(self._hosts) > 1:
            noisy = any(g.noisy for g in groups)
            for kind, flat in self._flat.items():
                # copied once more after the last noise: an old NaN would spread even when multiplied by 0
                if kind != "noise" or noisy or self._noisy:
                    flat.copy_(self._hosts[turn][kind], non_blocking=True)
            self._noisy = noisy
            event = self._events[turn] = torch.cuda.Event()
            # `record` would use the current device's stream, and the buffers may be on another device
            event.record(torch.cuda.current_stream(self._device))

    def drop(self, group: SampleGroup) -> None:
        """Drop references to a group that left: its latents, pictures and banks may be large."""
        for key in [key for key, plan in self._plans.items() if group in plan.groups]:
            del self._plans[key]

    def _write_rows(self, arrays: dict, groups: Sequence[SampleGroup], all_rows: Sequence[GroupRows]) -> "_Plan":
        """Write all values that do not change between steps."""
        shape, plan = self.shape, _Plan(groups, all_rows, self.shape)
        count, pictures = plan.rows, plan.pictures
        for name, column in COLUMNS.items():
            arrays[name][...] = np.arange(arrays[name].shape[-1]) if column.idle is None else column.idle
        for name in ("branch_weights", "rescale", "denoised", "update", "noise", "timestep", "slot", "row_picture"):
            arrays[name].fill(0)
        arrays["branch_rows"].fill(-1)
        arrays["input_scale"].fill(1)
        side = [8 * x for x in (shape.latents[1], shape.latents[2])]
        arrays["time_ids"][:] = [*side, 0, 0, *side]
        if shape.rows > count:
            arrays["row_picture"][count:] = min(pictures, shape.pictures - 1)

        order = plan.order
        arrays["row_picture"][:count] = plan.picture[order]
        plan.columns.write(arrays, plan.width[order])
        segments = [(row, g) for g, group_rows in zip(groups, all_rows) for row in group_rows.segments]
        for row, source in enumerate(order):
            found, group = segments[source]
            for i, segment in enumerate(found):
                arrays["image_page"][row, i], arrays["image_mask"][row, i] = segment.pages[group.step], segment.mask
                arrays["image_strength"][row, i] = segment.strength
                if (segment.pages != segment.pages[0]).any():
                    plan.varying.append((row, i, segment.pages, group))
        loras = [row for group_rows in all_rows for row in group_rows.loras]
        for row, source in enumerate(order):
            for i, (place, strength) in enumerate(loras[source]):
                arrays["lora"][row, i], arrays["lora_scale"][row, i] = place, strength
        arrays["branch_rows"][plan.picture[order], plan.branch[order]] = np.arange(count)
        start = 0
        for g, group_rows in zip(groups, all_rows):
            part = slice(start, start + g.pictures)
            arrays["branch_weights"][part], arrays["rescale"][part] = group_rows.weights, g.rescale
            # rescaling needs at least two branches
            arrays["rescale"][part][(group_rows.weights != 0).sum(1) < 2] = 0
            arrays["time_ids"][part], arrays["slot"][part] = g.time_ids, g.slots
            start += g.pictures
        return plan

    def _write_step(self, arrays, plan: "_Plan", groups, all_rows, pages) -> None:
        count, start = plan.rows, 0
        for g in groups:
            part, step = slice(start, start + g.pictures), g.step
            arrays["timestep"][part], arrays["input_scale"][part] = g.timestep[step], g.input_scale[step]
            arrays["denoised"][part], arrays["update"][part] = g.denoised[step], g.update[step]
            if g.noisy:
                arrays["noise"][part] = g.noise().numpy()
            start += g.pictures
        text = [group_rows.text_page[g.step] for g, group_rows in zip(groups, all_rows)]
        arrays["text_page"][:count] = np.concatenate(text)[plan.order]
        for row, i, image_pages, group in plan.varying:
            arrays["image_page"][row, i] = image_pages[group.step]
        if self.shape.references:
            page = plan.self_page
            if plan.bank_places.size:
                # the pool's pages are numbered after all rows of the call, including idle ones
                page = page.copy()
                page.reshape(-1)[plan.bank_places] = self.shape.rows + np.concatenate(pages)
            arrays["self_page"][:count] = page
            plan.columns.write_pages(arrays, page[:, 0])

    def _buffers(self, device: torch.device, pinned: bool) -> dict[str, torch.Tensor]:
        sizes = dict.fromkeys(_KINDS, 0)
        for kind, shape in self._layout.values():
            sizes[kind] += _padded(math.prod(shape))
        return {
            kind: torch.zeros(size, dtype=_KINDS[kind], device=device, pin_memory=pinned)
            for kind, size in sizes.items()
        }

    def _views(self, flat: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        starts, views = dict.fromkeys(flat, 0), {}
        for name, (kind, shape) in self._layout.items():
            count = math.prod(shape)
            views[name] = flat[kind][starts[kind] : starts[kind] + count].view(shape)
            starts[kind] += _padded(count)
        return views


def bank_keys(group: SampleGroup, step: int | None = None) -> list[PageKey]:
    """List every bank page that a group's rows read, row by row."""
    step, loras = group.step if step is None else step, group.conditions.bank_loras
    group_rows = group.rows_at(step)
    return [
        PageKey(reference.bank, step, int(branch), reference.number, loras.get(reference.bank.id))
        for branch, references in zip(group_rows.branch, group_rows.references)
        for reference in references
        if reference.bank is not None
    ]


class _Plan:
    """Arrangement of the rows of some groups in the buffers, with readers of a page adjacent."""

    def __init__(self, groups: Sequence[SampleGroup], all_rows: Sequence[GroupRows], shape: BatchShape):
        self.groups, self.all_rows = list(groups), list(all_rows)
        # (row, segment, pages [steps], group) of image segments whose page depends on the step
        self.varying: list[tuple[int, int, np.ndarray, SampleGroup]] = []
        self.rows, self.pictures = sum(rows.rows for rows in all_rows), sum(g.pictures for g in groups)
        starts = np.cumsum([0, *(g.pictures for g in groups)])
        self.picture = np.concatenate([group_rows.picture + start for group_rows, start in zip(all_rows, starts)])
        self.branch = np.concatenate([group_rows.branch for group_rows in all_rows])
        references, numbers, bank_rows = [], {}, []
        for group_rows, start in zip(all_rows, starts):
            for branch, row in zip(group_rows.branch, group_rows.references):
                entries = []
                for column, reference in enumerate(row):
                    if reference.bank is None:
                        entries.append((int(start) + reference.picture, -1))
                    else:
                        key = (reference.bank.id, int(branch), reference.number)
                        entries.append((0, numbers.setdefault(key, len(numbers))))
                        bank_rows.append((len(references), column))
                references.append(entries)
        self.width = np.array([len(row) for row in references], dtype=np.int64)
        page, self.order = plan_pages(
            self.picture, self.branch, references, width=shape.references, mutual=any(rows.mutual for rows in all_rows)
        )
        place = np.empty(self.rows, dtype=np.int64)
        place[self.order] = np.arange(self.rows)
        live = (page >= 0) & (page < self.rows)
        page = np.where(live, place[np.where(live, page, 0)], page)[self.order]
        self.self_page = np.where(page >= self.rows, NO_PAGE, page)  # bank pages change with the step
        columns = page.shape[1]
        self.bank_places = np.array([place[row] * columns + column for row, column in bank_rows], dtype=np.int64)
        self.columns = Rows.joined([rows.columns for rows in all_rows], self.order)
        uses = [(use, group) for group, rows in zip(groups, all_rows) for row in rows.controls for use in [*row, None]]
        self.controls = _controlled(uses, self.order) if any(use is not None for use, _ in uses) else []


class _Controlled:
    """The rows that one network steers while a plan holds."""

    def __init__(self, network: ControlNet | T2IAdapter):
        self.network = network
        self._rows: list[int] = []
        self._uses: list[tuple[list[ControlUse], SampleGroup]] = []  # more than one only for a union
        self._fixed: tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor] | None = None
        self._types: torch.Tensor | None = None

    def add(self, row: int, use: ControlUse, group: SampleGroup) -> None:
        if use.together and self._rows and self._rows[-1] == row:
            self._uses[-1][0].append(use)
        else:
            self._rows.append(row)
            self._uses.append(([use], group))

    def rows(self, device: torch.device) -> ControlRows:
        """Return the rows at their groups' current steps."""
        if self._fixed is None:
            maps = self.network.maps
            weights = [
                map_weights(
                    maps, 1.0 if use.together else use.control.weight, use.control.guess_mode and not self.network.pools
                )
                for (use, *_), _ in self._uses
            ]
            rows = [
                [torch.stack(maps).sum(0) for maps in zip(*(use.picture for use in uses))] for uses, _ in self._uses
            ]
            pictures = tuple(map(torch.stack, zip(*rows)))
            self._fixed = (
                torch.tensor(self._rows, device=device),
                pictures,
                torch.tensor(weights, dtype=pictures[0].dtype, device=device),
            )
            if self.network.union is not None:
                self._types = self.network.union.embed_types([use.numbers for (use, *_), _ in self._uses])
        pages = self._uses[0][0][0].pages
        places = np.array([use.text_page[group.step] for (use, *_), group in self._uses])
        text_page, layers, lengths = torch.from_numpy(places).to(device), (), None
        if pages is not None:
            layers, lengths = pages.layers, pages.lengths if pages.any_shorter(places) else None
        return ControlRows(self.network, *self._fixed, layers, text_page, lengths, self._types)


def _controlled(uses: Sequence[tuple["ControlUse | None", SampleGroup]], order: np.ndarray) -> "list[_Controlled]":
    """Sort control pictures by network; `uses`: those of each row, followed by None, in the order before `order`."""
    found: dict[ControlNet | T2IAdapter, _Controlled] = {}
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    row = 0
    for use, group in uses:
        if use is None:
            row += 1
        else:
            found.setdefault(use.network, _Controlled(use.network)).add(int(place[row]), use, group)
    return list(found.values())


def _padded(count: int) -> int:
    # align every view to at least 32 bytes, even for single-byte elements
    return -(-count // 32) * 32


class PagePlan(NamedTuple):
    """The page whose keys and values each row reads, and a row order in which readers of a page are neighbours."""

    page: np.ndarray  # [rows, R] int64: a row of the batch, or rows + page of the bank; -1: none
    order: np.ndarray  # [rows] int64: a permutation of the rows


def plan_pages(
    pictures: Sequence[int] | np.ndarray,
    branches: Sequence[int] | np.ndarray,
    references: Sequence[Sequence[tuple[int, int]]],
    *,
    width: int = 0,
    mutual: bool = False,
) -> PagePlan:
    """Resolve every row's references to pages.

    Args:
        pictures: for each row the id of its picture, any int64.
        branches: for each row its guidance branch, 0 to 3. A picture has at most one row per branch.
        references: for each row a list of (picture id, bank page). If the bank page is `LIVE` (-1), the reference is
            the row of that picture in the same branch; if it is >= 0, it is that page of the style bank's pool, and the
            picture's id is ignored. Column r of the result belongs to the r-th entry.
        width: least number of columns R, for shapes that don't change between batches.
        mutual: let rows refer to rows that have references themselves, as in full attention sharing. Otherwise such a
            chain is an error: the reference of a style must not depend on its readers.

    Returns:
        `PagePlan`. In `order`, rows connected by shared pages (including live references) form one run, runs are sorted
        by their first row, and inside a run rows with equal pages are neighbours; otherwise the order of the rows is
        kept.

    Raises:
        InvalidRequest: lengths that differ, values out of range, two rows of one picture and branch, a live reference
        without a row in the branch, a chain.
    """
    module = extension()
    if module is None:
        return plan_pages_ref(pictures, branches, references, width=width, mutual=mutual)
    batch, columns = _arrays(pictures, branches, references, width)
    page, order = np.empty((len(pictures), columns), np.int64), np.empty(len(pictures), np.int64)
    if not hasattr(_own, "planner"):
        _own.planner = module.BatchPlanner()
    if not _own.planner.plan(*batch, page, order, mutual):
        return plan_pages_ref(pictures, branches, references, width=width, mutual=mutual)  # raises, with the reason
    return PagePlan(page, order)


def plan_pages_ref(
    pictures: Sequence[int] | np.ndarray,
    branches: Sequence[int] | np.ndarray,
    references: Sequence[Sequence[tuple[int, int]]],
    *,
    width: int = 0,
    mutual: bool = False,
) -> PagePlan:
    """Do what `plan_pages` does, row by row."""
    batch, columns = _arrays(pictures, branches, references, width)
    rows, keys = len(pictures), list(zip(batch[0].tolist(), batch[1].tolist()))
    row_of: dict[tuple[int, int], int] = {}
    for row, key in enumerate(keys):
        if row_of.setdefault(key, row) != row:
            raise InvalidRequest(
                f"rows {row_of[key]} and {row} are both {_name(*key)}; a batch holds each picture and branch once"
            )

    pages: list[list[int]] = []
    parent = list(range(rows))
    first_reader: dict[int, int] = {}
    for row, (_, branch) in enumerate(keys):
        own = []
        for picture, bank_page in references[row]:
            if bank_page == LIVE:
                own.append(_live(row, (int(picture), branch), row_of, references, mutual))
                _join(parent, own[-1], row)
            else:
                own.append(rows + int(bank_page))
                _join(parent, first_reader.setdefault(own[-1], row), row)
        pages.append(own + [_NONE] * (columns - len(own)))
    # sets of rows that share pages, by their first row; within a set, rows with equal pages are adjacent
    order = sorted(range(rows), key=lambda row: (_find_root(parent, row), pages[row]))
    return PagePlan(np.array(pages, np.int64).reshape(rows, columns), np.array(order, np.int64))


def _arrays(pictures, branches, references, width: int) -> tuple[tuple[np.ndarray, ...], int]:
    """Return pictures, branches, offsets of each row's entries, their pictures and bank pages; and the columns.

    Raises InvalidRequest as `plan_pages` does, but not for what concerns rows together.
    """
    if width < 0:
        raise InvalidRequest(f"width is {width}, but must be 0 or more")
    if not len(pictures) == len(branches) == len(references):
        raise InvalidRequest(
            f"{len(pictures)} pictures, {len(branches)} branches and {len(references)} lists of references; "
            "give one of each per row"
        )
    lengths = [len(row) for row in references]
    try:
        entries = [(picture, page) for row in references for picture, page in row]
    except (TypeError, ValueError):
        raise InvalidRequest("a reference is a pair (picture id, bank page)") from None
    batch = (
        _integers("pictures", pictures),
        _integers("branches", branches, 0, _BRANCHES),
        np.cumsum([0, *lengths], dtype=np.int64),
        _integers("reference pictures", [picture for picture, _ in entries]),
        _integers("bank pages", [page for _, page in entries], LIVE, BANK_PAGES),
    )
    return batch, max([width, *lengths])


def _integers(name: str, values, low: int = -(2**63), high: int = 2**63) -> np.ndarray:
    array = np.asarray(values) if len(values) else np.zeros(0, np.int64)
    bounded = low > -(2**63) and array.size  # int64 holds no others
    if array.dtype.kind != "i" or bounded and not (low <= array.min() and array.max() < high):
        for value in values:
            if not isinstance(value, int | np.integer) or not low <= value < high:
                raise InvalidRequest(f"{name} hold {quoted(value)}, but must be integers from {low} to {high - 1}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _live(row: int, key: tuple[int, int], row_of: dict, references, mutual: bool) -> int:
    """Return the row that a live reference reads. Raises InvalidRequest."""
    found = row_of.get(key)
    if found is None:
        raise InvalidRequest(
            f"row {row} refers to {_name(*key)}, which has no row in this batch; add it or bake the reference"
        )
    if not mutual and len(references[found]):
        raise InvalidRequest(
            f"row {row} refers to {_name(*key)}, which refers to another page itself; references can't be chained"
        )
    return found


def _name(picture: int, branch: int) -> str:
    return f"picture {picture}, branch {branch}"


def _find_root(parent: list[int], node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


def _join(parent: list[int], a: int, b: int) -> None:
    # the lower root wins, so that a set's root is its first row
    a, b = _find_root(parent, a), _find_root(parent, b)
    parent[max(a, b)] = min(a, b)
