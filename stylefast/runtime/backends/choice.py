"""Backends by name, and the exported graphs that some of them run."""

import hashlib
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stylefast import values
from stylefast.code_caches import private_folder, replaceable_inside
from stylefast.errors import EngineMismatch, ExportError, InvalidRequest, ModelFormatError
from stylefast.export.manifest import CODE, SHOWN_DIGITS
from stylefast.models.unet import UNet
from stylefast.options import BACKENDS, EXPORTED
from stylefast.runtime.backends.base import Backend, TorchBackend


def check_backend(backend: Any, engines: str | Path | None = None, trust: str | None = None) -> None:
    """Raise InvalidRequest for an unknown backend, or for `engines` or `trust` that the backend does not use."""
    if not isinstance(backend, str):
        if not (isinstance(backend, Backend) or callable(backend)):
            raise InvalidRequest(
                f"backend is {values.quoted(backend)}; give a name ({', '.join(BACKENDS)}), a "
                "runtime.backends.base.Backend, or a function that makes one of the UNet"
            )
    elif backend not in BACKENDS:
        raise InvalidRequest(f"backend is {values.quoted(backend)}; choose one of {', '.join(BACKENDS)}")
    for name, value in (("engines", engines), ("trust", trust)):
        if value is not None and (not isinstance(backend, str) or backend not in EXPORTED):
            raise InvalidRequest(
                f"{name} applies only to exported engines; leave it out, or choose {', '.join(EXPORTED)}"
            )
    if engines is not None and not isinstance(engines, str | Path):
        raise InvalidRequest(f"engines is {values.quoted(engines)}; give the path of an export folder")
    if trust is not None and not isinstance(trust, str):
        raise InvalidRequest(
            f"trust is {values.quoted(trust)}; give the digest that `stylefast export` printed, 64 hex digits"
        )
    if backend == "tensorrt" and engines is None:
        raise InvalidRequest("backend 'tensorrt' needs engines=FOLDER; create one with `stylefast export tensorrt`")


def make_backend(
    backend: Any,
    unet: UNet,
    engines: str | Path | None = None,
    trust: str | None = None,
    *,
    source: Callable[[], Any] | None = None,
) -> Backend:
    """Make a UNet's backend by name; "auto" is "torch".

    backend: a name, a `Backend`, or a function of the UNet that returns one. engines: folder of an export; None:
    exported once, if the backend supports it. trust: digest of the manifest in a folder that others can write to.
    source: returns the current model, an `export.options.Source`, whose fingerprint is "<checkpoint>" or
    "<checkpoint>+<LoRAs>"; called at every step of exported graphs, which require it.

    Raises InvalidRequest; MissingDependency for a missing compiler or runtime; for exported graphs ModelNotFound,
    ModelFormatError, ExportError, EngineMismatch and UntrustedEngine.
    """
    check_backend(backend, engines, trust)
    if not isinstance(backend, str):
        made = backend if isinstance(backend, Backend) else backend(unet)
        if not isinstance(made, Backend):
            raise InvalidRequest(
                f"the backend's function returned {values.quoted(made)}, which is not a runtime.backends.base.Backend"
            )
        return made
    if backend in ("auto", "torch"):
        return TorchBackend(unet)
    if backend == "compile":
        # imports the compiler, which is slow
        from stylefast.runtime.backends.compiled import CompileBackend

        return CompileBackend(unet)
    if backend == "onnxruntime":
        from stylefast.export.sessions import require_onnxruntime

        require_onnxruntime(unet.device)
    assert source is not None
    folder = _exported_folder(EXPORTED[backend], source()) if engines is None else values.path("engines", engines)
    return _exported(backend, unet, folder, trust, lambda: source().fingerprint)


def _exported_folder(kind: str, source: Any) -> Path:
    """Return the folder of an export of exactly this model; export it if there is none."""
    from stylefast.export import pipeline
    from stylefast.export.options import Options
    from stylefast.runtime.backends.compile_cache import default_folder

    unet = source.unet
    options = Options(
        kind,
        str(unet.dtype).removeprefix("torch."),
        targets=(unet.device.type,) if kind == "aoti" else (),
        # compiling takes over a minute per flavour, and "banked" covers the others
        flavours=("banked",) if kind == "aoti" else (),
    )
    made_of = json.dumps(pipeline.identity(source, options), sort_keys=True)
    digest = hashlib.sha256(made_of.encode()).hexdigest()
    engines = default_folder() / "engines"
    folder = engines / digest[:32]
    try:
        reason = replaceable_inside(engines) if kind in CODE else None
        if reason is not None:
            folder = private_folder(engines, "exported engines", reason) / digest[:32]
        return pipeline.ensure(source, options, folder)
    except OSError as error:
        raise ExportError(
            f"the model can't be exported to {folder} ({error.strerror or error}); set STYLEFAST_CACHE to a "
            f"writable folder, or give engines=FOLDER with the output of `stylefast export {kind}`"
        ) from error


def _exported(backend: str, unet: UNet, folder: Path, trust: str | None, fingerprint: Callable[[], str]) -> Backend:
    from stylefast.export.manifest import check_files, check_fits, check_trust, read_manifest
    from stylefast.export.options import DIGEST
    from stylefast.export.unet_graph import graph_inputs
    from stylefast.models.digests import sampled_digest
    from stylefast.runtime.backends.exported import ExportedBackend, Graph
    from stylefast.runtime.backends.exported_parts import ExportedParts

    manifest = read_manifest(folder)
    check_trust(folder, manifest, trust)
    # LoRAs may be added later
    checkpoint = replace(manifest, fingerprint=_checkpoint(manifest.fingerprint))
    check_fits(
        checkpoint,
        kind=EXPORTED[backend],
        fingerprint=_checkpoint(fingerprint()),
        dtype=unet.dtype,
        target=_target(backend, unet.device),
    )
    graphs, own_weights = {}, False
    for entry in manifest.graphs:
        if entry.component == "unet":
            check_files(folder, manifest, entry.files, deep=False)
            inside = _weights_inside(entry)
            own_weights |= inside
            made_of = entry.extra.get(DIGEST)
            # fingerprints differ while the export's LoRAs are not loaded yet
            if fingerprint() == manifest.fingerprint and made_of not in (None, sampled_digest(unet.state_dict())):
                raise EngineMismatch(
                    f"{entry.file} in {folder} was made from other weights than the loaded ones, although their "
                    "fingerprints agree; export this model"
                )

            def session(entry=entry, inside=inside):
                # engines contain code, and damaged weights would silently give bad pictures
                check_files(folder, manifest, entry.files)
                opened = open_session(backend, folder / entry.file, unet.device)
                return opened if inside else _SharedWeights(opened, unet, fingerprint)

            size = sum(file.bytes for file in manifest.files if file.name in entry.files)
            ranges = _ranges(entry.label, entry.fixed, manifest.profiles.get(entry.label, ()))
            shape = _shape(entry)
            _check_inputs(folder, entry, graph_inputs(unet, shape))
            graphs[entry.label] = Graph(shape, session, ranges, size)

    def stale() -> str | None:
        now = fingerprint()
        if now == manifest.fingerprint or not own_weights:
            return None
        return (
            f"the graphs in {folder} contain other weights than the model has now ({_shown(manifest.fingerprint)}, "
            f"{_shown(now)}): LoRAs were loaded, removed or rescaled; export or refit with them, or use "
            "backend='torch'"
        )

    def part(entry):
        check_files(folder, manifest, entry.files)
        return open_session(backend, folder / entry.file, unet.device)

    return ExportedBackend(unet, graphs, backend, stale, ExportedParts.of(manifest.graphs, part))


class _SharedWeights:
    """Session that computes with the UNet's own weights, including LoRAs."""

    def __init__(self, session: Any, unet: UNet, fingerprint: Callable[[], str]):
        self._session, self._unet, self._fingerprint = session, unet, fingerprint
        self._held: str | None = None  # fingerprint of the session's current weights

    @property
    def nbytes(self) -> int:
        return self._session.nbytes

    def run(self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor]) -> None:
        now = self._fingerprint()
        if now != self._held:
            # the session copies some weights, so LoRA changes must be passed on
            self._session.set_weights(self._unet.state_dict())
            self._held = now
        self._session.run(inputs, outputs)

    def close(self) -> None:
        self._session.close()


def open_session(backend: str, file: Path, device: torch.device):
    """Open an exported graph. Only ONNX Runtime's or TensorRT's own checks apply."""
    if backend == "onnxruntime":
        from stylefast.export.sessions import OrtSession

        return OrtSession(file, device)
    if backend == "tensorrt":
        from stylefast.export.tensorrt_session import TensorRTSession

        return TensorRTSession(file, device)
    from stylefast.export.aoti import AotiSession

    return AotiSession(file, device)


def _shape(entry: Any) -> Any:
    """Return the `GraphShape` of a manifest's graph. Raises ModelFormatError."""
    from stylefast.export.unet_graph import GraphShape

    try:
        return GraphShape.from_dict(entry.shape)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelFormatError(
            f"the manifest's shape of {entry.label} is {entry.shape}, which this version of stylefast does not "
            f"understand ({type(error).__name__}: {error}); export again"
        ) from error


def _check_inputs(folder: Path, entry: Any, wanted: Sequence[Any]) -> None:
    """Raise EngineMismatch unless a manifest's graph takes the inputs that this version of stylefast provides."""
    found = {name: (dtype, dims) for name, dtype, dims in entry.inputs}
    for tensor in wanted:
        dtype, dims = found.pop(tensor.name, (None, ()))
        kind = str(tensor.dtype).removeprefix("torch.")
        # a dynamic dimension may have been exported with a fixed size
        sizes = len(dims) == len(tensor.dims) and all(
            a == b for a, b in zip(dims, tensor.dims) if isinstance(a, int) and isinstance(b, int)
        )
        if dtype != kind or not sizes:
            has = "no such input" if dtype is None else f"{dtype} {list(dims)}"
            raise EngineMismatch(
                f"{entry.file} in {folder} was exported by another version of the code: this version gives its "
                f"graphs {tensor.name} as {kind} {list(tensor.dims)}, but the file has {has}; export again"
            )
    if found:
        raise EngineMismatch(
            f"{entry.file} in {folder} was exported by another version of the code: it has the input {min(found)}, "
            "which graphs no longer have; export again"
        )


def _weights_inside(entry: Any) -> bool:
    """Return whether a manifest's graph holds its own weights. Raises ModelFormatError."""
    found = entry.extra.get("weights", True)
    if not isinstance(found, bool):
        raise ModelFormatError(
            f"the manifest's entry on the weights in {entry.label} is {values.quoted(found)}; it must be true or "
            "false; export again"
        )
    return found


def _ranges(label: str, fixed: Mapping[str, int], profiles: Any) -> dict[str, tuple[int, int]]:
    """Return (least, most) of the dimensions that a graph restricts; profiles: (least, usual, most) of each.

    Raises ModelFormatError for malformed profiles.
    """
    found = {name: (size, size) for name, size in fixed.items()}
    try:
        for profile in profiles:
            for name, numbers in profile.items():
                least, _, most = map(operator.index, numbers)
                low, high = found.get(name, (least, most))
                found[name] = (min(low, least), max(high, most))
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelFormatError(
            f"the manifest's profiles of {label} are {values.quoted(profiles)}; each must be an object of dimensions "
            "with three whole numbers: minimum, usual, maximum; export again"
        ) from error
    return found


def _shown(fingerprint: str) -> str:
    """Shorten a fingerprint for messages: the first digits of the checkpoint, and of the LoRAs."""
    checkpoint, _, loras = fingerprint.partition("+")
    return f"{checkpoint[:SHOWN_DIGITS]} with LoRAs {loras[:SHOWN_DIGITS]}" if loras else checkpoint[:SHOWN_DIGITS]


def _checkpoint(fingerprint: str) -> str:
    return fingerprint.partition("+")[0]


def _target(backend: str, device: torch.device) -> str:
    """Return the target that an export must have to run here. Raises EngineMismatch."""
    if backend == "tensorrt" and device.type != "cuda":
        raise EngineMismatch("TensorRT runs on NVIDIA GPUs; load the model with device='cuda', or choose onnxruntime")
    if backend == "onnxruntime" or device.type != "cuda":
        return device.type
    return "sm{}{}".format(*torch.cuda.get_device_capability(device))
