"""The denoising loop as a BLS model: Triton's Python backend loads this file as `model.py`.

A stylefast engine runs in the server: requests of all clients and styles share the steps of one batch, and join and
leave it between steps. Other models of this repository run the engine's graphs.
"""

import asyncio
import json
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import triton_python_backend_utils as pb_utils
from json_request import Shelf, read_order, split_pictures

import stylefast as sf
from stylefast.errors import (
    EngineClosed,
    EngineMismatch,
    ExportError,
    InvalidRequest,
    JobCancelled,
    OutOfMemory,
    QueueFull,
    StyleFastError,
)
from stylefast.export.manifest import GraphEntry, graph_from_json
from stylefast.export.unet_graph import GraphShape
from stylefast.runtime.backends.exported import ExportedBackend, Graph
from stylefast.runtime.backends.exported_parts import ExportedParts
from stylefast.runtime.jobs import Job


class BlsSession:
    """Session, as in `stylefast.export.sessions`, that has `model` of the same repository run its inputs.

    outputs: names, in order. before: called before every request, in the calling thread.
    """

    nbytes = 0  # the weights belong to the other model

    def __init__(
        self, model: str, outputs: Sequence[str], device: torch.device, before: Callable[[], None] = lambda: None
    ):
        self.model, self._outputs, self._device, self._before = model, list(outputs), device, before
        self._memory = None
        if device.type == "cuda":
            place = pb_utils.TRITONSERVER_MEMORY_GPU
            self._memory = pb_utils.PreferredMemory(place, device.index or 0)

    def run(
        self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return outputs by name; those in `outputs` are written into the given tensors.

        Raises ExportError with the other model's message, or QueueFull, OutOfMemory or JobCancelled, depending on its
        error code.
        """
        self._before()
        if self._device.type == "cuda":
            # inputs are read on streams that are not ordered with torch's
            torch.cuda.current_stream(self._device).synchronize()
        options = {} if self._memory is None else {"preferred_memory": self._memory}
        request = pb_utils.InferenceRequest(
            model_name=self.model,
            requested_output_names=self._outputs,
            inputs=[pb_utils.Tensor.from_dlpack(name, x.contiguous()) for name, x in inputs.items()],
            **options,
        )
        response = request.exec()
        if response.has_error():
            raise self._error(response.error())
        found = {}
        for name in self._outputs:
            value = torch.from_dlpack(pb_utils.get_output_tensor_by_name(response, name))
            if outputs and name in outputs:
                found[name] = outputs[name].copy_(value)
            else:
                # the server frees this memory with the response
                found[name] = value.to(self._device, copy=True)
        return found

    def close(self) -> None:
        """Do nothing, because the session holds no resources."""

    def _error(self, error) -> Exception:
        codes, message = pb_utils.TritonError, f"model {self.model}: {error.message()}"
        if error.code() == codes.UNAVAILABLE:
            # among the server's messages with this code, those about a queue mean that it is full
            return QueueFull(message) if "queue" in message else OutOfMemory(message)
        return JobCancelled(message) if error.code() == codes.CANCELLED else ExportError(message)


class Client:
    """Receiver of a request's answers.

    Triton frees a request with its last answer; a cancellation query during or after that would crash the whole server,
    so a lock separates the two.
    """

    def __init__(self, sender: Any):
        self._sender, self._lock, self._answered = sender, threading.Lock(), False

    def gone(self) -> bool:
        """Return whether the client cancelled; False after the last answer."""
        with self._lock:
            return not self._answered and self._sender.is_cancelled()

    def send(self, response: Any, last: bool = False) -> None:
        """Send an answer; ignored after the last one."""
        with self._lock:
            if self._answered:
                return
            self._answered = last
            self._sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0)


class TritonPythonModel:
    """Entry points of Triton's Python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        given = json.loads(args["model_config"])["parameters"]
        parameters = {name: json.loads(entry["string_value"]) for name, entry in given.items()}
        self._active: dict[Job, Client] = {}
        self._changed = threading.Condition()
        self._slots = parameters["slots"]
        self._graphs = {model: graph_from_json(graph) for model, graph in parameters["graphs"].items()}
        self._engine = sf.Engine.from_pretrained(parameters["model"], backend=self._backend, **parameters["engine"])
        if self._engine.fingerprint != parameters["fingerprint"]:
            raise EngineMismatch(
                f"the repository was written for weights {parameters['fingerprint'][:12]}, and {parameters['model']} "
                f"has {self._engine.fingerprint[:12]} here; install that model, or write the repository again"
            )
        banks = parameters["banks"]
        self._shelf = Shelf(None if banks is None else Path(banks), self._engine.styles())
        self._events = asyncio.new_event_loop()
        threading.Thread(target=self._events.run_forever, name="answers", daemon=True).start()

    def execute(self, requests: list) -> None:
        for request in requests:
            self._accept(request)
        with self._changed:
            # requests beyond the slots stay in the server's queue, under its limits
            self._changed.wait_for(lambda: len(self._active) < self._slots)

    def finalize(self) -> None:
        self._engine.close()
        self._events.call_soon_threadsafe(self._events.stop)

    def _backend(self, unet) -> ExportedBackend:
        models = {graph.label: model for model, graph in self._graphs.items()}

        def session(graph: GraphEntry) -> BlsSession:
            # the UNet is called at every step, so cancellations are checked once a step
            before = {"before": self._drop_cancelled} if graph.component == "unet" else {}
            return BlsSession(models[graph.label], [name for name, _, _ in graph.outputs], unet.device, **before)

        graphs = {
            graph.label: Graph(
                GraphShape.from_dict(graph.shape),
                session(graph),
                {name: (size, size) for name, size in graph.fixed.items()},
            )
            for graph in self._graphs.values()
            if graph.component == "unet"
        }
        return ExportedBackend(unet, graphs, "triton", components=ExportedParts.of(self._graphs.values(), session))

    def _accept(self, request) -> None:
        client = Client(request.get_response_sender())
        try:
            text, content = _bytes(request, "request"), _bytes(request, "pictures")
            lengths = pb_utils.get_input_tensor_by_name(request, "picture_bytes")
            lengths = [] if lengths is None else torch.from_dlpack(lengths).tolist()
            order = read_order(text, split_pictures(content, lengths), self._shelf)
            job = self._engine.submit(list(order.requests), deadline=order.deadline)
        except Exception as error:
            _refuse(client, error)
            return
        with self._changed:
            self._active[job] = client
        answer = self._answer(job, client, order.preview_every)
        asyncio.run_coroutine_threadsafe(answer, self._events).add_done_callback(_tell_bugs)

    async def _answer(self, job: Job, client: Client, preview_every: int) -> None:
        try:
            if preview_every:
                due = preview_every
                async for preview in job:
                    # steps that passed during a send are skipped; the final answer covers the last step
                    if due <= preview.step < preview.steps:
                        client.send(_response(preview.images(), preview.step, preview.steps))
                        due = preview.step + preview_every
            result = await job
            client.send(_response(result.images, job.steps, job.steps, result.metadata), last=True)
        except Exception as error:
            job.cancel()
            _refuse(client, error)
        finally:
            with self._changed:
                del self._active[job]
                self._changed.notify_all()

    def _drop_cancelled(self) -> None:
        """Cancel the jobs of clients that cancelled; called before every step."""
        with self._changed:
            active = list(self._active.items())
        for job, client in active:
            if client.gone():
                job.cancel()


def _response(images: list, step: int, steps: int, metadata: list[dict] | None = None):
    pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images]
    text = json.dumps(metadata or []).encode()
    outputs = {
        "images": torch.stack(pixels).view(len(images), images[0].height, images[0].width, 3),
        "step": torch.tensor([step], dtype=torch.int32),
        "steps": torch.tensor([steps], dtype=torch.int32),
        "metadata": torch.frombuffer(bytearray(text), dtype=torch.uint8),
    }
    return pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack(name, x) for name, x in outputs.items()])


def _refuse(client: Client, error: Exception) -> None:
    codes = pb_utils.TritonError
    if isinstance(error, StyleFastError):
        message = f"{type(error).__name__}: {error}"
    else:
        pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
        message = f"the server failed with {type(error).__name__}; its log says more"
    table = {
        InvalidRequest: codes.INVALID_ARG,
        JobCancelled: codes.CANCELLED,
        QueueFull: codes.UNAVAILABLE,
        OutOfMemory: codes.UNAVAILABLE,
        EngineClosed: codes.UNAVAILABLE,
    }
    code = next((code for kind, code in table.items() if isinstance(error, kind)), codes.INTERNAL)
    failed = pb_utils.InferenceResponse(error=codes(message, code))
    client.send(failed, last=True)


def _tell_bugs(answer) -> None:
    error = answer.exception()
    if error is not None:
        pb_utils.Logger.log_error("".join(traceback.format_exception(error)))


def _bytes(request, name: str) -> bytes:
    """Return a tensor's bytes; empty if the client sent none."""
    found = pb_utils.get_input_tensor_by_name(request, name)
    return b"" if found is None else torch.from_dlpack(found).cpu().numpy().tobytes()
