"""TensorRT engines from ONNX files: strongly typed, with optimisation profiles, for one chip or several.

The builder runs in a separate process (`main`): it rarely checks for interrupts, takes several times an engine's size
in memory, and is killed by the kernel if memory runs out. `build_engine` writes one order to the process's stdin, as a
line of JSON, and reads lines of JSON from its stdout until one has a result or an error. The process exits when its
stdin closes. It imports neither PyTorch nor models, which would take it longer than a small engine.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from stylefast import errors
from stylefast.errors import ExportError, InvalidRequest, StyleFastError
from stylefast.export.tensorrt import (
    RTX,
    EngineLayers,
    NetworkSummary,
    check_buildable,
    forwarder,
    load_package,
    package_of,
    read_layers,
    summarise_network,
    writing,
)
from stylefast.values import quoted
from stylefast.whole_files import put_in_place, sync

if TYPE_CHECKING:
    from stylefast.export.tensorrt_profiles import Shapes

Progress = Callable[[int, int, str], None]

PLAN, CACHE, _STDERR = "plan", "timing.cache", "stderr"  # files in an order's folder
_START = "from stylefast.export.tensorrt_build import main; main()"

log = logging.getLogger("stylefast.export.tensorrt")


@dataclass(frozen=True)
class Order:
    """Specification of a build; see `build_engine`. Results go to `folder`."""

    onnx_path: str
    folder: str
    package: str
    targets: list[str]
    profiles: list[Shapes]
    refittable: bool
    timing_cache: str | None
    memory_limit: int | None
    plugins: bool


@dataclass(frozen=True)
class BuildReport:
    """Result of a build: targets, TensorRT version, duration, and a summary of network and engine.

    layers: of all profiles; None if the package prints no listing. timing_cache: whether a cache was read. peak_memory:
    of the building process, in bytes.
    """

    path: Path
    package: str
    version: str
    targets: tuple[str, ...]
    seconds: float
    bytes: int
    peak_memory: int
    refittable: bool
    timing_cache: bool
    network: NetworkSummary
    layers: EngineLayers | None

    def to_dict(self) -> dict:
        """Return the fields in the manifest's form."""
        found = asdict(self) | {"path": self.path.name, "targets": list(self.targets)}
        return found | {"layers": self.layers and self.layers.to_dict()}


def build_engine(
    onnx_path: str | Path,
    path: str | Path,
    targets: Sequence[str],
    profiles: Sequence[Shapes],
    *,
    refittable: bool = False,
    timing_cache: str | Path | None = None,
    memory_limit: int | None = None,
    progress: Progress | None = None,
    plugins: bool = False,
) -> BuildReport:
    """Build the engine of an ONNX file and write it to `path` atomically.

    targets: chips by name, see `tensorrt`; several of them share one engine. profiles: from `Profile.shapes`, at
    least one if a dimension of the graph may vary. refittable: weights can be replaced later (`tensorrt.refit`), at
    some cost of speed; such builds need a GPU. timing_cache: a file that is read if it exists, and written.
    memory_limit: bytes of the chip's memory that a layer may use. progress: called with (done, total, phase); phases
    are nested. plugins: whether the graph's style attention is that of `tensorrt_plugin`.

    An interrupt leaves no files behind. Raises MissingDependency; InvalidRequest for invalid targets and profiles;
    EngineMismatch if a required GPU is not present; ExportError for a graph that TensorRT refuses, a build that fails
    or is killed because memory ran out, and a full disk.
    """
    onnx_path, path = Path(onnx_path).absolute(), Path(path).absolute()
    package = package_of(targets)
    check_buildable(package, targets, refittable)
    if not onnx_path.is_file():
        raise ExportError(f"there is no graph at {onnx_path}; run `stylefast export onnx`, or check the path")
    started = time.perf_counter()
    with writing(path):
        scratch = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    with scratch as folder:
        order = Order(
            onnx_path=str(onnx_path),
            folder=folder,
            package=package,
            targets=list(targets),
            profiles=list(profiles),
            refittable=refittable,
            timing_cache=str(Path(timing_cache).absolute()) if timing_cache else None,
            memory_limit=memory_limit,
            plugins=plugins,
        )
        found = _work(order, path, progress)
        with writing(path):
            if timing_cache is not None:
                put_in_place(Path(folder) / CACHE, Path(timing_cache))
            sync(Path(folder) / PLAN)
            put_in_place(Path(folder) / PLAN, path)
    layers, network = found.pop("layers"), found.pop("network")
    return BuildReport(
        path=path,
        package=package,
        targets=tuple(targets),
        seconds=time.perf_counter() - started,
        bytes=path.stat().st_size,
        refittable=refittable,
        network=NetworkSummary(**_tuples(network)),
        layers=layers and EngineLayers(**_tuples(layers)),
        **found,
    )


def _work(order: Order, path: Path, progress: Progress | None) -> dict:
    """Run the worker and return its result; raise its errors."""
    # let the worker import the same code as this process
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    stderr = Path(order.folder) / _STDERR
    with writing(path), open(stderr, "wb") as noise:
        worker = subprocess.Popen(
            [sys.executable, "-c", _START],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
            env=environment,
            start_new_session=True,
        )
    assert worker.stdin is not None and worker.stdout is not None
    try:
        with suppress(BrokenPipeError):  # its exit is reported below
            worker.stdin.write(json.dumps(asdict(order)) + "\n")
            worker.stdin.flush()
        for line in worker.stdout:
            said = json.loads(line)
            if "progress" in said and progress is not None:
                progress(*said["progress"])
            elif "log" in said:
                log.log(*said["log"])
            elif "error" in said:
                kind, message = said["error"]
                raise getattr(errors, kind)(message)
            elif "oserror" in said:
                with writing(path):
                    raise OSError(*said["oserror"])
            elif "result" in said:
                return said["result"]
        code = worker.wait()
    finally:
        # the worker has no further use in any case
        worker.kill()
        worker.wait()
        with suppress(BrokenPipeError):
            worker.stdin.close()
        worker.stdout.close()
    if code == -signal.SIGKILL:
        raise ExportError(
            "the process that built the engine was killed, most likely as memory ran out; a smaller profile, fewer "
            "profiles or a machine with more memory may do"
        )
    last = stderr.read_text(errors="replace").strip().splitlines()[-3:]
    raise ExportError(f"the process that built the engine ended with {code}: {' | '.join(last) or 'it gave no reason'}")


def _tuples(found: Any) -> Any:
    """Turn JSON's lists back into tuples."""
    if isinstance(found, dict):
        return {name: _tuples(value) for name, value in found.items()}
    return tuple(_tuples(value) for value in found) if isinstance(found, list) else found


def build(order: Order, progress: Callable[[int, int, str], None]) -> dict:
    """Build in this process; return the fields of `BuildReport` that the order lacks."""
    trt = load_package(order.package)
    if order.plugins:
        from stylefast.export.tensorrt_plugin import register_plugin  # brings Triton's kernels

        register_plugin(trt, order.targets[0])
    logger = forwarder(trt)
    builder = trt.Builder(logger)
    network = parse(trt, logger, builder, Path(order.onnx_path))
    config = builder.create_builder_config()
    # keep names and kernels of layers readable, in the builder's listing and in the engine
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.progress_monitor = _monitor(trt, progress)
    if order.memory_limit is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, order.memory_limit)
    if order.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    if order.package == RTX:
        # otherwise kernels allocate memory while they run, which CUDA graphs can't record
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        config.num_compute_capabilities = len(order.targets)
        for i, target in enumerate(order.targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, target.upper()), i)
    _add_profiles(builder, network, config, order.profiles)
    cached = order.timing_cache is not None and _read_timing_cache(trt, config, Path(order.timing_cache))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"TensorRT could not build the engine: {logger.last_errors()}")
    (Path(order.folder) / PLAN).write_bytes(memoryview(plan))
    if order.timing_cache is not None:
        (Path(order.folder) / CACHE).write_bytes(memoryview(config.get_timing_cache().serialize()))
    layers = read_layers(logger.layers[-1]) if logger.layers else None
    return {
        "version": trt.__version__,
        "timing_cache": cached,
        "peak_memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "network": asdict(summarise_network(trt, network)),
        "layers": layers and asdict(layers),
    }


def parse(trt: ModuleType, logger: Any, builder: Any, onnx_path: Path):
    """Return the network of an ONNX file with its external data. Raises ExportError, naming the refused nodes."""
    # TensorRT 10 needs the flag; TensorRT 11 and tensorrt_rtx are always strongly typed
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        found = []
        for i in range(parser.num_errors):
            error = parser.get_error(i)
            node = f"{error.node_operator()} {quoted(error.node_name())}: " if error.node_operator() else ""
            found.append(f"{node}{error.desc().strip()}")
        raise ExportError(f"TensorRT can't read {onnx_path.name}: {'; '.join(found) or logger.last_errors()}")
    return network


def _add_profiles(builder, network, config, profiles: list[Shapes]) -> None:
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    varying = {tensor.name for tensor in inputs if -1 in tuple(tensor.shape)}
    if varying and not profiles:
        raise InvalidRequest(f"sizes of {', '.join(sorted(varying))} may vary; a profile has to say how far")
    for number, shapes in enumerate(profiles):
        unknown = sorted(shapes.keys() - {tensor.name for tensor in inputs})
        missing = sorted(varying - shapes.keys())
        if unknown or missing:
            what = f"has {unknown[0]}, which the graph has not" if unknown else f"says nothing of {missing[0]}"
            raise InvalidRequest(f"profile {number} {what}")
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            if tensor.name in shapes:
                corners = [tuple(shape) for shape in shapes[tensor.name]]
                _check_corners(number, tensor.name, tuple(tensor.shape), corners)
                if tensor.name in varying:
                    profile.set_shape(tensor.name, *corners)
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(f"TensorRT refuses profile {number}: {shapes}")


def _check_corners(number: int, name: str, dims: tuple[int, ...], corners: list[tuple[int, ...]]) -> None:
    if len(corners) != 3 or any(len(corner) != len(dims) for corner in corners):
        raise InvalidRequest(f"profile {number}: {name} takes three shapes of {len(dims)} dimensions, not {corners}")
    for axis, dim in enumerate(dims):
        least, usual, most = (corner[axis] for corner in corners)
        if not 0 <= least <= usual <= most:
            raise InvalidRequest(f"profile {number}: dimension {axis} of {name} goes from {least} by {usual} to {most}")
        if dim != -1 and (least, most) != (dim, dim):
            raise InvalidRequest(
                f"profile {number}: dimension {axis} of {name} is {dim} in the graph, not {least} to {most}; export "
                "the graph with a size that varies, or write the graph's into the profile"
            )


def _read_timing_cache(trt: ModuleType, config, path: Path) -> bool:
    """Return whether the file existed and fits; if not, the build continues with an empty cache."""
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise ExportError(f"the timing cache {path} can't be read: {error}") from error
    cache = config.create_timing_cache(data)
    # for bytes that are no cache TensorRT silently creates an empty one
    read = cache is not None and (not data or bytes(cache.serialize()) == data or bool(cache.queryKeys()))
    if read and config.set_timing_cache(cache, False):
        return bool(data)
    log.warning("the timing cache %s is damaged, or of another chip or version; it is made anew", path)
    if not config.set_timing_cache(config.create_timing_cache(b""), False):
        raise ExportError("TensorRT makes no timing cache here; build without one")
    return False


def _monitor(trt: ModuleType, progress: Callable[[int, int, str], None]):
    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, phase_name, parent_phase, num_steps):
            self.totals[phase_name] = num_steps
            progress(0, num_steps, phase_name)

        def step_complete(self, phase_name, step):
            progress(step + 1, self.totals[phase_name], phase_name)
            return True

        def phase_finish(self, phase_name):
            total = self.totals.pop(phase_name)
            progress(total, total, phase_name)

    return Monitor()


class _ToParent(logging.Handler):
    def __init__(self, send: Callable[[dict], None]):
        super().__init__()
        self.send = send

    def emit(self, record):
        self.send({"log": [record.levelno, record.getMessage()]})


def main() -> None:
    """Read an order, build, and send the outcome."""
    # libraries may print to stdout, so answers go through a duplicate descriptor
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(found: dict) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    order = Order(**json.loads(sys.stdin.readline()))
    # exit if the parent is gone, because nothing else would stop the build
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    log.setLevel(logging.DEBUG)
    log.addHandler(_ToParent(send))
    log.propagate = False
    try:
        send({"result": build(order, lambda *state: send({"progress": state}))})
    except StyleFastError as error:
        send({"error": [type(error).__name__, str(error)]})
    except OSError as error:
        send({"oserror": [error.errno, str(error)]})
    answers.flush()
    # unloading takes seconds, and all files are closed
    os._exit(0)


if __name__ == "__main__":
    main()
