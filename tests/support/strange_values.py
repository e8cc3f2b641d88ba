"""What JSON and Python can hold in place of a sensible value, to be fed to everything that takes values."""

import numpy as np
import torch
from hypothesis import strategies as st


class Unprintable:
    """Raises in every conversion that a check might try."""

    def _refuse(self, *_):
        raise RuntimeError("this object can't be shown, counted or converted")

    __repr__ = __str__ = __len__ = __bool__ = __index__ = __float__ = __eq__ = __hash__ = _refuse


def _refuse(*_):
    raise RuntimeError("this object lies")


def _yes(*_):
    return True


def _two(_):
    return 2


class Text(str):
    """Lies about its length and what it equals, and has no other methods that work."""

    __contains__ = __eq__ = _yes
    __hash__, __len__ = str.__hash__, _two
    strip = encode = startswith = split = casefold = lower = __getitem__ = __iter__ = __add__ = __format__ = _refuse


class Whole(int):
    """Is in every range, as far as it can decide that."""

    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = _yes
    __hash__ = int.__hash__
    __index__ = __int__ = __float__ = _refuse


class Real(float):
    """As `Whole`."""

    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = _yes
    __hash__ = float.__hash__
    __float__ = _refuse


class Entries(list):
    """Says that it has two entries, but gives none of them."""

    __len__ = _two
    __iter__ = __getitem__ = __contains__ = __bool__ = _refuse


class Pairs(dict):
    """As `Entries`."""

    __len__ = _two
    __iter__ = __getitem__ = __contains__ = __bool__ = keys = values = items = get = _refuse


class Attributes:
    """Has every attribute, none of which can be looked at."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        raise RuntimeError("this object has no attribute that can be read")


class Place:
    """A path that is nowhere."""

    def __fspath__(self):
        raise RuntimeError("this path is nowhere")


TEXTS = [
    "",
    " ",
    "a fish",
    "\ud83d",
    "a \udc00 fish",
    "\0",
    "x" * 40_000,
    "x" * 300,
    "x/" * 3000,
    "x/" * 1500,
    "~no-such-user",
    "true",
    "7",
    "1e999",
    "../..",
    "/",
    "<a>",
    "{style}",
]
NUMBERS = [
    0,
    1,
    -1,
    7,
    2**31,
    2**53 + 1,
    2**63,
    2**64 - 1,
    2**64,
    10**400,
    10**5000,
    -(10**400),
    0.5,
    -0.0,
    1e308,
    -1e308,
    5e-324,
    float("inf"),
    float("-inf"),
    float("nan"),
    True,
    False,
    None,
]
# of Python alone
OBJECTS = [
    b"abc",
    bytearray(3),
    1j,
    object(),
    type,
    len,
    range(3),
    {1, 2},
    frozenset("qk"),
    slice(1),
    Unprintable(),
    Text("a fish"),
    Text(""),
    Text("x" * 40_000),
    Whole(7),
    Whole(-5),
    Real(0.5),
    Real("nan"),
    Entries(),
    Entries([1, 2, 3]),
    Pairs(),
    Pairs({"ink": 1.0}),
    Attributes(),
    Place(),
    np.int64(5),
    np.uint8(3),
    np.float32(0.5),
    np.bool_(True),
    np.array(5),
    np.array([1, 2]),
    np.zeros((0, 3)),
    np.array("5"),
    np.array(None),
    torch.tensor(5),
    torch.tensor(0.5),
    torch.tensor([1.0]),
    torch.tensor(True),
    torch.tensor(1j),
    torch.zeros(0),
    torch.zeros(3, device="meta"),
    torch.ones(3).to_sparse(),
    torch.ones(3).to(torch.float8_e4m3fn),
]


def deep(levels: int, wrap=lambda inner: [inner]):
    """A list in a list in a list, or as `wrap` says."""
    found = 1
    for _ in range(levels):
        found = wrap(found)
    return found


def _one_of(things):
    # by its number, since a strategy shows what it samples from, and not all of these can be shown
    return st.integers(0, len(things) - 1).map(lambda number: things[number])


_scalars = st.one_of(_one_of(TEXTS), _one_of(NUMBERS), st.integers(), st.floats(), st.text(max_size=8))


def _containers(inner):
    keys = st.one_of(
        st.sampled_from(["kind", "prompt", "style", "q", "down", "0", "path", "png", "sha256"]), st.text(max_size=4)
    )
    return st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3))


json_values = st.one_of(
    st.recursive(_scalars, _containers, max_leaves=6),
    st.builds(deep, st.sampled_from([1, 70, 3000])),
    st.builds(lambda levels: deep(levels, lambda inner: {"kind": inner}), st.sampled_from([1, 70, 3000])),
)
python_values = st.one_of(
    json_values,
    _one_of(OBJECTS),
    st.lists(_one_of([*OBJECTS, *NUMBERS]), max_size=3),
    st.tuples(_scalars, _scalars),
    st.dictionaries(st.sampled_from([1, None, ("a",), "q", 0.5]), _scalars, max_size=2),
)
