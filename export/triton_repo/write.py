"""Model repository for Triton Inference Server: one model per exported graph, and the loop that calls them.

    <out>/manifest.json                  content, with the hash of every file
    <out>/unet_live/config.pbtxt         one for each flavour, and 1/unet-live.onnx, 1/model.py
    <out>/text_encoder, text_encoder_2, text_projector, image_encoder, image_projector, vae_decoder
    <out>/stylefast/                     the loop: a Python model, decoupled, that calls the others step by step

`max_batch_size` is 0 throughout: rows, pages and masks of a UNet call have separate counts, so no first dimension is
"the batch"; the denoising loop does the batching, because it knows the steps.

The Python files are copies of those in `models`, which run only in the server.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stylefast import values
from stylefast.errors import EngineMismatch, ExportError, InvalidRequest
from stylefast.export.folder import UnfinishedExport, publishing
from stylefast.export.manifest import (
    GraphEntry,
    Manifest,
    check_files,
    check_trust,
    graph_from_json,
    graph_to_json,
    read_manifest,
)
from stylefast.export.unet_graph import native_latents, with_tokens
from stylefast.models.unet import UNet

LOOP = "stylefast"
VERSION = "1"
# torch's type name -> Triton's
DATA_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
}
TIMEOUT_ACTIONS = ("REJECT", "DELAY")
# runner -> (kind of export, platform); our own Python models use the backend "python"
RUNNERS = {
    "python": ("onnx", "python"),
    "onnxruntime": ("onnx", "onnxruntime_onnx"),
    "tensorrt": ("tensorrt", "tensorrt_plan"),
}
_INSTANCES = {"cpu": "KIND_CPU", "cuda": "KIND_GPU"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_MODELS = Path(__file__).parent / "models"
_LOOP_FILES = {"model.py": "loop_model.py", "json_request.py": "json_request.py"}
# warm-up sizes; text pages come in multiples of eight
_FIRST = {"text_pages": 8, "prompts": 2}


class Enum(str):
    """A value that protobuf's text format writes without quotes, such as TYPE_FP32."""

    __slots__ = ()


def pbtxt(message: Mapping[str, Any]) -> str:
    """Return a message in protobuf's text format, one field per line.

    A message holds, by field, strings, numbers, booleans, `Enum`s, messages, and lists of these for repeated fields.
    """
    return "".join(f"{line}\n" for line in _lines(message))


def _lines(message: Mapping[str, Any]) -> Iterator[str]:
    for name, value in message.items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Mapping):
                yield f"{name} {{"
                yield from (f"  {line}" for line in _lines(one))
                yield "}"
            else:
                yield f"{name}: {_scalar(one)}"


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum) or not isinstance(value, str):
        return str(value)
    # octal bytes keep the file ASCII, independent of encodings
    return '"' + "".join(_escaped(byte) for byte in value.encode()) + '"'


def _escaped(byte: int) -> str:
    if byte in b'"\\':
        return f"\\{chr(byte)}"
    return chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}"


@dataclass(frozen=True)
class TensorConfig:
    """Input or output: `dims` as numbers, -1 for varying ones. Raises InvalidRequest."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    optional: bool = False

    def __post_init__(self):
        values.one_of(f"data_type of {self.name}", self.data_type, DATA_TYPES.values())
        for dim in values.several(f"dims of {self.name}", self.dims, least=1):
            values.whole_number(f"a dimension of {self.name} (-1: varies)", dim, -1)

    def message(self) -> dict[str, Any]:
        optional = {"optional": True} if self.optional else {}
        return {"name": self.name, "data_type": Enum(self.data_type), "dims": list(self.dims)} | optional


@dataclass(frozen=True)
class QueuePolicy:
    """Limits of a queue: its length, and the waiting time before `action`; requests may override the time."""

    max_queue_size: int = 64
    timeout_microseconds: int = 60_000_000
    action: str = "REJECT"

    def __post_init__(self):
        for name in ("max_queue_size", "timeout_microseconds"):
            values.whole_number(name, getattr(self, name), 1)
        values.one_of("action of a queue policy", self.action, TIMEOUT_ACTIONS)

    def message(self) -> dict[str, Any]:
        return {
            "timeout_action": Enum(self.action),
            "default_timeout_microseconds": self.timeout_microseconds,
            "allow_timeout_override": True,
            "max_queue_size": self.max_queue_size,
        }


@dataclass(frozen=True)
class Warmup:
    """Request of zeros that a model answers before it counts as ready; `inputs` have no varying dims."""

    name: str
    inputs: tuple[TensorConfig, ...]

    def __post_init__(self):
        for tensor in self.inputs:
            if min(tensor.dims) < 1:
                raise InvalidRequest(f"warm-up {self.name}: {tensor.name} has dims {tensor.dims}; each must be above 0")

    def message(self) -> dict[str, Any]:
        inputs = [
            {"key": t.name, "value": {"data_type": Enum(t.data_type), "dims": list(t.dims), "zero_data": True}}
            for t in self.inputs
        ]
        return {"name": self.name, "batch_size": 1, "inputs": inputs}


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of one model of the repository. Raises InvalidRequest.

    platform: one of those in RUNNERS. device: "cpu" or "cuda". file: what a platform loads. parameters: strings for a
    model.py.
    """

    name: str
    platform: str
    inputs: tuple[TensorConfig, ...]
    outputs: tuple[TensorConfig, ...]
    device: str = "cpu"
    queue: QueuePolicy = QueuePolicy()
    warmups: tuple[Warmup, ...] = ()
    decoupled: bool = False
    file: str = ""
    parameters: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise InvalidRequest(
                f"a model's name is {values.quoted(self.name)}; letters, digits, '_', '-' and '.' make one"
            )
        values.one_of(f"platform of {self.name}", self.platform, (platform for _, platform in RUNNERS.values()))
        values.one_of(f"device of {self.name}", self.device, _INSTANCES)
        names = [tensor.name for tensor in (*self.inputs, *self.outputs)]
        if len(set(names)) != len(names) or not self.inputs or not self.outputs:
            raise InvalidRequest(f"{self.name} needs inputs and outputs with different names, not {', '.join(names)}")

    def to_pbtxt(self) -> str:
        """Return the text of config.pbtxt."""
        runs = {"backend": "python"} if self.platform == "python" else {"platform": self.platform}
        message: dict[str, Any] = {"name": self.name} | runs | {"max_batch_size": 0}
        if self.file:
            message["default_model_filename"] = self.file
        message["input"] = [tensor.message() for tensor in self.inputs]
        message["output"] = [tensor.message() for tensor in self.outputs]
        message["instance_group"] = {"kind": Enum(_INSTANCES[self.device]), "count": 1}
        message["version_policy"] = {"latest": {"num_versions": 1}}
        # a dynamic batcher with batches of one request, because only its scheduler has a queue policy
        message["dynamic_batching"] = {"default_queue_policy": self.queue.message()}
        if self.decoupled:
            message["model_transaction_policy"] = {"decoupled": True}
        message["model_warmup"] = [warmup.message() for warmup in self.warmups]
        message["parameters"] = [
            {"key": key, "value": {"string_value": value}} for key, value in self.parameters.items()
        ]
        return pbtxt(message)


_INPUTS = (
    TensorConfig("request", "TYPE_UINT8", (-1,)),
    TensorConfig("pictures", "TYPE_UINT8", (-1,), optional=True),
    TensorConfig("picture_bytes", "TYPE_INT64", (-1,), optional=True),
)
_OUTPUTS = (
    TensorConfig("images", "TYPE_UINT8", (-1, -1, -1, 3)),
    TensorConfig("step", "TYPE_INT32", (1,)),
    TensorConfig("steps", "TYPE_INT32", (1,)),
    TensorConfig("metadata", "TYPE_UINT8", (-1,)),
)


@dataclass(frozen=True)
class Shape:
    """Size of a UNet call that models answer once before they count as ready: pixels and rows."""

    width: int
    height: int
    rows: int = 2

    def __post_init__(self):
        for name in ("width", "height", "rows"):
            values.whole_number(f"{name} of a warm-up shape", getattr(self, name), 1)


@dataclass(frozen=True)
class Serving:
    """Options for running the models in the server. Raises InvalidRequest.

    runner: "python" runs ONNX graphs in our own Python models; "onnxruntime" and "tensorrt" in the server's backends of
    that name. device: "cpu" or "cuda". slots: max number of requests in the batch; others wait in the queue. queue:
    policy of every model. banks: folder of style banks on the server, which requests refer to by name. engine: further
    options of `Engine.from_pretrained` for the loop ("memory_limit", "max_batch_rows", "adapter"), as JSON values.
    """

    runner: str = "python"
    device: str = "cpu"
    slots: int = 16
    queue: QueuePolicy = QueuePolicy()
    banks: str | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        values.one_of("runner", self.runner, RUNNERS)
        values.one_of("device", self.device, _INSTANCES)
        values.whole_number("slots", self.slots, 1)
        if self.runner == "tensorrt" and self.device != "cuda":
            raise InvalidRequest("TensorRT runs on NVIDIA GPUs; choose device 'cuda', or the runner onnxruntime")
        taken = sorted({"backend", "engines", "trust", "device", "dtype"} & set(self.engine))
        if taken:
            raise InvalidRequest(
                f"engine has {values.quoted(taken[0])}, which the repository decides itself; take it out"
            )
        try:
            json.dumps(dict(self.engine))
        except TypeError as error:
            raise InvalidRequest(f"engine holds what JSON has not ({error}); give paths as strings") from error


def write_repository(
    export: str | Path,
    out: str | Path,
    *,
    unet: UNet,
    model: str,
    serving: Serving | None = None,
    shapes: Sequence[Shape] | None = None,
    downscale: int = 8,
    trust: str | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Write a model repository from an export folder; return its manifest.

    export: an export of kind "onnx" or "tensorrt" with a UNet in it. unet: the exported one, for its layout, with or
    without weights. model: argument of the loop's `Engine.from_pretrained` on the server: "tiny", a folder there, or a
    hub id. shapes: see `Shape`; None: one picture of the model's own size. downscale: the VAE's pixels per latent.
    trust: as for an engine. The folder appears complete or not at all.

    Raises InvalidRequest, ModelNotFound, ModelFormatError, ExportError, EngineMismatch and UntrustedEngine.
    """
    folder, manifest = Path(export).expanduser(), read_manifest(export)
    serving = serving or Serving()
    _check(manifest, serving)
    if shapes is None:
        height, width = native_latents(unet)
        shapes = [Shape(width * downscale, height * downscale)]
    for shape in shapes:
        _check_shape(shape, downscale)
    check_trust(folder, manifest, trust)
    check_files(folder, manifest)
    configs = {graph.label: graph_config(graph, unet, serving, shapes, downscale) for graph in manifest.graphs}
    loop = loop_config(manifest, model, serving)
    hashes = {entry.name: entry.sha256 for entry in manifest.files}
    arguments = [manifest.digest, *(c.to_pbtxt() for c in (*configs.values(), loop)), _sources()]
    with publishing(out, overwrite, arguments=arguments, needed=manifest.bytes) as written:
        graphs = [_write_graph(written, folder, graph, configs[graph.label], hashes) for graph in manifest.graphs]
        _write_model(written, loop, _LOOP_FILES)
        made = replace(manifest, kind="triton-repo", target=serving.device, graphs=tuple(graphs), files=written.files)
        written.complete(made)
    return made


def graph_config(
    graph: GraphEntry, unet: UNet, serving: Serving, shapes: Sequence[Shape], downscale: int
) -> ModelConfig:
    """Return the config of the model that runs one graph."""
    _, platform = RUNNERS[serving.runner]
    inputs, outputs = ([_tensor(t) for t in tensors] for tensors in (graph.inputs, graph.outputs))
    warmups = {}
    for shape in shapes:
        sizes = _FIRST | {"rows": shape.rows, "height": shape.height // downscale, "width": shape.width // downscale}
        sizes = with_tokens(unet, sizes | graph.fixed) | {"text_tokens": graph.shape.get("text_tokens", 1)}
        dims = [tuple(sizes.get(d, 1) if isinstance(d, str) else d for d in dims) for _, _, dims in graph.inputs]
        tensors = tuple(replace(tensor, dims=d) for tensor, d in zip(inputs, dims))
        # different shapes may give a graph the same inputs
        warmups.setdefault(tensors, Warmup(f"{shape.width}x{shape.height}, {shape.rows} rows", tensors))
    file = graph.file.rpartition("/")[2]
    parameters = {"graph": file, "FORCE_CPU_ONLY_INPUT_TENSORS": "no"} if platform == "python" else {}
    return ModelConfig(
        model_name(graph),
        platform,
        tuple(inputs),
        tuple(outputs),
        serving.device,
        serving.queue,
        tuple(warmups.values()),
        file="" if platform == "python" else file,
        parameters=parameters,
    )


def loop_config(manifest: Manifest, model: str, serving: Serving) -> ModelConfig:
    """Return the config of the loop; every parameter is JSON."""
    graphs = {model_name(graph): graph_to_json(graph) for graph in manifest.graphs}
    parameters = {
        "model": model,
        "fingerprint": manifest.fingerprint,
        "graphs": graphs,
        "slots": serving.slots,
        "banks": serving.banks,
        "engine": {"device": serving.device, "dtype": manifest.dtype, **serving.engine},
    }
    return ModelConfig(
        LOOP,
        "python",
        _INPUTS,
        _OUTPUTS,
        queue=serving.queue,
        decoupled=True,
        parameters={name: json.dumps(value) for name, value in parameters.items()},
    )


def model_name(graph: GraphEntry) -> str:
    """Return a graph's model name on the server: "unet_live" or "vae_decoder", for example."""
    return graph.label.replace("-", "_")


def _check(manifest: Manifest, serving: Serving) -> None:
    kind, _ = RUNNERS[serving.runner]
    if manifest.kind != kind:
        fitting = [runner for runner, (of, _) in RUNNERS.items() if of == manifest.kind]
        raise EngineMismatch(
            f"the export is of kind {manifest.kind}, and the runner {serving.runner} takes {kind}; "
            + (f"choose {' or '.join(fitting)}" if fitting else f"run `stylefast export {kind}`")
        )
    if kind == "tensorrt" and "tensorrt" not in manifest.toolchain:
        raise EngineMismatch(
            f"the engines were built with {', '.join(manifest.toolchain)}; the server's TensorRT backend loads those "
            "of the package tensorrt only. Build them with it, or take the runner onnxruntime"
        )
    if not any(graph.component == "unet" for graph in manifest.graphs):
        raise ExportError("the export has no UNet, and there is no loop without one; run `stylefast export` with it")
    if "+" in manifest.fingerprint:
        raise ExportError("the export was made with LoRAs on, which the loop can't put on; export without them")


def _check_shape(shape: Shape, downscale: int) -> None:
    if shape.width % downscale or shape.height % downscale:
        raise InvalidRequest(f"warm-up shape {shape.width}x{shape.height}: both must be divisible by {downscale}")


def _tensor(found: tuple) -> TensorConfig:
    name, dtype, dims = found
    if dtype not in DATA_TYPES:
        raise ExportError(f"{name} is {dtype}, which a model repository can't carry; it has {', '.join(DATA_TYPES)}")
    return TensorConfig(name, DATA_TYPES[dtype], tuple(-1 if isinstance(d, str) else d for d in dims))


def _sources() -> dict[str, str]:
    """Return the copied Python files; changes to them make an unfinished repository start anew."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(_MODELS.glob("*.py"))}


def _write_graph(
    written: UnfinishedExport, source: Path, graph: GraphEntry, config: ModelConfig, hashes: Mapping[str, str]
) -> GraphEntry:
    done = written.finished(config.name)
    if done is not None:
        return graph_from_json(done)
    # all files in one folder, because a graph refers to its external data by file name
    place = f"{config.name}/{VERSION}"
    names = {file: f"{place}/{file.rpartition('/')[2]}" for file in graph.files}
    moved = replace(graph, file=names[graph.file], files=tuple(names.values()))
    (written.path / place).mkdir(parents=True, exist_ok=True)
    for file, name in names.items():
        _place(source / file, written, name, hashes[file])
    runner = {"model.py": "graph_model.py"} if config.platform == "python" else {}
    _write_model(written, config, runner, moved.files, graph_to_json(moved))
    return moved


def _place(source: Path, written: UnfinishedExport, name: str, sha256: str) -> None:
    """Copy a file, or link it to an equal one of another model: the UNet's flavours share their weights."""
    path = written.path / name
    for entry in written.files:
        if entry.sha256 == sha256:
            try:
                os.link(written.path / entry.name, path)
                return
            except OSError:
                break  # file system without hard links
    shutil.copyfile(source, path)


def _write_model(
    written: UnfinishedExport,
    config: ModelConfig,
    python: Mapping[str, str],
    files: Sequence[str] = (),
    detail: Any = True,
) -> None:
    """Write config.pbtxt and a model's Python files (name there -> name in `models`); record them with `files`."""
    folder = written.path / config.name / VERSION
    folder.mkdir(parents=True, exist_ok=True)
    for name, template in python.items():
        shutil.copyfile(_MODELS / template, folder / name)
    (folder.parent / "config.pbtxt").write_text(config.to_pbtxt(), encoding="utf-8")
    names = (f"{config.name}/config.pbtxt", *(f"{config.name}/{VERSION}/{name}" for name in python))
    written.record(config.name, (*names, *files), detail)
