"""Measure the engine: a cached style against an uncached one and the published method, mixed batches, soak.

    python -m benchmarks runtime --device cpu [--minutes 45] [--only check,tiny] [--out FILE]
    python -m benchmarks runtime --device cuda --minutes 9

Prints every case when it is done and writes benchmarks/results/runtime-<device>.json. Contestants take turns in one
process. Exit code: 0 if every goal of the chosen cases holds, 1 if one was missed or could not be measured, 2 for what
can't be measured here.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.kernels.command import device_name
from benchmarks.kernels.measure import Budget
from benchmarks.kernels.report import MISSED, NOT_MEASURED, write
from benchmarks.runtime import cpu, cuda, report
from benchmarks.runtime.cases import Case, Outcome, remaining
from stylefast.kernels import registry
from stylefast.kernels.gpu.timing import one_line

RESULTS = Path(__file__).parent.parent / "results"
MINUTES = {"cpu": 45.0, "cuda": 9.0}
VOID = "the comparison is void: the published form was not shown to draw the engine's pictures"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small model, few steps, no goals: to see that all runs")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--minutes", type=float, help="cases that can't be done by then are not begun")
    parser.add_argument("--only", help="beginnings of the names of the cases to measure, by commas")
    parser.add_argument("--out", type=Path, help="file to write (with --quick or --only: none unless given)")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda needs a CUDA device, and PyTorch finds none here", file=sys.stderr)
        return 2
    if arguments.threads is not None and arguments.threads < 1:
        print(f"error: --threads is {arguments.threads}; at least 1 is needed", file=sys.stderr)
        return 2
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    minutes = MINUTES[arguments.device] if arguments.minutes is None else arguments.minutes
    if not minutes > 0:
        print(f"error: --minutes is {minutes:g}; more than 0 is needed", file=sys.stderr)
        return 2

    cases = (cpu if arguments.device == "cpu" else cuda).cases(arguments.quick)
    if arguments.only:
        wanted = tuple(arguments.only.split(","))
        if unknown := [name for name in wanted if not any(case.name.startswith(name) for case in cases)]:
            print(
                f"error: --only names {', '.join(unknown)}; there are {', '.join(c.name for c in cases)}",
                file=sys.stderr,
            )
            return 2
        cases = [case for case in cases if case.name.startswith(wanted)]
    whole = not (arguments.quick or arguments.only)
    path = arguments.out or (RESULTS / f"runtime-{device_name(arguments.device)}.json" if whole else None)
    content = run(cases, arguments.device, arguments.quick, Budget(minutes), path)
    print(summary_text(content, path))
    return 1 if content["unproved"] else 0


def run(cases: Sequence[Case], device: str, quick: bool, budget: Budget, path: Path | None) -> dict[str, Any]:
    """Measure all cases; the file is rewritten after each, so that an aborted run keeps its results."""
    content: dict[str, Any] = {
        "device": device,
        "quick": quick,
        "environment": environment(device),
        "forms": registry.report(device),
        "results": [],
    }
    print(heading(content), flush=True)
    void = ""
    for case in cases:
        outcome = measured(case, budget, void, torch.cuda.empty_cache if device == "cuda" else None)
        if quick and case.name != cpu.CHECK:
            outcome.figures = [replace(figure, goal=None) for figure in outcome.figures]
        if case.name == cpu.CHECK and any(figure.verdict in (MISSED, NOT_MEASURED) for figure in outcome.figures):
            void = VOID
        result = report.entry(case, outcome)
        print("\n" + report.block(result), flush=True)
        content["results"].append(result)
        content["unproved"] = report.unproved(content["results"])
        content["seconds"] = round(budget.seconds, 1)
        if path is not None:
            write(path, content)
    return content


def measured(case: Case, budget: Budget, void: str, clean_up: Callable[[], None] | None = None) -> Outcome:
    """Return a case's outcome, or why it has none."""
    if void:
        return case.not_measured(void)
    if remaining(budget) <= case.seconds:
        left = f", of which {remaining(budget):.0f} s are left" if case.seconds else ""
        needs = f"; it needs {case.seconds:.0f} s" if case.seconds else ""
        return case.not_measured(f"skipped, the time budget is {budget.minutes:g} minutes{left}{needs}")
    try:
        return case.measure(budget)
    except Exception as error:  # a case that can't run must not stop the others
        return case.not_measured(one_line(error))
    finally:
        if clean_up is not None:
            clean_up()


def heading(content: dict[str, Any]) -> str:
    """Describe machine, versions and kernel forms in a few lines."""
    env = content["environment"]
    machine = env.get("gpu") or f"{env['cpu']}, {env['threads']} threads of {env['cores']} cores"
    kernels = ", ".join(f"{row['operation']} {row['form']}" for row in content["forms"])
    return (
        f"{machine}; torch {env['torch']}, Python {env['python']}, commit {env['commit']}, load {env['load_before']}\n"
        f"kernels: {kernels}"
    )


def summary_text(content: dict[str, Any], path: Path | None) -> str:
    """List the goals that were not shown to hold; printed last so that they are seen."""
    lines = ["", *content["unproved"]]
    lines.append(
        f"{report.met(content['results'])} goals met, {len(content['unproved'])} missed or not measured, "
        f"{content['seconds']:.0f} s"
    )
    if path is not None:
        lines.append(f"wrote {path}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
