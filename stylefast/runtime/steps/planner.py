"""The batch planner: from references between images to pages and an order of the rows.

`plan_segments` checks its arguments and plans in C++; `plan_segments_ref` is the same in plain Python, which is used
where the extension is not built, says what is wrong with a batch, and is what tests compare with.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stylefast._extension import extension
from stylefast.errors import InvalidRequest
from stylefast.values import quoted

LIVE = -1  # instead of a bank page: the reference is an image of this batch
BANK_PAGES = 2**31  # exclusive limit of a bank page's index

_NONE = -1
_BRANCHES = 4
_own = threading.local()  # a C++ planner keeps scratch memory, so every thread has its own


class Segments(NamedTuple):
    """The page whose keys and values each row reads, and a row order in which readers of a page are neighbours."""

    page: np.ndarray  # [rows, R] int64: a row of the batch, or rows + page of the bank; -1: none
    order: np.ndarray  # [rows] int64: a permutation of the rows


def plan_segments(
    images: Sequence[int] | np.ndarray,
    branches: Sequence[int] | np.ndarray,
    references: Sequence[Sequence[tuple[int, int]]],
    *,
    width: int = 0,
    mutual: bool = False,
) -> Segments:
    """Resolve every row's references to pages.

    Args:
        images: for each row the id of its image, any int64.
        branches: for each row its guidance branch, 0 to 3. An image has at most one row per branch.
        references: for each row a list of (image id, bank page). If the bank page is `LIVE` (-1), the reference is the
            row of that image in the same branch; if it is >= 0, it is that page of the style bank's pool, and the image
            id is ignored. Column r of the result belongs to the r-th entry.
        width: least number of columns R, for shapes that don't change between batches.
        mutual: let rows refer to rows that have references themselves, as in full attention sharing. Otherwise such a
            chain is an error: the reference of a style must not depend on its readers.

    Returns:
        `Segments`. In `order`, rows connected by shared pages (including live references) form one run, runs are sorted
        by their first row, and inside a run rows with equal pages are neighbours; otherwise the order of the rows is
        kept.

    Raises:
        InvalidRequest: lengths that differ, values out of range, two rows of one image and branch, a live reference
        without a row in the branch, a chain.
    """
    module = extension()
    if module is None:
        return plan_segments_ref(images, branches, references, width=width, mutual=mutual)
    batch, columns = _arrays(images, branches, references, width)
    page, order = np.empty((len(images), columns), np.int64), np.empty(len(images), np.int64)
    if not hasattr(_own, "planner"):
        _own.planner = module.BatchPlanner()
    if not _own.planner.plan(*batch, page, order, mutual):
        return plan_segments_ref(images, branches, references, width=width, mutual=mutual)  # raises, with the reason
    return Segments(page, order)


def plan_segments_ref(
    images: Sequence[int] | np.ndarray,
    branches: Sequence[int] | np.ndarray,
    references: Sequence[Sequence[tuple[int, int]]],
    *,
    width: int = 0,
    mutual: bool = False,
) -> Segments:
    """Do what `plan_segments` does, row by row."""
    batch, columns = _arrays(images, branches, references, width)
    rows, keys = len(images), list(zip(batch[0].tolist(), batch[1].tolist()))
    row_of: dict[tuple[int, int], int] = {}
    for row, key in enumerate(keys):
        if row_of.setdefault(key, row) != row:
            raise InvalidRequest(
                f"rows {row_of[key]} and {row} are both {_name(*key)}; a batch holds each image and branch once"
            )

    pages: list[list[int]] = []
    parent = list(range(rows))
    first_reader: dict[int, int] = {}
    for row, (_, branch) in enumerate(keys):
        own = []
        for image, bank_page in references[row]:
            if bank_page == LIVE:
                own.append(_live(row, (int(image), branch), row_of, references, mutual))
                _join(parent, own[-1], row)
            else:
                own.append(rows + int(bank_page))
                _join(parent, first_reader.setdefault(own[-1], row), row)
        pages.append(own + [_NONE] * (columns - len(own)))
    # sets of rows that share pages, by their first row; within a set, rows with equal pages are adjacent
    order = sorted(range(rows), key=lambda row: (_find_root(parent, row), pages[row]))
    return Segments(np.array(pages, np.int64).reshape(rows, columns), np.array(order, np.int64))


def _arrays(images, branches, references, width: int) -> tuple[tuple[np.ndarray, ...], int]:
    """Return images, branches, offsets of each row's entries, their images and bank pages; and the columns.

    Raises InvalidRequest as `plan_segments` does, but not for what concerns rows together.
    """
    if width < 0:
        raise InvalidRequest(f"width is {width}, but must be 0 or more")
    if not len(images) == len(branches) == len(references):
        raise InvalidRequest(
            f"{len(images)} images, {len(branches)} branches and {len(references)} lists of references; "
            "give one of each per row"
        )
    lengths = [len(row) for row in references]
    try:
        entries = [(image, page) for row in references for image, page in row]
    except (TypeError, ValueError):
        raise InvalidRequest("a reference is a pair (image id, bank page)") from None
    batch = (
        _integers("images", images),
        _integers("branches", branches, 0, _BRANCHES),
        np.cumsum([0, *lengths], dtype=np.int64),
        _integers("reference images", [image for image, _ in entries]),
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


def _name(image: int, branch: int) -> str:
    return f"image {image}, branch {branch}"


def _find_root(parent: list[int], node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


def _join(parent: list[int], a: int, b: int) -> None:
    # the lower root wins, so that a set's root is its first row
    a, b = _find_root(parent, a), _find_root(parent, b)
    parent[max(a, b)] = min(a, b)
