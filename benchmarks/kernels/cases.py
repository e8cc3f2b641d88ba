"""What one measurement consists of: contestants over the same inputs, and what is compared with what."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

Call = Callable[[int], object]  # runs a contestant once, on the input set of that number


@dataclass(frozen=True)
class Versus:
    """`ours` against `peer`, two contestants: the ratio is the peer's time over ours.

    `goal`: the least ratio wanted. `waived`: why the goal does not hold on this machine. `errors`: whether both
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
    """`ours` against a ceiling of the same run: the ratio is the rate reached over "matmul" or "copy"."""

    ours: str
    ceiling: str
    goal: float | None = None
    waived: str = ""


@dataclass
class Entrants:
    """The contestants of a case, on inputs that exist now."""

    calls: dict[str, Call]
    sets: int = 1
    # contestants that can't be had here, and why
    absent: dict[str, str] = field(default_factory=dict)
    # the part of the result that `pick` takes out of a contestant's output, in fp64
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
    flop: float = 0.0  # of one call, for operations bound by arithmetic
    bytes: float = 0.0  # least traffic of one call, for those bound by memory

    def without_goals(self) -> "Case":
        """The same for information only."""
        return replace(self, comparisons=[_without_goals(c) for c in self.comparisons])


def _without_goals(comparison: Versus | Share) -> Versus | Share:
    changes = {"goal": None, **({"error_goal": None} if isinstance(comparison, Versus) else {})}
    return replace(comparison, **changes)


def type_name(dtype: torch.dtype) -> str:
    """A type's short name: fp32, bf16 or fp16."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def cache_bytes(device: str) -> int:
    """Size of a GPU's L2. 0 on a CPU, where contestants in turns evict one another's data."""
    return torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0


def input_sets(bytes_each: float, cache: float) -> int:
    """How many input sets to go round, so that none is found in a cache of that many bytes."""
    return min(16, max(1, -(-int(2 * cache) // max(int(bytes_each), 1))))


def normal(*shape: int, dtype: torch.dtype, device: str, seed: int) -> torch.Tensor:
    """Standard normal values."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)
