"""Choice of the form that runs an operation, with the reasons against the others.

Every operation is a PyTorch custom op `torch.ops.stylefast.<name>` with three forms: `triton` for CUDA devices, `cpp`
for CPUs, `torch` for everything. A call runs on the first of these that doesn't refuse it. The environment variable
`STYLEFAST_KERNELS` forces a form; forcing one that can't run is an error that says why:

    STYLEFAST_KERNELS=torch                          every operation
    STYLEFAST_KERNELS=cpp,geglu=torch                all operations except one
    STYLEFAST_KERNELS=shared_attention=torch         one operation; the others choose as usual
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from stylefast._extension import extension, extension_error
from stylefast.errors import InvalidRequest, MissingDependency
from stylefast.values import quoted

FORMS = ("triton", "cpp", "torch")
VARIABLE = "STYLEFAST_KERNELS"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_library = torch.library.Library("stylefast", "DEF")
_operations: dict[str, "Operation"] = {}
_using: list[tuple[str, str | None]] = []  # (form, operation or None for all), innermost last


class Operation:
    """One custom op: schema, outputs and forms. Public functions check their arguments and `call` it.

    schema      of the custom op, without its name
    outputs     arguments -> new tensor or tuple of tensors with the result's shape, type and strides; also the fake.
                An op that writes into its last argument instead gives None
    forms       form -> function; `torch` takes the arguments and returns the result, `triton` and `cpp` take the
                arguments followed by the outputs, which they fill. "triton" may also be a module of kernels.gpu whose
                function of the operation's name is imported when it is first needed
    groups      NamedTuples that the last arguments are, or None for; the schema has their fields instead
    refuse      (form, arguments) -> why the form can't take the call, or ""; the registry checks devices, types and
                missing packages itself
    values      arguments -> None; reads tensors on the host and raises InvalidRequest for values out of range
    traceable   the torch form without host reads, for compilers that differentiate it
    """

    def __init__(
        self,
        name: str,
        schema: str,
        outputs: Callable[..., Any],
        forms: dict[str, Any],
        groups: tuple[Any, ...] = (),
        refuse: Callable[[str, tuple], str] = lambda form, arguments: "",
        values: Callable[..., None] | None = None,
        traceable: Callable[..., Any] | None = None,
    ):
        self.name, self.outputs, self.forms, self.refuse, self.values = name, outputs, forms, refuse, values
        self.groups, self.traceable = groups, traceable or forms["torch"]
        self._choices: dict[tuple, str] = {}  # form by signature of a call of `run`
        # keep the strides of eager mode: kernels read views of fused projections without copies
        tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
        _library.define(name + schema, tags=tags)
        for device in ("CPU", "CUDA"):
            _library.impl(name, self._dispatched, device)

        def fake(*flat):
            return outputs(*self.grouped(flat))

        torch.library.register_fake(f"stylefast::{name}", fake, lib=_library)
        self.op = getattr(torch.ops.stylefast, name).default
        _operations[name] = self

    def call(self, *arguments: Any) -> Any:
        """Call the custom op, or the torch form itself if a gradient is needed: only that one has a backward."""
        if not _wants_gradient(arguments):
            return self.op(*self.flat(arguments))
        form, origin = _forced(self)
        if form not in (None, "torch"):
            raise InvalidRequest(
                f"{origin} forces {self.name} to {form}, but gradients are wanted and only the torch form has "
                "a backward; call it under torch.no_grad() or leave the choice open"
            )
        if torch.compiler.is_compiling():
            return self.traceable(*arguments)
        self._check_values(arguments)
        return self._torch(arguments)

    def run(self, *arguments: Any, form: str | None = None) -> Any:
        """Run without checks, for callers that make every argument themselves and call often.

        The dispatcher is skipped too, unless a compiler traces, a gradient is needed, or the environment or `using`
        forces a form or asks for checks: then this is `call`. `form` is that of a caller who has chosen it.
        """
        if form is None:
            if _is_watched() or _wants_gradient(arguments):
                return self.call(*arguments)
            first, *others = tensors_in(arguments)
            key = (first.device, first.shape[-1], first.dtype, *(x.dtype for x in others))
            form = self._choices.get(key)
            if form is None:
                form = self._choices[key] = choose(self, arguments)[0]
        if form == "torch":
            return self._torch(arguments)
        results = self.outputs(*arguments)
        filled = () if results is None else results if isinstance(results, tuple) else (results,)
        if not filled or any(result.numel() for result in filled):
            self._form(form)(*arguments, *filled)
        return results

    def flat(self, arguments: Sequence[Any]) -> tuple:
        """Return arguments with the fields of their groups in place of the groups, as the custom op takes them."""
        single = len(arguments) - len(self.groups)
        groups = zip(arguments[single:], self.groups, strict=True)
        return (*arguments[:single], *(x for given, kind in groups for x in given or (None,) * len(kind._fields)))

    def grouped(self, flat: tuple) -> tuple:
        """Return the custom op's arguments as the forms take them, the reverse of `flat`."""
        arguments, end = [], len(flat)
        for kind in reversed(self.groups):
            fields, end = flat[end - len(kind._fields) : end], end - len(kind._fields)
            arguments.insert(0, None if all(x is None for x in fields) else kind(*fields))
        return (*flat[:end], *arguments)

    def _dispatched(self, *flat):
        """Implement the custom op."""
        arguments = self.grouped(flat)
        self._check_values(arguments)
        return self.run(*arguments, form=choose(self, arguments)[0])

    def _form(self, name: str) -> Callable[..., Any]:
        form = self.forms[name]
        if isinstance(form, str):
            module = import_module(f"stylefast.kernels.gpu.{form}")
            form = self.forms[name] = getattr(module, self.name)
        return form

    def _check_values(self, arguments: tuple) -> None:
        if self.values is not None and (_device(arguments).type == "cpu" or _checks_values()):
            self.values(*arguments)

    def _torch(self, arguments: tuple):
        device, form = _device(arguments).type, self.forms["torch"]
        if not torch.is_autocast_enabled(device):
            return form(*arguments)
        # the operation defines its own rounding; autocast must not change it
        with torch.autocast(device, enabled=False):
            return form(*arguments)


def choose(operation: Operation, arguments: tuple) -> tuple[str, str]:
    """Return the form for a call and the reason. Raises InvalidRequest if a forced form can't take the call."""
    return _choose(operation, _device(arguments).type, lambda form: refusal(operation, form, arguments))


def refusal(operation: Operation, form: str, arguments: tuple) -> str:
    """Return why a form can't take a call, or "" if it can."""
    first = next(tensors_in(arguments))
    return _unfit(form, first.device, first.dtype) or operation.refuse(form, arguments)


def operation(name: str) -> Operation:
    """Return the operation of that name. Raises InvalidRequest, listing the known names."""
    if name not in _operations:
        raise InvalidRequest(f"there is no operation {quoted(name)}; there are {', '.join(sorted(_operations))}")
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
    """List the form of each operation on a device, for bfloat16 on CUDA and float32 on a CPU.

    One dict per operation: `operation`, `form` (None if the forced one can't run), `reason`, and `refused`, a dict
    form -> reason. The device defaults to cuda if available.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    rows = []
    for name in sorted(_operations):
        refused = {}
        try:
            refused = {form: _unfit(form, device, dtype) for form in FORMS}
            form, reason = _choose(_operations[name], device.type, refused.__getitem__)
        except InvalidRequest as error:
            form, reason = None, str(error)
        refused = {form: why for form, why in refused.items() if why}
        rows.append({"operation": name, "form": form, "reason": reason, "refused": refused})
    return rows


@contextmanager
def using(form: str, operation: str | None = None) -> Iterator[None]:
    """Force a form for one operation, or for all, as `STYLEFAST_KERNELS` does.

    The innermost use wins, and any wins over the environment. Not thread-safe.
    """
    _check_rule(form, operation, "registry.using")
    _using.append((form, operation))
    try:
        yield
    finally:
        _using.pop()


def _forced(entry: Operation) -> tuple[str | None, str]:
    """Return the form that is forced for an operation, or None, and where it was set."""
    for form, name in reversed(_using):
        if name in (None, entry.name):
            return form, "registry.using"
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
        name, separator, form = word.rpartition("=")
        _check_rule(form, name if separator else None, f"{VARIABLE}={setting}")
        if separator:
            named[name] = form
        elif general not in (None, form):
            raise InvalidRequest(f"{VARIABLE}={setting} forces everything to {general} and to {form}; name one")
        else:
            general = form
    return general, named


def _check_rule(form: str, name: str | None, origin: str) -> None:
    if form not in FORMS:
        raise InvalidRequest(f"{origin} names the form {quoted(form)}; there are {', '.join(FORMS)}")
    if name is not None and name not in _operations:
        raise InvalidRequest(f"{origin} names the operation {quoted(name)}; there are {', '.join(sorted(_operations))}")


def _choose(entry: Operation, device: str, refuse: Callable[[str], str]) -> tuple[str, str]:
    forced, origin = _forced(entry)
    if forced is not None:
        if why := refuse(forced):
            raise InvalidRequest(f"{origin} forces {entry.name} to {forced}, which can't run here: {why}")
        return forced, f"forced by {origin}"
    reasons = []
    for form in FORMS:
        why = refuse(form)
        if not why and form == "triton" and device == "cpu":
            why = "interpreted kernels run only when forced"
        if not why:
            return form, "; ".join(reasons) or "the first choice"
        reasons.append(f"not {form}: {why}")
    raise InvalidRequest(f"{entry.name} can't run: {'; '.join(reasons)}")


def _unfit(form: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return why a form can't take tensors of this device and type, for any operation and shape; "" if it can."""
    if form == "torch":
        return ""
    if form == "triton":
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


def require_extension() -> ModuleType:
    """Return the C++ extension. Raises MissingDependency if there is none."""
    module = extension()
    if module is None:
        raise MissingDependency(extension_error())
    return module


@cache
def _without_extension() -> str:
    module = extension()
    if module is None:
        return extension_error()
    if not instruction_set():
        return "STYLEFAST_CPU is none, or this CPU has neither AVX-512 nor AVX2 with FMA"
    return ""


def _wants_gradient(arguments: Sequence[Any]) -> bool:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in(arguments)):
        return True
    # forward-mode derivatives; torch.compile does not trace them
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors_in(arguments))


def _is_watched() -> bool:
    """Return whether a call must go through the custom op: traced, or with a form or checks asked for."""
    if torch.compiler.is_compiling():
        return True
    return bool(_using or os.environ.get(VARIABLE) or _checks_values() or is_in_torch_dispatch_mode())


def _checks_values() -> bool:
    return os.environ.get("STYLEFAST_CHECKS") == "1"


def tensors_in(arguments: Sequence[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors of an operation's arguments, those in lists and tuples too."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from tensors_in(argument)


def _device(arguments: tuple) -> torch.device:
    return next(tensors_in(arguments)).device
