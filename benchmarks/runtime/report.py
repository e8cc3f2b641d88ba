"""Format outcomes as text and as entries of the JSON file."""

import statistics
from typing import Any

from benchmarks.kernels.report import MET, MISSED, NO_GOAL, NOT_MEASURED
from benchmarks.runtime.cases import Case, Figure, Outcome, shown


def entry(case: Case, outcome: Outcome) -> dict[str, Any]:
    """Return one case for the JSON file: every sample, median, extremes and spread, every figure and its verdict."""
    return {
        "case": case.name,
        "what": case.what,
        "times": {name: summary(samples) for name, samples in outcome.times.items()},
        "figures": [_figure(figure) for figure in outcome.figures],
        **({"details": outcome.details} if outcome.details else {}),
    }


def summary(samples: list[float]) -> dict[str, Any]:
    """Summarise samples in seconds; `spread` is (longest - shortest) / median."""
    median = statistics.median(samples)
    return {
        "median_s": shown(median),
        "min_s": shown(min(samples)),
        "max_s": shown(max(samples)),
        "spread": shown((max(samples) - min(samples)) / median),
        "samples_s": [shown(sample) for sample in samples],
    }


def block(result: dict[str, Any]) -> str:
    """Format one case of the JSON file: its description, times and figures."""
    lines = [f"{result['case']}: {result['what']}"]
    width = max([len(name) for name in result["times"]] + [len(f["what"]) for f in result["figures"]] + [1])
    for name, times in result["times"].items():
        count = len(times["samples_s"])
        lines.append(
            f"  {name:<{width}}  {times['median_s']:>8.4g} s  best {times['min_s']:.4g} s"
            f"  spread {times['spread']:.1%}  ({count} sample{'s' if count > 1 else ''})"
        )
    for f in result["figures"]:
        value = f["note"] if f["verdict"] == NOT_MEASURED else f"{f['value']:>8.4g} {f['unit']}"
        label = f"{f['label']}: " if f["label"] else ""
        goal = "" if f["goal"] is None else f"  {label}goal {_bound(f)}"
        verdict = "" if f["verdict"] == NO_GOAL else f"  {f['verdict']}"
        note = f"  ({f['note']})" if f["note"] and f["verdict"] != NOT_MEASURED else ""
        lines.append(f"  {f['what']:<{width}}  {value.rstrip()}{goal}{verdict}{note}")
    return "\n".join(lines)


def unproved(results: list[dict[str, Any]]) -> list[str]:
    """Return one line for every missed goal and every missing figure."""
    lines = []
    for result in results:
        for f in result["figures"]:
            if f["verdict"] == MISSED:
                value = f"{f['value']:.4g} {f['unit']}".rstrip()
                lines.append(f"{MISSED}  {result['case']}: {f['what']} {value}, goal {_bound(f)}")
            elif f["verdict"] == NOT_MEASURED:
                lines.append(f"{NOT_MEASURED}  {result['case']}: {f['what']}: {f['note']}")
    return lines


def met(results: list[dict[str, Any]]) -> int:
    """Count the goals that hold."""
    return sum(f["verdict"] == MET for result in results for f in result["figures"])


def _figure(figure: Figure) -> dict[str, Any]:
    return {
        "what": figure.what,
        "value": None if figure.value is None else shown(figure.value),
        "unit": figure.unit,
        "goal": figure.goal,
        "at_most": figure.at_most,
        "label": figure.label,
        "verdict": figure.verdict,
        "note": figure.note,
    }


def _bound(figure: dict[str, Any]) -> str:
    return f"{'<=' if figure['at_most'] else '>='} {figure['goal']:g} {figure['unit']}".rstrip()


def markdown(results: list[dict[str, Any]]) -> str:
    """Format the cases of one style as the table in docs/banks.md, with a column per contestant."""
    names = ("plain", "cached", "uncached", "published")
    lines = [f"| case | {' | '.join(names)} | uncached / cached | published / cached |", "|---|" + "---|" * 6]
    for result in results:
        times, values = result["times"], {f["what"]: f["value"] for f in result["figures"]}
        if "cached" not in times:
            continue
        seconds = [f"{times[name]['median_s']:.3g} s" if name in times else "" for name in names]
        ratios = [f"{values[f'{over} / cached']:.2f}" for over in ("uncached", "published")]
        lines.append(f"| {' | '.join((result['case'], *seconds, *ratios))} |")
    return "\n".join(lines)
