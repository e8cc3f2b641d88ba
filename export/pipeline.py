"""Whole exports: from a loaded model to a folder with a manifest.

Each kind creates its graphs one after the other within `publishing`, so that the folder appears when all are finished,
and a second run resumes an interrupted one.
"""

import fcntl
import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stylefast.errors import EngineMismatch, ExportError, InvalidRequest, ModelError
from stylefast.export.components import (
    Component,
    decoder_dtype,
    export_component,
    image_encoder,
    image_projector,
    text_encoder,
    text_projector,
    vae_decoder,
)
from stylefast.export.folder import UnfinishedExport, publishing
from stylefast.export.manifest import (
    ANY_TARGET,
    MANIFEST,
    GraphEntry,
    Manifest,
    check_files,
    check_fits,
    graph_from_json,
    graph_to_json,
    read_manifest,
    versions,
)
from stylefast.export.onnx_file import WEIGHTS, StoredTensor, WeightFile, described, export_unet, require_onnx
from stylefast.export.onnx_operations import OnnxOperations
from stylefast.export.onnx_writer import check_opset
from stylefast.export.options import DIGEST, Options, Progress, Source, estimate_export
from stylefast.export.tensorrt_build import build_engine
from stylefast.export.tensorrt_profiles import Profile
from stylefast.export.unet_graph import GraphShape, graph_inputs, shape_ranges
from stylefast.models import vae as vaes
from stylefast.models.digests import sampled_digest
from stylefast.models.unet import UNet
from stylefast.threads import giving_way

logger = logging.getLogger(__name__)

TIMING_CACHE = "timing.cache"
_SCRATCH = "graphs"  # in a TensorRT export: the graphs to build engines from
# seconds to wait for another process that creates the same export
_PATIENCE = 3600


def export_onnx(source: Source, folder: Path, options: Options, progress: Progress | None = None) -> Manifest:
    """Export ONNX graphs of the UNet's flavours, which share one file of weights, and of the model's other parts.

    Raises MissingDependency, ModelError for a part that the model lacks, ExportError, and the errors of `publishing`.
    """
    progress = progress or Progress()
    require_onnx()
    names, fixed = source.components(options), source.fixed(options)
    check_opset(options.opset, options.torch_dtype)
    with _publishing(source, folder, options, progress) as out:
        graphs = _unet_graphs(source, out, options, progress, fixed) if "unet" in names else []
        others = [name for name in names if name != "unet"]
        total = len(graphs) + len(others)
        for number, name in enumerate(others, len(graphs)):
            progress.graph(name, number, total)
            graphs.append(_once(out, name, lambda name=name: _component(source, out.path, name, options, fixed)))
        progress.graph("", total, total)
        made = _manifest(source, options, out, graphs, ANY_TARGET, versions("onnx", "onnxscript"))
        out.complete(made)
    return made


def export_tensorrt(
    source: Source, folder: Path, options: Options, progress: Progress | None = None, keep_source: bool = True
) -> Manifest:
    """Build TensorRT engines of the UNet's flavours, each for all targets of `options` and with all profiles.

    Graphs come from `options.onnx`, or are exported temporarily. keep_source: False drops the UNet's weights once the
    graphs are written: the builder alone needs more than three times their memory. Raises the errors of `export_onnx`
    and `build_engine`.
    """
    from stylefast.export.tensorrt import check_buildable, load_package, package_of

    progress = progress or Progress()
    package = package_of(options.targets)
    trt = load_package(package)
    check_buildable(package, options.targets, options.refit)
    operations, profiles = _operations(options, trt), _profiles(source, options)
    given = None if options.onnx is None else _given_graphs(options.onnx, options, source)
    toolchain = {package: trt.__version__} | versions("onnx")
    with _publishing(source, folder, options, progress) as out:
        old, total = out.target / TIMING_CACHE, len(options.flavours)
        if old.is_file() and not (out.path / TIMING_CACHE).exists():
            shutil.copyfile(old, out.path / TIMING_CACHE)  # reuse earlier timings to speed up the build
        missing = [shape for shape in _shapes(source, options) if out.finished(f"unet-{shape.flavour}") is None]
        if given is None:
            graphs = _scratch_graphs(source, out.path / _SCRATCH, missing, options, progress, operations)
        else:
            graphs = given
        if not keep_source:
            source.unet.to("meta")
        made = []
        for number, flavour in enumerate(options.flavours):
            progress.graph(f"unet-{flavour}", number, total)

            def build(flavour=flavour) -> GraphEntry:
                return _engine(source.unet, out.path, *graphs[flavour], options, profiles, progress)

            made.append(_once(out, f"unet-{flavour}", build))
        progress.graph("", total, total)
        shutil.rmtree(out.path / _SCRATCH, ignore_errors=True)
        if (out.path / TIMING_CACHE).exists():
            out.record(TIMING_CACHE, [TIMING_CACHE])
        ranges = {entry.label: entry.extra["profiles"] for entry in made}
        manifest = _manifest(source, options, out, made, ",".join(options.targets), toolchain, ranges)
        out.complete(manifest)
    return manifest


def export_aoti(source: Source, folder: Path, options: Options, progress: Progress | None = None) -> Manifest:
    """Compile AOTInductor packages of the UNet's flavours, for this machine's CPU or GPU.

    Weights stay outside: a package runs on the engine's, LoRAs included. Raises the errors of `aoti.export_aoti` and
    `publishing`.
    """
    from stylefast.export.aoti import SUFFIX, export_aoti, target_of

    progress = progress or Progress()
    device, fixed = _compiled_on(source, options), source.fixed(options)
    with _publishing(source, folder, options, progress) as out:
        graphs = []
        for number, shape in enumerate(_shapes(source, options)):
            label = f"unet-{shape.flavour}"
            progress.graph(label, number, len(options.shapes))

            def compile_(shape=shape, label=label) -> GraphEntry:
                progress.phase(0, 0, "compiling")
                path = out.path / f"{label}{SUFFIX}"
                report = export_aoti(source.unet, shape, path, fixed=fixed, device=device, weights=False)
                return GraphEntry(
                    "unet",
                    path.name,
                    (path.name,),
                    shape.to_dict(),
                    described(report.inputs),
                    described(report.outputs),
                    fixed,
                    extra={"seconds": round(report.seconds, 1), "operations": report.operations, "weights": False},
                )

            graphs.append(_once(out, label, compile_))
        progress.graph("", len(graphs), len(graphs))
        made = _manifest(source, options, out, graphs, target_of(device), {"torch": torch.__version__})
        out.complete(made)
    return made


def export_triton_repo(source: Source, folder: Path, options: Options, progress: Progress | None = None) -> Manifest:
    """Write a model repository for Triton Inference Server, from `options.onnx` or from temporary graphs."""
    from stylefast.export.triton_repo.write import Serving, write_repository

    progress = progress or Progress()
    graphs = options.onnx
    beside = folder.with_name(f"{folder.name}.part.graphs")  # a suffix used only by unfinished exports
    if graphs is None:
        graphs = beside
        settings = {
            "dtype": options.dtype,
            "flavours": options.flavours,
            "references": options.references,
            "segments": options.segments,
            "max_text_chunks": options.max_text_chunks,
            "size": options.size,
            "opset": options.opset,
            "components": options.components,
        }
        export_onnx(source, beside, Options(kind="onnx", overwrite=True, **settings), progress)
    try:
        return write_repository(
            graphs,
            folder,
            unet=source.unet,
            model=source.origin or source.name,
            serving=Serving(runner=options.runner),
            downscale=vaes.downscale(source.vae),
            overwrite=options.overwrite,
        )
    finally:
        if graphs == beside:
            shutil.rmtree(beside, ignore_errors=True)


EXPORTS: Mapping[str, Callable[..., Manifest]] = {
    "onnx": export_onnx,
    "tensorrt": export_tensorrt,
    "aoti": export_aoti,
    "triton-repo": export_triton_repo,
}


# for the warning before an automatic export
_DURATIONS = {
    "onnx": "half a minute for a small model and several minutes for one of SDXL's size",
    "aoti": "a minute or two for a small model and up to an hour for one of SDXL's size, since it is compiled",
}


def ensure(source: Source, options: Options, folder: Path) -> Path:
    """Return `folder`, exporting to it first if it has no export; wait if another process is exporting to it.

    Raises the errors of the export.
    """
    deadline, said = time.monotonic() + _PATIENCE, False
    while not (folder / MANIFEST).is_file():
        if not said:
            logger.warning(
                "%s is exported once to %s (%s, %s), which takes %s; later starts find it there",
                source.name,
                folder,
                options.kind,
                options.dtype,
                _DURATIONS.get(options.kind, "a while"),
            )
            said = True
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            with silent_exporters(), giving_way():
                EXPORTS[options.kind](source, folder, options)
        except (ExportError, InvalidRequest):
            lock = folder.with_name(f"{folder.name}.part.lock")
            # another process's export is in progress, or finished between the two checks
            if not (folder / MANIFEST).is_file() and not _held(lock):
                raise
            while _held(lock) and not (folder / MANIFEST).is_file():
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
    return folder


@contextmanager
def silent_exporters() -> Iterator[None]:
    """Silence PyTorch's exporters about optional packages and about deprecations in PyTorch itself."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        log.setLevel(before)


def _held(lock: Path) -> bool:
    """Return whether a live process holds the lock; the file of a dead one may remain."""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _publishing(source: Source, folder: Path, options: Options, progress: Progress):
    names = source.components(options)
    estimate = estimate_export(
        source.unet.config,
        options.torch_dtype,
        options.flavours if "unet" in names else (),
        options.kind,
        source.other_bytes,
        options.onnx is not None,
    )
    made_of = identity(source, options)
    return publishing(folder, options.overwrite, arguments=made_of, needed=estimate.disk, say=progress.say)


def identity(source: Source, options: Options) -> dict[str, Any]:
    """Return all that determines an export's files: the model and the code, the options, and where it is compiled."""
    found = {"options": options.to_json(), "source": source.identity()}
    if options.kind == "aoti":
        from stylefast.export.aoti import made_on

        found["made on"] = made_on(_compiled_on(source, options))
    return found


def _compiled_on(source: Source, options: Options) -> torch.device:
    """Return the device that packages are compiled for: of several GPUs, the one that has the model."""
    wanted = torch.device(options.targets[0])
    return source.unet.device if source.unet.device.type == wanted.type else wanted


def _shapes(source: Source, options: Options) -> list[GraphShape]:
    return [replace(shape, text_tokens=source.text_encoder.max_tokens) for shape in options.shapes]


def _once(out: UnfinishedExport, name: str, make: Callable[[], GraphEntry]) -> GraphEntry:
    """Return a graph's entry, from an interrupted earlier run or newly made."""
    found = out.finished(name)
    if found is not None:
        return graph_from_json(found)
    entry = make()
    out.record(name, entry.files, graph_to_json(entry))
    return entry


def _unet_graphs(source, out: UnfinishedExport, options, progress, fixed, operations=OnnxOperations) -> list:
    graphs, total = [], len(source.components(options)) + len(options.shapes) - 1
    for number, shape in enumerate(_shapes(source, options)):
        label = f"unet-{shape.flavour}"
        progress.graph(label, number, total)

        def write(shape=shape) -> GraphEntry:
            found = out.finished(WEIGHTS)
            stored = {name: StoredTensor(*place) for name, place in (found or {}).items()}
            entry, weights = export_unet(
                source.unet,
                shape,
                out.path,
                weights=WeightFile(out.path / WEIGHTS, stored) if stored else None,
                opset=options.opset,
                fixed=fixed,
                metadata=_metadata(source),
                phase=progress.phase,
                operations=operations,
            )
            entry = replace(entry, extra={DIGEST: sampled_digest(source.unet.state_dict())})
            if not found:
                out.record(WEIGHTS, [WEIGHTS], {name: list(place) for name, place in weights.tensors.items()})
            return entry

        graphs.append(_once(out, label, write))
    return graphs


def _component(source: Source, folder: Path, name: str, options: Options, fixed: Mapping) -> GraphEntry:
    component = make_component(source, name, options.torch_dtype)
    known = {key: size for key, size in fixed.items() if key in component.dimensions}
    return export_component(component, folder, opset=options.opset, fixed=known, metadata=_metadata(source))


def make_component(source: Source, name: str, dtype: torch.dtype) -> Component:
    """Return a part of a model as a component, by its name. Raises ModelError for one that the model lacks."""
    if name in ("image_encoder", "image_projector"):
        if not source.adapters:
            raise ModelError(f"{source.name} has no {name}; give an IP-Adapter, or leave it out")
        adapter, encoder = next(iter(source.adapters.values()))
        return image_encoder(encoder, dtype) if name == "image_encoder" else image_projector(adapter, dtype)
    if name == "vae_decoder":
        return vae_decoder(source.vae, decoder_dtype(source.vae, dtype))
    if name == "text_projector":
        return text_projector(source.unet, dtype, source.text_encoder.max_tokens)
    return text_encoder(source.text_encoder.encoders[("text_encoder", "text_encoder_2").index(name)], dtype)


def _operations(options: Options, trt) -> type[OnnxOperations]:
    """Return how graphs write style attention for TensorRT. Raises the plugin's errors before the build."""
    if options.attention == "standard":
        return OnnxOperations
    from stylefast.export.tensorrt_plugin import PluginOperations, register_plugin

    if len(options.targets) > 1:
        raise InvalidRequest("the attention plugin carries code for one chip; export for each target by itself")
    for target in options.targets:
        register_plugin(trt, target)  # to report missing parts now; the builder process registers it again
    return PluginOperations


def _given_graphs(folder: Path, options: Options, source: Source) -> dict[str, tuple[Path, GraphEntry]]:
    """Return flavour -> folder and entry of an earlier export; raise unless it fits."""
    manifest, found = read_manifest(folder), {}
    check_fits(manifest, kind="onnx", fingerprint=source.fingerprint, dtype=options.torch_dtype)
    for wanted in _shapes(source, options):
        flavour, entry = wanted.flavour, manifest.graph("unet", wanted.flavour)
        if entry is None:
            raise EngineMismatch(f"{folder} has no UNet of flavour {flavour}; export it there first")
        shape = GraphShape.from_dict(entry.shape)
        if shape != wanted:
            raise EngineMismatch(
                f"{entry.file} in {folder} is {shape}, and {wanted} was asked for; export it like that"
            )
        check_files(folder, manifest, entry.files)
        found[flavour] = folder, entry
    return found


def _scratch_graphs(source, folder: Path, shapes, options, progress, operations) -> dict[str, tuple[Path, GraphEntry]]:
    """Write temporary graphs for the builder: flavour -> folder and entry."""
    folder.mkdir(exist_ok=True)
    graphs, weights = {}, None
    for number, shape in enumerate(shapes):
        progress.graph(f"graph of unet-{shape.flavour}", number, len(shapes))
        entry, weights = export_unet(
            source.unet,
            shape,
            folder,
            weights=weights,
            opset=options.opset,
            fixed=source.fixed(options),
            metadata=_metadata(source),
            phase=progress.phase,
            operations=operations,
        )
        graphs[shape.flavour] = (folder, replace(entry, extra={DIGEST: sampled_digest(source.unet.state_dict())}))
    return graphs


def _engine(unet: UNet, folder: Path, graphs: Path, graph: GraphEntry, options, profiles, progress) -> GraphEntry:
    """Build one flavour's TensorRT engine."""
    shape = GraphShape.from_dict(graph.shape)
    inputs = graph_inputs(unet, shape)
    name = f"{graph.label}.{'-'.join(options.targets)}.engine"
    report = build_engine(
        graphs / graph.file,
        folder / name,
        options.targets,
        [p.shapes(inputs, unet.attention_sizes, shape_ranges(unet, shape)) for p in profiles],
        refittable=options.refit,
        timing_cache=folder / TIMING_CACHE,
        progress=progress.phase,
        plugins=options.attention == "plugin",
    )
    extra = {"profiles": [p.to_dict() for p in profiles], "attention": options.attention, "build": report.to_dict()}
    extra |= {key: value for key, value in graph.extra.items() if key == DIGEST}
    return GraphEntry("unet", name, (name,), graph.shape, graph.inputs, graph.outputs, graph.fixed, graph.opset, extra)


def _profiles(source: Source, options: Options) -> list[Profile]:
    """Return the requested profiles; else one at the fixed size, or at the model's own."""
    scale, fixed = vaes.downscale(source.vae), source.fixed(options)
    if options.profiles:
        return [Profile.parse(text, scale) for text in options.profiles]
    width, height = (side // scale for side in source.native_size)
    size = {"width": width, "height": height} | fixed
    return [Profile.parse(",".join(f"{name}={value}" for name, value in size.items()))]


def _metadata(source: Source) -> dict[str, str]:
    return {"version": source.version, "model": source.name, "fingerprint": source.fingerprint}


def _manifest(source, options, out: UnfinishedExport, graphs, target: str, toolchain, profiles=None) -> Manifest:
    return Manifest(
        kind=options.kind,
        stylefast=source.version,
        model=source.name,
        fingerprint=source.fingerprint,
        dtype=options.dtype,
        target=target,
        toolchain={"torch": torch.__version__, **toolchain},
        graphs=tuple(graphs),
        files=out.files,
        profiles=profiles or {},
    )
