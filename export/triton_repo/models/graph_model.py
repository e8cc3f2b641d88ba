"""One exported ONNX graph in ONNX Runtime: Triton's Python backend loads this file as `model.py`.

For servers without the onnxruntime backend. Tensors are passed as DLPack, because a server's `as_numpy` misreads every
array if the server was built for another major version of numpy than the installed one.
"""

import json
import traceback
from pathlib import Path

import torch
import triton_python_backend_utils as pb_utils

from stylefast.errors import InvalidRequest, OutOfMemory, StyleFastError
from stylefast.export.sessions import OrtSession


class TritonPythonModel:
    """Entry points of Triton's Python backend."""

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        on_gpu = args["model_instance_kind"] == "GPU"
        self._device = torch.device(f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu")
        self._inputs = [tensor["name"] for tensor in config["input"]]
        file = config["parameters"]["graph"]["string_value"]
        folder = Path(args["model_repository"]) / args["model_version"]
        self._session = OrtSession(folder / file, self._device)

    def execute(self, requests: list) -> list:
        return [self._answer(request) for request in requests]

    def finalize(self) -> None:
        self._session.close()

    def _answer(self, request):
        if request.is_cancelled():
            return _failed("the request was cancelled", pb_utils.TritonError.CANCELLED)
        try:
            given = {name: self._tensor(request, name) for name in self._inputs}
            found = self._session.run(given)
        except InvalidRequest as error:
            return _failed(str(error), pb_utils.TritonError.INVALID_ARG)
        except OutOfMemory as error:
            return _failed(str(error), pb_utils.TritonError.UNAVAILABLE)
        except StyleFastError as error:
            return _failed(str(error), pb_utils.TritonError.INTERNAL)
        except Exception as error:  # a bug must not stop the process with all its waiting requests
            pb_utils.Logger.log_error(traceback.format_exc())
            return _failed(f"{type(error).__name__}: {error}", pb_utils.TritonError.INTERNAL)
        wanted = set(request.requested_output_names())
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor.from_dlpack(name, value.contiguous()) for name, value in found.items() if name in wanted]
        )

    def _tensor(self, request, name: str) -> torch.Tensor:
        return torch.from_dlpack(pb_utils.get_input_tensor_by_name(request, name)).to(self._device)


def _failed(message: str, code: int):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
