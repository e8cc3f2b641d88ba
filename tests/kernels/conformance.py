"""What the suites of the operations share: forms to call, drawn inputs full of NaN, and the bound on errors.

A suite is one file for each operation. Its tests are parametrised by form: the literal reference, PyTorch, C++ with
each instruction set, Triton interpreted on the CPU or, marked `gpu`, compiled. Every form fills outputs full of NaN. An
error may be twice that of the formula composed of PyTorch's own calls in the same type, plus a few units in the last
place.
"""

import math
import os
import random
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import pytest
import torch

from stylefast._extension import extension, extension_error
from stylefast.kernels.registry import Operation, tensors_in

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MATRICES = (torch.float32, torch.float16)  # Triton's interpreter multiplies no others
INSTRUCTION_SETS = ("avx2", "avx512", "avx512_bf16")  # each has the one before
LAYOUTS = ("contiguous", "fused", "transposed", "padded", "spread")
HIDDEN, NAN = -math.inf, math.nan

# only a build that was switched off on purpose excuses its absence; a failed one must show
switched_off = extension() is None and os.environ.get("STYLEFAST_EXTENSION") == "0"
NEEDS_EXTENSION = pytest.mark.skipif(switched_off, reason=extension_error() or "built")
INTERPRETED = (
    pytest.mark.skipif(find_spec("triton") is None, reason="needs the triton package"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels are compiled here"),
)


class Form(NamedTuple):
    """One way to run an operation; call it with the operation and its arguments, tensors on the CPU."""

    kind: str  # "reference", "torch", "cpp" or "triton"
    name: str
    marks: tuple = ()
    reference: Callable | None = None
    instructions: str = ""
    config: dict[str, Any] | None = None  # None: the committed one
    device: str = "cpu"
    types: tuple[torch.dtype, ...] = FLOATS

    def prepare(self, monkeypatch):
        """Skip the test if this CPU lacks the instructions, or cap the C++ kernels at them."""
        if self.kind != "cpp":
            return
        best = extension().instruction_set()
        if not best or INSTRUCTION_SETS.index(self.instructions) > INSTRUCTION_SETS.index(best):
            pytest.skip(f"this CPU has no {self.instructions}")
        monkeypatch.setenv("STYLEFAST_CPU", self.instructions)

    def __call__(self, operation: Operation, *arguments):
        """Return what the form makes of the arguments, NaN wherever it wrote nothing."""
        if self.reference is not None:
            return self.reference(*arguments)
        if self.kind == "torch":
            return operation.run(*arguments, form="torch")
        given = moved(arguments, self.device)
        outputs = operation.outputs(*given)
        filled = () if outputs is None else outputs if isinstance(outputs, tuple) else (outputs,)
        for out in filled:
            out.fill_(NAN)
        config = {} if self.config is None else {"config": self.config}
        if not filled or any(out.numel() for out in filled):
            operation._form(self.kind)(*given, *filled, **config)
        if self.device != "cpu" and outputs is None:  # the last argument is filled
            for mine, theirs in zip(tensors_in(arguments[-1:]), tensors_in(given[-1:]), strict=True):
                mine.copy_(theirs)
        return moved(outputs, "cpu")


CPP = [Form("cpp", f"cpp-{x}", (NEEDS_EXTENSION,), instructions=x) for x in INSTRUCTION_SETS]
TORCH = Form("torch", "torch")
GPU = Form("triton", "gpu", (pytest.mark.gpu,), device="cuda")


def forms(reference: Callable | None = None, interpreted: tuple = FLOATS, **configs: dict | None) -> list[Form]:
    """Return every form of an operation; `configs` are those of the kernels that are interpreted, in these types."""
    literal = [] if reference is None else [Form("reference", "reference", reference=reference)]
    triton = [Form("triton", f"triton-{name}", INTERPRETED, config=x, types=interpreted) for name, x in configs.items()]
    return [*literal, TORCH, *CPP, *triton, GPU]


def each(forms: list[Form], kinds: str = "reference torch cpp triton"):
    """Parametrise a test's argument `form`, by default with all of these forms."""
    chosen = [form for form in forms if form.kind in kinds.split()]
    return pytest.mark.parametrize("form", [pytest.param(x, id=x.name, marks=x.marks) for x in chosen], indirect=True)


def each_type(forms: list[Form], kinds: str = "torch cpp triton"):
    """Parametrise `form` and `dtype` with every type that a form takes."""
    pairs = [
        pytest.param(form, dtype, id=f"{form.name}-{str(dtype)[6:]}", marks=form.marks)
        for form in forms
        for dtype in form.types
        if form.kind in kinds.split()
    ]
    return pytest.mark.parametrize("form, dtype", pairs, indirect=["form"])


def moved(value, device: str):
    """Move tensors, in tuples and lists too, with their strides and what lies between their elements."""
    if isinstance(value, torch.Tensor):
        if value.device.type == device:
            return value
        whole = torch.as_strided(value, (value.untyped_storage().nbytes() // value.element_size(),), (1,), 0)
        return whole.to(device).as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, (list, tuple)):
        parts = [moved(x, device) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


class Draw:
    """Reproducible choices and tensors."""

    def __init__(self, seed: int):
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def one(self, values):
        return self.random.choice(values)

    def some(self, *shape, values):
        """Return a nested list of this shape."""
        size, *rest = shape
        return [self.some(*rest, values=values) if rest else self.one(values) for _ in range(size)]

    def normal(self, *shape, dtype=torch.float32):
        return torch.randn(shape, generator=self.generator).to(dtype)

    def uniform(self, *shape):
        return torch.rand(shape, generator=self.generator)

    def table(self, values, *shape, dtype=torch.float32):
        """Return values as a table of this shape, half of the time with strides that are not its own."""
        x = torch.tensor(values, dtype=dtype).reshape(shape)
        return x if x.ndim < 2 or self.one((True, False)) else x.t().contiguous().t()


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def laid_out(x, layout):
    """x [rows, tokens, heads, d] as a view whose gaps hold NaN."""
    rows, tokens, heads, width = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "fused":
        view = x.new_full((rows, tokens, 3, heads, width), NAN)[:, :, 1]
    elif layout == "transposed":
        view = x.new_full((rows, heads, tokens, width), NAN).transpose(1, 2)
    elif layout == "padded":
        view = x.new_full((rows, tokens + 2, heads + 1, width + 8), NAN)[:, 1:-1, 1:, 3 : width + 3]
    else:
        view = x.new_full((2 * rows, 3 * tokens, heads, width), NAN)[1::2, 2::3]
    return view.copy_(x)


def rms(x):
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def assert_as_near_as_pytorch(found, composed, exact, logits=0.0, ulps=4, size=None):
    """Errors against `exact` stay below twice those of `composed`, give or take `ulps` of numbers of this size.

    logits: the largest magnitude that fp32 had to hold beside the logits, such as a shift. size: by default that of the
    largest exact number.
    """
    assert found.shape == exact.shape and found.dtype == composed.dtype
    assert not found.isnan().any(), "a NaN came through"
    if size is None:
        size = float(exact.abs().max()) if exact.numel() else 0.0
    units = ulps * torch.finfo(found.dtype).eps + 8 * torch.finfo(torch.float32).eps * logits
    error, allowed = rms(found.double() - exact), rms(composed.double() - exact)
    assert error <= 2 * allowed + 0.25 * units * size, f"rms error {error:.3g}, PyTorch's own {allowed:.3g}"
    worst, worst_allowed = (float((x.double() - exact).abs().max()) if x.numel() else 0.0 for x in (found, composed))
    assert worst <= 2 * worst_allowed + units * size, f"largest error {worst:.3g}, PyTorch's own {worst_allowed:.3g}"


def doubled(value):
    """Halves and floats in double precision, in tuples and lists too; fp8 and integers as they are."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.dtype in FLOATS else value
    if isinstance(value, list):
        return [doubled(x) for x in value]
    if isinstance(value, tuple):
        return type(value)(*map(doubled, value)) if hasattr(value, "_fields") else tuple(map(doubled, value))
    return value


def equal(one, other) -> bool:
    """Return whether two results, tensors or tuples of them, have the same bits, NaN in the same places."""
    ones, others = (x if isinstance(x, tuple) else (x,) for x in (one, other))
    return all(torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25)) for a, b in zip(ones, others, strict=True))


def same_bits_on_any_number_of_threads(form, operation, *arguments):
    """Assert that one thread and five give the same bits."""
    before = torch.get_num_threads()
    try:
        results = [torch.set_num_threads(count) or form(operation, *arguments) for count in (1, 5)]
    finally:
        torch.set_num_threads(before)
    assert equal(*results)


def captured(operation, *arguments):
    """Capture a call on a GPU, which holds only if it never waits for the device; return (replay, arguments there)."""
    given = moved(arguments, "cuda")
    operation.run(*given, form="triton")  # compiles, which a capture may not
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = operation.run(*given, form="triton")

    def replay():
        for result in results if isinstance(results, tuple) else (results,):
            result.fill_(NAN)
        graph.replay()
        return moved(results, "cpu")

    return replay, given
