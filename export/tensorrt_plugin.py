"""Shared self-attention as a TensorRT plugin that contains our Triton kernel's PTX: attention="plugin".

`compile_ptx` needs no GPU. Its PTX takes only the listed arguments: the two pointers to scratch memory that Triton adds
to every kernel are removed, which is possible because this kernel uses neither.

The plugin is one of TensorRT's quickly deployable plugins, compiled ahead of time: during an engine's build,
`tensorrt.plugin` requests PTX and launch parameters and stores both in the engine, which needs neither Python nor this
package to run. Two plugins are needed, because a plugin has a fixed number of inputs:

    stylefast::shared_attention          rows read other rows of the batch       9 inputs
    stylefast::shared_attention_banked   rows read pages of style banks too     11 inputs

Both need the package `tensorrt` 10.9 or later. `tensorrt_rtx` has no plugins compiled ahead of time; there, and for
calls without references, attention stays in standard operators, as with attention="standard", the default.

Limits of ahead-of-time plugins determine the kernel's form (`kernels.gpu.plugin_attention`): one kernel, no workspace,
no tensor maps, integers as the only scalars, arguments in the order inputs, integers, outputs. Pools of pages must be
dense, so TensorRT first copies a layer's part of a packed page tensor.

TensorRT 11.1 and 11.2 leak a CUDA module at every change of a context's shapes under such a plugin (TensorRT issue
4849). Give each size its own profile and context, with min = opt = max; shapes that are known at build time also let
the kernel skip its masks.

Pass `PluginOperations` to the writer of the ONNX file, and call `register_plugin` before the file is parsed, in the
process that parses it.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import Parameter, Signature
from math import gcd
from types import ModuleType
from typing import Any

import torch

from stylefast import values
from stylefast.code_caches import guard_triton_cache
from stylefast.errors import EngineMismatch, ExportError, InvalidRequest, MissingDependency
from stylefast.export.onnx_operations import OnnxOperations, Value
from stylefast.export.tensorrt import present_target
from stylefast.kernels.configs import Config, configuration
from stylefast.kernels.shared_attention import HEAD_SIZES

TYPES = (torch.float16, torch.bfloat16, torch.float32)
LEAST_CAPABILITY = 80
# shared memory of a block that has not requested more from the driver
SHARED_LIMIT = 48 * 1024
# version of CUDA 12.9, the first that supports every chip of `kernels/tuning`; newer drivers read it too
PTX_VERSION = 88


@dataclass(frozen=True)
class CompiledKernel:
    """Compiled kernel, ready for `cuModuleLoadData`.

    ptx: its text. name: the entry's. shared: bytes of dynamic shared memory per block. warps: per block. arguments:
    names in order; tensors are pointers, those of `SIZES` in kernels.gpu.plugin_attention are int32. block_m: query
    tokens per block; the grid is ceil(tokens / block_m) * rows * heads blocks along x. config: the one it was compiled
    with, after reduction to fit.
    """

    ptx: str
    name: str
    shared: int
    warps: int
    arguments: tuple[str, ...]
    block_m: int
    config: Config


def compile_ptx(
    chip: str,
    dtype: torch.dtype,
    d: int,
    *,
    banked: bool = False,
    parts: int = 3,
    even: int = 0,
    config: Config | None = None,
    shared_limit: int = SHARED_LIMIT,
    ptx_version: int | None = PTX_VERSION,
) -> CompiledKernel:
    """Compile shared attention with AdaIN, for heads of d channels.

    chip: "sm89". banked: with pages of a bank. parts: of q, k and v that AdaIN moves, 2 or 3. even: a divisor of the
    tokens of rows and pages, 0 if unknown; if it is a multiple of the key tile, the kernel needs no masks. config: from
    `kernels/tuning`, by default the committed one of the chip; stages and tiles are reduced until a block needs at most
    shared_limit bytes. ptx_version: 88 is PTX 8.8; None takes Triton's newest.

    Raises EngineMismatch for a chip that is too old, InvalidRequest for other values out of range, MissingDependency
    without Triton, and ExportError if the kernel does not compile or fit, or if Triton interprets kernels.
    """
    capability = chip_capability(chip)
    if dtype not in TYPES:
        raise InvalidRequest(f"dtype is {dtype}; the kernel takes {', '.join(str(known) for known in TYPES)}")
    if d not in HEAD_SIZES:
        raise InvalidRequest(
            f"heads have {d} channels, the kernel takes {', '.join(map(str, HEAD_SIZES))}; export with "
            'attention="standard"'
        )
    if parts not in (2, 3):
        raise InvalidRequest(f"parts is {values.quoted(parts)}; AdaIN moves 2 (queries, keys) or 3 (values too)")
    values.whole_number("even", even, 0)
    _require_triton()
    from stylefast.kernels.gpu.plugin_attention import is_even, specialise

    if config is None:
        bits = torch.finfo(dtype).bits
        config = configuration("shared_attention", capability, None, form="pointers", d=d, bits=bits, page="native")
    least = None
    for fitted in _smaller(config):
        made = specialise(d, dtype, parts, banked, even > 0 and is_even(fitted, even), fitted)
        compiled = _compile(made, capability, ptx_version)
        shared = compiled.metadata.shared
        if shared <= shared_limit:
            arguments = tuple(name for name, kind in made.signature.items() if kind != "constexpr")
            ptx = without_scratch(compiled.asm["ptx"], compiled.metadata.name, len(arguments))
            warps = compiled.metadata.num_warps
            return CompiledKernel(ptx, compiled.metadata.name, shared, warps, arguments, int(fitted["block_m"]), fitted)
        least = shared if least is None else min(least, shared)
    raise ExportError(
        f"{made.name} on {chip} needs at least {least} bytes of shared memory, the limit is {shared_limit}; raise "
        'shared_limit if the launcher asks the driver for more, or export with attention="standard"'
    )


def chip_capability(chip: str) -> int:
    """Return the number in a chip's name, 89 for "sm89".

    Raises InvalidRequest for an invalid name, EngineMismatch for a chip that the kernels don't support.
    """
    found = re.fullmatch(r"sm_?(\d{2,3})", chip) if isinstance(chip, str) else None
    if found is None:
        raise InvalidRequest(f'chip is {values.quoted(chip)}; name its compute capability, "sm89" for 8.9')
    capability = int(found[1])
    if capability < LEAST_CAPABILITY:
        raise EngineMismatch(
            f"{chip} has compute capability {capability / 10:.1f}, the Triton kernels need 8.0 or higher; export with "
            'attention="standard"'
        )
    return capability


def without_scratch(ptx: str, name: str, arguments: int) -> str:
    """Return PTX whose entry `name` takes only its first `arguments` parameters.

    Raises ExportError if it reads one of the others, or has fewer.
    """
    found = re.search(rf"\.entry {re.escape(name)}\(\s*(.*?)\s*\)", ptx, re.DOTALL)
    if found is None:
        raise ExportError(f"the PTX has no entry {name}")
    declared = [parameter.strip() for parameter in found[1].split(",")]
    if len(declared) < arguments:
        raise ExportError(f"{name} declares {len(declared)} parameters, {arguments} were expected")
    body = ptx[found.end() :]
    for parameter in declared[arguments:]:
        if re.search(rf"\b{re.escape(parameter.split()[-1])}\b", body):
            raise ExportError(f"{name} reads the scratch memory {parameter.split()[-1]}, which no plugin can give it")
    kept = ",\n\t".join(declared[:arguments])
    return ptx[: found.start(1)] + kept + ptx[found.end(1) :]


def _smaller(config: Config) -> Iterator[Config]:
    """Yield the configuration, then, in the order of their cost, those that need less shared memory."""
    block_m, block_n, most = (int(config[name]) for name in ("block_m", "block_n", "num_stages"))
    for m, n in ((block_m, block_n), (block_m, block_n // 2), (block_m // 2, block_n), (block_m // 2, block_n // 2)):
        if min(m, n) >= 16:
            for stages in range(most, 0, -1):
                yield {**config, "block_m": m, "block_n": n, "num_stages": stages}


def _compile(made: Any, capability: int, ptx_version: int | None) -> Any:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(made.kernel, triton.JITFunction):
        raise ExportError(
            "TRITON_INTERPRET=1 was set when the kernels were loaded, and interpreted kernels have no PTX; start a "
            "process without it"
        )
    source = ASTSource(made.kernel, made.signature, constexprs=made.constants, attrs=made.attrs)
    guard_triton_cache()
    options = {"enable_fp_fusion": True, **made.options}
    if ptx_version is not None:
        options["ptx_version"] = ptx_version
    try:
        with knobs.compilation.scope():
            # line info would contain local file paths
            knobs.compilation.disable_line_info = True
            return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # any compiler error
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ExportError(f"{made.name} does not compile for sm{capability}: {text[-400:]}") from error


def _require_triton() -> None:
    try:
        import_module("triton")
    except ImportError as error:
        raise MissingDependency(
            "the attention plugin carries a Triton kernel and triton is not installed; `pip install "
            "'stylefast[triton]'` brings it, attention=\"standard\" needs none"
        ) from error


NAMESPACE, VERSION = "stylefast", "1"
_LIVE = ("q", "k", "v", "page", "mode", "scale", "shift", "gain", "offset")
# plugin -> its inputs, in order; the single output has the shape and type of q
PLUGINS = {"shared_attention": _LIVE, "shared_attention_banked": (*_LIVE, "pool_k", "pool_v")}
_INT32 = 6  # among ONNX's element types
_OF_PAGES, _OF_NUMBERS = ("page", "mode"), ("scale", "shift", "gain", "offset")

_registered: dict[ModuleType, tuple] = {}  # tensorrt -> settings of its registered plugins


def plugin_api(trt: ModuleType | None = None) -> ModuleType:
    """Return `tensorrt.plugin` of a TensorRT that supports plugins compiled ahead of time.

    trt: the module, by default `tensorrt`. Raises MissingDependency if it is not installed and EngineMismatch if it
    lacks such plugins, as TensorRT-RTX does.
    """
    instead = 'export with attention="standard", which needs no plugin'
    if trt is None:
        try:
            trt = import_module("tensorrt")
        except (ImportError, OSError) as error:
            raise MissingDependency(
                "the attention plugin needs the package tensorrt 10.9 or later, which is not installed or does not "
                f"load ({error}); `pip install tensorrt` (`pip install 'stylefast[export]'` brings tensorrt-rtx, which "
                f"has no such plugins), or {instead}"
            ) from error
    name = f"{trt.__name__} {getattr(trt, '__version__', 'of an unknown version')}"
    needed = ("QuickPluginCreationRequest", "IPluginV3QuickAOTBuild")
    if missing := [part for part in needed if not hasattr(trt, part)]:
        raise EngineMismatch(
            f"{name} can't hold plugins compiled ahead of time (it has no {missing[0]}); use tensorrt 10.9 or later on "
            f"this machine's GPU, or {instead}"
        )
    try:
        return import_module(f"{trt.__name__}.plugin")
    except ImportError as error:
        raise EngineMismatch(f"{name} has no module {trt.__name__}.plugin ({error}); {instead}") from error


def register_plugin(
    trt: ModuleType | None = None,
    chip: str | None = None,
    *,
    configs: Sequence[Config] = (),
    shared_limit: int = SHARED_LIMIT,
    ptx_version: int | None = PTX_VERSION,
    compiler: Callable[..., CompiledKernel] = compile_ptx,
) -> tuple[str, ...]:
    """Register both plugins with TensorRT in this process. Returns their names.

    trt: the module, by default `tensorrt`. chip: "sm89", by default the current CUDA device's; engines are built for
    the GPU that builds them. configs: launch configurations that TensorRT compares by timing, by default only the
    committed one. shared_limit, ptx_version: as in `compile_ptx`; the default of shared_limit is available in every
    launcher, because TensorRT's documentation does not say whether it requests more. compiler: replaces `compile_ptx`.

    A second call with the same values does nothing. Raises the errors of `plugin_api` and `chip_capability`, and
    ExportError without a chip or for a second call with other values: TensorRT keeps the first registration. Errors of
    `compile_ptx` appear during the build.
    """
    trtp = plugin_api(trt)
    trt = trt or import_module("tensorrt")
    chip = _current_chip() if chip is None else chip
    chip_capability(chip)
    chosen = tuple(configs) or (None,)
    settings = (chip, chosen, shared_limit, ptx_version, compiler)
    if trt in _registered:
        if _registered[trt] != settings:
            raise ExportError(
                f"{NAMESPACE}::shared_attention is already registered for {_registered[trt][0]} in this process, with "
                "other settings; build for each in a process of its own"
            )
        return tuple(PLUGINS)

    @cache
    def kernel(tactic: int, dtype: torch.dtype, d: int, banked: bool, parts: int, even: int) -> CompiledKernel:
        # 0 is TensorRT's number for the default tactic
        config = chosen[tactic - 1 if tactic else 0]
        return compiler(
            chip,
            dtype,
            d,
            banked=banked,
            parts=parts,
            even=even,
            config=config,
            shared_limit=shared_limit,
            ptx_version=ptx_version,
        )

    for name, inputs in PLUGINS.items():
        _register(trt, trtp, name, inputs, kernel, len(chosen))
    _registered[trt] = settings
    return tuple(PLUGINS)


def _register(trt, trtp, name: str, inputs: tuple[str, ...], kernel: Callable, tactics: int) -> None:
    types = {trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16, trt.DataType.FLOAT: torch.float32}
    words = {torch.float16: "FP16", torch.bfloat16: "BF16", torch.float32: "FP32"}

    def dtype_of(q) -> torch.dtype:
        if q.dtype not in types:
            raise ExportError(f"{NAMESPACE}::{name} takes queries of {', '.join(words.values())}, not {q.dtype}")
        return types[q.dtype]

    def describe(*tensors):
        return tensors[0].like()

    def autotune(*tensors_and_outputs):
        native = words[dtype_of(tensors_and_outputs[0])]
        own = ["INT32" if x in _OF_PAGES else "FP32" if x in _OF_NUMBERS else native for x in (*inputs, "out")]
        return [trtp.AutoTuneCombination(",".join(own), "LINEAR", list(range(1, tactics + 1)))]

    def aot_impl(*tensors_outputs_and_tactic):
        tensors, tactic = dict(zip(inputs, tensors_outputs_and_tactic)), tensors_outputs_and_tactic[-1]
        q, gain, pool = tensors["q"], tensors["gain"], tensors.get("pool_k")
        d, parts = q.shape[3], gain.shape[0]
        if min(d, parts) < 0:
            raise ExportError(f"{NAMESPACE}::{name} needs a fixed number of channels and of AdaIN's parts")
        # -1 is a varying dimension
        counts = [q.shape[1]] if pool is None else [q.shape[1], pool.shape[1]]
        even = gcd(*counts) if min(counts) > 0 else 0
        found = kernel(tactic, dtype_of(q), d, pool is not None, parts, even)

        rows, tokens, heads = (q.shape_expr[i] for i in range(3))
        sizes = {"rows": rows, "tokens": tokens, "heads": heads, "references": tensors["page"].shape_expr[1]}
        if pool is not None:
            sizes |= {"pages": pool.shape_expr[0], "page_tokens": pool.shape_expr[1]}
        if found.arguments != (*inputs, *sizes, "out"):
            raise ExportError(f"the kernel takes {found.arguments}, a plugin passes {(*inputs, *sizes, 'out')}")
        launch = trtp.KernelLaunchParams()
        launch.grid_x = trtp.cdiv(tokens, found.block_m) * rows * heads
        launch.block_x = 32 * found.warps
        launch.shared_mem = found.shared
        numbers = trtp.SymIntExprs(len(sizes))
        for i, size in enumerate(sizes.values()):
            numbers[i] = trtp.SymInt32(size)
        return found.name, found.ptx, launch, numbers

    desc, text = trtp.TensorDesc, str | bytes
    outputs, tactic = {"outputs": tuple[desc]}, {"tactic": int}
    described = dict.fromkeys(inputs, desc)
    _annotate(describe, described, tuple[desc])
    _annotate(autotune, described | outputs, list[trtp.AutoTuneCombination])
    _annotate(aot_impl, described | outputs | tactic, tuple[text, text, trtp.KernelLaunchParams, trtp.SymIntExprs])
    name = f"{NAMESPACE}::{name}"
    trtp.register(name)(describe)
    trtp.autotune(name)(autotune)
    trtp.aot_impl(name)(aot_impl)


def _annotate(function: Callable, parameters: dict[str, Any], result: Any) -> None:
    """Give a variadic function the signature from which `tensorrt.plugin` reads names and types."""
    named = [Parameter(x, Parameter.POSITIONAL_OR_KEYWORD, annotation=kind) for x, kind in parameters.items()]
    function.__signature__ = Signature(named, return_annotation=result)


def _current_chip() -> str:
    chip = present_target()
    if chip is None:
        raise ExportError(
            'there is no CUDA device to compile the attention plugin for; name the chip, chip="sm89", or export with '
            'attention="standard"'
        )
    return chip


class PluginOperations(OnnxOperations):
    """`OnnxOperations` that write shared attention as a node of the plugin, for graphs that only TensorRT reads.

    Nodes have the domain "stylefast", the plugin's name, and the attributes that TensorRT's parser reads:
    plugin_namespace, plugin_version, and aot = 1. A call without references stays in standard operators. Raises
    ExportError for an unsupported call.
    """

    domains = {NAMESPACE: 1}

    def shared_attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        page: Value,
        modes: Value,
        scale: Value,
        shift: Value,
        bias: Value | None = None,
        gain: Value | None = None,
        offset: Value | None = None,
        pool_k: Value | None = None,
        pool_v: Value | None = None,
        pool_k_scale: Value | None = None,
        pool_v_scale: Value | None = None,
    ) -> Value:
        if page.shape[1] == 0:
            return super().shared_attention(q, k, v, page, modes, scale, shift)
        instead = 'export with attention="standard"'
        if gain is None:
            raise ExportError(f"the attention plugin needs AdaIN's gain and offset; {instead}")
        if bias is not None or pool_k_scale is not None:
            raise ExportError(f"the attention plugin takes neither a bias per token nor pages in fp8; {instead}")
        if q.shape[3] not in HEAD_SIZES:
            raise ExportError(
                f"heads have {q.shape[3]} channels, the attention plugin takes {', '.join(map(str, HEAD_SIZES))}; "
                f"{instead}"
            )
        tables = (self.op.Cast(page, to=_INT32), self.op.Cast(modes, to=_INT32), scale, shift, gain, offset)
        if pool_k is None:
            return self._node("shared_attention", q, k, v, *tables)
        return self._node("shared_attention_banked", q, k, v, *tables, pool_k, pool_v)

    def _node(self, plugin: str, *inputs):
        import onnx_ir as ir

        nodes = self.op.nodes
        node = ir.node(
            plugin,
            inputs=inputs,
            domain=NAMESPACE,
            name=f"{self.op.place}/{plugin}_{len(nodes)}",
            attributes={"plugin_namespace": NAMESPACE, "plugin_version": VERSION, "aot": 1},
        )
        node.outputs[0].name = f"v{len(nodes)}"
        nodes.append(node)
        return node.outputs[0]
