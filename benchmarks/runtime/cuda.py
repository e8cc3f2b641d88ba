"""The cases of `--device cuda`: SDXL's UNet and VAE in bf16, 1024x1024, 30 steps with guidance; most informative first.

Labels B1 to B4, C and G are the goals of this project's performance plan, L those of LoRAs per row. Peers that take
minutes to compile come last, and are started only if enough time is left.
"""

import copy
import statistics
import tempfile
import time
from functools import cached_property
from pathlib import Path

import torch

from benchmarks import loras
from benchmarks.kernels.measure import Budget, ceilings, cuda_timer
from benchmarks.runtime import host
from benchmarks.runtime.cases import Case, Figure, Outcome, Race, Ratio, race
from benchmarks.runtime.models import Model, random_model, sdxl_model, unet_config, vae_config
from benchmarks.runtime.published import Published
from benchmarks.runtime.scene import Scene
from stylefast import Engine

STEPS, FEW_STEPS = 30, 10  # step time is the difference of two runs, so that encoding and the VAE cancel out
ROUNDS = 5
# a multiply-add counts as two; 77 text tokens, 128x128 latents, attention included
FLOP_PER_ROW = 6.761e12
RESIDENT, STREAMED = 64 * 2**30, 5 * 2**30  # bytes for pages: two full styles of 30 steps; about six steps of one
SETUP_SECONDS, COMPILE_SECONDS = 60.0, 240.0
MAX_AUTOTUNE = {"mode": "max-autotune", "fullgraph": True, "dynamic": False}


class Bench:
    """State shared by the cases, created on first use. `quick` is a small model, on any device."""

    def __init__(self, quick: bool, device: str):
        self.quick, self.device = quick, device
        self.scene = Scene(self._model, steps=2 if quick else STEPS, pictures=True)
        self.few = Scene(lambda: self.scene.model, steps=1 if quick else FEW_STEPS)
        self.rounds = 1 if quick else ROUNDS

    def _model(self) -> Model:
        if self.quick:
            config = unet_config((32, 64, 64), cross_dim=128, pooled_dim=64, time_dim=16, side=8, depth=(1, 1, 1))
            vae = vae_config((32, 32, 32, 32), 1)
            return random_model("small", config, (64, 64), vae, self.device, torch.float32)
        return sdxl_model(self.device, backend="compile", bank_memory=RESIDENT)

    def race(self, runs, budget: Budget) -> Race:
        """Run contestants in turns, timed until the device is done."""
        return race(runs, self.rounds, budget, warm_ups=int(not self.quick), cuda=self.device == "cuda")

    @cached_property
    def streamed(self) -> Scene:
        """Return the same model with room for only a few steps' pages: the others come from the host every time."""
        options = {} if self.quick else {"backend": "compile", "bank_memory": STREAMED}
        model = self.scene.model
        # the published form replaced processors in the pipeline's UNet, which the engine refuses
        pipeline = copy.copy(model.published.pipeline)
        pipeline.unet = _without_processors(pipeline.unet)
        engine = Engine.from_pipeline(pipeline, **options)
        return Scene(
            lambda: Model(model.name, engine, model.published, model.size),
            self.scene.steps,
            pictures=True,
            banks=self.scene.banks,
        )

    @cached_property
    def compiled(self) -> Published:
        """Return the published form under `torch.compile`, with its own channels-last copies of UNet and VAE."""
        pipeline = self.scene.model.published.pipeline
        unet, vae = (_channels_last(part) for part in (pipeline.unet, pipeline.vae))
        call, decode = (torch.compile(part, **MAX_AUTOTUNE) for part in (unet, vae.decode))
        return Published(pipeline, unet=unet, call=call, decode=decode)

    @cached_property
    def compiled_plain(self) -> Published:
        """Return diffusers' plain UNet under `torch.compile`, channels-last, with fused projections."""
        pipeline = self.scene.model.published.pipeline
        unet = _channels_last(_without_processors(pipeline.unet))
        unet.fuse_qkv_projections()
        return Published(pipeline, unet=unet, call=torch.compile(unet, **MAX_AUTOTUNE), plain=True)


def _without_processors(unet):
    """Return a diffusers UNet with its default attention, sharing the weights of one with replaced attention."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        plain = UNet2DConditionModel.from_config(unet.config)
    plain.load_state_dict(unet.state_dict(), assign=True)
    return plain.eval()


def cases(quick: bool = False, device: str = "cuda") -> list[Case]:
    """Return all cases, the most informative first."""
    bench = Bench(quick, device)
    return [
        against_published(bench, 1, ("B1", 5.0), ("B1", 2.7), ("B3", 1.80)),
        against_published(bench, 4, ("B1", 3.5), None, ("B3", 1.17)),
        against_uncached(bench, 2, 1.38),
        step(bench),
        host_side(bench),
        row_loras(bench, 8),
        row_loras(bench, 32),
        streamed(bench),
        compiled(bench, 1, 3.0, 1.6),
        compiled(bench, 4, 1.8, None),
        compiled_step(bench),
    ]


def against_published(bench: Bench, n: int, cached, uncached, inside) -> Case:
    """Compare with the published method; each of the three goals is (label, least ratio) or None."""

    def ratio(over: str, under: str, goal) -> Ratio:
        return Ratio(over, under, goal and goal[1], label=goal[0] if goal else "")

    ratios = (
        ratio("published", "cached", cached),
        ratio("published", "uncached", uncached),
        ratio("uncached", "cached", inside),
    )

    def measure(budget: Budget) -> Outcome:
        scene = bench.scene
        runs = {"cached": scene.cached(n), "uncached": scene.uncached_set(n), "published": scene.published(n)}
        return _outcome(bench.race(runs, budget), ratios)

    what = f"{_pictures(n)}, {_settings(bench)}; uncached and published make and decode the reference too"
    return Case(f"published n={n}", what, measure, ratios, SETUP_SECONDS if n == 1 else 30)


def against_uncached(bench: Bench, n: int, goal: float) -> Case:
    """Compare cached with uncached in our engine alone."""
    ratios = (Ratio("uncached", "cached", goal, label="B3"),)

    def measure(budget: Budget) -> Outcome:
        runs = {"cached": bench.scene.cached(n), "uncached": bench.scene.uncached_set(n)}
        return _outcome(bench.race(runs, budget), ratios)

    what = f"{_pictures(n)}, {_settings(bench)}; uncached makes and decodes the reference too"
    return Case(f"uncached n={n}", what, measure, ratios, 30)


def step(bench: Bench) -> Case:
    """Compare one guided step without a style with the rate of a matrix product."""
    expected = (
        Figure("share of peak, n=1", None, 0.72, label="C"),
        Figure("share of peak, n=4", None, 0.80, label="C"),
    )

    def measure(budget: Budget) -> Outcome:
        timer = cuda_timer if bench.device == "cuda" else _once
        peak = 1e9 * ceilings(bench.device, bench.quick, timer)["matmul"]["bf16"]
        times, figures, failures = {}, [], {}
        for n, wanted in zip((1, 4), expected, strict=True):
            found = bench.race(_long_and_short(bench, f"n={n}", n), budget)
            times |= found.times
            failures |= found.failures
            seconds, why = _seconds_per_step(bench, found, f"n={n}")
            value = None if seconds is None else 2 * n * FLOP_PER_ROW / seconds / peak
            figures += [
                Figure(wanted.what, value, wanted.goal, label=wanted.label, note=why),
                Figure(f"step, n={n}", None if seconds is None else 1e3 * seconds, unit="ms", note=why),
            ]
        return Outcome(times, figures, {"failures": failures, "peak_tflops": round(peak / 1e12, 1)})

    what = (
        f"a plain guided step of the engine, from runs of {bench.scene.steps} and {bench.few.steps} steps; peak is "
        "this run's bf16 matrix product of 8192^3"
    )
    return Case("step", what, measure, expected, 30)


def host_side(bench: Bench) -> Case:
    """Measure host overhead: gaps on the device, CPU time of a step, synchronisations, style changes, recompiles."""
    expected = host.EXPECTED

    def measure(budget: Budget) -> Outcome:
        figures, details = host.measure(bench.scene, bench.few, bench.device)
        return Outcome(figures=figures, details=details)

    what = "1 picture of a cached style; gaps on the device count from 10 us on, as launches cause them"
    return Case("host", what, measure, expected, 60)


def row_loras(bench: Bench, count: int) -> Case:
    """Compare a batch in which every picture has a LoRA of its own with the same batch without, and with merging."""
    each = f"{loras.COUNTED[count]} LoRAs"
    ratios = (
        (
            Ratio(each, "none", 1.20, at_most=True, label="L"),
            Ratio("one LoRA on one row", "none", 1.04, at_most=True, label="L"),
            Ratio("one by one", each, 3.0, label="L"),
        )
        if count == 8
        else (Ratio(each, "none", 1.15, at_most=True, label="L"),)
    )

    def measure(budget: Budget) -> Outcome:
        engine = bench.scene.model.engine
        with tempfile.TemporaryDirectory() as folder:
            files = loras.registered(engine, Path(folder), count, engine.unet.dtype)
            runs = loras.contestants(engine, files, bench.few.steps)
            wanted = {name for ratio in ratios for name in (ratio.over, ratio.under)}
            found = bench.race({name: run for name, run in runs.items() if name in wanted}, budget)
            for name in files:
                engine.loras.remove(name)
        return _outcome(found, ratios)

    what = (
        f"{count} pictures of {bench.few.steps} steps without guidance, each with its own LoRA of rank {loras.RANK} on "
        "all attention and feed-forward layers"
    )
    return Case(f"LoRAs n={count}", what, measure, ratios, 60)


def streamed(bench: Bench) -> Case:
    """Compare pages copied from the host with pages kept on the device."""
    ratios = (
        Ratio("streamed fp8 n=1", "resident fp8 n=1", 1.03, at_most=True, label="B4"),
        Ratio("streamed n=2", "resident n=2", 1.03, at_most=True, label="B4"),
    )

    def measure(budget: Budget) -> Outcome:
        # bake both banks on the engine that has the room
        fp8 = {"dtype": "float8_e4m3fn"}
        resident = {"resident fp8 n=1": bench.scene.cached(1, **fp8), "resident n=2": bench.scene.cached(2)}
        streaming = bench.streamed
        runs = {"streamed fp8 n=1": streaming.cached(1, **fp8), "streamed n=2": streaming.cached(2)}
        return _outcome(bench.race(resident | runs, budget), ratios)

    what = f"{_settings(bench)}; room for {STREAMED / 2**30:.0f} GiB of pages against {RESIDENT / 2**30:.0f} GiB"
    return Case("streamed", what, measure, ratios, 120)


def compiled(bench: Bench, n: int, cached: float, uncached: float | None) -> Case:
    """Compare with the published form under torch.compile."""
    ratios = (
        Ratio("compiled", "cached", cached, label="B2"),
        Ratio("compiled", "uncached", uncached, label="B2" if uncached else ""),
    )

    def measure(budget: Budget) -> Outcome:
        scene = bench.scene
        began = time.perf_counter()
        published = scene.published(n, bench.compiled)
        published()
        first = time.perf_counter() - began
        runs = {"cached": scene.cached(n), "uncached": scene.uncached_set(n), "compiled": published}
        outcome = _outcome(bench.race(runs, budget), ratios)
        outcome.details["first_call_s"] = round(first, 1)
        return outcome

    what = (
        f"{_pictures(n)}, {_settings(bench)}; the published form in channels-last under torch.compile with max-autotune"
    )
    return Case(f"compiled n={n}", what, measure, ratios, COMPILE_SECONDS)


def compiled_step(bench: Bench) -> Case:
    """Compare a plain guided step with diffusers' UNet, compiled as well as possible."""
    expected = (Figure("compiled / ours", None, 1.45, label="C"),)

    def measure(budget: Budget) -> Outcome:
        form = bench.compiled_plain
        theirs = {f"compiled, {scene.steps} steps": scene.plainly_published(1, form) for scene in _both(bench)}
        found = bench.race(_long_and_short(bench, "ours", 1) | theirs, budget)
        (ours, why), (other, why_other) = (_seconds_per_step(bench, found, name) for name in ("ours", "compiled"))
        value = None if ours is None or other is None else other / ours
        figure = Figure(expected[0].what, value, expected[0].goal, label="C", note=why or why_other)
        return Outcome(found.times, [figure], {"failures": found.failures})

    what = "a plain guided step of 1 picture; theirs has fused projections, channels-last, torch.compile, max-autotune"
    return Case("compiled step", what, measure, expected, COMPILE_SECONDS)


def _both(bench: Bench) -> tuple[Scene, Scene]:
    """Return scenes for long and short runs that end at the latents."""
    return Scene(lambda: bench.scene.model, steps=bench.scene.steps), bench.few


def _long_and_short(bench: Bench, name: str, n: int) -> dict:
    return {f"{name}, {scene.steps} steps": scene.plain(n) for scene in _both(bench)}


def _seconds_per_step(bench: Bench, found: Race, name: str) -> tuple[float | None, str]:
    """Return the median seconds of one additional step, or why there is no figure."""
    ends = [f"{name}, {scene.steps} steps" for scene in _both(bench)]
    if missing := [f"{end}: {found.failures.get(end, 'has not run')}" for end in ends if end not in found.times]:
        return None, "; ".join(missing)
    long, short = (statistics.median(found.times[end]) for end in ends)
    if long <= short:
        return None, f"{bench.scene.steps} steps took no longer than {bench.few.steps}"
    return (long - short) / (bench.scene.steps - bench.few.steps), ""


def _outcome(found: Race, ratios) -> Outcome:
    figures = [ratio.figure(found.times, found.failures) for ratio in ratios]
    return Outcome(found.times, figures, {"failures": found.failures})


def _channels_last(module: torch.nn.Module) -> torch.nn.Module:
    # a copy, because the eager form and the engine keep using the original's storage
    return copy.deepcopy(module).to(memory_format=torch.channels_last)


def _once(calls, sets: int):
    from benchmarks.kernels.measure import cpu_timer

    return cpu_timer(seconds=0.0, least=1, most=1, shortest=0.0)(calls, sets)


def _pictures(n: int) -> str:
    return "1 picture of a style" if n == 1 else f"{n} pictures of a style"


def _settings(bench: Bench) -> str:
    return f"{bench.scene.steps} steps, guidance {bench.scene.guidance:g}, text encoding and VAE included"
