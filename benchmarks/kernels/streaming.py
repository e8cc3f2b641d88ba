"""The memory-bound operations: token_stats, group_norm_silu, geglu, add_layer_norm and guided_step.

Traffic counts every input and output once, even if an implementation reads inputs again.
"""

from collections.abc import Callable

import torch

from benchmarks.kernels import plain
from benchmarks.kernels.cases import Case, Entrants, Share, Versus, cache_bytes, input_sets, normal
from stylefast import kernels

OURS, PLAIN, COMPILED = "one call", "plain PyTorch", "torch.compile, max-autotune"
EPS = 1e-5


def cpu_cases(quick: bool) -> list[Case]:
    """Return cases at sizes of two rows at 1024 x 1024 pixels, without goals."""
    scale = 32 if quick else 1
    return [
        case
        for dtype in (torch.float32, torch.bfloat16)
        for case in _cases(2, 4, 4096 // scale, 128 // (4 if quick else 1), dtype, "cpu", None)
    ]


def cuda_cases(quick: bool, device: str = "cuda") -> list[Case]:
    """Return bf16 cases at sizes larger than any L2."""
    if quick:
        return _cases(2, 4, 256, 16, torch.bfloat16, device, {})
    return _cases(16, 128, 4096, 128, torch.bfloat16, device, {"copy": 0.85, "compiled": 1.2})


def _cases(rows: int, pictures: int, tokens: int, side: int, dtype, device: str, goals: dict | None) -> list[Case]:
    compiled, goals = goals is not None, goals or {}
    size = torch.empty(0, dtype=dtype).element_size()
    tensor = f"[{rows}, {tokens}, 640]"
    values = 1.0 * rows * tokens * 640 * size
    picture = 1.0 * rows * 320 * side * side * size
    # latents, anchor, noise and updated values are fp32, predictions and history have the network's type
    step = 1.0 * pictures * 4 * side * side * (5 * 4 + 6 * size)
    operations = [
        (_Operation("token_stats", _token_stats(rows, tokens)), f"q and k {tensor}", 2 * values, goals),
        (
            _Operation("group_norm_silu", _group_norm_silu(rows, side), last=(True,)),
            f"[{rows}, 320, {side}, {side}] channels last",
            2 * picture,
            goals,
        ),
        (_Operation("geglu", _geglu(rows, tokens)), f"[{rows}, {tokens}, 5120]", 12 * values, goals),
        (_Operation("add_layer_norm", _add_layer_norm(rows, tokens)), tensor, 4 * values, goals),
        (
            _Operation("guided_step", _guided_step(pictures, side, 0.0)),
            f"{pictures} x [4, {side}, {side}]",
            step,
            goals,
        ),
        # rescale must read predictions twice, so the goals above don't apply
        (
            _Operation("guided_step", _guided_step(pictures, side, 0.7), peer=plain.rescaled_guided_step),
            f"{pictures} x [4, {side}, {side}] rescale",
            step,
            {},
        ),
    ]
    return [
        _case(operation, shape, dtype, device, traffic, wanted, compiled)
        for operation, shape, traffic, wanted in operations
    ]


class _Operation:
    """Our operation `name`, its peer (default: same name in `plain`), arguments for both, and extra ones for ours."""

    def __init__(self, name: str, make: Callable, peer: Callable | None = None, last: tuple = ()):
        self.name, self.make, self.last = name, make, last
        self.ours, self.peer = getattr(kernels, name), peer or getattr(plain, name)


def _case(operation: _Operation, shape: str, dtype, device: str, traffic: float, goals: dict, compiled: bool) -> Case:
    comparisons: list[Versus | Share] = [Versus(OURS, PLAIN, error_goal=None)]
    if compiled:
        comparisons.append(Versus(OURS, COMPILED, goals.get("compiled"), error_goal=None))
    comparisons.append(Share(OURS, "copy", goals.get("copy")))

    def build() -> Entrants:
        sets = [operation.make(dtype, device, seed) for seed in range(input_sets(traffic, cache_bytes(device)))]
        peer = operation.peer
        calls = {
            OURS: lambda i: operation.ours(*sets[i], *operation.last),
            PLAIN: lambda i: peer(*sets[i]),
        }
        if compiled:
            compiled_peer = torch.compile(peer, mode="max-autotune-no-cudagraphs", dynamic=False)
            calls[COMPILED] = lambda i: compiled_peer(*sets[i])
        return Entrants(calls, sets=len(sets), exact=lambda: _flat(peer(*map(_double, sets[0]))), pick=_flat)

    return Case(operation.name, shape, dtype, comparisons, build, bytes=traffic)


def _double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _flat(out) -> torch.Tensor:
    # only the first values of each output: comparing all would take longer than the benchmark
    parts = out if isinstance(out, tuple) else (out,)
    return torch.cat([part.flatten()[: 2**20].double() for part in parts])


def _token_stats(rows: int, tokens: int) -> Callable:
    def make(dtype, device, seed):
        return tuple(normal(rows, tokens, 10, 64, dtype=dtype, device=device, seed=2 * seed + i) for i in range(2))

    return make


def _group_norm_silu(rows: int, side: int) -> Callable:
    def make(dtype, device, seed):
        x = normal(rows, 320, side, side, dtype=dtype, device=device, seed=seed)
        weight, bias = (normal(320, dtype=dtype, device=device, seed=90 + i) for i in range(2))
        return x.to(memory_format=torch.channels_last), 32, weight, bias, EPS

    return make


def _geglu(rows: int, tokens: int) -> Callable:
    return lambda dtype, device, seed: (normal(rows, tokens, 5120, dtype=dtype, device=device, seed=seed),)


def _add_layer_norm(rows: int, tokens: int) -> Callable:
    def make(dtype, device, seed):
        shapes = ((rows, tokens, 640), (rows, tokens, 640), (640,), (640,))
        return (
            *(normal(*shape, dtype=dtype, device=device, seed=4 * seed + i) for i, shape in enumerate(shapes)),
            EPS,
        )

    return make


def _guided_step(pictures: int, side: int, rescale: float) -> Callable:
    """Return inputs for classifier-free guidance, branches null and full, with coefficients that use every term."""

    def make(dtype, device, seed):
        picture = (4, side, side)
        shapes = ((pictures, *picture), (pictures, *picture), (pictures, *picture))
        latents, anchor, noise = (
            normal(*shape, dtype=torch.float32, device=device, seed=6 * seed + i) for i, shape in enumerate(shapes)
        )
        history = normal(pictures, 2, *picture, dtype=dtype, device=device, seed=6 * seed + 3)
        predictions = normal(2 * pictures, *picture, dtype=dtype, device=device, seed=6 * seed + 4)
        index = torch.arange(pictures, device=device)
        unused = torch.full_like(index, -1)
        return (
            latents,
            anchor,
            history,
            predictions,
            torch.stack([index, unused, unused, index + pictures], 1),
            torch.tensor([-4.0, 0.0, 0.0, 5.0], device=device).repeat(pictures, 1),
            torch.full((pictures,), rescale, device=device),
            torch.tensor([1.0, -0.8], device=device).repeat(pictures, 1),
            torch.tensor([[0.6, 0.1, 0.3, -0.1, 0.05, 0.2], [0.1, 0.9, 0.1, 0.1, 0.1, 0.1]], device=device).repeat(
                pictures, 1, 1
            ),
            noise,
        )

    return make
