"""Measure times, errors and ceilings. A timer is a function (calls, sets) -> Times that handles its own device."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.kernels.cases import Call, Case, Entrants, type_name
from stylefast.kernels.gpu.timing import Times, graph_milliseconds, one_line

Timer = Callable[[Mapping[str, Call], int], Times]


class Budget:
    """A time budget, counted from its creation."""

    def __init__(self, minutes: float, clock: Callable[[], float] = time.monotonic):
        self.minutes, self.clock, self.start = minutes, clock, clock()

    @property
    def spent(self) -> bool:
        return self.clock() - self.start >= 60 * self.minutes

    @property
    def seconds(self) -> float:
        return self.clock() - self.start


def cpu_timer(seconds: float = 15.0, least: int = 5, most: int = 25, shortest: float = 0.02) -> Timer:
    """Return a timer that runs contestants in turns until `seconds` are spent, within `least` and `most` rounds.

    A sample is at least `shortest` seconds long; shorter calls are repeated and the time divided.
    """

    def milliseconds(calls: Mapping[str, Call], sets: int) -> Times:
        repeats, failures = {}, {}
        for name, call in calls.items():
            try:
                call(0)
                repeats[name] = max(1, math.ceil(shortest / max(_seconds(call, 1, sets), 1e-9)))
            except Exception as error:  # any failure: the other contestants must still be timed
                failures[name] = one_line(error)
        samples: dict[str, list[float]] = {name: [] for name in repeats}
        start, rounds = time.perf_counter(), 0
        while rounds < least or (rounds < most and time.perf_counter() - start < seconds):
            for name, count in repeats.items():
                samples[name].append(1e3 * _seconds(calls[name], count, sets) / count)
            rounds += 1
        return Times(samples, failures)

    return milliseconds


def cuda_timer(calls: Mapping[str, Call], sets: int) -> Times:
    """Time replays of CUDA graphs."""
    return graph_milliseconds(calls, sets)


def measure_case(case: Case, timer: Timer) -> dict[str, Any]:
    """Measure times of every contestant, errors for comparisons that need them, and failures."""
    entrants = case.build()
    times = timer(entrants.calls, entrants.sets)
    wanted = {name for c in case.comparisons if getattr(c, "errors", False) for name in (c.ours, c.peer)}
    return {
        "times": {name: summary(samples) for name, samples in times.samples.items()},
        "failures": {**entrants.absent, **times.failures},
        "errors": _errors(entrants, [name for name in times.samples if name in wanted]),
    }


def summary(samples: list[float]) -> dict[str, Any]:
    """Return median and extremes of samples in milliseconds, to four digits."""
    figures = {"median_ms": statistics.median(samples), "min_ms": min(samples), "max_ms": max(samples)}
    return {**{name: float(f"{value:.4g}") for name, value in figures.items()}, "samples": len(samples)}


def ceilings(device: str, quick: bool, timer: Timer) -> dict[str, Any]:
    """Measure the rates of a square matrix product by type, in GFLOP/s, and of a copy, in GB/s read plus written."""
    size, copied = {"cpu": (2048, 2**28), "cuda": (8192, 2**31)}[device]
    if quick:
        size, copied = 256, 2**22
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)
    source = torch.ones(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {"copy": lambda i: target.copy_(source)}
    for dtype in dtypes:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        calls[type_name(dtype)] = lambda i, a=a, b=b, out=out: torch.matmul(a, b, out=out)
    times = timer(calls, 1)
    seconds = {name: statistics.median(samples) / 1e3 for name, samples in times.samples.items()}
    return {
        "matmul_size": size,
        "matmul": {type_name(d): round(2 * size**3 / seconds[type_name(d)] / 1e9, 1) for d in dtypes},
        "copy_bytes": copied,
        "copy": round(2 * copied / seconds["copy"] / 1e9, 1),
    }


def _errors(entrants: Entrants, names: list[str]) -> dict[str, dict[str, float]]:
    """Return the largest and RMS deviation from the fp64 result; NaN if an output contains one."""
    if entrants.exact is None or not names:
        return {}
    exact = entrants.exact()
    found = {}
    for name in names:
        deviation = (entrants.pick(entrants.calls[name](0)) - exact).abs()
        figures = {"max": deviation.max().item(), "rms": deviation.square().mean().sqrt().item()}
        found[name] = {key: float(f"{value:.3g}") for key, value in figures.items()}
    return found


def _seconds(call: Call, count: int, sets: int) -> float:
    start = time.perf_counter()
    for i in range(count):
        call(i % sets)
    return time.perf_counter() - start
