"""A graph that another model of this server runs: looks like a session of `stylefast.export.sessions`."""

from collections.abc import Callable, Mapping, Sequence

import torch
import triton_python_backend_utils as pb_utils

from stylefast.errors import ExportError, JobCancelled, OutOfMemory, QueueFull


class BlsSession:
    """Sends its inputs to `model`, which stands in the same repository, and waits for the outputs.

    outputs: names, in order. before: called before every request, in the thread that makes it.
    """

    nbytes = 0  # the weights are the other model's

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
        """Outputs by name; those in `outputs` are written into the tensors given there.

        Raises ExportError with the other model's message; QueueFull, OutOfMemory and JobCancelled where it says so.
        """
        self._before()
        if self._device.type == "cuda":
            # what is sent is read on streams that know nothing of torch's
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
                # the server takes the memory back with the response
                found[name] = value.to(self._device, copy=True)
        return found

    def close(self) -> None:
        """Nothing is held."""

    def _error(self, error) -> Exception:
        codes, message = pb_utils.TritonError, f"model {self.model}: {error.message()}"
        if error.code() == codes.UNAVAILABLE:
            # of the server's own messages, this one means that there is no room in the queue
            return QueueFull(message) if "queue" in message else OutOfMemory(message)
        return JobCancelled(message) if error.code() == codes.CANCELLED else ExportError(message)
