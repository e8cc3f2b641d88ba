"""Judge measurements against goals; print them as tables and write them as JSON."""

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.kernels.cases import Case, Share, Versus, type_name
from stylefast.whole_files import write_whole

MET, MISSED, NO_GOAL, WAIVED, NOT_MEASURED = "met", "MISSED", "no goal", "goal does not apply", "not measured"


def result_of(case: Case, measured: dict[str, Any] | None, ceilings: dict[str, Any], why: str = "") -> dict[str, Any]:
    """Return one case for the JSON file. `measured` comes from `measure_case`, or is None with the reason `why`."""
    measured = measured or {"times": {}, "failures": {}, "errors": {}}
    return {
        "operation": case.operation,
        "shape": case.shape,
        "dtype": type_name(case.dtype),
        "gflop": round(case.flop / 1e9, 3),
        "megabytes": round(case.bytes / 1e6, 3),
        **measured,
        "comparisons": [_judged(case, c, measured, ceilings, why) for c in case.comparisons],
    }


def missed(results: list[dict[str, Any]]) -> list[str]:
    """Return one line for every missed goal."""
    lines = []
    for result in results:
        name = f"{result['operation']} {result['shape']} {result['dtype']}"
        for c in result["comparisons"]:
            if c["verdict"] == MISSED:
                lines.append(f"{name}: {c['ours']} / {c['peer']} {c['ratio']:.2f}, goal {c['goal']:g}")
            if c.get("error_verdict") == MISSED:
                lines.append(
                    f"{name}: error of {c['ours']} {c['error_ratio']:.2f} x {c['peer']}, goal {c['error_goal']}"
                )
    return lines


def not_measured(results: list[dict[str, Any]]) -> list[str]:
    """Return one line for every comparison without a figure."""
    return [
        f"{r['operation']} {r['shape']} {r['dtype']}: {c['ours']} / {c['peer']}: {c['note']}"
        for r in results
        for c in r["comparisons"]
        if c["verdict"] == NOT_MEASURED
    ]


def table(results: list[dict[str, Any]]) -> str:
    """Format all comparisons, one block per case."""
    return "\n\n".join(block(result) for result in results)


def block(result: dict[str, Any]) -> str:
    """Format one case: a line describing it, and a line per comparison."""
    lines = [("ours", "ms", "against", "ms", "ratio", "goal", "rate", "error")]
    lines += [_line(result, c) for c in result["comparisons"]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    numeric = {1, 3, 4}
    rows = [
        "  ".join(cell.rjust(w) if i in numeric else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths)))
        for line in lines
    ]
    notes = [f"    {c['note']}" for c in result["comparisons"] if c["note"]]
    head = f"{result['operation']} {result['shape']} {result['dtype']}"
    return "\n".join([head, *("  " + row.rstrip() for row in rows), *dict.fromkeys(notes)])


def markdown(results: list[dict[str, Any]]) -> str:
    """Format the measured comparisons as one Markdown table, for the documentation."""
    lines = ["| operation, shape, type | ours | against | ratio | goal | error |", "|---|---|---|---|---|---|"]
    for result in results:
        name = f"`{result['operation']}` {result['shape']} {result['dtype']}"
        for c in result["comparisons"]:
            if c["verdict"] == NOT_MEASURED:
                continue
            _, milliseconds, _, peer_milliseconds, ratio, goal, _, error = _line(result, c)
            peer = f"{c['peer']}{f', {peer_milliseconds} ms' if peer_milliseconds else ''}"
            lines.append(f"| {name} | {c['ours']}, {milliseconds} ms | {peer} | {ratio} | {goal} | {error} |")
            name = ""
    return "\n".join(lines)


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON atomically; non-finite figures become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(_finite(content), indent=1, allow_nan=False) + "\n").encode())


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _judged(case: Case, c: Versus | Share, measured: dict, ceilings: dict, why: str) -> dict[str, Any]:
    times, failures = measured["times"], measured["failures"]
    share = isinstance(c, Share)
    peer = f"{c.ceiling} rate of this run" if share else c.peer
    judged: dict[str, Any] = {"ours": c.ours, "peer": peer, "ratio": None, "goal": c.goal}
    missing = [name for name in (c.ours, *(() if share else (c.peer,))) if name not in times]
    if why or missing:
        note = why or "; ".join(f"{name}: {failures.get(name, 'not among the contestants')}" for name in missing)
        return judged | {"verdict": NOT_MEASURED, "note": note}
    if share:
        rate, ceiling = _rate(case, times[c.ours]["median_ms"], c.ceiling), _ceiling(case, c.ceiling, ceilings)
        ratio = rate / ceiling
    else:
        ratio = times[c.peer]["median_ms"] / times[c.ours]["median_ms"]
    judged["ratio"] = float(f"{ratio:.4g}")
    if c.goal is None:
        verdict, note = NO_GOAL, ""
    elif c.waived:
        verdict, note = WAIVED, f"goal {c.goal:g} does not apply: {c.waived}"
    else:
        # judge the rounded figure that is printed and recorded
        verdict, note = (MET if judged["ratio"] >= c.goal else MISSED), ""
    return judged | {"verdict": verdict, "note": note} | _judged_errors(c, measured["errors"])


def _judged_errors(c: Versus | Share, errors: dict[str, dict[str, float]]) -> dict[str, Any]:
    if isinstance(c, Share) or not c.errors or c.ours not in errors or c.peer not in errors:
        return {}
    ours, peer = errors[c.ours], errors[c.peer]
    ratios = [ours[key] / peer[key] if peer[key] else (math.inf if ours[key] else 1.0) for key in ("max", "rms")]
    if any(math.isnan(ratio) for ratio in ratios):
        worst, verdict = math.nan, MISSED  # a NaN is wrong, with or without a goal
    else:
        worst = max(ratios)
        verdict = NO_GOAL if c.error_goal is None else MET if worst <= c.error_goal else MISSED
    return {"error_ratio": float(f"{worst:.3g}"), "error_goal": c.error_goal, "error_verdict": verdict}


def _rate(case: Case, milliseconds: float, ceiling: str) -> float:
    """Return GFLOP/s against the matrix product, GB/s against the copy."""
    return (case.flop if ceiling == "matmul" else case.bytes) / milliseconds / 1e6


def _ceiling(case: Case, name: str, ceilings: dict[str, Any]) -> float:
    return ceilings["matmul"][type_name(case.dtype)] if name == "matmul" else ceilings["copy"]


def _line(result: dict[str, Any], c: dict[str, Any]) -> tuple[str, ...]:
    times = result["times"]

    def ms(name):
        return f"{times[name]['median_ms']:.4g}" if name in times else ""

    if c["verdict"] == NOT_MEASURED:
        return (c["ours"], ms(c["ours"]), c["peer"], ms(c["peer"]), "", NOT_MEASURED, "", "")
    goal = {MET: f">= {c['goal']} {MET}", MISSED: f">= {c['goal']} {MISSED}", NO_GOAL: "", WAIVED: "(waived)"}
    milliseconds = times[c["ours"]]["median_ms"]
    if result["gflop"]:
        rate = f"{result['gflop'] / milliseconds * 1e3:,.0f} GFLOP/s"
    else:
        rate = f"{result['megabytes'] / milliseconds:,.1f} GB/s"
    error = ""
    if "error_ratio" in c:
        error = f"{c['error_ratio']:.2f} x" + (f" {MISSED}" if c["error_verdict"] == MISSED else "")
    return (c["ours"], ms(c["ours"]), c["peer"], ms(c["peer"]), f"{c['ratio']:.2f}", goal[c["verdict"]], rate, error)
