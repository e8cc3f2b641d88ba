"""TensorRT engines from ONNX files: strongly typed, with optimisation profiles, for one chip or several.

The builder runs in a separate process (`tensorrt_worker`): it rarely checks for interrupts, takes several times an
engine's size in memory, and is killed by the kernel if memory runs out.
"""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from stylefast import errors
from stylefast.errors import ExportError
from stylefast.export.tensorrt_api import check_buildable, package_of
from stylefast.export.tensorrt_inspect import EngineLayers, NetworkSummary
from stylefast.export.tensorrt_profiles import Shapes
from stylefast.export.tensorrt_worker import CACHE, PLAN, Order

Progress = Callable[[int, int, str], None]

_STDERR = "stderr"
_START = "from stylefast.export.tensorrt_worker import main; main()"

log = logging.getLogger("stylefast.export.tensorrt")


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
    package: str | None = None,
    plugins: bool = False,
) -> BuildReport:
    """Build the engine of an ONNX file and write it to `path` atomically.

    targets: chips by name, see `tensorrt_api`; several of them share one engine. profiles: from `Profile.shapes`, at
    least one if a dimension of the graph may vary. refittable: weights can be replaced later (`tensorrt_refit`), at
    some cost of speed; such builds need a GPU. timing_cache: a file that is read if it exists, and written.
    memory_limit: bytes of the chip's memory that a layer may use. progress: called with (done, total, phase); phases
    are nested. package: "tensorrt" or "tensorrt_rtx" if both support the target. plugins: whether the graph's style
    attention is that of `tensorrt_plugin`.

    An interrupt leaves no files behind. Raises MissingDependency; InvalidRequest for invalid targets and profiles;
    EngineMismatch if a required GPU is not present; ExportError for a graph that TensorRT refuses, a build that fails
    or is killed because memory ran out, and a full disk.
    """
    onnx_path, path = Path(onnx_path).absolute(), Path(path).absolute()
    package = package_of(targets, package)
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
                os.replace(Path(folder) / CACHE, timing_cache)
            os.replace(Path(folder) / PLAN, path)
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


def _tuples(found):
    """Turn JSON's lists back into tuples."""
    if isinstance(found, dict):
        return {name: _tuples(value) for name, value in found.items()}
    return tuple(_tuples(value) for value in found) if isinstance(found, list) else found


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of writing to `path` or to files next to it into ExportError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, errors.StyleFastError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(f"the disk of {path.parent} is full; {path.name} was not written") from error
        raise ExportError(f"{path} can't be written: {error}") from error


def write_whole(path: Path, data) -> None:
    """Write bytes to `path` atomically. Raises ExportError for a full disk."""
    with writing(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        file = Path(folder) / PLAN
        file.write_bytes(memoryview(data))
        os.replace(file, path)


__all__ = ["BuildReport", "Progress", "build_engine", "write_whole", "writing"]
