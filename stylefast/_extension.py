"""The C++ extension `stylefast._C`, or the reason why it is absent."""

from functools import cache
from importlib import import_module
from types import ModuleType

# increased with every change of the bindings, so that a stale build is refused instead of called
INTERFACE = 10

_WAY_OUT = (
    "build it with `make extension` in a checkout, or reinstall with `pip install --no-build-isolation` where torch "
    "and a C++20 compiler are found"
)


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        import_module("torch")  # loads its libraries, which the extension is linked against
        from stylefast import _C
    except ImportError as error:
        return None, f"the C++ extension could not be imported ({error}); {_WAY_OUT}"
    found = getattr(_C, "interface", None)
    if found != INTERFACE:
        return None, f"the C++ extension has interface {found}, but this version needs {INTERFACE}; {_WAY_OUT}"
    return _C, ""


def extension() -> ModuleType | None:
    """Return the extension module, or None if it was not built or belongs to another version."""
    return _load()[0]


def extension_error() -> str:
    """Return why `extension()` is None and what to do about it; "" if it is available."""
    return _load()[1]
