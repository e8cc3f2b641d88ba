"""The real Triton Inference Server, from the package nvidia-pytriton, and a client that asks its loop for pictures.

The package is never imported: it wants numpy 1, and the binary, its libraries and its Python backend are all that is
needed. The backend's processes run in this very Python environment.
"""

import importlib.util
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CHECKOUT = Path(__file__).resolve().parents[2]
START_SECONDS = 120
STOP_SECONDS = 30
ANSWER_SECONDS = 60  # for one answer of a stream


def missing() -> str | None:
    """Why the server can't be started here, or None."""
    package = importlib.util.find_spec("pytriton")
    if package is None or package.origin is None:
        return "needs the server of nvidia-pytriton (pip install --no-deps nvidia-pytriton)"
    if not _binary().is_file():
        return f"{_binary()} is absent"
    if not _stub().is_file():
        return f"nvidia-pytriton has no Python backend for Python {sysconfig.get_python_version()}"
    if importlib.util.find_spec("tritonclient") is None:
        return "needs tritonclient[grpc]"
    return None


@dataclass(frozen=True)
class Answer:
    """One response of the loop."""

    images: np.ndarray  # [pictures, height, width, 3] uint8
    step: int
    steps: int
    metadata: list
    final: bool


class TritonServer:
    """A running server; `log` is the file that its output goes to."""

    def __init__(self, address: str, log: Path):
        from tritonclient import grpc

        self._grpc, self.address, self.log = grpc, address, log
        self.client = grpc.InferenceServerClient(address)

    def ask(self, order: dict | bytes, pictures: Sequence[bytes] = (), **options) -> "Stream":
        """Send a request to the loop and return its stream of answers."""
        return Stream(self._grpc, self.address, order, pictures, options)

    def picture(self, order: dict, pictures: Sequence[bytes] = ()) -> Answer:
        """The last answer to a request; raises the server's error."""
        with self.ask(order, pictures) as answers:
            return list(answers)[-1]

    def calls(self, model: str) -> int:
        """Requests that a model has answered well since the server started."""
        found = self.client.get_inference_statistics(model).model_stats
        return sum(int(one.inference_stats.success.count) for one in found)


class Stream:
    """The answers to one request, in order, as they come; raises what the server says is wrong."""

    def __init__(self, grpc, address: str, order: dict | bytes, pictures: Sequence[bytes], options: dict):
        self._client, self._answers = grpc.InferenceServerClient(address), queue.Queue()
        self._client.start_stream(callback=lambda result, error: self._answers.put((result, error)))
        text = order if isinstance(order, bytes) else json.dumps(order).encode()
        inputs = [_tensor(grpc, "request", np.frombuffer(text, np.uint8))]
        if pictures:
            inputs.append(_tensor(grpc, "pictures", np.frombuffer(b"".join(pictures), np.uint8)))
            inputs.append(_tensor(grpc, "picture_bytes", np.array([len(p) for p in pictures], np.int64)))
        self._client.async_stream_infer("stylefast", inputs, **options)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    @property
    def answered(self) -> bool:
        """Whether an answer, or an error, has come that nobody took yet."""
        return not self._answers.empty()

    def __iter__(self) -> Iterator[Answer]:
        final = False
        while not final:
            result, error = self._answers.get(timeout=ANSWER_SECONDS)
            if error is not None:
                raise error
            final = result.get_response().parameters["triton_final_response"].bool_param
            if not result.get_response().outputs:
                continue  # the end of a request that has nothing to say
            text = result.as_numpy("metadata").tobytes()
            step, steps = (int(result.as_numpy(name)[0]) for name in ("step", "steps"))
            yield Answer(result.as_numpy("images"), step, steps, json.loads(text), final)


@contextmanager
def triton_server(repository: Path, folder: Path) -> Iterator[TritonServer]:
    """Start a server on a model repository, with all of its models; `folder` takes its log and its backends.

    Raises RuntimeError with the end of the log where it does not come up.
    """
    log = folder / "server.log"
    address = f"127.0.0.1:{_free_port()}"
    command = [
        _binary(),
        f"--model-repository={repository}",
        f"--backend-directory={_backends(folder)}",
        "--model-control-mode=explicit",
        "--load-model=*",
        "--disable-auto-complete-config",
        "--allow-http=false",
        "--allow-metrics=false",
        "--grpc-address=127.0.0.1",
        f"--grpc-port={address.rpartition(':')[2]}",
        "--exit-timeout-secs=5",
        "--log-info=false",
        "--pinned-memory-pool-byte-size=0",
    ]
    with log.open("wb") as output:
        # a group of its own, so that the backend's processes go with it
        process = subprocess.Popen(
            list(map(str, command)),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            cwd=folder,
            start_new_session=True,
        )
        try:
            server = TritonServer(address, log)
            _wait_until_ready(server, process)
            yield server
        finally:
            _stop(process)


def log_end(log: Path, lines: int = 60) -> str:
    """The end of a server's log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def _wait_until_ready(server: TritonServer, process: subprocess.Popen) -> None:
    from tritonclient.utils import InferenceServerException

    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if server.client.is_server_ready():
                return
        except InferenceServerException:
            pass  # does not listen yet
        time.sleep(0.1)
    raise RuntimeError(f"the server did not come up (exit status {process.poll()}):\n{log_end(server.log)}")


def _stop(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # whatever of the backend's processes outlived the server
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _environment() -> dict[str, str]:
    libraries = [str(_package().parent / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR") or ""]
    environment = dict(os.environ)
    environment |= {
        "LD_LIBRARY_PATH": os.pathsep.join([*libraries, environment.get("LD_LIBRARY_PATH", "")]).strip(os.pathsep),
        # the backend embeds Python, which finds its packages by the first python3 in PATH
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]]),
        "OMP_NUM_THREADS": "1",
    }
    return environment


def _backends(folder: Path) -> Path:
    """A folder of backends: the Python backend, with the stub of this Python beside its library."""
    backend = folder / "backends" / "python"
    if not backend.exists():
        backend.mkdir(parents=True)
        for path in (_package() / "tritonserver" / "backends" / "python").iterdir():
            if path.is_file():
                (backend / path.name).symlink_to(path)
        (backend / _stub().name).symlink_to(_stub())
        # the embedded Python heeds no PYTHONPATH, but looks for modules here: the package as it would be installed
        package = backend / "stylefast"
        package.mkdir()
        for path in (*(CHECKOUT / "stylefast").iterdir(), CHECKOUT / "kernels", CHECKOUT / "export"):
            (package / path.name).symlink_to(path)
    return backend.parent


def _package() -> Path:
    return Path(importlib.util.find_spec("pytriton").origin).parent


def _binary() -> Path:
    return _package() / "tritonserver" / "bin" / "tritonserver"


def _stub() -> Path:
    stubs = _package() / "tritonserver" / "python_backend_stubs"
    return stubs / sysconfig.get_python_version() / "triton_python_backend_stub"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _tensor(grpc, name: str, values: np.ndarray):
    types = {"uint8": "UINT8", "int64": "INT64"}
    tensor = grpc.InferInput(name, list(values.shape), types[str(values.dtype)])
    tensor.set_data_from_numpy(values)
    return tensor
