"""Detection of manual changes to modules in memory: methods replaced on an instance, other layers or attributes.

State dicts don't hold such changes, so a model rebuilt from config and weights would lose them.
"""

from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn

from stylefast.errors import ModelError
from stylefast.values import quoted

Made = Mapping[str, tuple[type, Mapping[str, Any]]]  # module name -> class and plain attributes

# attributes that ordinary use sets without effect on pictures, or that are checked elsewhere
_NO_MATTER = frozenset(
    (
        "training",
        "gradient_checkpointing",
        "p",
        "dropout",
        "inplace",
        "name",
        "sample_size",
        "sliceable_head_dim",
        "upcast_attention",
        "upcast_softmax",
        "fused_projections",
        "encoder_hid_proj",
    )
)
# modules to skip: handled elsewhere, or copies of others
_BESIDE = frozenset(("processor", "encoder_hid_proj", "to_qkv", "to_kv"))
# base class methods that affect a module's output; the others are bookkeeping
_CALLED = frozenset(("forward", "_call_impl", "_wrapped_call_impl"))
_BASES = (
    "torch.nn.modules.module",
    "diffusers.models.modeling_utils",
    "transformers.modeling_utils",
    "diffusers.configuration_utils",
    "diffusers.utils",
    "transformers.utils",
)
_MISSING, _OTHER = object(), object()


def replaced_method(module: nn.Module) -> str | None:
    """Return the name of a method replaced on this instance, or None.

    A forward wrapped by accelerate counts as replaced only if the wrapped one is; diffusers' hooks and modules wrapped
    by `torch.compile` don't count.
    """
    if "_orig_mod" in module._modules:
        return None
    kind = type(module)
    for name, value in vars(module).items():
        owner = next((one for one in kind.__mro__ if name in vars(one)), None)
        if owner is None or not _is_method(vars(owner)[name]):
            continue
        if name == "forward":
            if "_hf_hook" in vars(module):
                value = vars(module).get("_old_forward", value)
            if getattr(value, "__func__", None) is not kind.forward and "_diffusers_hook" not in vars(module):
                return name
        elif name in _CALLED or not owner.__module__.startswith(_BASES):
            return name
    return None


def overriding(thing: Any, library: str, bookkeeping: tuple[str, ...]) -> tuple[type | None, list[str]]:
    """Return the object's first base class from `library`, and the methods and properties of it that are overridden.

    Overrides come from subclasses or from the instance; `__init__` and methods defined in the modules of `bookkeeping`
    don't count. Returns (None, []) for objects of other libraries.
    """
    line = type(thing).__mro__
    base = next((kind for kind in line if kind.__module__.split(".")[0] == library), None)
    if base is None:
        return None, []
    names = {name for kind in line[: line.index(base)] for name in vars(kind)} | {*getattr(thing, "__dict__", ())}
    found = []
    for name in names - {"__init__"}:
        owner = next((kind for kind in base.__mro__ if name in vars(kind)), object)
        inherited = vars(owner).get(name)
        if owner is not object and not owner.__module__.startswith(bookkeeping) and _is_method(inherited):
            found.append(name)
    return base, sorted(found)


def made_modules(model: nn.Module) -> Made:
    """Return the reference for `check_as_made`, given a model built from its config alone."""
    return {
        name: (
            type(one),
            {
                key: _plain(value)
                for key, value in vars(one).items()
                if key not in _NO_MATTER and not key.startswith("_") and _plain(value) is not _OTHER
            },
        )
        for name, one in model.named_modules(remove_duplicate=False)
    }


def check_as_made(what: str, model: nn.Module, made: Made) -> None:
    """Raise ModelError, naming module and attribute, if the model's modules differ from those its config builds."""
    for name, one in model.named_modules(remove_duplicate=False):
        parts = name.split(".")
        if "_orig_mod" in one._modules or _BESIDE & {*parts}:
            continue
        place = ".".join(part for part in parts if part != "_orig_mod")
        kind, attributes = made.get(place, (None, {}))
        if kind is not type(one) and {kind, type(one)} != {nn.Dropout, nn.Identity}:
            expected = "nothing" if kind is None else f"a {kind.__name__}"
            raise ModelError(
                f"{what} has a {type(one).__name__} at {place or 'its root'} where its config creates {expected}, "
                "and the engine would ignore it; load the model again"
            )
        for key, expected in attributes.items():
            found = vars(one).get(key, _MISSING)
            if found is not _MISSING and _plain(found) != expected:
                raise ModelError(
                    f"{what} has {key}={quoted(found)} at {place or 'its root'} where its config has "
                    f"{quoted(expected)}, and the engine would ignore it; set it back, or load the model again"
                )


def _is_method(value: Any) -> bool:
    return callable(value) or isinstance(value, (property, classmethod, staticmethod))


def _plain(value: Any) -> Any:
    """Return a comparable form: numbers, strings, None, tuples of them, names of functions and types, else _OTHER."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if isinstance(value, (type, FunctionType, BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    return _OTHER
