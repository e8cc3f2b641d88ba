"""The Triton kernel of shared attention as PTX, for runtimes that launch it without Triton. Needs no GPU.

The PTX takes only the listed arguments: the two pointers to scratch memory that Triton adds to every kernel are
removed, which is possible because this kernel uses neither.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from stylefast.code_caches import guard_triton_cache
from stylefast.errors import EngineMismatch, ExportError, InvalidRequest, MissingDependency
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
        raise InvalidRequest(f"parts is {parts!r}; AdaIN moves 2 (queries, keys) or 3 (values too)")
    if isinstance(even, bool) or not isinstance(even, int) or even < 0:
        raise InvalidRequest(f"even is {even!r}; it must be a whole number, 0 where no divisor is known")
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
            return CompiledKernel(ptx, compiled.metadata.name, shared, warps, arguments, fitted["block_m"], fitted)
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
        raise InvalidRequest(f'chip is {chip!r}; name its compute capability, "sm89" for 8.9')
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
    block_m, block_n = config["block_m"], config["block_n"]
    for m, n in ((block_m, block_n), (block_m, block_n // 2), (block_m // 2, block_n), (block_m // 2, block_n // 2)):
        if min(m, n) >= 16:
            for stages in range(config["num_stages"], 0, -1):
                yield {**config, "block_m": m, "block_n": n, "num_stages": stages}


def _compile(made: Any, capability: int, ptx_version: int | None) -> Any:
    import triton
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
        with triton.knobs.compilation.scope():
            # line info would contain local file paths
            triton.knobs.compilation.disable_line_info = True
            return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # any compiler error
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ExportError(f"{made.name} does not compile for sm{capability}: {text[-400:]}") from error


def _require_triton() -> None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            "the attention plugin carries a Triton kernel and triton is not installed; `pip install "
            "'stylefast[triton]'` brings it, attention=\"standard\" needs none"
        ) from error


__all__ = ["PTX_VERSION", "SHARED_LIMIT", "CompiledKernel", "chip_capability", "compile_ptx", "without_scratch"]
