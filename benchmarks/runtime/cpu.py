"""The cases of `--device cpu`: the embedded model and a half-width SDXL, 20 steps with guidance, fp32."""

from functools import partial

import torch

from benchmarks.kernels.measure import Budget
from benchmarks.runtime import mixes, soak
from benchmarks.runtime.cases import Case, Figure, Outcome, Ratio, Run, deviation, race
from benchmarks.runtime.models import half_width_model, tiny_model
from benchmarks.runtime.scene import Scene

CHECK = "check"
CHECKED_WITHIN = 1e-3
GOALS = {1: (1.7, 2.0), 4: (1.15, None)}  # uncached / cached, published / cached
MIXED_GOAL = 1.1
# threads that call `generate` at once, against the same requests by `submit`; UNet calls for each step of a request
THREADS_GOAL, CALLS_GOAL = 1.3, 2
# at its native 64 px the embedded model's deepest layers have 16 tokens, and doubling the rows of a matrix product
# costs far less than twice the time: leaving out the reference saves little there. Measured without goals
TINY_SIDE = 256


def cases(quick: bool = False) -> list[Case]:
    """Return all cases, the cheapest first.

    quick: the embedded model alone, to see that everything runs; compares pictures of two steps and times one step.
    """
    steps, rounds = (2, 1) if quick else (20, 9)
    checked = Scene(tiny_model, steps)
    if quick:
        small = tiny = Scene(lambda: checked.model, 1)
    else:
        small, tiny = checked, Scene(tiny_model, steps, side=TINY_SIDE)
    found = [check(checked)]
    found += [speed("tiny", tiny, n, rounds, GOALS[n]) for n in (1, 4)]
    if not quick:
        found += [speed("tiny, 64 px", small, n, rounds, (None, None)) for n in (1, 4)]
    found += [mixed(small, rounds), threads(small, rounds), *soak.cases(quick)]
    if not quick:
        half = Scene(half_width_model)
        found += [speed("half-width", half, 1, 3, GOALS[1]), speed("half-width", half, 4, 2, GOALS[4])]
    return found


def check(scene: Scene, n: int = 2) -> Case:
    """Check that the published form and the engine draw the same pictures; otherwise the comparison is void."""
    expected = Figure("published - uncached", None, CHECKED_WITHIN, at_most=True)

    def measure(budget: Budget) -> Outcome:
        ours, theirs = scene.uncached(n)(), scene.published(n)()[1:]
        largest = max(latents.abs().max().item() for latents in theirs)
        return Outcome(
            figures=[
                Figure(
                    expected.what,
                    deviation(ours, theirs),
                    expected.goal,
                    at_most=True,
                    note=f"latents reach {largest:.3g}",
                ),
                Figure("cached - uncached", deviation(scene.cached(n)(), ours), note="the bank as `bake` stores it"),
            ]
        )

    what = f"largest difference of latents after {scene.steps} steps, {n} pictures, same seeds and noise"
    return Case(CHECK, what, measure, (expected,))


def speed(name: str, scene: Scene, n: int, rounds: int, goals: tuple[float | None, float | None]) -> Case:
    """Compare cached with uncached and published; text encoding is included, the VAE left out, on all sides."""
    over_uncached, over_published = goals
    ratios = [
        Ratio("uncached", "cached", over_uncached),
        Ratio("published", "cached", over_published),
        Ratio("published", "uncached"),
    ]
    if n == 1:
        ratios.append(Ratio("cached", "plain"))

    def measure(budget: Budget) -> Outcome:
        runs = {"cached": scene.cached(n), "uncached": scene.uncached(n), "published": scene.published(n)}
        if n == 1:
            runs["plain"] = scene.plain(n)
        # the n=1 case has already warmed up the slow models
        found = race(runs, rounds, budget, warm_ups=int(rounds > 1 and (n == 1 or rounds > 3)))
        figures = [ratio.figure(found.times, found.failures) for ratio in ratios]
        if {"uncached", "published"} <= found.results.keys():
            apart = deviation(found.results["uncached"], found.results["published"][1:])
            figures.append(Figure("published - uncached", apart, note="largest difference of latents"))
        return Outcome(found.times, figures, {"failures": found.failures, "bank_bytes": scene.bank().nbytes})

    pictures = "1 picture" if n == 1 else f"{n} pictures"
    what = f"{pictures} of one style, {scene.steps} steps, guidance {scene.guidance:g}, text encoding included, no VAE"
    return Case(f"{name} n={n}", what, measure, tuple(ratios))


def mixed(scene: Scene, rounds: int) -> Case:
    """Compare eight styles in one batch with one style, at the same number of rows."""
    ratios = (
        Ratio("eight styles", "one style", MIXED_GOAL, at_most=True),
        Ratio("eight banks", "one bank", MIXED_GOAL, at_most=True),
    )

    def measure(budget: Budget) -> Outcome:
        batches = {
            "one style": mixes.one_live_style(scene),
            "eight styles": mixes.mixed_styles(scene),
            "one bank": mixes.one_bank(scene),
            "eight banks": mixes.eight_banks(scene),
        }
        runs = {name: lambda requests=requests: scene.drawn(requests) for name, requests in batches.items()}
        found = race(runs, rounds, budget, warm_ups=int(rounds > 1))
        figures = [ratio.figure(found.times, found.failures) for ratio in ratios]
        return Outcome(found.times, figures, {"failures": found.failures})

    what = (
        f"{mixes.BATCH} pictures, {scene.steps} steps. 18 rows: one live StyleAligned reference with 8 readers, "
        "against 2 banks, 1 live reference, 2 InstantStyle, 1 DreamStyler, 1 bank with InstantStyle and 1 plain, at "
        "their own strengths and guidance. 16 rows: one bank for all, against 8 banks"
    )
    return Case("mixed batch of 8", what, measure, ratios)


def threads(scene: Scene, rounds: int) -> Case:
    """Compare eight threads that call `generate` at once with the same eight requests by `submit`."""
    ratio = Ratio("threads", "submit", THREADS_GOAL, at_most=True)
    calls = Figure("UNet calls of threads", None, CALLS_GOAL * scene.steps, at_most=True)

    def measure(budget: Budget) -> Outcome:
        runner, requests, seen = scene.model.engine.runner, mixes.plain(scene), {}
        runs = {
            "threads": lambda: mixes.by_threads(scene, requests),
            "submit": lambda: mixes.by_submit(scene, requests),
        }

        def counted(name: str, run: Run) -> list[torch.Tensor]:
            before = runner.calls
            latents = run()
            seen.setdefault(name, []).append(runner.calls - before)
            return latents

        found = race({n: partial(counted, n, run) for n, run in runs.items()}, rounds, budget, warm_ups=int(rounds > 1))
        apart = deviation(found.results["threads"], found.results["submit"])
        return Outcome(
            found.times,
            [
                ratio.figure(found.times, found.failures),
                Figure(calls.what, max(seen["threads"]), calls.goal, at_most=True),
                Figure("UNet calls of submit", max(seen["submit"])),
                Figure("threads - submit", apart, note="largest difference of latents"),
            ],
            {"failures": found.failures, "calls": seen},
        )

    what = f"{mixes.BATCH} plain requests of {scene.steps} steps, each by a thread of its own or all submitted"
    return Case("eight threads", what, measure, (ratio, calls))
