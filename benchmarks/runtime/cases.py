"""Parts of an engine measurement, and timing of whole calls with contestants in turns."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.kernels.measure import Budget
from benchmarks.kernels.report import MET, MISSED, NO_GOAL, NOT_MEASURED
from stylefast.kernels.gpu.timing import one_line

Run = Callable[[], Any]


@dataclass(frozen=True)
class Figure:
    """One number and its goal: at least `goal`, or at most. Without a value, `note` says why."""

    what: str
    value: float | None
    goal: float | None = None
    at_most: bool = False
    unit: str = ""
    label: str = ""  # the goal's name in a list of goals
    note: str = ""

    @property
    def verdict(self) -> str:
        """Return the verdict on the value rounded to four digits, as printed and recorded."""
        if self.value is None:
            return NOT_MEASURED
        if self.goal is None:
            return NO_GOAL
        value = shown(self.value)
        return MET if (value <= self.goal if self.at_most else value >= self.goal) else MISSED


@dataclass(frozen=True)
class Ratio:
    """Median time of `over` divided by that of `under`, and the goal."""

    over: str
    under: str
    goal: float | None = None
    at_most: bool = False
    label: str = ""

    def figure(self, times: Mapping[str, Sequence[float]], failures: Mapping[str, str]) -> Figure:
        """Return the ratio from measured seconds by contestant, or the reason if one of the two has not run."""
        what = f"{self.over} / {self.under}"
        missing = [name for name in (self.over, self.under) if not times.get(name)]
        if missing:
            note = "; ".join(f"{name}: {failures.get(name, 'has not run')}" for name in missing)
            return Figure(what, None, self.goal, self.at_most, label=self.label, note=note)
        value = statistics.median(times[self.over]) / statistics.median(times[self.under])
        return Figure(what, value, self.goal, self.at_most, label=self.label)


@dataclass
class Outcome:
    """The results of a case."""

    times: dict[str, list[float]] = field(default_factory=dict)  # seconds of every sample by contestant
    figures: list[Figure] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)  # ready for JSON


@dataclass(frozen=True)
class Case:
    """One measurement. `expected`: its figures if not run; `seconds`: the time that must be left to start it."""

    name: str
    what: str  # description of the comparison
    measure: Callable[[Budget], Outcome]
    expected: tuple[Ratio | Figure, ...] = ()
    seconds: float = 0.0

    def not_measured(self, why: str) -> Outcome:
        """Return all expected figures without values."""
        ratios = [e.figure({}, {}) if isinstance(e, Ratio) else e for e in self.expected]
        figures = [Figure(f.what, None, f.goal, f.at_most, f.unit, f.label, why) for f in ratios]
        return Outcome(figures=figures or [Figure(self.name, None, note=why)])


@dataclass(frozen=True)
class Race:
    """Times of contestants, and the last result of each."""

    times: dict[str, list[float]]
    failures: dict[str, str]
    results: dict[str, Any]


def race(runs: Mapping[str, Run], rounds: int, budget: Budget, *, warm_ups: int = 1, cuda: bool = False) -> Race:
    """Run every contestant in turn, A B C A B C, for `rounds` rounds, or fewer if the next would exceed the budget.

    A contestant that raises is dropped and the others continue. `warm_ups` rounds are not counted.
    """
    failures: dict[str, str] = {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    results: dict[str, Any] = {}
    for turn in range(-warm_ups, rounds):
        began = time.perf_counter()
        for name, run in runs.items():
            if name in failures:
                continue
            try:
                seconds, results[name] = timed(run, cuda)
            except Exception as error:  # any failure: the other contestants must still be timed
                failures[name] = one_line(error)
                times[name] = []
                continue
            if turn >= 0:
                times[name].append(seconds)
        if turn >= 0 and time.perf_counter() - began > remaining(budget):
            break
    return Race({name: samples for name, samples in times.items() if samples}, failures, results)


def timed(run: Run, cuda: bool = False) -> tuple[float, Any]:
    """Return the seconds of one call, including its work on the device, and its result."""
    gc.collect()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def remaining(budget: Budget) -> float:
    """Return the seconds that are left."""
    return max(0.0, 60 * budget.minutes - budget.seconds)


def deviation(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the largest difference between two lists of latents; NaN if either contains one."""
    pairs = zip(actual, expected, strict=True)
    return max((a.float().cpu() - b.float().cpu()).abs().max().item() for a, b in pairs)


def shown(value: float) -> float:
    """Round a value to four digits."""
    return float(f"{value:.4g}")
