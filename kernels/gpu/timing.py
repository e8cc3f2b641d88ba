"""Times of GPU work: replays of CUDA graphs, contestants in turns.

Launch gaps and host work stay out, and what a GPU's clocks do meanwhile meets every contestant alike.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

ROUNDS = 21
GRAPH_MILLISECONDS = 2.0  # a graph holds as many launches as this takes
MOST_LAUNCHES = 64


class Times(NamedTuple):
    """Milliseconds of every sample by contestant, and why those that are missing could not run."""

    samples: dict[str, list[float]]
    failures: dict[str, str]


def graph_milliseconds(calls: Mapping[str, Callable[[int], object]], sets: int = 1, rounds: int = ROUNDS) -> Times:
    """Milliseconds of one call of each contestant, `rounds` samples each.

    A contestant gets the number of an input set in [0, sets) with every call, in order, so that data which would fit
    in the L2 is not found there. It must neither synchronise nor read device tensors on the host.
    """
    graphs, failures = {}, {}
    for name, call in calls.items():
        try:
            graphs[name] = _captured(call, sets)
        except Exception as error:  # whatever refuses: the other contestants are still to be timed
            torch.cuda.synchronize()
            failures[name] = one_line(error)
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, launches) in graphs.items():
            samples[name].append(_elapsed(graph.replay) / launches)
    return Times(samples, failures)


def one_line(error: Exception) -> str:
    """Kind and message of an error, shortened; of paths only the last part, as figures travel to other machines."""
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
    """Milliseconds on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)
