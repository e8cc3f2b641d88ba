"""Timing of GPU work: replays of CUDA graphs, contestants in turns.

Launch gaps and host work are excluded, and changes of the GPU's clocks affect all contestants alike.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

ROUNDS = 21
GRAPH_MILLISECONDS = 2.0  # target length of a graph
MOST_LAUNCHES = 64


class Times(NamedTuple):
    """Milliseconds of every sample by contestant, and the errors of those that could not run."""

    samples: dict[str, list[float]]
    failures: dict[str, str]


def graph_milliseconds(calls: Mapping[str, Callable[[int], object]], sets: int = 1, rounds: int = ROUNDS) -> Times:
    """Time one call of each contestant in milliseconds, `rounds` samples each.

    Each call receives the number of an input set in [0, sets), in order, so that inputs are not found in the L2. Calls
    must neither synchronise nor read device tensors on the host.
    """
    graphs, failures = {}, {}
    for name, call in calls.items():
        try:
            graphs[name] = _captured(call, sets)
        except Exception as error:  # one contestant's failure must not stop the others
            torch.cuda.synchronize()
            failures[name] = one_line(error)
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, launches) in graphs.items():
            samples[name].append(_elapsed(graph.replay) / launches)
    return Times(samples, failures)


def one_line(error: Exception) -> str:
    """Return kind and message of an error, shortened.

    Paths are cut to their last part, because results are copied to other machines.
    """
    message = re.sub(r"(?<![\w/:])/(?:[\w.+@-]+/)+", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {message[:300]}"


def _captured(call: Callable[[int], object], sets: int) -> tuple[torch.cuda.CUDAGraph, int]:
    call(0)  # compiles
    once = _elapsed(lambda: [call(i % sets) for i in range(3)]) / 3
    wanted = min(MOST_LAUNCHES, max(1, math.ceil(GRAPH_MILLISECONDS / max(once, 1e-3))))
    launches = sets * math.ceil(wanted / sets)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(sets):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            call(i % sets)
    graph.replay()
    torch.cuda.synchronize()
    return graph, launches


def _elapsed(work: Callable[[], object]) -> float:
    """Run `work` and return its milliseconds on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
