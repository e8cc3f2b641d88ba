"""Finds what was changed by hand on modules in memory: methods put on one instance, other layers, other attributes.

None of that is in a state dict, so a model that is rebuilt from config and weights would draw without it.
"""

from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn

from stylefast.errors import ModelError
from stylefast.values import quoted

Made = Mapping[str, tuple[type, Mapping[str, Any]]]  # each module's class and plain attributes, by its name

# set in ordinary use and without effect on a picture, or checked elsewhere
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
# modules that are left out by name, or are copies of others
_BESIDE = frozenset(("processor", "encoder_hid_proj", "to_qkv", "to_kv"))
# methods of every module that are part of its work; the rest of what the base classes have is bookkeeping
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
    """The name of a method that this one instance has in place of its class's; None where there is none.

    A forward that accelerate or `torch.compile` wrapped counts as its class's where the one inside is.
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
    """The first class of `library` that a thing is of, and what takes the place of its methods and properties.

    That is what the thing's own subclasses define, and what was put on the instance; `__init__` is not counted, nor
    what the modules of `bookkeeping` define.
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
    """What `check_as_made` compares: taken of a model that was made from its config and nothing else."""
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
    """Raises ModelError, naming place and attribute, for a model whose modules are not as its config makes them."""
    for name, one in model.named_modules(remove_duplicate=False):
        parts = name.split(".")
        if "_orig_mod" in one._modules or _BESIDE & {*parts}:
            continue
        place = ".".join(part for part in parts if part != "_orig_mod")
        kind, attributes = made.get(place, (None, {}))
        if kind is not type(one) and {kind, type(one)} != {nn.Dropout, nn.Identity}:
            expected = "nothing" if kind is None else f"a {kind.__name__}"
            raise ModelError(
                f"{what} has a {type(one).__name__} at {place or 'its root'} where its config makes {expected}, and "
                "the engine would draw without it; load the model anew"
            )
        for key, expected in attributes.items():
            found = vars(one).get(key, _MISSING)
            if found is not _MISSING and _plain(found) != expected:
                raise ModelError(
                    f"{what} has {key}={quoted(found)} at {place or 'its root'} where its config makes "
                    f"{quoted(expected)}, and the engine would draw without it; set it back, or load the model anew"
                )


def _is_method(value: Any) -> bool:
    return callable(value) or isinstance(value, (property, classmethod, staticmethod))


def _plain(value: Any) -> Any:
    """A value that can be compared: numbers, strings, None, tuples of them, and functions by their names."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    if isinstance(value, (type, FunctionType, BuiltinFunctionType)):
        return f"{value.__module__}.{value.__qualname__}"
    return _OTHER
