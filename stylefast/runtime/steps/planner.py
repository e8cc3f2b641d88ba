"""The batch planner: from references between images to pages and an order of the rows.

The work is done in C++ if the extension is built, else by the Python twin below; both give the same arrays and
messages.
"""

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stylefast._extension import extension, extension_error
from stylefast.errors import InvalidRequest, MissingDependency

BACKENDS = ("auto", "cpp", "python")
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
        references: for each row a list of (image id, bank page). If the bank page is `LIVE` (-1), the reference is the
            row of that image in the same branch; if it is >= 0, it is that page of the style bank's pool, and the image
            id is ignored. Column r of the result belongs to the r-th entry.
        width: least number of columns R, for shapes that don't change between batches.
        mutual: let rows refer to rows that have references themselves, as in full attention sharing. Otherwise such a
            chain is an error: the reference of a style must not depend on its readers.
        backend: "cpp", "python", or "auto" (C++ if it is built).

    Returns:
        `Segments`. In `order`, rows connected by shared pages (including live references) form one run, runs are sorted
        by their first row, and inside a run rows with equal pages are neighbours; otherwise the order of the rows is
        kept.

    Raises:
        InvalidRequest: lengths that differ, values out of range, two rows of one image and branch, a live reference
        without a row in the branch, a chain.
        MissingDependency: backend "cpp" without the extension.
    """
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
        _integers("branches", branches, 0, _BRANCHES),
        np.cumsum([0, *(len(row) for row in references)], dtype=np.int64),
        _integers("reference images", [image for image, _ in entries]),
        _integers("bank pages", [page for _, page in entries], LIVE, BANK_PAGES),
    )
    rows = len(images)
    page = np.empty((rows, max([width, *map(len, references)])), np.int64)
    order = np.empty(rows, np.int64)
    plan_arrays(*arrays, page, order, mutual, backend=backend)
    return Segments(page, order)


def plan_arrays(
    images: np.ndarray,
    branches: np.ndarray,
    offsets: np.ndarray,
    reference_images: np.ndarray,
    reference_pages: np.ndarray,
    page_out: np.ndarray,
    order_out: np.ndarray,
    mutual: bool = False,
    *,
    backend: str = "auto",
) -> int:
    """Run `plan_segments` for a loop that plans every step: results go to given arrays, and C++ allocates nothing.

    All arrays are int64 and contiguous. The references of row r are entries offsets[r] to offsets[r + 1].

    Args:
        images, branches: [rows].
        offsets: [rows + 1], rising from 0 to the number of entries.
        reference_images, reference_pages: [entries].
        page_out: [rows, R], overwritten, -1 where a row has fewer than R references.
        order_out: [rows], overwritten.

    Returns:
        The largest number of references of any row, at most R.

    Raises:
        InvalidRequest: as `plan_segments`; also for arrays of another type or shape and for more references than R.
        `page_out` and `order_out` are then undefined.
        MissingDependency: backend "cpp" without the extension.
    """
    planner = _planner(backend)
    inputs = (images, branches, offsets, reference_images, reference_pages, page_out, order_out)
    if planner is None:
        _check_arrays(*inputs)
        return _plan_arrays(*inputs, mutual)
    try:
        return planner.plan(*inputs, mutual)
    except (TypeError, ValueError) as error:
        _check_arrays(*inputs)
        if isinstance(error, TypeError):
            raise
        raise InvalidRequest(str(error)) from None


def _planner(backend: str):
    """Return this thread's C++ planner, or None for the twin. Raises InvalidRequest and MissingDependency."""
    if backend not in BACKENDS:
        raise InvalidRequest(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if backend == "python":
        return None
    module = extension()
    if module is None:
        if backend == "cpp":
            raise MissingDependency(extension_error())
        return None
    if not hasattr(_own, "planner"):
        _own.planner = module.BatchPlanner()
    return _own.planner


def _check_arrays(*arrays: np.ndarray) -> None:
    names = ("images", "branches", "offsets", "reference_images", "reference_pages", "page_out", "order_out")
    for name, array in zip(names, arrays):
        if not isinstance(array, np.ndarray) or array.dtype != np.int64 or not array.flags.c_contiguous:
            kind = f"{array.dtype} array" if isinstance(array, np.ndarray) else type(array).__name__
            raise InvalidRequest(f"{name} is a {kind}, but must be a contiguous int64 array")
        if name in ("page_out", "order_out") and not array.flags.writeable:
            raise InvalidRequest(f"{name} can't be written to")


def _integers(name: str, values: Sequence[int], low: int = -(2**63), high: int = 2**63) -> np.ndarray:
    values = [int(value) if isinstance(value, np.integer) else value for value in values]
    for value in values:
        if not isinstance(value, int) or not low <= value < high:
            raise InvalidRequest(f"{name} hold {value!r}, but must be integers from {low} to {high - 1}")
    return np.array(values, dtype=np.int64)


def _row_name(image: int, branch: int) -> str:
    return f"image {image}, branch {branch}"


def _check_batch(branches, offsets, reference_images, reference_pages, page_out, order_out, rows) -> int:
    entries = reference_images.size
    if not (
        branches.size == order_out.size == rows
        and offsets.size == rows + 1
        and reference_pages.size == entries
        and page_out.ndim == 2
        and len(page_out) == rows
    ):
        raise InvalidRequest("the arrays' lengths do not fit each other")
    if offsets[0] != 0 or offsets[-1] != entries:
        raise InvalidRequest(f"offsets must run from 0 to the number of references, {entries}")
    counts = np.diff(offsets)
    if (counts < 0).any():
        raise InvalidRequest("offsets must not fall")
    most, width = int(counts.max(initial=0)), page_out.shape[1]
    if most > width:
        raise InvalidRequest(f"a row has {most} references, but page has {width} columns")
    _integers("branches", branches, 0, _BRANCHES)
    _integers("bank pages", reference_pages, LIVE, BANK_PAGES)
    return most


def _plan_arrays(images, branches, offsets, reference_images, reference_pages, page_out, order_out, mutual) -> int:
    """Plan like csrc/planner.cpp: same arguments, results and messages."""
    rows = images.size
    most = _check_batch(branches, offsets, reference_images, reference_pages, page_out, order_out, rows)
    images, branches, offsets = images.tolist(), branches.tolist(), offsets.tolist()
    reference_images, reference_pages = reference_images.tolist(), reference_pages.tolist()
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

    width = page_out.shape[1]
    pages = [own + [_NONE] * (width - len(own)) for own in pages]
    page_out[:] = np.array(pages, dtype=np.int64).reshape(rows, width)
    # sets of rows that share pages, by their first row; within a set, rows with equal pages are adjacent
    order_out[:] = sorted(range(rows), key=lambda row: (_find_root(parent, row), pages[row]))
    return most


def _find_root(parent: list[int], node: int) -> int:
    while parent[node] != node:
        parent[node] = parent[parent[node]]
        node = parent[node]
    return node


def _join(parent: list[int], a: int, b: int) -> None:
    # the lower root wins, so that a set's root is its first row
    a, b = _find_root(parent, a), _find_root(parent, b)
    parent[max(a, b)] = min(a, b)
