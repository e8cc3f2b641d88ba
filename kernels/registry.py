"""Choice of the backend that runs an operation, with the reasons against the others.

Every operation is a PyTorch custom op `torch.ops.stylefast.<name>` with three backends: `triton` for CUDA devices,
`cpp` for CPUs, `torch` for everything. A call runs on the first of these that doesn't refuse it. The environment
variable `STYLEFAST_KERNELS` forces a backend; forcing one that can't run is an error that says why:

    STYLEFAST_KERNELS=torch                          every operation
    STYLEFAST_KERNELS=cpp,geglu=torch                all operations except one
    STYLEFAST_KERNELS=shared_attention=torch         one operation; the others choose as usual
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch.autograd import forward_ad

from stylefast._extension import extension, extension_error
from stylefast.errors import InvalidRequest
from stylefast.kernels import checks

BACKENDS = ("triton", "cpp", "torch")
VARIABLE = "STYLEFAST_KERNELS"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library("stylefast", "DEF")
_operations: dict[str, "Operation"] = {}
_local = threading.local()
_using: list[tuple[str, str | None]] = []  # (backend, operation or None for all), innermost last


class Operation:
    """One custom op: schema, outputs and forms.

    schema      of the custom op, without its name
    outputs     arguments -> new tensor or tuple of tensors with the result's shape, type and strides; also the fake
    forms       backend -> function; `torch` takes the arguments and returns the result, `triton` and `cpp` take the
                arguments followed by the outputs, which they fill
    refuse      (backend, arguments) -> why the backend can't take the call, or ""; the registry checks devices,
                types and missing packages itself
    values      arguments -> None; reads tensors on the host and raises InvalidRequest for values out of range
    traceable   the torch form without host reads, for compilers that differentiate it
    """

    def __init__(
        self,
        name: str,
        schema: str,
        outputs: Callable[..., Any],
        forms: dict[str, Callable[..., Any]],
        refuse: Callable[[str, tuple], str] = lambda backend, arguments: "",
        values: Callable[..., None] | None = None,
        traceable: Callable[..., Any] | None = None,
    ):
        self.name, self.outputs, self.forms, self.refuse, self.values = name, outputs, forms, refuse, values
        self.traceable = traceable or forms["torch"]
        self._choices: dict[tuple, str] = {}  # backend by signature of a trusted call
        _define(name, schema, self.run, outputs)
        self.op = getattr(torch.ops.stylefast, name).default
        _operations[name] = self

    def __call__(self, *arguments):
        """Call the custom op, or the torch form itself if a gradient is needed: only that one has a backward."""
        if trusted():
            return self._run_trusted(arguments)
        if not _wants_gradient(arguments):
            return self.op(*arguments)
        backend, origin = _forced(self)
        if backend not in (None, "torch"):
            raise InvalidRequest(
                f"{origin} forces {self.name} to {backend}, but gradients are wanted and only the torch form has "
                "a backward; call it under torch.no_grad() or leave the choice open"
            )
        if torch.compiler.is_compiling():
            return self.traceable(*arguments)
        self._check_values(arguments)
        return self._torch(arguments)

    def run(self, *arguments):
        """Choose a backend and run it; the implementation of the custom op."""
        backend = self._admit(arguments)
        if backend == "torch":
            return self._torch(arguments)
        results = self.outputs(*arguments)
        filled = results if isinstance(results, tuple) else (results,)
        if any(result.numel() for result in filled):
            self.forms[backend](*arguments, *filled)
        return results

    def _run_trusted(self, arguments: tuple):
        """Run a trusted call; its backend is cached by device, types and last dimension."""
        first = next(_tensors(arguments))
        types = [x.dtype if isinstance(x, torch.Tensor) else x is None for x in arguments]
        key = (first.device, first.shape[-1], *types)
        backend = self._choices.get(key)
        if backend is None:
            backend = self._choices[key] = choose(self, arguments)[0]
        if backend == "torch":
            return self._torch(arguments)
        results = self.outputs(*arguments)
        self.forms[backend](*arguments, *(results if isinstance(results, tuple) else (results,)))
        return results

    def into(self, name: str, schema: str) -> Callable[..., None]:
        """Register and return a variant of the op that writes its single output into the last argument."""

        def run(*arguments):
            *inputs, out = arguments
            checks.apart(out, **{name: x for name, x in zip(names, inputs) if isinstance(x, torch.Tensor)})
            backend = self._admit(tuple(inputs))
            if backend != "torch" and out.is_contiguous():
                if out.numel():
                    self.forms[backend](*arguments)
            else:
                out.copy_(self.run(*inputs))

        _define(name, schema, run, lambda *arguments: None)
        op = getattr(torch.ops.stylefast, name).default
        names = [argument.name for argument in op._schema.arguments]

        def call(*arguments):
            if _wants_gradient(arguments):
                raise InvalidRequest(f"{self.name} has no gradient into `out`; leave `out` away or use torch.no_grad()")
            op(*arguments)

        return call

    def _admit(self, arguments: tuple) -> str:
        self._check_values(arguments)
        return choose(self, arguments)[0]

    def _check_values(self, arguments: tuple) -> None:
        if self.values is not None and (_device(arguments).type == "cpu" or _checks_values()):
            self.values(*arguments)

    def _torch(self, arguments: tuple):
        device = _device(arguments).type
        if not torch.is_autocast_enabled(device):
            return self.forms["torch"](*arguments)
        # the operation defines its own rounding; autocast must not change it
        with torch.autocast(device, enabled=False):
            return self.forms["torch"](*arguments)


def _define(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    # keep the strides of eager mode: kernels read views of fused projections without copies
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
    _library.define(name + schema, tags=tags)
    for device in ("CPU", "CUDA"):
        _library.impl(name, run, device)
    torch.library.register_fake(f"stylefast::{name}", fake, lib=_library)


def choose(operation: Operation, arguments: tuple) -> tuple[str, str]:
    """Return the backend for a call and the reason. Raises InvalidRequest if a forced backend can't take the call."""
    return _choose(operation, _device(arguments).type, lambda backend: refusal(operation, backend, arguments))


def refusal(operation: Operation, backend: str, arguments: tuple) -> str:
    """Return why a backend can't take a call, or "" if it can."""
    first = next(_tensors(arguments))
    return _unfit(backend, first.device, first.dtype) or operation.refuse(backend, arguments)


def operation(name: str) -> Operation:
    """Return the operation of that name. Raises InvalidRequest, listing the known names."""
    if name not in _operations:
        raise InvalidRequest(f"there is no operation {name!r}; there are {', '.join(sorted(_operations))}")
    return _operations[name]


def instruction_set() -> str:
    """Return the instruction set of the C++ forms: "avx512_bf16", "avx512", "avx2", or "" if unavailable.

    Raises InvalidRequest if the environment's STYLEFAST_CPU names a set that is not usable here.
    """
    module = extension()
    try:
        return module.instruction_set() if module is not None else ""
    except ValueError as error:
        raise InvalidRequest(str(error)) from error


def report(device: torch.device | str | None = None) -> list[dict[str, Any]]:
    """List the backend of each operation on a device, for bfloat16 on CUDA and float32 on a CPU.

    One dict per operation: `operation`, `backend` (None if the forced one can't run), `reason`, and `refused`, a dict
    backend -> reason. The device defaults to cuda if available.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows = []
    for name in sorted(_operations):
        refused = {}
        try:
            refused = {backend: _unfit(backend, device, dtype) for backend in BACKENDS}
            backend, reason = _choose(_operations[name], device.type, refused.get)
        except InvalidRequest as error:
            backend, reason = None, str(error)
        refused = {backend: why for backend, why in refused.items() if why}
        rows.append({"operation": name, "backend": backend, "reason": reason, "refused": refused})
    return rows


@contextmanager
def using(backend: str, operation: str | None = None) -> Iterator[None]:
    """Force a backend for one operation, or for all, as `STYLEFAST_KERNELS` does.

    The innermost use wins, and any wins over the environment. Not thread-safe.
    """
    _check_rule(backend, operation, "registry.using")
    _using.append((backend, operation))
    try:
        yield
    finally:
        _using.pop()


@contextmanager
def trusting() -> Iterator[None]:
    """Skip checks, dispatcher and gradients for operations called by this thread.

    For callers that create all arguments themselves and call often, such as sampler steps under inference mode. Has no
    effect if a backend is forced or checks are requested (STYLEFAST_KERNELS, `using`, STYLEFAST_CHECKS=1).
    """
    before = getattr(_local, "trusted", False)
    _local.trusted = not (_checks_values() or _using or os.environ.get(VARIABLE))
    try:
        yield
    finally:
        _local.trusted = before


def trusted() -> bool:
    """Return whether this thread skips checks; always False under torch.compile."""
    return not torch.compiler.is_compiling() and getattr(_local, "trusted", False)


def _forced(entry: Operation) -> tuple[str | None, str]:
    """Return the backend that is forced for an operation, or None, and where it was set."""
    for backend, name in reversed(_using):
        if name in (None, entry.name):
            return backend, "registry.using"
    setting = os.environ.get(VARIABLE)
    if not setting:
        return None, ""
    general, named = _parse(setting)
    if entry.name in named:
        return named[entry.name], f"{VARIABLE}={setting}"
    if general is not None:
        return general, f"{VARIABLE}={setting}"
    return None, ""


def _parse(setting: str) -> tuple[str | None, dict[str, str]]:
    general, named = None, {}
    for word in filter(None, (part.strip() for part in setting.split(","))):
        name, separator, backend = word.rpartition("=")
        _check_rule(backend, name if separator else None, f"{VARIABLE}={setting}")
        if separator:
            named[name] = backend
        elif general not in (None, backend):
            raise InvalidRequest(f"{VARIABLE}={setting} forces everything to {general} and to {backend}; name one")
        else:
            general = backend
    return general, named


def _check_rule(backend: str, name: str | None, origin: str) -> None:
    if backend not in BACKENDS:
        raise InvalidRequest(f"{origin} names the backend {backend!r}; there are {', '.join(BACKENDS)}")
    if name is not None and name not in _operations:
        raise InvalidRequest(f"{origin} names the operation {name!r}; there are {', '.join(sorted(_operations))}")


def _choose(entry: Operation, device: str, refuse: Callable[[str], str]) -> tuple[str, str]:
    forced, origin = _forced(entry)
    if forced is not None:
        if why := refuse(forced):
            raise InvalidRequest(f"{origin} forces {entry.name} to {forced}, which can't run here: {why}")
        return forced, f"forced by {origin}"
    reasons = []
    for backend in BACKENDS:
        why = refuse(backend)
        if not why and backend == "triton" and device == "cpu":
            why = "interpreted kernels run only when forced"
        if not why:
            return backend, "; ".join(reasons) or "the first choice"
        reasons.append(f"not {backend}: {why}")
    raise InvalidRequest(f"{entry.name} can't run: {'; '.join(reasons)}")


def _unfit(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return why a backend can't take tensors of this device and type, for any operation and shape; "" if it can."""
    if backend == "torch":
        return ""
    if backend == "triton":
        why = _without_triton(device.type, device.index)
    elif device.type != "cpu":
        why = f"the tensors are on {device.type}, the C++ form is for CPUs"
    else:
        why = _without_extension()
    return why or ("" if dtype in FLOATS else f"{dtype} is not float32, bfloat16 or float16")


@cache
def _without_triton(kind: str, index: int | None) -> str:
    if find_spec("triton") is None:
        return "triton is not installed; `pip install 'stylefast[triton]'` brings it"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    if kind != "cuda":
        return f"the tensors are on {kind}, Triton kernels need a CUDA device"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"this GPU has compute capability {major}.{minor}, the kernels need 8.0 or higher"
    return ""


@cache
def _without_extension() -> str:
    module = extension()
    if module is None:
        return extension_error()
    if not instruction_set():
        return "STYLEFAST_CPU is none, or this CPU has neither AVX-512 nor AVX2 with FMA"
    return ""


def _wants_gradient(arguments: Sequence[Any]) -> bool:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors(arguments)):
        return True
    # forward-mode derivatives; torch.compile does not trace them
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in _tensors(arguments))


def _checks_values() -> bool:
    return os.environ.get("STYLEFAST_CHECKS") == "1"


def _tensors(arguments: Sequence[Any]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)


def _device(arguments: tuple) -> torch.device:
    return next(_tensors(arguments)).device
