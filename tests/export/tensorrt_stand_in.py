"""Modules that behave like `tensorrt` and `tensorrt.plugin` where the attention plugin touches them, for the CPU.

What the real ones check when functions are registered is checked here too: the names, order and types of arguments.
"""

import inspect
from enum import Enum
from types import ModuleType


class Expression:
    """A size of the network: a number, or the text of what it is computed from."""

    def __init__(self, value):
        self.value = value.value if isinstance(value, Expression) else value

    def __mul__(self, other):
        return Expression(_combined("*", self.value, Expression(other).value))


def _combined(sign, a, b):
    known = isinstance(a, int) and isinstance(b, int)
    if known:
        return a * b if sign == "*" else -(-a // b)
    return f"({a} {sign} {b})"


class TensorDesc:
    def __init__(self, dtype, dims):  # a dimension that varies is given by its name
        self.dtype = dtype
        self.shape = tuple(d if isinstance(d, int) else -1 for d in dims)
        self.shape_expr = tuple(Expression(d) for d in dims)

    def like(self):
        return TensorDesc(self.dtype, [e.value for e in self.shape_expr])


class AutoTuneCombination:
    def __init__(self, io_types, layouts, tactics):
        self.io_types, self.layouts, self.tactics = io_types, layouts, tactics


class KernelLaunchParams:
    def __init__(self):
        self.grid_x = self.grid_y = self.grid_z = self.block_x = self.block_y = self.block_z = 1
        self.shared_mem = 0


class SymIntExprs:
    def __init__(self, length):
        self.items = [None] * length

    def __setitem__(self, index, value):
        self.items[index] = value


def stand_in(name="tensorrt_stand_in") -> tuple[ModuleType, ModuleType]:
    """(tensorrt, its plugin module), new ones; the latter's `plugins` holds what was registered."""
    trt, trtp = ModuleType(name), ModuleType(f"{name}.plugin")
    trt.__version__ = "11.0"
    trt.DataType = Enum("DataType", ["FLOAT", "HALF", "BF16", "INT32", "INT64"])
    trt.QuickPluginCreationRequest = trt.IPluginV3QuickAOTBuild = object
    trtp.plugins = {}
    trtp.TensorDesc, trtp.AutoTuneCombination = TensorDesc, AutoTuneCombination
    trtp.KernelLaunchParams, trtp.SymIntExprs, trtp.SymInt32 = KernelLaunchParams, SymIntExprs, Expression
    trtp.cdiv = lambda a, b: Expression(_combined("cdiv", Expression(a).value, Expression(b).value))

    def register(plugin):
        def keep(function):
            assert plugin not in trtp.plugins, f"{plugin} is already defined"
            signature = inspect.signature(function)
            assert all(p.annotation is TensorDesc and p.default is p.empty for p in signature.parameters.values())
            assert signature.return_annotation == tuple[TensorDesc]
            trtp.plugins[plugin] = {"inputs": list(signature.parameters), "register": function}
            return function

        return keep

    def part(kind, more, result):
        def decorate(plugin):
            def keep(function):
                signature = inspect.signature(function)
                assert list(signature.parameters) == trtp.plugins[plugin]["inputs"] + more
                assert signature.parameters["outputs"].annotation == tuple[TensorDesc]
                assert signature.return_annotation == result
                trtp.plugins[plugin][kind] = function
                return function

            return keep

        return decorate

    text = str | bytes
    trtp.register = register
    trtp.autotune = part("autotune", ["outputs"], list[AutoTuneCombination])
    trtp.aot_impl = part("aot_impl", ["outputs", "tactic"], tuple[text, text, KernelLaunchParams, SymIntExprs])
    return trt, trtp
