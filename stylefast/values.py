"""Checks for values from users, files and clients, with uniform error messages.

Every function takes the value's name for the message and the error class, returns the value as a plain Python type, and
raises that error for anything else, whatever its `repr` or size. NumPy's and torch's numbers, including 0-d arrays, are
accepted like Python's; bools are never numbers.
"""

import difflib
import itertools
import json
import math
import operator
import os
import re
import reprlib
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from stylefast.errors import InvalidRequest, PromptError

_NEIGHBOURS = 2000  # max directory entries searched for a similar name
QUOTED = 200  # max characters of a value in a message
MAX_PROMPT = 32_000
MAX_SEED = 2**64 - 1
# strengths multiply the model's values, and half precision ends at 65504
MAX_STRENGTH = 10_000.0
JSON_BYTES, JSON_DEPTH, JSON_DIGITS = 16 * 2**20, 64, 100
# limits of file systems; looking up a longer name is an error
NAME_BYTES, PATH_BYTES = 255, 4095
_NUMBERS = re.compile(r"bool|u?int(8|16|32|64)|b?float(16|32|64)|float8_\w+|complex(32|64|128)")
_LONG_INT = 1024  # longer integers are not printed; Python refuses to print very long ones


class _Short(reprlib.Repr):
    """Reprs that stay short and never raise, however large or broken the value."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 4, QUOTED, QUOTED
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = self.maxarray = 10

    def repr_int(self, value, level):
        bits = value.bit_length()
        if bits <= _LONG_INT:
            return super().repr_int(value, level)
        return f"<a whole number of about {int(bits * math.log10(2)) + 1} digits>"


_short = _Short()


def quoted(value: Any) -> str:
    """Return a value as quoted in messages: its `repr`, on one line of at most 200 characters."""
    try:
        shown = _short.repr(value)
    except Exception:  # a foreign __repr__ or __len__ may raise anything
        shown = f"<{type(value).__name__}>"
    shown = " ".join(shown.encode("utf-8", "backslashreplace").decode().split())
    return shown if len(shown) <= QUOTED else shown[: QUOTED - 3] + "..."


def whole_number(
    name: str, value: Any, low: int | None = None, high: int | None = None, *, error: type = InvalidRequest
) -> int:
    """Return a whole number from `low` to `high` (None: unbounded) as an int."""
    number = _index(value)
    if number is None or (low is not None and number < low) or (high is not None and number > high):
        raise error(f"{name} is {quoted(value)}; it must be a whole number{_range(low, high)}")
    return number


def real_number(
    name: str,
    value: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    also: Iterable[float] = (),
    error: type = InvalidRequest,
) -> float:
    """Return a finite number from `low` to `high` (None: unbounded), or greater than `above`, as a float.

    `also`: further values to accept, such as `-math.inf`.
    """
    number = _float(value)
    if number is not None and number in also:
        return number
    if number is not None and math.isfinite(number):
        inside = (low is None or number >= low) and (high is None or number <= high)
        if inside and (above is None or number > above):
            return number
    ends = _range(low, high) if above is None else f" above {above:g}{'' if high is None else f', up to {high:g}'}"
    extra = "".join(f", or {one:g}" for one in also)
    raise error(f"{name} is {quoted(value)}; it must be a {'' if ends else 'finite '}number{ends}{extra}")


def flag(name: str, value: Any, *, error: type = InvalidRequest) -> bool:
    """Return True or False; accept only real bools, since the string "false" is truthy."""
    if isinstance(value, bool) or (_is_bool(value) and _axes(value) == 0):
        return bool(value)
    raise error(f"{name} is {quoted(value)}; it must be true or false")


def text(name: str, value: Any, *, longest: int | None = None, empty: bool = True, error: type = InvalidRequest) -> str:
    """Return a string of at most `longest` characters without lone surrogates; `empty=False` refuses blank ones."""
    if not isinstance(value, str):
        raise error(f"{name} is {quoted(value)} ({type(value).__name__}); it must be a string")
    value = str.__str__(value)
    if longest is not None and len(value) > longest:
        raise error(f"{name} has {len(value)} characters; at most {longest} are allowed, so shorten it")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as cause:
        raise error(
            f"{name} contains half of a character (U+{ord(value[cause.start]):04X}, a lone surrogate) at position "
            f"{cause.start}; the text was cut inside an emoji, so send it complete: {quoted(value)}"
        ) from None
    if not empty and not value.strip():
        raise error(f"{name} is empty; it must contain some text")
    return value


def prompt(name: str, value: Any, *, error: type = PromptError) -> str:
    """Return a text for the text encoders, of at most 32,000 characters.

    Raises `error` for non-strings; PromptError for text that is too long or cut inside a character.
    """
    if not isinstance(value, str):
        raise error(f"{name} is {quoted(value)} ({type(value).__name__}); it must be a string")
    return text(name, value, longest=MAX_PROMPT, error=PromptError)


def one_of(name: str, value: Any, known: Iterable[str], *, error: type = InvalidRequest) -> str:
    """Return one of the `known` names; the error lists them and suggests the nearest."""
    known = tuple(known)
    # a subclass may say that it equals anything
    if isinstance(value, str) and str.__str__(value) in known:
        return str.__str__(value)
    raise error(f"{name} is {quoted(value)}; choose one of {', '.join(known)}{did_you_mean(value, known)}")


def did_you_mean(value: Any, known: Iterable[str]) -> str:
    """Return the end of a message, "; did you mean 'euler'?", or "" if no known name is similar."""
    value = str.__str__(value) if isinstance(value, str) else ""
    if not 0 < len(value) <= QUOTED:
        return ""
    spelled = {one.casefold(): one for one in known}
    near = difflib.get_close_matches(value.casefold(), spelled, n=1, cutoff=0.6)
    return f"; did you mean {quoted(spelled[near[0]])}?" if near else ""


def did_you_mean_beside(missing: Path, suffixes: Iterable[str] = ()) -> str:
    """Return the end of a message on a missing path: a similar name in its folder, or "" if there is none.

    `suffixes`: of the files considered (default: all files); folders always are.
    """
    wanted = tuple(suffixes)
    try:
        with os.scandir(missing.parent) as entries:
            beside = [
                entry.name
                for entry in itertools.islice(entries, _NEIGHBOURS)
                if not wanted or entry.is_dir() or Path(entry.name).suffix.lower() in wanted
            ]
    except OSError:  # missing or unreadable folder
        return ""
    return did_you_mean(missing.name, beside)


def several(name: str, value: Any, *, least: int = 0, most: int | None = None, error: type = InvalidRequest) -> list:
    """Return a list or tuple of `least` to `most` things as a list."""
    found = entries(value)
    if found is None:
        raise error(f"{name} is {quoted(value)}; it must be a list")
    if len(found) < least or (most is not None and len(found) > most):
        count = f"{least}" if least == most else f"{least} to {most}" if most is not None else f"at least {least}"
        raise error(f"{name} has {len(found)} entries, {quoted(value)}; it must have {count}")
    return found


def entries(value: Any) -> list | None:
    """Return what a list or tuple holds, whatever a subclass makes of its length and order; None for anything else."""
    if isinstance(value, list):
        return list(list.__iter__(value))
    return list(tuple.__iter__(value)) if isinstance(value, tuple) else None


def mapping(name: str, value: Any, *, error: type = InvalidRequest) -> dict:
    """Return a mapping with names for keys as a dictionary."""
    found = _items(value)
    if found is None:
        raise error(f"{name} is {quoted(value)}; it must be a dictionary")
    odd = [key for key in found if not isinstance(key, str)]
    if odd:
        raise error(f"{name} has the key {quoted(odd[0])} ({type(odd[0]).__name__}); keys must be strings")
    return {str.__str__(key): inner for key, inner in found.items()}


def builtins(name: str, value: Any, *, deepest: int = JSON_DEPTH, error: type = InvalidRequest) -> Any:
    """Return nested data with Python's own dictionaries, lists, tuples and texts for subclasses, whose methods may lie.

    Other values stay as they are. Raises `error` for more than `deepest` levels.
    """
    if isinstance(value, str):
        return str.__str__(value)
    several = entries(value)
    found = _items(value) if several is None else several
    if found is None:
        return value
    if not deepest:
        raise error(f"{name} is nested too deeply; at most {JSON_DEPTH} levels are allowed")

    def inner(one):
        return builtins(name, one, deepest=deepest - 1, error=error)

    if isinstance(found, dict):
        return {str.__str__(key) if isinstance(key, str) else key: inner(one) for key, one in found.items()}
    return tuple(map(inner, found)) if isinstance(value, tuple) else list(map(inner, found))


def fractions(name: str, value: Any, *, error: type = InvalidRequest) -> tuple[float, float]:
    """Return (start, end), fractions of the steps with 0 <= start < end <= 1."""
    pair = entries(value) or ()
    start, end = map(_float, pair) if len(pair) == 2 else (None, None)
    if start is None or end is None or not 0 <= start < end <= 1:
        raise error(
            f"{name} is {quoted(value)}; it must be (start, end) with 0 <= start < end <= 1, in fractions of the steps"
        )
    return start, end


def seed(name: str, value: Any, *, error: type = InvalidRequest) -> int:
    """Return a 64-bit seed; None and -1 draw a random one, of 32 bits so that it can be typed."""
    number = None if value is None else _index(value)
    if value is None or number == -1:
        return secrets.randbits(32)
    if number is None or not 0 <= number <= MAX_SEED:
        raise error(
            f"{name} is {quoted(value)}; it must be a whole number from 0 to 2^64 - 1, or None (or -1) for a random one"
        )
    return number


def seeds(name: str, value: Any, count: int) -> list[int]:
    """Return `count` seeds: the entries of a list of that length, else `value` and its successors modulo 2^64."""
    given = entries(value) if isinstance(value, (list, tuple)) else list(value) if _axes(value) == 1 else None
    if given is not None:
        if len(given) != count:
            raise InvalidRequest(
                f"{name} has {len(given)} entries for {count} prompts; give one for each, or a single number"
            )
        return [seed(f"{name} {i}", one) for i, one in enumerate(given)]
    first = seed(name, value)
    return [(first + i) % (MAX_SEED + 1) for i in range(count)]


def path(name: str, value: Any, *, error: type = InvalidRequest) -> Path:
    """Return a path, whether or not it exists; `~` is expanded."""
    try:
        shown = os.fspath(value)
    except Exception:  # a foreign __fspath__ may raise anything
        shown = None
    if not isinstance(shown, str):
        raise error(f"{name} is {quoted(value)}; it must be a path")
    return typed_path(name, text(name, shown, error=error), error=error)


def typed_path(name: str, typed: str, *, error: type = InvalidRequest) -> Path:
    """Return a path typed on a command line: like `path`, but names may be invalid UTF-8."""
    if not typed or "\0" in typed:
        raise error(f"{name} is {quoted(typed)}; a path needs at least one character, and no NUL")
    try:
        found = Path(typed).expanduser()
    except RuntimeError as cause:
        raise error(
            f"{name} is {quoted(typed)}, and that user's home folder is unknown; write the path in full"
        ) from cause
    if len(os.fsencode(found)) > PATH_BYTES or any(len(os.fsencode(part)) > NAME_BYTES for part in found.parts):
        raise error(
            f"{name} is {quoted(typed)}; a file name may have at most {NAME_BYTES} bytes, and a path {PATH_BYTES}"
        )
    return found


def dense_tensor(name: str, value: Any, *, error: type = InvalidRequest) -> None:
    """Raise `error` for a torch tensor without plain values: sparse, nested, quantised, or on the meta device."""
    kind, layout = str(value.dtype).removeprefix("torch."), str(value.layout).removeprefix("torch.")
    if value.is_nested:
        found, way = "a nested tensor", "give it dense"
    elif layout != "strided":
        found, way = f"a tensor of layout {layout}", "give it dense"
    elif value.is_meta:
        found, way = "a tensor on the device meta, which has no values", "load them first"
    elif value.is_quantized:
        found, way = f"a quantised tensor ({kind})", "give it as floats: .dequantize()"
    elif not _NUMBERS.fullmatch(kind):
        found, way = f"a tensor of {kind}, which are not plain numbers", "convert it to float32"
    else:
        return
    raise error(f"{name} is {found}; {way}")


def no_device(what: str, place: str | os.PathLike, *, error: type = InvalidRequest) -> None:
    """Raise `error` if the path is neither a file nor a folder: reading a pipe or device may never end."""
    try:
        mode = os.stat(place).st_mode
    except (OSError, ValueError):  # a missing file is reported when it is opened
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise error(f"{what} {shown_path(place)} is a pipe or a device, not a file; give the path of a file")


def free_bytes(folder: str | os.PathLike) -> int | None:
    """Return a disk's free bytes; None for file systems without that figure, such as /proc."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else None


def shown(name: Any) -> str:
    """Return a name for a message: as it is, or quoted if it is long, unprintable or no string."""
    fits = isinstance(name, str) and 0 < len(name) <= QUOTED and name.isprintable()
    return str.__str__(name) if fits else quoted(name)


def shown_path(place: str | os.PathLike) -> str:
    """Return a path for a message: as it is, or quoted if it is long or unprintable."""
    return shown(str(place))


def listed(names: Iterable[Any], empty: str = "none") -> str:
    """Return names for a message, separated by commas; of many only the first, and how many there are in all."""
    names = list(names)
    found, length = [], 0
    for name in names[:QUOTED]:
        found.append(shown(name))
        length += len(found[-1]) + 2
        if length > QUOTED:
            break
    else:
        return ", ".join(found) or empty
    return f"{', '.join(found[:-1] or found)}, ... ({len(names)} in all)"


def function(name: str, value: Any, takes: str, *, error: type = InvalidRequest) -> Callable | None:
    """Return a callable or None; `takes` describes its arguments for the message: "(step, steps)"."""
    if value is not None and not callable(value):
        raise error(f"{name} is {quoted(value)}; it must be a function of {takes}, or None")
    return value


def load_json(
    content: str | bytes,
    what: str,
    *,
    kind: type | None = None,
    error: type = InvalidRequest,
    largest: int = JSON_BYTES,
    deepest: int = JSON_DEPTH,
    infinite: bool = False,
) -> Any:
    """Parse JSON from an untrusted source; `what` names it in messages ("the request file calls.json").

    A byte order mark is ignored; UTF-16 and UTF-32 are accepted. Raises `error` for more than `largest` bytes or
    characters, more than `deepest` levels, duplicate names in an object, NaN and infinities (as 1e999, and written out
    unless `infinite`: Python writes `-Infinity` into configs), whole numbers of more than 100 digits, and, given a
    `kind` (dict or list), any other type at the top.
    """
    if len(content) > largest:
        raise error(f"{what} has {len(content)} bytes; at most {largest} are allowed")
    try:
        if not isinstance(content, str):
            content = bytes(content).decode(json.detect_encoding(bytes(content)))
        found = json.loads(
            content.removeprefix("\ufeff"),
            object_pairs_hook=_object,
            parse_constant=_infinity if infinite else _no_constant,
            parse_float=_finite,
            parse_int=_short_int,
        )
        _check_depth(found, deepest)
    except RecursionError:
        raise error(f"{what} is nested too deeply; at most {deepest} levels are allowed") from None
    except UnicodeDecodeError as cause:
        raise error(f"{what} is not UTF-8 text ({cause.reason} at byte {cause.start})") from None
    except ValueError as cause:
        raise error(f"{what} is not valid JSON ({cause})") from None
    if kind is not None and not isinstance(found, kind):
        expected = "an object" if kind is dict else "a list" if kind is list else kind.__name__
        raise error(f"{what} contains {quoted(found)}, but must be {expected}")
    return found


def read_json(
    file: str | Path,
    what: str,
    *,
    kind: type | None = None,
    error: type = InvalidRequest,
    largest: int = JSON_BYTES,
    infinite: bool = False,
) -> Any:
    """Read and parse a JSON file as `load_json` does; a missing or unreadable file raises the same error."""
    place = path(what, file, error=error)
    try:
        if not place.is_file():
            raise error(f"{what}: no file found at {shown_path(place)}; check the path")
        with place.open("rb") as stream:
            # one extra byte shows whether the file is too long
            content = stream.read(largest + 1)
    except OSError as cause:
        raise error(f"{what} can't be read: {cause.strerror or cause} ({shown_path(place)})") from cause
    if len(content) > largest:
        raise error(f"{what} is longer than the allowed {largest} bytes ({shown_path(place)})")
    return load_json(content, what, kind=kind, error=error, largest=largest, infinite=infinite)


def _range(low: float | None, high: float | None) -> str:
    if low is None:
        return "" if high is None else f" of at most {_bound(high)}"
    return f" of at least {_bound(low)}" if high is None else f" from {_bound(low)} to {_bound(high)}"


def _bound(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _items(value: Any) -> dict | None:
    """Return what a mapping holds; None for anything else."""
    if isinstance(value, dict):
        return dict(dict.items(value))
    try:
        return dict(value.items()) if isinstance(value, Mapping) else None
    except Exception:  # a foreign `items` may raise anything
        return None


def _dtype(value: Any) -> str:
    """Return the name of NumPy's and torch's types, such as "bool" and "torch.bool"; "" for other values."""
    try:
        return str(getattr(value, "dtype", ""))
    except Exception:  # a foreign attribute may raise anything
        return ""


def _axes(value: Any) -> int:
    """Return how many axes an array or tensor has; 0 for other values."""
    try:
        return int(operator.index(getattr(value, "ndim", 0)))
    except Exception:  # as above
        return 0


def _is_bool(value: Any) -> bool:
    return _dtype(value).endswith("bool")


def _index(value: Any) -> int | None:
    """Return a whole number as an int; None for anything else."""
    if type(value) is int:
        return value
    if isinstance(value, bool) or _axes(value) != 0 or _is_bool(value):
        return None
    try:
        return int(operator.index(value))
    except Exception:  # a foreign __index__ may raise anything
        return None


def _float(value: Any) -> float | None:
    """Return a real number as a float, NaN and infinities included; None for other or too large values."""
    if isinstance(value, bool) or _axes(value) != 0 or _is_bool(value):
        return None
    # 0-d arrays and tensors are not instances of Real but have a numeric dtype
    if not isinstance(value, Real) and not any(kind in _dtype(value) for kind in ("int", "float")):
        return None
    try:
        return float(value)
    except Exception:  # complex tensors, 400-digit numbers, a foreign __float__
        return None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{quoted(twice)} occurs twice in one object")
    return found


def _no_constant(word: str):
    raise ValueError(f"{word} is not a JSON number")


def _infinity(word: str) -> float:
    return float(word) if word != "NaN" else _no_constant(word)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


def _short_int(digits: str) -> int:
    if len(digits) > JSON_DIGITS:
        raise ValueError(f"a whole number has {len(digits)} digits; at most {JSON_DIGITS} are allowed")
    return int(digits)


def _check_depth(found: Any, deepest: int) -> None:
    level = [found]
    for _ in range(deepest + 1):
        inner = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        if not inner:
            return
        level = [value for values in inner for value in values]
    raise RecursionError


def check_fields(what: str, given: Mapping, known: Sequence[str]) -> None:
    """Raise InvalidRequest for a field of a dictionary that is not known."""
    unknown = [str(name) for name in given if name not in known]
    if unknown:
        raise InvalidRequest(
            f"{what} has the unknown field {quoted(unknown[0])}; the known ones are {', '.join(known)}"
            f"{did_you_mean(unknown[0], known)}"
        )
