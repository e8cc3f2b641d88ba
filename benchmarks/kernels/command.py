"""Measure the kernels and their peers, interleaved in one process, and judge them against the goals.

    python -m benchmarks kernels --device cpu [--quick] [--threads 2] [--out FILE] [--check]
    python -m benchmarks kernels --device cuda --minutes 5

Prints tables and writes benchmarks/results/kernels-<device>.json: medians and extremes of every contestant, errors
against fp64, this run's own ceilings, and the environment.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import cpu_features, environment
from benchmarks.kernels import attention, cross_attention, lora, report, streaming
from benchmarks.kernels.cases import Case
from benchmarks.kernels.measure import Budget, Timer, ceilings, cpu_timer, cuda_timer, measure_case
from stylefast.kernels import registry
from stylefast.kernels.gpu.timing import one_line

RESULTS = Path(__file__).parent.parent / "results"
QUICK_TIMER = {"seconds": 0.0, "least": 2, "most": 2, "shortest": 0.0}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0; 1 with --check if a goal is missed; 2 if nothing can be measured here."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs; no goals")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--minutes", type=float, default=30.0, help="rows that are not begun by then are not measured")
    parser.add_argument("--only", help="operations to measure, by commas")
    parser.add_argument("--out", type=Path, help="file to write (with --quick: nothing is written unless given)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda needs a CUDA device, and PyTorch finds none here", file=sys.stderr)
        return 2
    if arguments.threads is not None and arguments.threads < 1:
        print(f"error: --threads is {arguments.threads}; at least 1 is needed", file=sys.stderr)
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    budget = Budget(arguments.minutes)
    cases = cases_for(arguments.device, arguments.quick)
    if arguments.only:
        wanted = arguments.only.split(",")
        if unknown := sorted(set(wanted) - {case.operation for case in cases}):
            print(
                f"error: --only names {', '.join(unknown)}; there are "
                f"{', '.join(dict.fromkeys(case.operation for case in cases))}",
                file=sys.stderr,
            )
            return 2
        cases = [case for case in cases if case.operation in wanted]
    timer = cuda_timer if arguments.device == "cuda" else cpu_timer(**(QUICK_TIMER if arguments.quick else {}))
    path = arguments.out or (None if arguments.quick else RESULTS / f"kernels-{device_name(arguments.device)}.json")
    content = run(cases, timer, arguments.device, arguments.quick, budget, path)
    print(summary_text(content, path))
    return 1 if arguments.check and content["missed"] else 0


def cases_for(device: str, quick: bool) -> list[Case]:
    """Return every case of a device; with --quick, without goals."""
    if device == "cpu":
        features = cpu_features()
        cases = [
            *attention.cpu_cases(quick, features),
            *cross_attention.cpu_cases(quick, features),
            *streaming.cpu_cases(quick),
            *lora.cpu_cases(quick),
        ]
    else:
        cases = [
            *attention.cuda_cases(quick),
            *cross_attention.cuda_cases(quick),
            *streaming.cuda_cases(quick),
            *lora.cuda_cases(quick),
            *attention.form_cases(quick),
        ]
    return [case.without_goals() for case in cases] if quick else cases


@torch.no_grad()
def run(
    cases: Sequence[Case], timer: Timer, device: str, quick: bool, budget: Budget, path: Path | None
) -> dict[str, Any]:
    """Measure all cases; the file is rewritten after each, so that an aborted run keeps its results."""
    torch.manual_seed(0)
    content: dict[str, Any] = {
        "device": device,
        "quick": quick,
        "environment": environment(device),
        "forms": registry.report(device),
        "ceilings": ceilings(device, quick, timer),
        "results": [],
    }
    print(heading(content), flush=True)
    for case in cases:
        measured, why = None, ""
        if budget.spent:
            why = f"the time budget of {budget.minutes:g} minutes was spent"
        else:
            try:
                measured = measure_case(case, timer)
            except Exception as error:  # a case that can't run must not stop the others
                why = one_line(error)
            if device == "cuda":
                torch.cuda.empty_cache()
        result = report.result_of(case, measured, content["ceilings"], why)
        print("\n" + report.block(result), flush=True)
        content["results"].append(result)
        content["missed"] = report.missed(content["results"])
        content["not_measured"] = report.not_measured(content["results"])
        content["seconds"] = round(budget.seconds, 1)
        if path is not None:
            report.write(path, content)
    return content


def heading(content: dict[str, Any]) -> str:
    """Describe machine, forms and ceilings in a few lines."""
    env, limits = content["environment"], content["ceilings"]
    machine = env.get("gpu") or f"{env['cpu']}, {env['threads']} threads of {env['cores']} cores"
    matmul = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in limits["matmul"].items())
    lines = [
        f"{machine}; torch {env['torch']}, triton {env['triton']}, Python {env['python']}, commit {env['commit']}",
        f"this run's ceilings: matmul {limits['matmul_size']}^3 {matmul}; copy {limits['copy']:.1f} GB/s",
    ]
    lines += [f"{row['operation']}: {row['form']} ({row['reason']})" for row in content["forms"]]
    return "\n".join(lines)


def summary_text(content: dict[str, Any], path: Path | None) -> str:
    """List missed goals and missing measurements; printed last so that they are seen."""
    lines = [""]
    lines += [f"MISSED  {line}" for line in content["missed"]]
    lines += [f"not measured  {line}" for line in content["not_measured"]]
    verdicts = [c["verdict"] for r in content["results"] for c in r["comparisons"]]
    lines.append(
        f"{verdicts.count(report.MET)} goals met, {len(content['missed'])} missed (errors included), "
        f"{len(content['not_measured'])} rows not measured, {content['seconds']:.0f} s"
    )
    if path is not None:
        lines.append(f"wrote {path}")
    return "\n".join(lines)


def device_name(device: str) -> str:
    """Return "cpu", or the GPU's name in lower case with dashes: nvidia-h200."""
    if device == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
