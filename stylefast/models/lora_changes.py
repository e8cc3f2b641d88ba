"""Weight changes given by the tensors of one module in a LoRA file, computed in float32 from the weight itself.

    LoRA   W' = W + s B A                      with a middle kernel M (LoCon): s sum_ij B_i M_ij A_j
    LoHa   W' = W + s (B1 A1) * (B2 A2)
    LoKr   W' = W + s (C kron D)
    full   W' = W + D
    DoRA   W' = m V / |V|, V = W + (any of the above), |.| over the inputs of an output or the other way round

where s = alpha / rank, and alpha = rank if the file has none.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from stylefast.errors import AdapterError


class Change(Protocol):
    """A change of one weight."""

    def delta(self, weight: Tensor) -> Tensor:
        """Return the tensor added to `weight` at scale 1: float32, with its shape and device."""
        ...


@dataclass(frozen=True)
class LowRank:
    """LoRA: up [out, rank], down [rank, in (* kernel)]; or down [rank, in] with mid [rank, rank, kh, kw]."""

    up: Tensor
    down: Tensor
    scaling: float
    mid: Tensor | None = None

    def delta(self, weight: Tensor) -> Tensor:
        """Return scaling * up (mid) down."""
        up, down = _at(self.up, weight), _at(self.down, weight)
        if self.mid is None:
            product = up @ down
        else:
            product = torch.einsum("ij...,jr,pi->pr...", _at(self.mid, weight), down, up)
        return (self.scaling * product).reshape(weight.shape)


@dataclass(frozen=True)
class Hadamard:
    """LoHa: two products, each of (a [out, rank], b [rank, in * kernel]), or (a [rank, out], b [rank, in], kernel)."""

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    scaling: float

    def delta(self, weight: Tensor) -> Tensor:
        """Return scaling * first * second, elementwise."""
        first, second = (_product(factors, weight) for factors in (self.first, self.second))
        return (self.scaling * first * second).reshape(weight.shape)


@dataclass(frozen=True)
class Kronecker:
    """LoKr: the Kronecker product of two small matrices, each given whole or in factors as in `Hadamard`."""

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    scaling: float

    def delta(self, weight: Tensor) -> Tensor:
        """Return scaling * (first kron second)."""
        # torch.kron fails on some strides
        first, second = (_product(factors, weight).contiguous() for factors in (self.first, self.second))
        return (self.scaling * torch.kron(first, second)).reshape(weight.shape)


@dataclass(frozen=True)
class Difference:
    """A change stored in full, in the weight's shape."""

    value: Tensor

    def delta(self, weight: Tensor) -> Tensor:
        """Return the stored values."""
        return _at(self.value, weight).reshape(weight.shape)


@dataclass(frozen=True)
class Replacement:
    """A trained weight stored in full."""

    value: Tensor

    def delta(self, weight: Tensor) -> Tensor:
        """Return the stored weight minus the model's."""
        return _at(self.value, weight).reshape(weight.shape) - weight.float()


@dataclass(frozen=True)
class Decomposed:
    """DoRA: the changed weight keeps its direction and gets the length `magnitude`, [out] or [1, in].

    A scale other than 1 interpolates between W and W', as in ComfyUI; peft scales only V and keeps the length.
    """

    change: Change
    magnitude: Tensor

    def delta(self, weight: Tensor) -> Tensor:
        """Return magnitude * V / |V| - W."""
        changed = weight.float() + self.change.delta(weight)
        flat = changed.flatten(1) if self.magnitude.ndim == 1 else changed.transpose(0, 1).flatten(1)
        along = (-1, 1) if self.magnitude.ndim == 1 else (1, -1)
        length = flat.norm(dim=1) + torch.finfo(torch.float32).eps
        factor = _at(self.magnitude, weight).flatten() / length
        return changed * factor.view(*along, *[1] * (weight.ndim - 2)) - weight.float()


def change_of(tensors: Mapping[str, Tensor], shape: tuple[int, ...], scaling: "Scaling", where: str) -> Change:
    """Build the change of a weight [out, in, ...] of `shape` from a module's tensors by role, without alpha and biases.

    Raises AdapterError, naming the module (`where`), for tensors that don't fit together, and ShapeMismatch for a
    weight of another shape.
    """
    lengths = [role for role in ("magnitude", "dora_scale") if role in tensors]
    roles = set(tensors) - set(lengths)
    if roles == {"diff"}:
        change = Difference(tensors["diff"])
        found = tuple(tensors["diff"].shape)
        if math.prod(found) != math.prod(shape) or (found[0] != shape[0] if found else True):
            raise ShapeMismatch(where, found, shape)
    elif roles in ({"up", "down"}, {"up", "down", "mid"}):
        change = _low_rank(tensors, shape, scaling, where)
    elif roles and all(role.startswith("hada_") for role in roles):
        change = _hadamard(tensors, shape, scaling, where)
    elif roles and all(role.startswith("lokr_") for role in roles):
        change = _kronecker(tensors, shape, scaling, where)
    else:
        raise AdapterError(f"{where} has {' and '.join(sorted(tensors))}, which together do not form a weight change")
    if not lengths:
        return change
    if len(lengths) > 1 or len(shape) < 2:
        raise AdapterError(f"{where} has {' and '.join(sorted(tensors))}, which do not belong together")
    return Decomposed(change, _lengths(tensors[lengths[0]], lengths[0], shape, where))


class ShapeMismatch(AdapterError):
    """Error for a change made for a weight of another shape."""

    def __init__(self, where: str, found: tuple[int, ...], shape: tuple[int, ...]):
        super().__init__(f"{where} changes a weight of {list(found)}, but this model's has {list(shape)}")


@dataclass(frozen=True)
class Scaling:
    """Factor of a module's product: alpha / rank, or alpha / sqrt(rank); alpha None gives 1."""

    alpha: float | None
    rank_stabilised: bool = False

    def of(self, rank: int) -> float:
        """Return the factor at a rank."""
        if self.alpha is None:
            return 1.0
        return self.alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def _low_rank(tensors, shape, scaling: Scaling, where: str) -> LowRank:
    up, down, mid = tensors["up"], tensors["down"], tensors.get("mid")
    rank = _rank(where, up, down)
    if mid is None:
        if up.numel() != up.shape[0] * rank:
            raise AdapterError(f"{where} has factors {_shapes(up, down)}, which do not belong together")
        found = (up.shape[0], *down.shape[1:])
    else:
        square = tuple(mid.shape[:2]) == (rank, rank) and down.numel() == rank * down.shape[1]
        if not square or up.numel() != up.shape[0] * rank:
            raise AdapterError(f"{where} has factors {_shapes(up, mid, down)}, which do not belong together")
        found = (up.shape[0], down.shape[1], *mid.shape[2:])
    # linear layers are sometimes stored as 1x1 convolutions, and vice versa
    if _without_pixels(found) != _without_pixels(shape):
        raise ShapeMismatch(where, found, shape)
    return LowRank(up.flatten(1), down.flatten(1), scaling.of(rank), mid)


def _hadamard(tensors, shape, scaling: Scaling, where: str) -> Hadamard:
    pairs = []
    for place in "12":
        pair = _factors(tensors, f"hada_w{place}_a", f"hada_w{place}_b", f"hada_t{place}", where)
        if _flat_shape(pair, shape) != (shape[0], math.prod(shape[1:])):
            raise ShapeMismatch(where, _flat_shape(pair, shape), (shape[0], math.prod(shape[1:])))
        pairs.append(pair)
    rank = tensors["hada_w1_b"].shape[0]
    return Hadamard(pairs[0], pairs[1], scaling.of(rank))


def _kronecker(tensors, shape, scaling: Scaling, where: str) -> Kronecker:
    pairs, ranks = [], []
    for place in "12":
        whole = tensors.get(f"lokr_w{place}")
        if whole is not None:
            pairs.append((whole,))
            continue
        pairs.append(_factors(tensors, f"lokr_w{place}_a", f"lokr_w{place}_b", f"lokr_t{place}", where))
        ranks.append(tensors[f"lokr_w{place}_b"].shape[0])
    if any(f"lokr_w{place}" in tensors and f"lokr_w{place}_{factor}" in tensors for place in "12" for factor in "ab"):
        raise AdapterError(f"{where} has {', '.join(sorted(tensors))}, which do not belong together")
    (out1, in1), (out2, in2) = (_flat_shape(pair, shape) for pair in pairs)
    if (out1 * out2, in1 * in2) != (shape[0], math.prod(shape[1:])):
        raise ShapeMismatch(where, (out1 * out2, in1 * in2), (shape[0], math.prod(shape[1:])))
    # two whole matrices have no rank; LyCORIS then writes a meaningless alpha
    return Kronecker(pairs[0], pairs[1], scaling.of(ranks[-1]) if ranks else 1.0)


def _factors(tensors, a: str, b: str, kernel: str, where: str) -> tuple[Tensor, ...]:
    if a not in tensors or b not in tensors:
        raise AdapterError(f"{where} has {', '.join(sorted(tensors))}, but not both of {a} and {b}")
    first, second, middle = tensors[a], tensors[b], tensors.get(kernel)
    if middle is None:
        _rank(where, first, second)
        return first, second
    if first.ndim != 2 or second.ndim != 2 or middle.ndim < 3:
        raise AdapterError(f"{where} has factors {_shapes(first, second, middle)}, which do not belong together")
    if tuple(middle.shape[:2]) != (first.shape[0], second.shape[0]) or 0 in middle.shape:
        raise AdapterError(f"{where} has factors {_shapes(first, second, middle)}, which do not belong together")
    return first, second, middle


def _rank(where: str, up: Tensor, down: Tensor) -> int:
    if down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1]:
        raise AdapterError(f"{where} has factors {_shapes(up, down)}, whose ranks differ; the file is damaged")
    if down.shape[0] == 0:
        raise AdapterError(f"{where} has factors {_shapes(up, down)} of rank 0; the file is damaged")
    return down.shape[0]


def _without_pixels(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if all(side == 1 for side in shape[2:]) else tuple(shape)


def _flat_shape(factors: tuple[Tensor, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    if len(factors) == 1:
        return (factors[0].shape[0], math.prod(factors[0].shape[1:])) if factors[0].ndim else (1, 1)
    if len(factors) == 2:
        return factors[0].shape[0], math.prod(factors[1].shape[1:])
    return factors[0].shape[1], factors[1].shape[1] * math.prod(factors[2].shape[2:])


def _product(factors: tuple[Tensor, ...], weight: Tensor) -> Tensor:
    # -> [out, in * kernel]
    parts = [_at(one, weight) for one in factors]
    if len(parts) == 1:
        return parts[0].flatten(1) if parts[0].ndim > 1 else parts[0].view(-1, 1)
    if len(parts) == 2:
        return parts[0].flatten(1) @ parts[1].flatten(1)
    return torch.einsum("ij...,jr,ip->pr...", parts[2], parts[1], parts[0]).flatten(1)


def _lengths(value: Tensor, role: str, shape: tuple[int, ...], where: str) -> Tensor:
    """Return the magnitude as [out] or [1, in]. Raises AdapterError for other sizes."""
    # peft always writes one length per output; LyCORIS writes [out, 1, ..] or, by default, one per input as [1, in, ..]
    per_output = role == "magnitude" or value.ndim < 2 or value.shape[0] == shape[0] or value.numel() != shape[1]
    if value.numel() != shape[0 if per_output else 1]:
        raise AdapterError(
            f"{where} has a magnitude of {list(value.shape)}; a weight of {list(shape)} takes one length per output or "
            "per input"
        )
    return value.flatten() if per_output else value.reshape(1, -1)


def _at(tensor: Tensor, weight: Tensor) -> Tensor:
    return tensor.to(weight.device, torch.float32)


def _shapes(*tensors: Tensor) -> str:
    return " and ".join(str(list(tensor.shape)) for tensor in tensors)
