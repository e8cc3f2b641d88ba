"""What users pass to an engine, checked and in one form."""

from collections.abc import Sequence

import torch

from stylefast.errors import InvalidRequest

OUTPUTS = ("pil", "np", "latents")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_output(name: str) -> None:
    """Raise InvalidRequest for a kind of result that does not exist."""
    if not isinstance(name, str) or name not in OUTPUTS:
        raise InvalidRequest(f"output is {name!r}; there are {', '.join(OUTPUTS)}")


def check_deadline(seconds: float | None) -> None:
    """Raise InvalidRequest for a deadline that is no number of seconds above 0."""
    if seconds is None:
        return
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds > 0:
        raise InvalidRequest(f"deadline is {seconds!r}; it must be a number of seconds above 0")


def device_of(name: str) -> torch.device:
    """A device by name, "auto" being CUDA where there is one. Raises InvalidRequest."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidRequest(f"device {name!r} is unknown; use 'auto', 'cpu' or 'cuda'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("device is 'cuda', but PyTorch finds no CUDA device; use 'cpu', or install a CUDA build")
    return device


def dtype_of(name: str) -> torch.dtype | str:
    """A type by name, or "auto". Raises InvalidRequest."""
    if not isinstance(name, str) or (name != "auto" and name not in _DTYPES):
        raise InvalidRequest(f"dtype is {name!r}; there are auto, {', '.join(_DTYPES)}")
    return _DTYPES.get(name, name)


def buckets_of(given: Sequence[int]) -> tuple[int, ...]:
    """Row counts that batches are padded to, ascending. Raises InvalidRequest."""
    buckets = tuple(given) if isinstance(given, Sequence) else () if given is None else (given,)
    if any(isinstance(b, bool) or not isinstance(b, int) or b < 1 for b in buckets) or list(buckets) != sorted(buckets):
        raise InvalidRequest(f"batch_buckets is {given!r}; give ascending row counts such as (2, 4, 8, 16), or none")
    return buckets


def count_of(name: str, value: int | None) -> int | None:
    """A whole number of at least 1, or None. Raises InvalidRequest."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InvalidRequest(f"{name} is {value!r}; it must be a whole number of at least 1, or None for no limit")
    return value


def as_list(value) -> list:
    """None, one thing or several as a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]
