"""Ahead-of-time check: compile every kernel in every committed configuration for every chip, without a GPU.

    python -m stylefast.kernels.gpu.ahead --chips 80,90 --operations shared_attention,geglu --json report.json

A kernel fails if it does not compile, uses stack (its registers spill), or takes more shared memory than a block of
that chip may have. Each `kernels/gpu/<operation>.py` lists its compiles in `specialisations(capability)`.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from stylefast.values import quoted

# bytes per block; CUDA programming guide, table of technical specifications per compute capability
SHARED_LIMITS = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

OPERATIONS = (
    "shared_attention",
    "token_stats",
    "adain_affine",
    "dequantise",
    "gated_cross_attention",
    "group_norm_silu",
    "geglu",
    "layer_norm",
    "guided_step",
    "row_lora",
)


class Specialisation(NamedTuple):
    """One compile: a kernel with its argument types, constants and options."""

    name: str
    kernel: Any  # a triton.jit function
    signature: dict[str, str]  # argument -> "*bf16", "i32", "constexpr", ...
    constants: dict[str, Any]
    options: dict[str, Any]  # num_warps, num_stages, ...
    attrs: dict[tuple[int, ...], list]  # argument's index -> [["tt.divisibility", 16]]


class Report(NamedTuple):
    """Result of one compile; error is None if it succeeded."""

    name: str
    capability: int
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    seconds: float
    error: str | None

    def problem(self) -> str | None:
        """Return why this kernel fails the check, or None if it passes."""
        limit = SHARED_LIMITS[self.capability]
        if self.error is not None:
            return f"does not compile: {self.error}"
        if self.stack_bytes or self.local_bytes:
            return f"spills: {self.stack_bytes} bytes of stack, {self.local_bytes} of local memory a thread"
        if self.shared_bytes > limit:
            return f"takes {self.shared_bytes} bytes of shared memory, a block may have {limit}"
        return None


def compile_ahead(specialisation: Specialisation, capability: int) -> Report:
    """Compile for a chip and read the cubin's resource usage. Needs a process without TRITON_INTERPRET."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, kernel, signature, constants, options, attrs = specialisation
    started = time.perf_counter()
    try:
        source = ASTSource(kernel, signature, constexprs=constants, attrs=attrs)
        options = {"enable_fp_fusion": True, **options}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        registers, stack, local = _resources(compiled.asm["cubin"])
    except Exception as error:  # any compiler error is a result
        text = " ".join(f"{type(error).__name__}: {error}".split())
        return Report(name, capability, 0, 0, 0, 0, time.perf_counter() - started, text[-600:])
    seconds = time.perf_counter() - started
    return Report(name, capability, registers, stack, local, compiled.metadata.shared, seconds, None)


def compile_operation(operation: str, capability: int) -> list[Report]:
    """Compile every specialisation of an operation for a chip. A name with a dot is imported as a module."""
    module = import_module(operation if "." in operation else f"stylefast.kernels.gpu.{operation}")
    return [compile_ahead(specialisation, capability) for specialisation in module.specialisations(capability)]


def compile_all(operations: list[str], chips: list[int], jobs: int) -> list[Report]:
    """Compile all operations for all chips in `jobs` new processes, which inherit this one's environment."""
    pairs = [(operation, chip) for operation in operations for chip in chips]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(compile_operation, *pair) for pair in pairs]
        return [report for done in waiting for report in done.result()]


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """Return a thread's registers, stack bytes and local bytes from the cubin's resource report."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if tool is None:
        raise FileNotFoundError("cuobjdump is neither in the triton package nor on PATH")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise ValueError(f"no resource report in cuobjdump's output: {quoted(text)}")
    return int(found[1]), int(found[2]), int(found[3])


def _chips(text: str) -> list[int]:
    chips = [int(chip) for chip in text.split(",")]
    if unknown := [chip for chip in chips if chip not in SHARED_LIMITS]:
        raise argparse.ArgumentTypeError(f"no limits known for {unknown}; known: {sorted(SHARED_LIMITS)}")
    return chips


def main(arguments: list[str] | None = None) -> int:
    """Run the command above; return 1 if any kernel fails."""
    parser = argparse.ArgumentParser(prog="python -m stylefast.kernels.gpu.ahead", description=__doc__.split("\n")[0])
    parser.add_argument("--chips", type=_chips, default=list(SHARED_LIMITS), help="compute capabilities, as 80,90")
    parser.add_argument("--operations", type=lambda text: text.split(","), default=list(OPERATIONS))
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, help="write the reports there")
    given = parser.parse_args(arguments)

    # interpreted kernels don't compile; the workers inherit the environment
    os.environ.pop("TRITON_INTERPRET", None)
    started = time.perf_counter()
    reports = compile_all(given.operations, given.chips, given.jobs)
    if given.json:
        records = [{**report._asdict(), "problem": report.problem()} for report in reports]
        given.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")

    width = max((len(report.name) for report in reports), default=0)
    print(f"{'kernel':{width}}  chip   regs  stack   shared  seconds")
    for report in reports:
        print(
            f"{report.name:{width}}  sm_{report.capability:<3} {report.registers:4} {report.stack_bytes:6} "
            f"{report.shared_bytes:8} {report.seconds:8.1f}"
        )
    failed = [report for report in reports if report.problem()]
    for report in failed:
        print(f"{report.name} on sm_{report.capability} {report.problem()}", file=sys.stderr)
    print(f"{len(reports) - len(failed)} of {len(reports)} pass, {time.perf_counter() - started:.0f} s")
    return 1 if failed or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
