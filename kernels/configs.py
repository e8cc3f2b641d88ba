"""Launch configurations of the Triton kernels: committed JSON per GPU, nearest match, no search at run time.

`kernels/tuning/*.json` holds one file per GPU:

    {"gpu": "NVIDIA H200", "capability": 90, "measured": {...} or null,
     "operations": {"geglu": [{"key": {"columns": 2560, "bits": 16}, "config": {"num_warps": 4}}, ...]}}

A file whose "gpu" is null applies to every GPU of its capability and was chosen by reasoning, not measured. `stylefast
bench --tune` writes measured ones. The folder in `STYLEFAST_TUNING`, if set, is read before the committed files.
"""

import math
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from stylefast import values
from stylefast.errors import InvalidRequest

FOLDER = Path(__file__).parent / "tuning"

Key = dict[str, int | float | str]
Config = dict[str, int | float | str | bool]


class Tuning(NamedTuple):
    """Content of one tuning file."""

    path: Path
    gpu: str | None
    capability: int  # 90 for compute capability 9.0
    measured: dict[str, Any] | None
    operations: dict[str, list[tuple[Key, Config]]]


def configuration(operation: str, capability: int, gpu: str | None = None, **key: int | float | str) -> Config:
    """Return the configuration of the nearest committed key on the nearest GPU.

    The file is that of the GPU's name, else of its capability, else of the highest capability below it. Within the
    file, an entry matches if its string values equal those asked for; of the matching entries the one with the smallest
    sum of |log2(asked / committed)| over its numbers is taken. Raises InvalidRequest if nothing matches.
    """
    for tuning in _preference(capability, gpu):
        entries = tuning.operations.get(operation, ())
        near = [(distance, config) for known, config in entries if (distance := _distance(key, known)) < math.inf]
        if near:
            return min(near, key=lambda pair: pair[0])[1]
    raise InvalidRequest(
        f"no launch configuration of {operation} fits {key} on compute capability {capability / 10:.1f}; "
        f"add one with `stylefast bench --tune` or force another form by STYLEFAST_KERNELS={operation}=torch"
    )


def configurations(operation: str, capability: int) -> list[tuple[Key, Config]]:
    """Return every entry that may serve a GPU of this capability, for ahead-of-time compilation."""
    found = [entry for tuning in _preference(capability, None) for entry in tuning.operations.get(operation, ())]
    named = [t for t in tunings() if t.gpu is not None and t.capability == capability]
    found += [entry for tuning in named for entry in tuning.operations.get(operation, ())]
    return [entry for i, entry in enumerate(found) if entry not in found[:i]]


def source(capability: int, gpu: str | None = None) -> Tuning | None:
    """Return the file that is tried first for a GPU, or None."""
    return next(iter(_preference(capability, gpu)), None)


@cache
def tunings() -> tuple[Tuning, ...]:
    """Return all files, those of `STYLEFAST_TUNING` first. Raises InvalidRequest for a damaged one."""
    folders = [Path(folder) for folder in (os.environ.get("STYLEFAST_TUNING"), FOLDER) if folder]
    return tuple(_read(path) for folder in folders for path in sorted(folder.glob("*.json")))


def _read(path: Path) -> Tuning:
    try:
        data = values.read_json(path, "it", kind=dict)
        operations = {
            name: [(entry["key"], entry["config"]) for entry in entries] for name, entries in data["operations"].items()
        }
        return Tuning(path, data["gpu"], int(data["capability"]), data["measured"], operations)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequest(
            f"{path} is not a tuning file ({type(error).__name__}: {error}); write it anew by `stylefast bench --tune`"
        ) from error


def _preference(capability: int, gpu: str | None) -> list[Tuning]:
    named = [t for t in tunings() if gpu is not None and t.gpu == gpu]
    general = [t for t in tunings() if t.gpu is None and t.capability <= capability]
    return [*named, *sorted(general, key=lambda t: -t.capability)[:1]]


def _distance(asked: Key, known: Key) -> float:
    total = 0.0
    for name, value in known.items():
        wanted = asked.get(name)
        if isinstance(value, str) or isinstance(wanted, str) or wanted is None:
            if wanted != value:
                return math.inf
        else:
            total += abs(math.log2(max(wanted, 1e-9) / max(value, 1e-9)))
    return total
