"""A graph run by another model of this server, with the interface of `stylefast.export.sessions`."""

from collections.abc import Callable, Mapping, Sequence

import torch
import triton_python_backend_utils as pb_utils

from stylefast.errors import ExportError, JobCancelled, OutOfMemory, QueueFull


class BlsSession:
    """Session that sends its inputs to `model` in the same repository and waits for the outputs.

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
