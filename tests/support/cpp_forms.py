"""Both forms of the runtime's C++ parts, for tests to run on."""

import os

import pytest

from stylefast._extension import extension, extension_error
from stylefast.runtime.banks.page_pool import PageBooksRef, PagePool

# only a build that was switched off on purpose excuses its absence; a failed one must show
switched_off = extension() is None and os.environ.get("STYLEFAST_EXTENSION") == "0"
needs_extension = pytest.mark.skipif(switched_off, reason=extension_error() or "built")
backends = pytest.mark.parametrize("backend", ["python", pytest.param("cpp", marks=needs_extension)])


def pool_of(slots: int, backend: str) -> PagePool:
    """A pool whose books are kept in C++ or by the reference."""
    pool = PagePool(slots)
    if backend == "python":
        pool._books = PageBooksRef(slots)
    else:
        assert not isinstance(pool._books, PageBooksRef)
    return pool
