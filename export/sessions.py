"""Exported ONNX graphs that run on torch tensors, which ONNX Runtime reads and writes in place.

Every session of an exported graph, in any runtime, has `run(inputs, outputs)` and `close()`.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from stylefast.errors import EngineMismatch, ExportError, InvalidRequest, MissingDependency, OutOfMemory
from stylefast.export.unet_graph import short_name
from stylefast.values import quoted

# ONNX's number of an element type -> (torch's type, ONNX Runtime's name)
_TYPES = {
    1: (torch.float32, "float"),
    2: (torch.uint8, "uint8"),
    3: (torch.int8, "int8"),
    6: (torch.int32, "int32"),
    7: (torch.int64, "int64"),
    9: (torch.bool, "bool"),
    10: (torch.float16, "float16"),
    11: (torch.float64, "double"),
    16: (torch.bfloat16, "bfloat16"),
}
_NUMBERS = {dtype: number for number, (dtype, _) in _TYPES.items()}
_DTYPES = {f"tensor({name})": dtype for dtype, name in _TYPES.values()}
_CUDA = "CUDAExecutionProvider"
# microseconds that ONNX Runtime's threads spin before they sleep: about as long as OpenMP's, for the reasons in
# `stylefast.threads`. The longer default slows down a busy machine and gains nothing on an idle one
_SPIN = ("session.intra_op.spin_duration_us", "30")
# messages of ONNX Runtime for valid graphs that this version can't run
_FOREIGN = ("unsupported model ir version", "opset", "not implemented")
_NO_KERNEL = "could not find an implementation"
_DATA = ("external data", "external initializer", "initializer")


class Session(Protocol):
    """Exported graph, ready to run."""

    def run(
        self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Run the graph on tensors by name; see `OrtSession.run`."""
        ...

    def close(self) -> None:
        """Free the graph."""


class OrtSession:
    """ONNX file in ONNX Runtime, with graph optimisations on.

    device: "cpu", or "cuda:0" with `onnxruntime-gpu`, whose kernels run on the session's own stream, ordered with
    torch's current stream before and after. threads: of one operator on a CPU; None: torch's thread count.

    Raises MissingDependency without ONNX Runtime, or without its CUDA provider if needed; ExportError for a file that
    is missing, truncated or damaged, or whose external data is; EngineMismatch for a graph that this version can't run.
    """

    def __init__(
        self,
        path: str | Path,
        device: str | torch.device = "cpu",
        threads: int | None = None,
    ):
        self.path, self.device = Path(path).expanduser(), torch.device(device)
        runtime = require_onnxruntime(self.device)
        if not self.path.is_file():
            raise ExportError(f"there is no graph at {self.path}; run `stylefast export onnx`, or check the path")
        self._stream = None
        if self.device.type == "cuda":
            if self.device.index is None:
                self.device = torch.device("cuda", torch.cuda.current_device())
            self._stream = torch.cuda.Stream(self.device)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
        options.add_session_config_entry(*_SPIN)
        # only fatal errors: others are raised as exceptions and would also be printed to stderr
        options.log_severity_level = 4
        try:
            self._session = runtime.InferenceSession(str(self.path), options, providers=self._providers())
        except Exception as error:  # ONNX Runtime's own types, without a common base
            raise _loading(self.path, error) from error
        if self._stream is not None and _CUDA not in self._session.get_providers():
            raise ExportError(
                "onnxruntime could not load its CUDA provider; its log says which library is missing. Install CUDA and "
                "cuDNN in the versions that it names, or load the model with device='cpu'"
            )
        self.inputs = {x.name: (_DTYPES.get(x.type), tuple(x.shape)) for x in self._session.get_inputs()}
        self.outputs = {x.name: (_DTYPES.get(x.type), tuple(x.shape)) for x in self._session.get_outputs()}
        self._run_options = runtime.RunOptions()
        self._run_options.log_severity_level = 4
        if self._stream is not None:
            # streams wait for each other; the host doesn't wait
            self._run_options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(
        self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Run the graph and return its outputs by name.

        inputs: every input of the graph, on the session's device. outputs: tensors to write to, contiguous and of the
        right shape; missing ones are allocated. On a GPU the results are ready in the order of torch's current stream.

        Raises EngineMismatch for tensors that the graph was not exported for, InvalidRequest for unknown or missing
        names and for unfit outputs, OutOfMemory, and ExportError for any other failure.
        """
        if self._session is None:
            raise ExportError(f"the session of {self.path.name} was closed; open another one")
        sizes = check_inputs(self.path.name, self.device, inputs, self.inputs)
        given = dict(outputs or {})
        check_outputs(self.path.name, given, self.outputs)
        binding = self._session.io_binding()
        place = (self.device.type, self.device.index or 0)
        held = []  # keep tensors alive until the graph has run, because bindings are addresses
        for name, x in inputs.items():
            held.append(_somewhere(x.contiguous()))
            binding.bind_input(name, *place, _NUMBERS[x.dtype], list(x.shape), held[-1].data_ptr())
        results: dict[str, torch.Tensor] = {}
        for name, (dtype, dims) in self.outputs.items():
            shape = [sizes.get(dim, dim) for dim in dims]
            known = [side for side in shape if isinstance(side, int)]
            if name in given:
                results[name] = self._checked(name, given[name], dtype, shape)
            elif dtype is not None and len(known) == len(shape):
                results[name] = torch.empty(known, dtype=dtype, device=self.device)
            elif self.device.type == "cpu" and dtype not in (None, torch.bfloat16):  # numpy has no bfloat16
                binding.bind_output(name, *place)
                continue
            else:
                raise InvalidRequest(
                    f"the shape of {name} ({dims}) does not follow from the inputs' dimensions; give a tensor for it"
                )
            x = results[name]
            held.append(_somewhere(x))
            binding.bind_output(name, *place, _NUMBERS[x.dtype], list(x.shape), held[-1].data_ptr())
        try:
            with torch.cuda.device(self.device) if self._stream is not None else nullcontext():
                if self._stream is not None:
                    self._stream.wait_stream(torch.cuda.current_stream(self.device))
                self._session.run_with_iobinding(binding, self._run_options)
                if self._stream is not None:
                    torch.cuda.current_stream(self.device).wait_stream(self._stream)
        except Exception as error:
            raise _running(self.path, error) from error
        for name, value in zip(self.outputs, binding.get_outputs(), strict=True):
            if name not in results:
                results[name] = torch.from_numpy(value.numpy())
        return {name: results[name] for name in self.outputs}

    def close(self) -> None:
        """Free the graph and its weights; idempotent."""
        if self._stream is not None:
            self._stream.synchronize()
        self._session = None

    def _providers(self) -> list:
        if self._stream is None:
            return ["CPUExecutionProvider"]
        options = {"device_id": str(self.device.index or 0), "user_compute_stream": str(self._stream.cuda_stream)}
        # for operators without a CUDA kernel, such as arithmetic on shapes
        return [(_CUDA, options), "CPUExecutionProvider"]

    def _checked(self, name: str, x: torch.Tensor, dtype: torch.dtype | None, shape: Sequence) -> torch.Tensor:
        check_output(name, x, dtype, shape, self.device)
        if not x.is_contiguous():
            raise InvalidRequest(f"the tensor for output {name} is not contiguous; give one that is")
        return x


def check_names(file: str, inputs: Collection[str], known: Collection[str]) -> None:
    """Raise InvalidRequest unless exactly the known inputs of a graph's file are given."""
    missing, unknown = sorted(set(known) - set(inputs)), sorted(set(inputs) - set(known))
    if missing or unknown:
        what = f"needs input {quoted(missing[0])}" if missing else f"has no input {quoted(unknown[0])}"
        raise InvalidRequest(f"{file} {what}; its inputs are {', '.join(known)}")


def check_outputs(file: str, outputs: Collection[str], known: Collection[str]) -> None:
    """Raise InvalidRequest for an output that a graph's file does not have."""
    unknown = sorted(set(outputs) - set(known))
    if unknown:
        raise InvalidRequest(f"{file} has no output {quoted(unknown[0])}; it has {', '.join(known)}")


def check_inputs(
    file: str, device: torch.device, inputs: Mapping[str, torch.Tensor], known: Mapping[str, tuple]
) -> dict[str, int]:
    """Return the sizes of a graph's named dimensions.

    known: type and dimensions by name; a dimension of None takes any size. Raises InvalidRequest for unknown and
    missing inputs and for another device than the session's, EngineMismatch for types and shapes that the graph was not
    exported for.
    """
    check_names(file, inputs, known)
    sizes: dict[str, int] = {}
    for name, (dtype, dims) in known.items():
        x = inputs[name]
        if not same_device(x.device, device):
            raise InvalidRequest(f"input {name} is on {x.device}, the session of {file} on {device}")
        if x.dtype != dtype:
            raise EngineMismatch(
                f"input {name} is {short_name(x.dtype)}, and {file} was exported for {short_name(dtype)}; load the "
                "model in that type, or export it in this one"
            )
        fits = len(dims) == x.ndim and all(
            dim is None or side == (dim if isinstance(dim, int) else sizes.setdefault(dim, side))
            for side, dim in zip(x.shape, dims)
        )
        if not fits:
            agreed = ", ".join(f"{dim}={sizes[dim]}" for dim in dims if dim in sizes)
            raise EngineMismatch(
                f"input {name} has shape {list(x.shape)}, and {file} was exported for {list(dims)}"
                + (f" with {agreed}" if agreed else "")
            )
    return sizes


def check_output(name: str, x: torch.Tensor, dtype: torch.dtype | None, shape: Sequence, device: torch.device) -> None:
    """Raise InvalidRequest unless a tensor fits an output, whose sides that are no numbers may have any size."""
    fits = len(shape) == x.ndim and all(side == dim or not isinstance(dim, int) for side, dim in zip(x.shape, shape))
    if x.dtype != dtype or not fits or not same_device(x.device, device):
        raise InvalidRequest(
            f"the tensor for output {name} is {short_name(x.dtype)} {list(x.shape)} on {x.device}; it must be "
            f"{short_name(dtype)} {list(shape)} on {device}"
        )


def same_device(one: torch.device, other: torch.device) -> bool:
    """Return whether two devices are the same one; "cuda" means "cuda:0"."""
    return one.type == other.type and (one.index or 0) == (other.index or 0)


def require_onnxruntime(device: str | torch.device = "cpu") -> Any:
    """Return the module `onnxruntime`. Raises MissingDependency if it, or its CUDA part if needed, is not installed."""
    place = torch.device(device)
    if place.type not in ("cpu", "cuda"):
        raise InvalidRequest(f"device is {quoted(str(device))}; ONNX graphs run on 'cpu' and 'cuda:<number>'")
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(
            "exported ONNX graphs run in ONNX Runtime, which is not installed; `pip install 'stylefast[export]'` "
            "brings it"
        ) from error
    if place.type == "cuda" and _CUDA not in onnxruntime.get_available_providers():
        raise MissingDependency(
            "this onnxruntime has no CUDA provider; `pip install onnxruntime-gpu` in place of onnxruntime, or load the "
            "model with device='cpu'"
        )
    return onnxruntime


def _somewhere(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or for an empty one, which has no address, a substitute with an address."""
    return x if x.numel() else torch.zeros(1, dtype=x.dtype, device=x.device)


def _line(error: Exception) -> str:
    """Return ONNX Runtime's message on one line, without leading codes and source paths."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    return re.sub(r"\S*/(\w+\.(?:cc|h|cpp):\d+) ", r"\1 ", text)[:400]


def _loading(path: Path, error: Exception) -> ExportError:
    text = str(error).lower()
    if _NO_KERNEL in text:
        return EngineMismatch(
            f"{path.name} has an operator that onnxruntime lacks on this device in the graph's type: {_line(error)}; "
            "export in another type (CPUs want float32 or float16), or run on another device"
        )
    if any(mark in text for mark in _FOREIGN):
        return EngineMismatch(
            f"this onnxruntime can't run {path.name}: {_line(error)}; install a newer one, or export with a lower opset"
        )
    what = "is truncated or damaged"
    if any(mark in text for mark in _DATA):
        what = "can't be loaded: its external data is missing or truncated"
    return ExportError(f"{path.name} {what}; export the model again, or copy the whole folder ({_line(error)})")


def _running(path: Path, error: Exception) -> Exception:
    text = str(error).lower()
    if isinstance(error, MemoryError) or "failed to allocate memory" in text or "out of memory" in text:
        return OutOfMemory(f"{path.name} ran out of memory: {_line(error)}")
    return ExportError(f"{path.name} failed: {_line(error)}")
