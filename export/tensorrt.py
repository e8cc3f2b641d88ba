"""Wrapper around the two TensorRT packages: their targets, loading, logging, engine files, layers and refitting.

`tensorrt_rtx` builds for workstation chips and for the A100 on any machine, without a GPU, several chips in one engine.
`tensorrt` also supports data-centre chips, but builds only for the GPU that is present. A target is named after its
compute capability: "sm89" is an RTX 4090 or an L4, "sm90" an H100 or H200.

Engines can't be opened without a GPU; instead, the parsed network is inspected, and the listing of layers that the
builder prints at its end (kept by `forwarder`). With a GPU the engine's own inspector prints the same listing.

PyTorch is imported where it is used: the process that builds an engine does without.
"""

from __future__ import annotations

import errno
import importlib
import logging
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from stylefast.errors import EngineMismatch, ExportError, InvalidRequest, MissingDependency, OutOfMemory, StyleFastError
from stylefast.values import quoted
from stylefast.whole_files import write_whole

if TYPE_CHECKING:
    import torch

RTX, DATA_CENTRE = "tensorrt_rtx", "tensorrt"
PACKAGES = {
    RTX: ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
    DATA_CENTRE: ("sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121"),
}

# offsets in an engine's header: size and version; the magic at its start tells the package
_MAGIC = {b"vtrt": RTX, b"ftrt": DATA_CENTRE}
_SIZE_AT, _VERSION_AT, _HEADER = 16, 24, 32

log = logging.getLogger("stylefast.export.tensorrt")


def package_of(targets: Sequence[str]) -> str:
    """Return the package that builds one engine for all of `targets`.

    `tensorrt_rtx` is preferred if it supports all of them, because it needs no GPU. Raises InvalidRequest for an
    unknown target, duplicates, several that no package builds together, or none.
    """
    named = list(targets)
    if isinstance(targets, str) or not named:
        raise InvalidRequest(f"targets are {quoted(targets)}; name one chip or more, such as ['sm89', 'sm120']")
    for target in named:
        if target not in PACKAGES[DATA_CENTRE]:
            raise InvalidRequest(f"there is no target {quoted(target)}; there are {', '.join(PACKAGES[DATA_CENTRE])}")
    if len(set(named)) != len(named):
        raise InvalidRequest(f"targets {', '.join(named)} name one chip twice")
    if all(target in PACKAGES[RTX] for target in named):
        return RTX
    if len(named) > 1:
        raise InvalidRequest(
            f"'tensorrt' builds for the one GPU that is present, and {', '.join(named)} were asked for; export once "
            "for each, on a machine that has it"
        )
    return DATA_CENTRE


def load_package(package: str) -> ModuleType:
    """Import and return the package. Raises MissingDependency with instructions to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        if package == RTX:
            way = "pip install 'stylefast[export]'"
        else:
            way = (
                "pip install 'stylefast[export]' brings 'tensorrt_rtx', which knows "
                f"{', '.join(PACKAGES[RTX])}; data-centre chips need NVIDIA's own package: pip install tensorrt"
            )
        raise MissingDependency(f"the package {quoted(package)} can't be loaded ({error}): {way}") from error


def present_target(device: torch.device | str | None = None) -> str | None:
    """Return the target name of a CUDA device, or None without CUDA."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def check_buildable(package: str, targets: Sequence[str], refittable: bool = False) -> None:
    """Raise EngineMismatch if `package` can't build for `targets` on this machine."""
    present = present_target()
    if package == RTX:
        if refittable and present is None:
            # tensorrt_rtx 1.7 compiles and loads weight-rearranging kernels during such builds
            raise EngineMismatch(
                "a refittable engine takes a GPU to build, also with 'tensorrt_rtx', and none is present; build one "
                "that is not, and build again when weights change"
            )
        return
    if present != targets[0]:
        there = "no GPU is present" if present is None else f"{present} is present"
        raise EngineMismatch(f"'tensorrt' builds only for the GPU at hand: {targets[0]} was asked for, and {there}")


def plan_header(head: bytes) -> tuple[str, str, int]:
    """Return an engine file's package, that package's version and its least size in bytes, from its first 32 bytes.

    Raises ExportError if these are not the beginning of an engine.
    """
    if len(head) < _HEADER:
        raise ExportError(f"the engine is truncated: it has {len(head)} bytes, less than its header's {_HEADER}")
    if head[:4] not in _MAGIC:
        raise ExportError(f"this is no TensorRT engine: it begins with {quoted(head[:4])}")
    version = ".".join(str(part) for part in head[_VERSION_AT : _VERSION_AT + 4])
    return _MAGIC[head[:4]], version, int.from_bytes(head[_SIZE_AT : _SIZE_AT + 8], "little")


def forwarder(trt: ModuleType):
    """Return a logger for `trt` that forwards its lines to `logging`, and keeps the last errors and the list of layers.

    `errors` are the last error lines. `layers` is the listing of the engine's layers that the builder prints, the only
    way to inspect an engine on a machine without a GPU.
    """
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.DEBUG,  # hundreds of remarks on types and initializers
        severity.INFO: logging.DEBUG,
    }

    class Forwarder(trt.ILogger):
        def __init__(self):
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=8)
            self.layers: list[str] = []

        def log(self, level, message):
            if level in (severity.INTERNAL_ERROR, severity.ERROR):
                self.errors.append(message.strip())
            elif level == severity.VERBOSE:
                if message.startswith("Layers:"):
                    self.layers.append(message)
                # too many to forward: over a hundred thousand lines for a UNet
                return
            log.log(levels[level], "%s: %s", trt.__name__, message.strip())

        def last_errors(self) -> str:
            """Return the last error lines joined, or a note that TensorRT gave none."""
            return " | ".join(self.errors) or "TensorRT gave no reason"

    return Forwarder()


def torch_dtype(trt: ModuleType, dtype: Any) -> torch.dtype:
    """Return the torch type of a TensorRT type. Raises ExportError for an unsupported one."""
    import torch

    names = {
        "FLOAT": torch.float32,
        "HALF": torch.float16,
        "BF16": torch.bfloat16,
        "INT32": torch.int32,
        "INT64": torch.int64,
        "BOOL": torch.bool,
        "INT8": torch.int8,
        "UINT8": torch.uint8,
    }
    for name, found in names.items():
        if dtype == getattr(trt.DataType, name, None):
            return found
    raise ExportError(f"an engine's tensor has the type {dtype}; only {', '.join(names)} are known")


def open_engine(trt: ModuleType, logger: Any, path: Path):
    """Return runtime and engine of a file, on torch's current CUDA device; the engine must not outlive its runtime.

    Raises EngineMismatch for one of another chip or version, OutOfMemory, and ExportError for one that is damaged.
    """
    plan = read_plan(path)
    package, version, _ = plan_header(plan)
    if package != trt.__name__:
        raise EngineMismatch(f"{path.name} is an engine of the package {quoted(package)}, not {quoted(trt.__name__)}")
    runtime = trt.Runtime(logger)
    # separate check, because a failed load gives its reason only in the log
    if hasattr(runtime, "get_engine_validity"):
        validity, causes = runtime.get_engine_validity(plan[: runtime.engine_header_size])
        if validity == trt.EngineValidity.INVALID:
            _refuse(trt, logger, path, version, causes)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        reason = logger.last_errors()
        if any(word in reason.lower() for word in ("version", "compute capability", "incompatible", "platform")):
            raise EngineMismatch(f"{path.name} was built for another chip or version than {_here(trt)}: {reason}")
        if "memory" in reason.lower():
            raise OutOfMemory(f"{path.name} does not fit into the memory of the GPU: {reason}")
        raise ExportError(f"{path.name} can't be opened: {reason}")
    return runtime, engine


def package_of_plan(path: Path) -> str:
    """Return the package that wrote an engine file and can run it. Raises ExportError if it is not an engine."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEADER)
    except OSError as error:
        raise _no_engine(path, error) from error
    return plan_header(head)[0]


def read_plan(path: Path) -> bytes:
    """Return an engine file's bytes. Raises ExportError if it is missing or shorter than its header says."""
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise _no_engine(path, error) from error
    least = plan_header(plan)[2]
    if len(plan) < least:
        raise ExportError(f"{path.name} is truncated: it has {len(plan)} bytes of {least}; export it again")
    return plan


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of writing to `path` or to files next to it into ExportError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StyleFastError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(f"the disk of {path.parent} is full; {path.name} was not written") from error
        raise ExportError(f"{path} can't be written: {error}") from error


def _no_engine(path: Path, error: OSError) -> ExportError:
    return ExportError(f"there is no engine at {path} ({error.strerror}); run `stylefast export tensorrt`")


def _refuse(trt: ModuleType, logger, path: Path, version: str, causes: int) -> None:
    found = {name for name, flag in trt.EngineInvalidityDiagnostics.__members__.items() if causes & flag.value}
    if "MALFORMED_ENGINE" in found:
        raise ExportError(f"{path.name} is damaged; export it again")
    if "INSUFFICIENT_GPU_MEMORY" in found:
        raise OutOfMemory(f"{path.name} does not fit into the memory of the GPU")
    reasons = {
        "VERSION_MISMATCH": f"it was built by version {version}",
        "UNSUPPORTED_CC": "it was built for other chips",
        "OLD_CUDA_DRIVER": "the GPU's driver is too old",
        "OLD_CUDA_RUNTIME": "the CUDA runtime is too old",
    }
    named = [text for name, text in reasons.items() if name in found] or [logger.last_errors()]
    raise EngineMismatch(f"{path.name} can't run with {_here(trt)}: {', '.join(named)}")


def _here(trt: ModuleType) -> str:
    return f"{trt.__name__} {trt.__version__} on {present_target() or 'a machine without a GPU'}"


_LAYER = re.compile(r"^\s*Name: (?P<name>.*?), LayerType: (?P<kind>\w*), ", re.MULTILINE)
# kernels that contain queries, softmax and values of one attention
_FUSED = re.compile(r"mha|fmha|flash|attention_v", re.IGNORECASE)
# these only order streams
_WAITING = ("signal", "wait", "shape_call")


@dataclass(frozen=True)
class NetworkSummary:
    """Parsed network: inputs and outputs as (name, type's name, dims, -1 for varying ones), layers by type.

    attentions: their number. plugins: names of layers that are not standard operators.
    """

    inputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    outputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    layers: dict[str, int]
    attentions: int
    plugins: tuple[str, ...]


@dataclass(frozen=True)
class EngineLayers:
    """Layers of a built engine: their number by kind, and the number of kernels with fused attention.

    kinds are TensorRT's: "kgen" is a kernel generated for several operators, "gemm" and "correlation" are matrix
    products and convolutions, "runtime_fusion" either with what follows it.
    """

    kinds: dict[str, int]
    fused_attentions: int
    plugins: tuple[str, ...]

    @property
    def kernels(self) -> int:
        """Return the number of layers that compute something."""
        return sum(count for kind, count in self.kinds.items() if kind not in _WAITING)

    def to_dict(self) -> dict:
        return asdict(self) | {"kernels": self.kernels}


def summarise_network(trt: ModuleType, network: Any) -> NetworkSummary:
    """Summarise an INetworkDefinition after parsing."""

    def tensor(found) -> tuple[str, str, tuple[int, ...]]:
        return found.name, found.dtype.name, tuple(found.shape)

    layers, plugins = Counter(), []
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        kind = layer.type.name
        layers[kind] += 1
        if "PLUGIN" in kind:
            plugins.append(layer.name)
    return NetworkSummary(
        inputs=tuple(tensor(network.get_input(i)) for i in range(network.num_inputs)),
        outputs=tuple(tensor(network.get_output(i)) for i in range(network.num_outputs)),
        layers=dict(layers),
        attentions=layers["SOFTMAX"] + layers["ATTENTION_INPUT"],
        plugins=tuple(plugins),
    )


def read_layers(listing: str) -> EngineLayers | None:
    """Summarise a listing of layers as TensorRT prints it; None if it has none."""
    found = [(match["name"], match["kind"]) for match in _LAYER.finditer(listing)]
    if not found:
        return None
    return EngineLayers(
        kinds=dict(Counter(kind for _, kind in found)),
        fused_attentions=sum(1 for name, kind in found if kind not in _WAITING and _FUSED.search(name)),
        plugins=tuple(name for name, kind in found if "plugin" in kind.lower()),
    )


def inspect_engine(trt: ModuleType, engine: Any) -> EngineLayers | None:
    """Summarise an opened engine, which needs a GPU; None if it was built without layer names."""
    return read_layers(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.ONELINE))


def refit(
    engine_path: str | Path,
    weights: str | Path | Mapping[str, torch.Tensor],
    out: str | Path | None = None,
    *,
    trt: ModuleType | None = None,
) -> tuple[str, ...]:
    """Put new weights into an engine; return the names of all its refittable weights, which are ONNX's initialisers.

    weights: an ONNX file of the same graph, all of whose weights are used, or the changed tensors by name, with the
    shape and type of the initialiser, which the exporter may have transposed. out: path of the new engine; None
    overwrites `engine_path`, whose hash then differs from the manifest's. The engine can be refitted again. trt: the
    package, if not the file's.

    Runs on torch's current CUDA device. Raises EngineMismatch without one, for an engine built for another chip, and
    for one not built to be refitted; InvalidRequest for names, sizes and types that the engine does not have;
    ExportError for missing weights, and a full disk.
    """
    engine_path = Path(engine_path)
    package = package_of_plan(engine_path)
    if trt is None:
        trt = load_package(package)
        if present_target() is None:
            raise EngineMismatch("an engine is refitted on a GPU like the one that it is for, and none is present")
    logger = forwarder(trt)
    runtime, engine = open_engine(trt, logger, engine_path)
    if not engine.refittable:
        raise EngineMismatch(f"{engine_path.name} was not built to be refitted; build it with refittable=True")
    refitter = trt.Refitter(engine, logger)
    names = tuple(refitter.get_all_weights())
    if isinstance(weights, Mapping):
        held = _set(trt, logger, refitter, names, weights)
    else:
        held = _set_from_onnx(trt, logger, refitter, Path(weights))
    missing = refitter.get_missing_weights()
    if missing:
        raise ExportError(f"with these weights others must change too: {', '.join(missing[:5])}")
    if not refitter.refit_cuda_engine():
        raise ExportError(f"TensorRT could not refit {engine_path.name}: {logger.last_errors()}")
    del held
    config = engine.create_serialization_config()
    config.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
    target = Path(out) if out is not None else engine_path
    with writing(target):
        write_whole(target, memoryview(engine.serialize_with_config(config)))
    del refitter, engine, runtime
    return names


def _set(trt: ModuleType, logger, refitter, names: tuple[str, ...], weights: Mapping[str, torch.Tensor]) -> list:
    """Set the weights; return the tensors that must stay alive until the engine is refitted."""
    import torch

    types = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16"}
    held = []
    for name, tensor in weights.items():
        if name not in names:
            raise InvalidRequest(
                f"the engine has no weights {quoted(name)}; it has {len(names)}, such as {quoted(names[0])}"
            )
        prototype = refitter.get_weights_prototype(name)
        dtype = types.get(tensor.dtype)
        if prototype.size != tensor.numel() or dtype is None or prototype.dtype != getattr(trt.DataType, dtype):
            raise InvalidRequest(
                f"{name} takes {prototype.size} elements of {prototype.dtype}, not {tensor.numel()} of {tensor.dtype}"
            )
        tensor = tensor.detach().cpu().contiguous()
        held.append(tensor)
        if not refitter.set_named_weights(name, trt.Weights(prototype.dtype, tensor.data_ptr(), tensor.numel())):
            raise ExportError(f"TensorRT refuses the weights {quoted(name)}: {logger.last_errors()}")
    return held


def _set_from_onnx(trt: ModuleType, logger, refitter, path: Path) -> list:
    if not path.is_file():
        raise ExportError(f"there is no graph at {path}; run `stylefast export onnx`, or check the path")
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(path)):
        found = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        raise ExportError(f"{path.name} does not fit the engine: {'; '.join(found) or logger.last_errors()}")
    return [parser]
