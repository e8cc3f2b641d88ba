"""`stylefast export`: a model as ONNX graphs, TensorRT engines, AOTInductor packages or a Triton model repository."""

import argparse
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from stylefast.commands.bank_report import shown_bytes
from stylefast.commands.model_options import DEFAULT_MODEL
from stylefast.commands.parser import Parser
from stylefast.errors import EngineMismatch, InvalidRequest
from stylefast.values import listed, quoted, shown, shown_path

SUMMARY = "Export a model for other runtimes, with styles and strengths as inputs."
EXAMPLES = """examples:
  stylefast export onnx --model tiny --out engines
  stylefast export tensorrt --model tiny --target sm89,sm120 --profile rows=1:4:8
  stylefast export aoti --target cpu --flavour live
  stylefast export onnx --lora-rank 32 --lora-slots 2 --max-text-chunks 4
  stylefast generate "a fish" --backend onnxruntime --engines engines
"""
# kind -> summary and examples
KINDS = {
    "onnx": (
        "ONNX graphs, to run in ONNX Runtime on any machine or to build TensorRT engines from.",
        "  stylefast export onnx --model tiny --flavour live,plain --dtype float16 --out engines",
    ),
    "tensorrt": (
        "TensorRT engines for NVIDIA chips; for RTX chips they can be built without a GPU.",
        "  stylefast export tensorrt --model tiny --target sm89,sm120 --profile rows=1:4:8,size=64x64:96x96:128x128\n"
        "  stylefast export tensorrt --onnx engines --target sm89 --out ada",
    ),
    "aoti": (
        "AOTInductor packages, with which a process starts without compiling.",
        "  stylefast export aoti --model tiny --target cpu --flavour live --out packages",
    ),
    "triton-repo": (
        "A model repository for NVIDIA's Triton Inference Server that generates complete pictures.",
        "  stylefast export triton-repo --model tiny --out repository\n  tritonserver --model-repository repository",
    ),
}


# option -> what it counts, and the field of a `GraphShape`
_OF_SHAPES = {
    "references": ("references", "references"),
    "segments": ("segments", "segments"),
    "lora_rank": ("ranks of a LoRA", "lora_rank"),
    "lora_slots": ("LoRAs per picture", "lora_slots"),
    "max_text_chunks": ("chunks of a text", "text_chunks"),
}


def add_arguments(parser: Parser) -> None:
    """Add one command per kind; None means that an option was not given."""
    parser.set_defaults(run=parser.show_help)
    kinds = parser.add_subparsers(dest="kind", metavar="KIND")
    for kind, (summary, examples) in KINDS.items():
        own = kinds.add_parser(
            kind,
            help=summary,
            description=summary,
            epilog=f"examples:\n{examples}\n",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        own.set_defaults(run=run)
        _add_common(own, kind)
        if kind == "tensorrt":
            _add_tensorrt(own)
        if kind == "aoti":
            own.add_argument("--target", metavar="DEVICE", help="cpu or cuda (default: cuda if available)")
        if kind == "triton-repo":
            own.add_argument("--onnx", metavar="FOLDER", type=Path, help="use the graphs of this export")
            own.add_argument(
                "--runner",
                choices=("python", "onnxruntime"),
                help="what runs the graphs: stylefast in "
                "the server's Python, or the server's own ONNX Runtime (default: python)",
            )


def _add_common(parser: argparse.ArgumentParser, kind: str) -> None:
    add = parser.add_argument
    add(
        "--out",
        metavar="FOLDER",
        type=Path,
        help=f"folder to create (default: named after the model, e.g. tiny-{kind})",
    )
    add("--overwrite", action="store_true", help="replace an existing export once the new one is finished")
    add("--quiet", action="store_true", help="no progress, only the folder on stdout")

    group = parser.add_argument_group("model").add_argument
    group(
        "--model",
        metavar="NAME",
        default=DEFAULT_MODEL,
        help="tiny (comes with stylefast, the default), a diffusers folder, a .safetensors file, or a hub id",
    )
    group("--adapter", metavar="FILE", help="IP-Adapter (default: the one that comes with the model, if any)")
    group("--image-encoder", metavar="DIR", help="CLIP image encoder of --adapter (default: the model's own)")
    group("--vae", metavar="NAME", help="a VAE to use instead of the model's own")
    group(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help=(
            "type of weights and activations (default: float16 for TensorRT, otherwise what `generate` uses on the "
            "device)"
        ),
    )

    group = parser.add_argument_group("graphs").add_argument
    flavours = "live,banked" if kind == "tensorrt" else "live,banked,plain"
    group(
        "--flavour",
        metavar="NAMES",
        help=(
            "flavours of the UNet: plain (no references), live (references are pictures of the batch), banked "
            f"(also baked styles); each includes the previous ones (default: {flavours})"
        ),
    )
    if kind in ("onnx", "triton-repo"):
        group(
            "--components",
            metavar="NAMES",
            help=(
                "all, or some of unet, vae_decoder, text_encoder, text_encoder_2, text_projector, image_encoder, "
                "image_projector (default: all parts of the model)"
            ),
        )
    group("--references", type=int, metavar="N", help="max references per picture (default: 1)")
    group(
        "--segments",
        type=int,
        metavar="N",
        help="max style pictures per picture, through the IP-Adapter; 0 leaves it out (default: 2)",
    )
    if kind != "triton-repo":
        group(
            "--lora-rank",
            type=int,
            metavar="R",
            help="take LoRAs that differ by picture, of ranks up to R, 128 at most (default: 0, no inputs for LoRAs)",
        )
        group("--lora-slots", type=int, metavar="N", help="max LoRAs per picture, with --lora-rank (default: 2)")
    group(
        "--max-text-chunks",
        type=int,
        metavar="C",
        help="take prompts of up to C chunks, with SDXL of 75 tokens each; 16 at most (default: 1)",
    )
    group("--size", metavar="fixed|WxH", help="one size in pixels, or fixed: the model's own (default: any size)")
    if kind != "aoti":
        group("--opset", type=int, metavar="N", help="ONNX opset (default: 20, for bfloat16 22)")


def _add_tensorrt(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("TensorRT").add_argument
    group(
        "--target",
        metavar="CHIPS",
        help="sm80, sm86, sm89, sm120, ...; several in one engine: sm89,sm120 (default: this machine's GPU)",
    )
    group(
        "--profile",
        action="append",
        metavar="RANGES",
        help=(
            "sizes to build for, minimum:usual:maximum, e.g. rows=1:4:8,size=512x512:1024x1024:1024x1536; may be "
            "repeated"
        ),
    )
    group(
        "--refit",
        action="store_true",
        help="build engines whose weights can be replaced, for LoRAs; needs a GPU",
    )
    group(
        "--attention",
        choices=("standard", "plugin"),
        help="style attention as standard operators, or as a plugin with stylefast's kernel (default: standard)",
    )
    group("--onnx", metavar="FOLDER", type=Path, help="build from the graphs of this export")


def run(arguments: argparse.Namespace) -> int:
    """Export the model and print the folder's path."""
    name = Path(arguments.model).name.removesuffix(".safetensors")
    out = arguments.out or Path(f"{name or 'model'}-{arguments.kind}")
    options = options_of(arguments)
    from stylefast.export.folder import check_target
    from stylefast.export.manifest import check_fits, read_manifest
    from stylefast.export.options import require_toolchain

    out = check_target(out, arguments.overwrite)
    require_toolchain(options)
    if not arguments.quiet:
        print(f"loading {shown(arguments.model)} ...", file=sys.stderr)
    source = _load(arguments, options)
    # fail early on options that this model does not support
    source.fixed(options)
    components = source.components(options)
    if options.onnx is not None:
        check_fits(read_manifest(options.onnx), fingerprint=source.fingerprint)
    if not arguments.quiet:
        for line in _plan(source, options, components, out):
            print(line, file=sys.stderr)
    start = time.perf_counter()
    manifest = _export(source, out, options, arguments.quiet)
    if not arguments.quiet:
        from stylefast.commands.export_report import report_lines, use_words

        auto = _dtype_here(options.kind, options.targets)
        lines = report_lines(out, manifest, time.perf_counter() - start)
        if "unet" in components:  # every backend needs a UNet
            lines.append(f"use it with\n  {shlex.join(use_words(out, arguments, options, auto))}")
        print("\n".join(lines), file=sys.stderr)
    print(out)
    return 0


def options_of(arguments: argparse.Namespace):
    """Return the `Options` given on the command line. Raises InvalidRequest."""
    from stylefast.export.options import NATIVE, Options
    from stylefast.record import parse_size

    kind = arguments.kind
    targets = _names("--target", getattr(arguments, "target", None)) or _target_here(kind)
    size = arguments.size
    given: dict[str, Any] = {
        "flavours": _names("--flavour", arguments.flavour),
        "components": _names("--components", getattr(arguments, "components", None)),
        "profiles": tuple(getattr(arguments, "profile", None) or ()),
        "size": NATIVE if size == "fixed" else None if size is None else parse_size(size),
        "opset": getattr(arguments, "opset", None),
        "refit": getattr(arguments, "refit", None),
        "attention": getattr(arguments, "attention", None),
        "runner": getattr(arguments, "runner", None),
        "onnx": getattr(arguments, "onnx", None),
        "dtype": arguments.dtype,
        "references": arguments.references,
        "segments": arguments.segments,
        "lora_rank": getattr(arguments, "lora_rank", None),
        "lora_slots": getattr(arguments, "lora_slots", None),
        "max_text_chunks": arguments.max_text_chunks,
    }
    given = {name: value for name, value in given.items() if value not in (None, ())}
    otherwise: dict[str, Any] = (
        {"dtype": _dtype_here(kind, targets)} if "onnx" not in given else _of_graphs(given["onnx"], given)
    )
    return Options(kind=kind, targets=targets, overwrite=arguments.overwrite, **otherwise | given)


def _of_graphs(folder: Path, given: dict) -> dict:
    """Return the options fixed by existing graphs. Raises EngineMismatch if `given` contradicts them."""
    from stylefast.export.manifest import check_fits, read_manifest
    from stylefast.export.unet_graph import GraphShape

    manifest = read_manifest(folder)
    check_fits(manifest, kind="onnx", dtype=given.get("dtype"))
    shapes = {graph.flavour: graph.shape for graph in manifest.graphs if graph.flavour is not None}
    for flavour in given.get("flavours", ()):
        if flavour not in shapes:
            raise EngineMismatch(
                f"{shown_path(folder)} has no UNet of flavour {shown(flavour)}; it has {listed(shapes)}. Export it "
                f"with `stylefast export onnx --flavour {shown(flavour)}`"
            )
    settled = {"dtype": manifest.dtype, "flavours": tuple(shapes)}
    for name, (what, of_shape) in _OF_SHAPES.items():
        # plain graphs take no references
        counts = {
            getattr(GraphShape.from_dict(shape), of_shape)
            for shape in shapes.values()
            if name != "references" or shape["flavour"] != "plain"
        }
        if name in given and counts - {given[name]}:
            raise EngineMismatch(
                f"{shown_path(folder)} was exported with {counts.pop()} {what}, not {quoted(given[name])}; drop "
                f"--{name.replace('_', '-')}"
            )
        if counts:
            settled[name] = counts.pop()
    return settled


def _dtype_here(kind: str, targets: tuple[str, ...]) -> str:
    """Return the dtype that the engine would choose by default on the export's target."""
    from stylefast.models.checkpoint import resolve_device, resolve_dtype

    device = resolve_device("auto")
    if kind in ("tensorrt", "aoti"):
        import torch

        # don't probe for a GPU: TensorRT engines can be built on machines without one
        device = torch.device("cpu" if targets == ("cpu",) else "cuda")
    return str(resolve_dtype("auto", device)).removeprefix("torch.")


def _target_here(kind: str) -> tuple[str, ...]:
    """Return this machine's GPU as the target, "cpu" for aoti without a GPU; () if there is none to choose."""
    import torch

    if kind == "aoti":
        return ("cuda" if torch.cuda.is_available() else "cpu",)
    if kind == "tensorrt" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return (f"sm{major}{minor}",)
    return ()


def _names(option: str, text: str | None) -> tuple[str, ...]:
    """Return ("live", "plain") for "live,plain". Raises InvalidRequest."""
    if text is None:
        return ()
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise InvalidRequest(f"{option} is {quoted(text)}; give names separated by commas")
    return names


def _load(arguments: argparse.Namespace, options):
    import stylefast
    from stylefast.export.options import load_source

    return load_source(
        arguments.model,
        options.dtype,
        device="cuda" if options.targets == ("cuda",) else "cpu",
        adapter=arguments.adapter,
        image_encoder=arguments.image_encoder,
        vae=arguments.vae,
        version=stylefast.__version__,
    )


def _plan(source, options, components: tuple[str, ...], out: Path) -> list[str]:
    """Describe the export and its estimated memory and disk use, with a warning if there is too little memory."""
    from stylefast.export.options import estimate_export
    from stylefast.models.weight_files import available_memory

    estimate = estimate_export(
        source.unet.config,
        options.torch_dtype,
        options.flavours if "unet" in components else (),
        options.kind,
        source.other_bytes,
        options.onnx is not None,
    )
    graphs = [f"unet ({', '.join(options.flavours)})" if name == "unet" else name for name in components]
    target = f" for {', '.join(options.targets)}" if options.targets else ""
    lines = [
        f"exporting {source.name} (fingerprint {source.fingerprint[:12]}) to {out}: {', '.join(graphs)} in "
        f"{options.dtype}{target}",
        f"estimate: {shown_bytes(estimate.memory)} of memory, {shown_bytes(estimate.disk)} of disk",
    ]
    warning = estimate.warning(available_memory("cpu"))
    return lines if warning is None else [*lines, f"warning: {warning}"]


def _export(source, out: Path, options, quiet: bool):
    """Export the model and return the manifest."""
    from stylefast.export import pipeline

    exports = {
        "onnx": pipeline.export_onnx,
        "tensorrt": partial(pipeline.export_tensorrt, keep_source=False),
        "aoti": pipeline.export_aoti,
        "triton-repo": pipeline.export_triton_repo,
    }
    bars = Bars(quiet)
    try:
        with pipeline.silent_exporters():
            return exports[options.kind](source, out, options, bars)
    finally:
        bars.close()


class Bars:
    """Progress bars of an export (its `Progress`): one over the graphs, one over the steps of the current graph."""

    def __init__(self, quiet: bool):
        from tqdm import tqdm

        self._quiet = quiet
        self._graphs = tqdm(unit="graph", disable=quiet)
        # disable=None shows the bar on a terminal only; a log would get a line per step
        self._steps = tqdm(unit="step", disable=quiet or None, position=1, leave=False)
        self._phase = None

    def graph(self, name: str, number: int, total: int) -> None:
        """Begin graph `number` of `total`; number == total when all are finished."""
        self._graphs.total, self._graphs.n = total, number
        self._graphs.set_description(name)

    def phase(self, done: int, total: int, name: str) -> None:
        """Show `done` of `total` steps of a phase of the graph; total 0 means unknown."""
        if name != self._phase:
            self._phase = name
            self._steps.reset(total or None)
            self._steps.set_description(name)
        self._steps.total = total or None
        self._steps.update(done - self._steps.n)

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        if not self._quiet:
            self._graphs.write(text, file=sys.stderr)

    def close(self) -> None:
        """Close the bars."""
        self._steps.close()
        self._graphs.close()
