"""LoRAs as factors that differ by row of a batch: x W' = x W + (x down) up, without a change of the shared weight W.

    LoRA   down = A, up = s B                        rank r; a middle kernel M (LoCon) is folded into A
    LoHa   (B1 A1) * (B2 A2)                         rank r1 r2: all products of a row of A1 and one of A2
    LoKr   C kron D = (Cb kron Db) (Ca kron Da)      rank rC rD, with C = Cb Ca and D = Db Da

with A, B, C, D and s of `lora_changes`. All are exact. Any matrix also has the factors W and identity, whose rank is
its smaller side; they are used where that is less. What has no factors of low rank is refused by name: a LoRA is used
whole or not at all.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from stylefast import values
from stylefast.errors import AdapterError
from stylefast.models.digests import all_finite
from stylefast.models.lora_changes import Change, Decomposed, Difference, Hadamard, Kronecker, LowRank, Replacement
from stylefast.models.lora_file import LoraFile

MAX_RANK = 128
# B-LoRA (arXiv 2403.14572, section 4): the transformers of SDXL's first upper block, as its authors' blora_utils.py
# names them at github.com/yardenfren1996/B-LoRA
BLORA_BLOCKS: Mapping[str, str] = {"content": "up_blocks.0.attentions.0.", "style": "up_blocks.0.attentions.1."}
_NAMED = 3  # max layers in a message


class NotLowRank(AdapterError):
    """Error for a change that has no factors of low rank; `reason` says what it is instead."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class Factors(NamedTuple):
    """Factors of a weight's change at scale 1, with alpha / rank in `up`; both finite, on the CPU, of any strides.

    The change of weight [out, in, *kernel] at (o, i, tap) is `down[tap, i] @ up[:, o]`; a linear layer has one tap, and
    a kernel's taps are numbered row by row.
    """

    down: Tensor  # [taps, in, rank]
    up: Tensor  # [rank, out]

    @property
    def rank(self) -> int:
        """Return the rank."""
        return self.up.shape[0]


def factors_of(change: Change, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Factors:
    """Return the factors of a change of a weight of `shape` [out, in, *kernel], computed in `dtype`.

    Raises NotLowRank for DoRAs, full differences, trained weights and biases, and for ranks above MAX_RANK, and
    AdapterError for factors too large for `dtype`.
    """
    reason = _why_not(change, shape)
    if reason is None:
        pair = _pair(change, dtype)
        rank, side = _rank(pair), min(shape[0], math.prod(shape[1:]))
        if min(rank, side) <= MAX_RANK:
            return _laid_out(*(_product(pair) if rank <= side else _with_identity(_whole(pair))), shape)
        ranks = " x ".join(str(up.shape[1]) for up, _ in pair.pairs)
        product = "" if len(pair.pairs) == 1 else f" ({ranks})"
        reason = f"{_kind(change)} of rank {rank}{product}, above the limit of {MAX_RANK}"
    raise NotLowRank(
        f"the change of a weight of {list(shape)} is {reason}; load its LoRA for the whole engine with "
        "engine.load_lora, which then holds for every request",
        reason,
    )


def split(lora: LoraFile) -> tuple[dict[tuple[str, str], Factors], dict[tuple[str, str], str]]:
    """Return the factors of all changes that have some, and the reasons why the others don't, by (part, weight).

    Raises AdapterError as `factors_of` does, naming the weight.
    """
    factors, reasons = {}, {}
    for key, change in lora.changes.items():
        try:
            factors[key] = factors_of(change, lora.targets[key].shape)
        except NotLowRank as error:
            reasons[key] = error.reason
        except AdapterError as error:
            raise AdapterError(f"{lora.name}: {'.'.join(key)}: {error}") from error
    return factors, reasons


def row_factors(lora: LoraFile) -> dict[tuple[str, str], Factors]:
    """Return the factors of the whole LoRA by (part, weight).

    Raises NotLowRank if any of its changes has none: it names the first ones, how many there are, and what it costs to
    load the LoRA for the whole engine. Raises AdapterError as `factors_of` does.
    """
    factors, reasons = split(lora)
    if reasons:
        shown = "; ".join(f"{'.'.join(key)[:100]} is {reason}" for key, reason in list(reasons.items())[:_NAMED])
        more = f"; and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
        kept = sum(target.nbytes for target in lora.targets.values())
        raise NotLowRank(
            f"{lora.name} can't differ by request: {len(reasons)} of its {len(lora.changes)} changes have no factors "
            f"of low rank ({shown}{more}); load it for the whole engine with engine.load_lora (it then holds for every "
            f"request; {_size(kept)} of originals are kept)",
            next(iter(reasons.values())),
        )
    return factors


def blora_part(lora: LoraFile, what: str) -> LoraFile:
    """Return only a LoRA's changes of the block that carries "content", or "style" (B-LoRA, arXiv 2403.14572).

    Its name and digest are its own. Raises InvalidRequest for another `what`, AdapterError if the file changes nothing
    in that block.
    """
    block = BLORA_BLOCKS[values.one_of("the part of a B-LoRA", what, BLORA_BLOCKS)]
    kept = [key for key in lora.changes if key[0] == "unet" and key[1].startswith(block)]
    if not kept:
        raise AdapterError(
            f"{lora.name} changes nothing in unet.{block[:-1]}, the block that carries {what}; it is no B-LoRA of "
            f"{what}, so use it whole"
        )
    return replace(
        lora,
        name=f"{lora.name}-{what}",
        digest=hashlib.sha256(f"{lora.digest} {what}".encode()).hexdigest(),
        changes={key: lora.changes[key] for key in kept},
        targets={key: lora.targets[key] for key in kept},
    )


# a change as the Kronecker or Khatri-Rao product of pairs (up [out, rank], down [rank, in * taps]); one pair is itself
_Pair = tuple[Tensor, Tensor]


class _Pairs(NamedTuple):
    pairs: tuple[_Pair, ...]
    elementwise: bool  # Khatri-Rao
    scaling: float


def _why_not(change: Change, shape: tuple[int, ...]) -> str | None:
    if isinstance(change, Decomposed):
        return "a DoRA, whose change depends on the whole weight"
    if len(shape) < 2:
        return "a change of a bias or a norm, which has no rank"
    if isinstance(change, Difference):
        return "a full difference"
    if isinstance(change, Replacement):
        return "a trained weight, stored in full"
    return None if isinstance(change, (LowRank, Hadamard, Kronecker)) else f"a {type(change).__name__}"


def _kind(change: Change) -> str:
    return {LowRank: "a LoRA", Hadamard: "a LoHa", Kronecker: "a LoKr"}[type(change)]


def _pair(change: Change, dtype: torch.dtype) -> _Pairs:
    if isinstance(change, LowRank):
        up, down = change.up.to(dtype), change.down.to(dtype)
        if change.mid is not None:
            down = torch.einsum("ij...,jr->ir...", change.mid.to(dtype), down).flatten(1)
        return _Pairs(((up, down),), False, change.scaling)
    assert isinstance(change, (Hadamard, Kronecker))
    pairs = tuple(_of_stored([one.to(dtype) for one in factors]) for factors in (change.first, change.second))
    return _Pairs(pairs, isinstance(change, Hadamard), change.scaling)


def _of_stored(stored: list[Tensor]) -> _Pair:
    """Return the pair of a matrix stored whole, as two factors, or as two factors and a middle kernel."""
    if len(stored) == 1:
        return _with_identity(stored[0].flatten(1) if stored[0].ndim > 1 else stored[0].view(-1, 1))
    if len(stored) == 2:
        return stored[0].flatten(1), stored[1].flatten(1)
    return stored[0].T, torch.einsum("ij...,jr->ir...", stored[2], stored[1]).flatten(1)


def _with_identity(matrix: Tensor) -> _Pair:
    out, inner = matrix.shape
    identity = torch.eye(min(out, inner), dtype=matrix.dtype)
    return (identity, matrix) if out <= inner else (matrix, identity)


def _rank(given: _Pairs) -> int:
    return math.prod(up.shape[1] for up, _ in given.pairs)


def _product(given: _Pairs) -> _Pair:
    (up, down), *rest = given.pairs
    for other_up, other_down in rest:
        if given.elementwise:
            up = (up[:, :, None] * other_up[:, None, :]).flatten(1)
            down = (down[:, None, :] * other_down[None, :, :]).flatten(0, 1)
        else:
            # torch.kron fails on some strides
            up = torch.kron(up.contiguous(), other_up.contiguous())
            down = torch.kron(down.contiguous(), other_down.contiguous())
    return up if given.scaling == 1 else given.scaling * up, down


def _whole(given: _Pairs) -> Tensor:
    (first, *rest) = [up @ down for up, down in given.pairs]
    for other in rest:
        first = first * other if given.elementwise else torch.kron(first.contiguous(), other.contiguous())
    return given.scaling * first


def _laid_out(up: Tensor, down: Tensor, shape: tuple[int, ...]) -> Factors:
    if not (all_finite(up) and all_finite(down)):
        raise AdapterError(f"its factors exceed {up.dtype}, multiplied by alpha / rank; the file is damaged")
    taps = math.prod(shape[2:])
    return Factors(down.view(len(down), shape[1], taps).permute(2, 1, 0), up.T)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
