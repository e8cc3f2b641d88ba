"""TensorRT engines from ONNX files: strongly typed, with optimisation profiles, for one chip or several.

The builder runs in a process of its own (`tensorrt_worker`): it looks up from its work too seldom to be interrupted,
holds several times an engine's size, and is what the kernel kills where that is not there.
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
    """What was built: for whom, by which version, in how many seconds, and what came of the graph.

    layers: of all profiles; None where the package prints no listing. timing_cache: whether a cache was read.
    peak_memory: of the building process, in bytes.
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
        """As manifests hold it."""
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
    """Build the engine of an ONNX file and write it to `path`, whole or not at all.

    targets: chips by name, see `tensorrt_api`; several of them share one engine. profiles: of `Profile.shapes`, one or
    more where a dimension of the graph may vary. refittable: weights can be replaced later (`tensorrt_refit`), at some
    cost of speed; such builds take a GPU. timing_cache: a file that is read if it is there, and written. memory_limit:
    of the chip's memory that a layer may use, in bytes. progress: called with (done, total, phase); phases lie within
    one another. package: "tensorrt" or "tensorrt_rtx" where both know the target. plugins: the graph's style attention
    is that of `tensorrt_plugin`.

    Interrupted, it leaves nothing behind. Raises MissingDependency; InvalidRequest for targets and profiles that can't
    be; EngineMismatch where a GPU would have to be present; ExportError for a graph that is refused, a build that fails
    or is killed as memory runs out, and a disk that is full.
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
    """What the worker says in the end; its errors are raised."""
    # the same code as here, wherever it comes from
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
        with suppress(BrokenPipeError):  # how it ended is told below
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
        # nothing of it is needed any more, whatever has happened
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
    """JSON's lists as the tuples that they were."""
    if isinstance(found, dict):
        return {name: _tuples(value) for name, value in found.items()}
    return tuple(_tuples(value) for value in found) if isinstance(found, list) else found


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of writing to `path` or to files beside it as ExportError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, errors.StyleFastError):
            raise
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(f"the disk of {path.parent} is full; {path.name} was not written") from error
        raise ExportError(f"{path} can't be written: {error}") from error


def write_whole(path: Path, data) -> None:
    """Write bytes to `path` so that it holds all of them, or what it held before. ExportError for a full disk."""
    with writing(path), tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        file = Path(folder) / PLAN
        file.write_bytes(memoryview(data))
        os.replace(file, path)


__all__ = ["BuildReport", "Progress", "build_engine", "write_whole", "writing"]
