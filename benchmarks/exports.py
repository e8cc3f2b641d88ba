"""Exported engines against the torch or compile backend: their pictures, their seconds, and the cost of exporting.

    python -m benchmarks exports                              # the embedded model in fp32: onnxruntime and aoti
    python -m benchmarks exports --device cuda --minutes 9    # SDXL's size in fp16: also tensorrt, against compile

Exports go to a temporary folder. Pictures are compared at equal seeds, by the lowest peak signal-to-noise ratio among a
case's pictures; contestants take turns. Results name what can't run here, with the reason. Writes
benchmarks/results/exports-<device>.json. Exit code: 0 if every goal of the chosen cases holds, 1 if one was missed or
could not be measured, 2 for what can't be measured here.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import stylefast as sf
from benchmarks.kernels.command import device_name
from benchmarks.kernels.measure import Budget
from benchmarks.runtime import mixes
from benchmarks.runtime.cases import Case, Figure, Outcome, Ratio, race
from benchmarks.runtime.command import run, summary_text
from benchmarks.runtime.models import Model, random_pipeline, sdxl_config, unet_config, vae_config
from benchmarks.runtime.scene import PROMPTS, Scene
from stylefast.errors import StyleFastError
from stylefast.export import pipeline
from stylefast.export.manifest import Manifest
from stylefast.export.options import Options, Source, load_source, require_toolchain
from stylefast.export.tensorrt import present_target
from stylefast.kernels.gpu.timing import one_line

RESULTS = Path(__file__).parent / "results"
KINDS = {"onnxruntime": "onnx", "aoti": "aoti", "tensorrt": "tensorrt"}  # backend -> kind of export
# the baseline of exported engines, and the backends that run
PEERS = {"cpu": "torch", "cuda": "compile"}
RUN = {"cpu": ("onnxruntime", "aoti"), "cuda": ("onnxruntime", "aoti", "tensorrt")}
DTYPES = {"cpu": "float32", "cuda": "float16"}
CHIPS = ("sm89", "sm120")  # targets of engines built on a machine without a GPU
LEAST_DB = 40.0
SIDES, COUNTS = {"cpu": (64, 256), "cuda": (1024,)}, (1, 4)
STEPS = {"cpu": 20, "cuda": 30}
MINUTES = {"cpu": 60.0, "cuda": 9.0}
# seconds that must be left to begin a case with a large model
LONGEST = {"onnxruntime": 60.0, "aoti": 150.0, "tensorrt": 300.0}
STYLES = ("plain", "StyleAligned, live", "bank", "InstantStyle", "DreamStyler", "mixed batch of 8")


class Bench:
    """State shared by the cases, created on first use: exports in `folder`, an engine per backend.

    quick: two steps, one round, and a small model.
    """

    def __init__(self, device: str, folder: Path, quick: bool = False, backends: Sequence[str] = ()):
        self.device, self.folder, self.quick = device, folder, quick
        self.peer, self.dtype = PEERS[device], DTYPES[device]
        self.backends = tuple(backends) or RUN[device]
        self.steps, self.rounds = (2, 1) if quick else (STEPS[device], 5)
        self.made: dict[str, Path] = {}  # backend -> folder of its export
        self._engines: dict[str, sf.Engine] = {}
        self._banks: dict[str, Any] = {}

    @cached_property
    def pipeline(self):
        """Make the pipeline for GPU runs: random weights at SDXL's size."""
        if self.quick:
            unet, texts = unet_config((32, 64, 64), cross_dim=128, pooled_dim=64, time_dim=16, side=16), (64, 64)
            vae = vae_config((32, 32, 32, 32), 1)
        else:
            unet, texts, vae = sdxl_config(), (768, 1280), vae_config((128, 256, 512, 512), 2)
        return random_pipeline(unet, texts, vae, self.device, getattr(torch, self.dtype))

    def source(self, dtype: str) -> Source:
        """Load the model to export, anew at each call: an export may consume its weights."""
        if self.device == "cpu":
            return load_source("tiny", dtype, version=sf.__version__)
        from stylefast.models.checkpoint import from_pipeline
        from stylefast.models.text import TextEncoder
        from stylefast.models.unet import UNet

        parts = from_pipeline(self.pipeline)
        text = TextEncoder(parts.tokenizers, parts.text_encoders, parts.force_zeros)
        unet = UNet.from_state(parts.unet_config, parts.unet_state)
        return Source(parts.name, parts.fingerprint, unet, parts.vae, text, {}, sf.__version__)

    def options(self, backend: str) -> Options:
        """Return a backend's export options; on a GPU only the live graph. Raises StyleFastError if it can't run."""
        kind, given = KINDS[backend], {"dtype": self.dtype}
        if self.device == "cuda":
            given |= {"flavours": ("live",), "components": ("unet",)}
        if kind == "aoti":
            given["targets"] = (self.device,)
        if kind == "tensorrt" and self.device == "cpu":
            # built but not run
            given |= {"dtype": "float16", "targets": CHIPS, "profiles": ("rows=1:4:8,size=64x64:64x64:256x256",)}
        elif kind == "tensorrt":
            given |= {"targets": (present_target(),), "profiles": ("rows=2:2:8,text_pages=1:2:64",)}
        options = Options(kind, **given)
        require_toolchain(options)
        if backend == "onnxruntime":
            from stylefast.export.sessions import require_onnxruntime

            require_onnxruntime(torch.device(self.device))
        return options

    def why_not(self, backend: str) -> str:
        """Return why a backend can't be exported for here; "" if it can."""
        try:
            self.options(backend)
        except StyleFastError as error:
            return one_line(error)
        return ""

    def export(self, backend: str) -> tuple[float, Manifest]:
        """Export the loaded model; return the seconds taken and the manifest."""
        options, source = self.options(backend), self.source(self.options(backend).dtype)
        folder = self.folder / backend
        start = time.perf_counter()
        with pipeline.silent_exporters():
            manifest = pipeline.EXPORTS[options.kind](source, folder, options)
        seconds = time.perf_counter() - start
        self.made[backend] = folder
        return seconds, manifest

    def engine(self, backend: str) -> sf.Engine:
        """Return the backend's engine, with the export made for it."""
        if backend not in self._engines:
            options = {"backend": backend} | ({"engines": self.made[backend]} if backend in KINDS else {})
            if self.device == "cpu":
                made = sf.Engine.from_pretrained("tiny", device="cpu", dtype=self.dtype, **options)
            else:
                made = sf.Engine.from_pipeline(self.pipeline, **options)
            self._engines[backend] = made
        return self._engines[backend]

    def scene(self, backend: str, side: int | None = None) -> Scene:
        """Return a scene for a backend; banks are baked on first use and shared between backends."""

        def model() -> Model:
            engine = self.engine(backend)
            return Model("tiny" if self.device == "cpu" else "SDXL", engine, None, engine.native_size)

        return Scene(model, self.steps, pictures=self.device == "cpu", side=side, banks=self._banks)

    def ready(self) -> tuple[list[str], dict[str, str]]:
        """Return the backends whose exports exist, and the others with the reason."""
        missing = {name: self.why_not(name) or "was not exported" for name in self.backends if name not in self.made}
        return [name for name in self.backends if name in self.made], missing

    def close(self) -> None:
        """Close the engines."""
        for engine in self._engines.values():
            engine.close()


def cases(bench: Bench) -> list[Case]:
    """Return all cases; exports come before the cases that use them."""
    built = [*bench.backends, *(["tensorrt"] if bench.device == "cpu" and not bench.quick else [])]
    found = [exporting(bench, backend) for backend in built]
    if bench.device == "cpu":
        found += [parity(bench, backend) for backend in bench.backends]
    sides = (SIDES[bench.device][0],) if bench.quick else SIDES[bench.device]
    return found + [speed(bench, side, n) for side in sides for n in COUNTS]


def exporting(bench: Bench, backend: str) -> Case:
    """Measure seconds and bytes of an export; without figures if it can't be made here."""
    kind = KINDS[backend]

    def measure(budget: Budget) -> Outcome:
        why = bench.why_not(backend)
        if why:
            return Outcome(details={"skipped": why})
        seconds, manifest = bench.export(backend)
        graphs = {graph.label: _of_graph(manifest, graph) for graph in manifest.graphs}
        figures = [Figure("seconds", seconds, unit="s"), Figure("size", manifest.bytes / 1e6, unit="MB")]
        details = {
            "target": manifest.target,
            "dtype": manifest.dtype,
            "toolchain": manifest.toolchain,
            "graphs": graphs,
        }
        return Outcome(figures=figures, details=details)

    what = "from the loaded model to the folder with its manifest"
    least = LONGEST[backend] if bench.device == "cuda" else 0.0
    return Case(f"export {kind}", what, measure, (Figure("seconds", None, unit="s"),), least)


def parity(bench: Bench, backend: str) -> Case:
    """Compare pictures of an exported engine and of the peer at equal seeds, style by style."""
    expected = tuple(Figure(name, None, LEAST_DB, unit="dB") for name in STYLES)

    def measure(budget: Budget) -> Outcome:
        if backend not in bench.made:
            why = bench.why_not(backend) or "was not exported"
            return Outcome(figures=[Figure(f.what, None, f.goal, unit=f.unit, note=why) for f in expected])
        # the peer first: it bakes the banks that all read
        drawn = [_styled(bench.scene(name)) for name in (bench.peer, backend)]
        figures = [Figure(style, psnr(drawn[1][style](), drawn[0][style]()), LEAST_DB, unit="dB") for style in STYLES]
        return Outcome(figures=figures)

    what = f"lowest PSNR of a picture against {bench.peer}, {bench.steps} steps, equal seeds, {bench.dtype}"
    return Case(f"{backend} pictures", what, measure, expected)


def speed(bench: Bench, side: int, n: int) -> Case:
    """Measure a call of `n` plain pictures by the peer and every exported engine, in turns."""

    def measure(budget: Budget) -> Outcome:
        ready, missing = bench.ready()
        names = [bench.peer, *ready]
        scenes = {name: bench.scene(name, side) for name in names}
        runs = {name: scenes[name].plain(n) for name in names}
        found = race(runs, bench.rounds, budget, warm_ups=int(not bench.quick), cuda=bench.device == "cuda")
        figures = [
            Figure(f"{name}, a picture", float(np.median(samples)) / n, unit="s")
            for name, samples in found.times.items()
        ]
        figures += [Ratio(bench.peer, name).figure(found.times, found.failures) for name in ready]
        if bench.device == "cuda" and bench.peer in found.results:
            figures += [
                _apart(name, found.results[name], found.results[bench.peer]) for name in ready if name in found.results
            ]
        return Outcome(found.times, figures, {"skipped": missing, "failures": found.failures})

    pictures = "1 picture" if n == 1 else f"{n} pictures"
    what = f"{pictures} of {side}x{side}, {bench.steps} steps, {bench.dtype}, text encoding included" + (
        "" if bench.device == "cpu" else ", no VAE"
    )
    # the first call includes compilation
    return Case(f"{side} px n={n}", what, measure, seconds=120.0 if bench.device == "cuda" and n == 1 else 0.0)


def psnr(actual: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> float:
    """Return the lowest PSNR of pictures [height, width, 3] in 0..1, in dB; at most 200, for equal pictures."""
    errors = [np.mean((a.astype(np.float64) - b) ** 2) for a, b in zip(actual, expected, strict=True)]
    return float(-10 * np.log10(max(*errors, 1e-20)))


def _styled(scene: Scene) -> dict[str, Callable[[], list]]:
    """Return a run for each of STYLES."""
    engine = scene.model.engine
    pictures, learned = engine.references(), engine.styles()
    runs = (
        scene.plain(4),
        scene.uncached_set(3),
        scene.cached(2),
        lambda: scene.drawn(PROMPTS[:2], sf.InstantStyle(pictures["neon"], scale=0.8)),
        lambda: scene.drawn(PROMPTS[:2], sf.DreamStyler(learned["chalk"])),
        lambda: scene.drawn(mixes.mixed_styles(scene)),
    )
    return dict(zip(STYLES, runs, strict=True))


def _of_graph(manifest: Manifest, graph) -> dict[str, Any]:
    """Return the bytes of a graph's own file, and its builder's statistics."""
    sizes = {entry.name: entry.bytes for entry in manifest.files}
    found: dict[str, Any] = {"bytes": sizes[graph.file]}
    if "seconds" in graph.extra:
        found["seconds"] = graph.extra["seconds"]
    if "build" in graph.extra:
        build = graph.extra["build"]
        layers = build["layers"] or {}
        found |= {
            "seconds": round(build["seconds"], 1),
            "builder_gb": round(build["peak_memory"] / 1e9, 2),
            "fused_attentions": layers.get("fused_attentions"),
            "kernels": layers.get("kernels"),
            "plugins": len(build["network"]["plugins"]),
        }
    return found


def _apart(name: str, latents: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> Figure:
    """Return the RMS of the latents' difference relative to the RMS of the expected latents."""
    ours, theirs = (torch.stack([x.float().cpu() for x in found]) for found in (latents, expected))
    value = ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()
    return Figure(f"{name}, latents apart", value, note="rms, of the latents' own")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks exports", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backends", help="of those that run on the device, by commas (default: all)")
    parser.add_argument("--quick", action="store_true", help="few steps, one round: to see that all runs")
    parser.add_argument("--minutes", type=float, help="cases that can't be done by then are not begun")
    parser.add_argument("--out", type=Path, help="file to write (with --quick or --backends: none unless given)")
    arguments = parser.parse_args(argv)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda needs a CUDA device, and PyTorch finds none here", file=sys.stderr)
        return 2
    backends = tuple(arguments.backends.split(",")) if arguments.backends else RUN[device]
    if unknown := [name for name in backends if name not in RUN[device]]:
        print(f"error: --backends names {unknown[0]}; on {device} there are {', '.join(RUN[device])}", file=sys.stderr)
        return 2
    minutes = MINUTES[device] if arguments.minutes is None else arguments.minutes
    if not minutes > 0:
        print(f"error: --minutes is {minutes:g}; more than 0 is needed", file=sys.stderr)
        return 2
    whole = not (arguments.quick or arguments.backends)
    path = arguments.out or (RESULTS / f"exports-{device_name(device)}.json" if whole else None)
    with tempfile.TemporaryDirectory(prefix="exports-") as folder:
        bench = Bench(device, Path(folder), arguments.quick, backends)
        try:
            content = run(cases(bench), device, arguments.quick, Budget(minutes), path)
        finally:
            bench.close()
    print(summary_text(content, path))
    return 1 if content["unproved"] else 0


if __name__ == "__main__":
    sys.exit(main())
