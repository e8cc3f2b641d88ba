"""Host overhead on a GPU: gaps between kernels, CPU time of a step, synchronisations, recompiles."""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.utils import counters

import stylefast as sf
from benchmarks.runtime.cases import Figure, timed
from benchmarks.runtime.mixes import BAKED
from benchmarks.runtime.scene import PROMPTS, Scene

GAP_MICROSECONDS = 10.0
SWITCHES = 6
EXPECTED = (
    Figure("idle share of the device", None, 0.01, at_most=True, label="G"),
    Figure("CPU time per step", None, 60.0, at_most=True, unit="us", label="G"),
    Figure("synchronisations in the loop", None, 0, at_most=True, label="G"),
    Figure("another cached style", None, 30.0, at_most=True, unit="ms", label="G"),
    Figure("recompiles", None, 0, at_most=True, label="G"),
)


def measure(scene: Scene, few: Scene, device: str) -> tuple[list[Figure], dict[str, Any]]:
    """Measure the figures of `EXPECTED`; `few` has fewer steps, for figures that don't depend on them."""
    long = Scene(lambda: scene.model, steps=scene.steps, banks=scene.banks)  # ends at the latents
    run = long.cached(1)
    run()
    idle, details = idle_share(run) if device == "cuda" else (None, {})
    values = (
        (idle, "the profiler saw no kernels"),
        (cpu_microseconds_per_step(long), "too few steps"),
        (synchronisations(long) if device == "cuda" else None, "the device is no GPU"),
        (switch_milliseconds(few, device), ""),
        (recompiles(few), ""),
    )
    figures = [
        Figure(e.what, value, e.goal, e.at_most, e.unit, e.label, why if value is None else "")
        for e, (value, why) in zip(EXPECTED, values, strict=True)
    ]
    return figures, details


def idle_share(run) -> tuple[float | None, dict[str, Any]]:
    """Return the share of the middle of a run in which the device idles longer than a gap between two launches.

    Copies don't count as work: pages streamed in the background must not hide a waiting device.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset"))
    )
    if len(spans) < 2:
        return None, {}
    return shares(spans)


def shares(spans: list[tuple[float, float]]) -> tuple[float, dict[str, Any]]:
    """Return the idle share of sorted `spans` (start, end) in microseconds.

    The first 30 % of the run, which include encoding, and the last 5 % are left out.
    """
    first, last = spans[0][0], max(end for _, end in spans)
    begin, stop = first + 0.3 * (last - first), first + 0.95 * (last - first)
    done, gaps = begin, []
    for start, end in spans:
        if end <= begin or start >= stop:
            continue
        if start > done:
            gaps.append(start - done)
        done = max(done, end)
    if stop > done:
        gaps.append(stop - done)
    idle = sum(gap for gap in gaps if gap >= GAP_MICROSECONDS) / (stop - begin)
    return idle, {
        "all_gaps_share": round(sum(gaps) / (stop - begin), 4),
        "longest_gap_us": round(max(gaps, default=0.0), 1),
    }


@contextmanager
def before_steps(engine: sf.Engine, call: Callable[[], object]) -> Iterator[None]:
    """Call `call` before every step of an engine.

    A request's own `callback` receives latents, so the cost of fetching them would be included.
    """
    runner = engine.runner
    advance = runner.step

    def advancing(*arguments, **options):
        call()
        return advance(*arguments, **options)

    runner.step = advancing
    try:
        yield
    finally:
        del runner.step


def cpu_microseconds_per_step(scene: Scene) -> float | None:
    """Return the median CPU time of the step loop's thread between two steps, without waiting for the device."""
    marks: list[float] = []
    style = sf.StyleAligned(scene.bank())
    with before_steps(scene.model.engine, lambda: marks.append(time.thread_time())):
        scene.drawn(PROMPTS[:1], style)
    between = [after - before for before, after in zip(marks, marks[1:])]
    return 1e6 * statistics.median(between) if between else None


def synchronisations(scene: Scene) -> int:
    """Count how often the host waited for the device between the first step and the last."""
    seen: list[int] = []
    style = sf.StyleAligned(scene.bank())
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with before_steps(scene.model.engine, lambda: seen.append(_waits(caught))):
                scene.drawn(PROMPTS[:1], style)
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return seen[-1] - seen[0]


def switch_milliseconds(scene: Scene, device: str) -> float:
    """Return the extra time of a call whose cached style differs from that of the call before."""
    runs = [scene.cached(1, prompt=prompt) for prompt in BAKED[:2]]
    for run in runs:
        run()
    same, switched, last = [], [], 1
    for turn in range(2 * SWITCHES):
        wanted = 1 - last if turn % 2 else last
        seconds, _ = timed(runs[wanted], device == "cuda")
        (switched if wanted != last else same).append(seconds)
        last = wanted
    return 1e3 * (statistics.median(switched) - statistics.median(same))


def recompiles(scene: Scene) -> int:
    """Count the graphs that are recompiled when style, strength and mix of a batch of two change."""
    first, second = (scene.bank(prompt) for prompt in BAKED[:2])
    mixes = [
        [sf.StyleAligned(first)] * 2,
        [sf.StyleAligned(first), sf.StyleAligned(second)],
        [sf.StyleAligned(second, scale=0.8, shift=0.5), sf.StyleAligned(first, adain={"q": 0.3})],
        [None, sf.StyleAligned(first, mode="swap")],
        [sf.StyleAligned(first, share_group_norm=True), None],
    ]
    before = None
    for styles in mixes:
        settings = {"steps": scene.steps, "guidance": scene.guidance, "size": scene.model.size}
        scene.drawn([sf.Request(PROMPTS[i], style=style, seed=i, **settings) for i, style in enumerate(styles)])
        # the first batch's compilations don't count
        before = _graphs() if before is None else before
    return _graphs() - before


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]


def _waits(caught) -> int:
    return sum("synchroniz" in str(warning.message) for warning in caught)
