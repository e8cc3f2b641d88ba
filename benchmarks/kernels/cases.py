"""Parts of a measurement: contestants on the same inputs, and the comparisons between them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

Call = Callable[[int], object]  # runs a contestant once, on the input set of that number


@dataclass(frozen=True)
class Versus:
    """Comparison of `ours` with `peer`, two contestants: the ratio is the peer's time over ours.

    `goal`: the lowest acceptable ratio. `waived`: why the goal does not apply on this machine. `errors`: whether both
    compute the same function, so that their errors against fp64 can be compared; `error_goal`: ours must be at most
    that many times the peer's.
    """

    ours: str
    peer: str
    goal: float | None = None
    waived: str = ""
    errors: bool = True
    error_goal: float | None = 2.0


@dataclass(frozen=True)
class Share:
    """Comparison of `ours` with a ceiling of the same run: the ratio is the rate reached over "matmul" or "copy"."""

    ours: str
    ceiling: str
    goal: float | None = None
    waived: str = ""


@dataclass
class Entrants:
    """The contestants of a case, with allocated inputs."""

    calls: dict[str, Call]
    sets: int = 1
    # contestants that are unavailable here, with the reason
    absent: dict[str, str] = field(default_factory=dict)
    # the fp64 result, for the part of the output that `pick` extracts
    exact: Callable[[], torch.Tensor] | None = None
    pick: Callable[[object], torch.Tensor] = lambda out: out


@dataclass(frozen=True)
class Case:
    """One operation at one shape and type. `build` allocates the inputs, so a case costs nothing before its turn."""

    operation: str
    shape: str
    dtype: torch.dtype
    comparisons: Sequence[Versus | Share]
    build: Callable[[], Entrants]
    flop: float = 0.0  # of one call, for compute-bound operations
    bytes: float = 0.0  # minimum traffic of one call, for memory-bound operations

    def without_goals(self) -> "Case":
        """Return the same case without goals."""
        return replace(self, comparisons=[_without_goals(c) for c in self.comparisons])


def _without_goals(comparison: Versus | Share) -> Versus | Share:
    changes = {"goal": None, **({"error_goal": None} if isinstance(comparison, Versus) else {})}
    return replace(comparison, **changes)


def type_name(dtype: torch.dtype) -> str:
    """Return a type's short name: fp32, bf16 or fp16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def cache_bytes(device: str) -> int:
    """Return a GPU's L2 size. 0 on a CPU, where alternating contestants evict one another's data."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0


def input_sets(bytes_each: float, cache: float) -> int:
    """Return the number of input sets to cycle through so that none is still in a cache of that many bytes."""
    return min(16, max(1, -(-int(2 * cache) // max(int(bytes_each), 1))))


def normal(*shape: int, dtype: torch.dtype, device: str, seed: int) -> torch.Tensor:
    """Return standard normal values."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)
