"""The batch planner: from "this row takes that image as its reference" to pages and an order of the rows.

The work is done in C++ where the extension is built and by the twin below where it isn't; both give the same arrays
and the same messages.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stylefast._extension import extension, extension_error
from stylefast.errors import InvalidRequest, MissingDependency

BACKENDS = ("auto", "cpp", "python")
LIVE = -1  # in place of a bank page: the reference is an image of this batch
BANK_PAGES = 2**31  # exclusive limit of a bank page's index

_NONE = -1


class Segments(NamedTuple):
    """Whose keys and values each row reads, and how to order the rows so that readers of a page are neighbours."""

    page: np.ndarray  # [rows, R] int64: a row of the batch, or rows + page of the bank; -1: none
    order: np.ndarray  # [rows] int64: a permutation of the rows


def plan_segments(
    images: Sequence[int],
    branches: Sequence[int],
    references: Sequence[Sequence[tuple[int, int]]],
    *,
    width: int = 0,
    mutual: bool = False,
    backend: str = "auto",
) -> Segments:
    """Resolve every row's references to pages.

    Args:
        images: for each row the id of its image, any int64.
        branches: for each row its guidance branch, 0 to 3. An image has at most one row per branch.
        references: for each row a list of (image id, bank page). With a bank page of `LIVE` (-1) the reference is the
            row of that image in the same branch; with a bank page >= 0 it is that page of the style bank's pool, and
            the image id is not looked at. Column r of the result belongs to the r-th entry.
        width: least number of columns R, for shapes that stay the same from batch to batch.
        mutual: let rows refer to rows that have references themselves, as in full attention sharing. Otherwise such a
            chain is an error: the reference of a style must not depend on its readers.
        backend: "cpp", "python", or "auto" (C++ where it is built).

    Returns:
        `Segments`. In `order`, rows connected by shared pages (a live reference among them) are one run, runs come by
        their first row, and inside a run rows with equal pages are neighbours; else the order of the rows is kept.

    Raises:
        InvalidRequest: lengths that differ, values out of range, two rows of one image and branch, a live reference
            without a row in the branch, a chain.
        MissingDependency: backend "cpp" without the extension.
    """
    if backend not in BACKENDS:
        raise InvalidRequest(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "cpp" and extension() is None:
        raise MissingDependency(extension_error())
    if width < 0:
        raise InvalidRequest(f"width is {width}, but must be 0 or more")
    if not len(images) == len(branches) == len(references):
        raise InvalidRequest(
            f"{len(images)} images, {len(branches)} branches and {len(references)} lists of references; "
            "give one of each per row"
        )

    entries = [entry for row in references for entry in row]
    if any(len(entry) != 2 for entry in entries):
        raise InvalidRequest("a reference is a pair (image id, bank page)")
    arrays = (
        _integers("images", images),
        _integers("branches", branches, 0, 4),
        np.cumsum([0, *(len(row) for row in references)], dtype=np.int64),
        _integers("reference images", [image for image, _ in entries]),
        _integers("bank pages", [page for _, page in entries], LIVE, BANK_PAGES),
    )
    if backend == "python" or extension() is None:
        return Segments(*_plan_segments(*arrays, width, mutual))
    try:
        return Segments(*extension().plan_segments(*arrays, width, mutual))
    except ValueError as error:
        raise InvalidRequest(str(error)) from None


def _integers(name: str, values: Sequence[int], low: int = -(2**63), high: int = 2**63) -> np.ndarray:
    values = [int(value) if isinstance(value, np.integer) else value for value in values]
    for value in values:
        if not isinstance(value, int) or not low <= value < high:
            raise InvalidRequest(f"{name} hold {value!r}, but must be integers from {low} to {high - 1}")
    return np.array(values, dtype=np.int64)


def _row_name(image: int, branch: int) -> str:
    return f"image {image}, branch {branch}"


def _plan_segments(images, branches, offsets, reference_images, reference_pages, min_width, mutual):
    """The twin of csrc/planner.cpp: same arguments, results and messages."""
    images, branches, offsets = images.tolist(), branches.tolist(), offsets.tolist()
    reference_images, reference_pages = reference_images.tolist(), reference_pages.tolist()
    rows = len(images)
    row_of = {}
    for row, key in enumerate(zip(images, branches)):
        if key in row_of:
            raise InvalidRequest(
                f"rows {row_of[key]} and {row} are both {_row_name(*key)}; a batch holds each image and branch once"
            )
        row_of[key] = row

    pages = []
    parent = list(range(rows))
    first_reader = {}
    for row in range(rows):
        own = []
        for entry in range(offsets[row], offsets[row + 1]):
            if reference_pages[entry] >= 0:
                page = rows + reference_pages[entry]
                _join(parent, first_reader.setdefault(page, row), row)
            else:
                key = (reference_images[entry], branches[row])
                page = row_of.get(key)
                if page is None:
                    raise InvalidRequest(
                        f"row {row} refers to {_row_name(*key)}, which has no row in this batch; "
                        "add it or bake the reference"
                    )
                if not mutual and offsets[page + 1] > offsets[page]:
                    raise InvalidRequest(
                        f"row {row} refers to {_row_name(*key)}, which refers to another page itself; "
                        "references can't be chained"
                    )
                _join(parent, page, row)
            own.append(page)
        pages.append(own)

    width = max([min_width, *map(len, pages)])
    pages = [own + [_NONE] * (width - len(own)) for own in pages]
    # sets of rows that share pages, by their first row; within a set, rows of equal pages side by side
    order = sorted(range(rows), key=lambda row: (_find_root(parent, row), pages[row]))
    return np.array(pages, dtype=np.int64).reshape(rows, width), np.array(order, dtype=np.int64)


def _find_root(parent: list[int], node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


def _join(parent: list[int], a: int, b: int) -> None:
    # the lower root wins, so that a set is known by its first row
    a, b = _find_root(parent, a), _find_root(parent, b)
    parent[max(a, b)] = min(a, b)
