"""TensorRT engines that run on torch tensors, on the session's own stream, recorded as CUDA graphs.

Large inputs that stay constant for a whole request, mainly keys and values, are read in place. The others are copied
into buffers with fixed addresses, which recorded graphs require.
"""

import logging
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from stylefast.errors import EngineMismatch, ExportError, InvalidRequest, OutOfMemory
from stylefast.export.sessions import check_inputs, check_output, check_outputs
from stylefast.export.tensorrt import (
    EngineLayers,
    forwarder,
    inspect_engine,
    load_package,
    open_engine,
    package_of_plan,
    torch_dtype,
    writing,
)
from stylefast.kernels.gpu.capture import capture
from stylefast.slots import LruDict
from stylefast.values import quoted
from stylefast.whole_files import write_whole

# name prefixes of inputs that are read in place
BY_ADDRESS = ("text_kv_", "image_kv_", "page_kv_", "page_stats_", "page_norms", "lora_down_", "lora_up_")
ALIGNMENT = 256  # bytes, for every address that TensorRT is given

log = logging.getLogger("stylefast.export.tensorrt")

Bounds = tuple[tuple[int, ...], tuple[int, ...]]  # least and most shape of an input


class GpuQueue:
    """A session's own CUDA stream and its operations; tests replace it with a CPU version."""

    def __init__(self, device: torch.device):
        if not torch.cuda.is_available():
            raise EngineMismatch("TensorRT engines run on CUDA devices, and there is none; use backend='onnxruntime'")
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.stream = torch.cuda.Stream(self.device)

    @property
    def handle(self) -> int:
        """Return the stream in TensorRT's form."""
        return self.stream.cuda_stream

    @contextmanager
    def here(self) -> Iterator[None]:
        """Make the device torch's current one."""
        with torch.cuda.device(self.device):
            yield

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """Use the stream, ordered after earlier and before later work of torch's current stream."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            current.wait_stream(self.stream)

    def record(self, call: Callable[[], None]) -> Any:
        """Record the work that `call` puts on the stream as a graph with `replay()`; nothing runs yet."""
        return capture(call, self.stream)

    def wait(self) -> None:
        """Wait until all work on the stream is done."""
        self.stream.synchronize()


@dataclass
class _Shaped:
    """State kept for one set of input shapes: a context set to them, and its recorded graph.

    Each has its own context, because a recorded graph reads shapes from its context's memory.
    """

    context: Any
    inputs: dict[str, torch.Tensor]  # buffers of copied inputs
    outputs: dict[str, torch.Tensor]
    bound: dict[str, int] = field(default_factory=dict)  # addresses of the last run that was not a replay
    recorded: dict[str, int] = field(default_factory=dict)  # addresses in the graph
    graph: Any = None
    ran: bool = False
    recordable: bool = True


class TensorRTSession:
    """TensorRT engine on a CUDA device.

    cuda_graphs: record the engine's work when the same shapes come at the same addresses twice in a row, and replay it
    from then on. by_address: name prefixes of inputs that are not copied; these must be contiguous, at multiples of 256
    bytes, and best stay the same for many runs. shapes_kept: max number of shape sets whose contexts and graphs are
    kept; the least recently used is dropped. kernels: cache file of the kernels that `tensorrt_rtx` compiled for this
    GPU; read if it exists, and written by `close`.

    A TensorRT engine is code: check first that it is trusted (`manifest.check_trust`). Raises MissingDependency;
    InvalidRequest for bad arguments; EngineMismatch without CUDA or for an engine of another chip or version;
    OutOfMemory; ExportError for a damaged or truncated engine.
    """

    def __init__(
        self,
        path: str | Path,
        device: str | torch.device = "cuda",
        *,
        cuda_graphs: bool = True,
        by_address: Collection[str] = BY_ADDRESS,
        shapes_kept: int = 8,
        kernels: str | Path | None = None,
        trt: ModuleType | None = None,
        queue: GpuQueue | None = None,
    ):
        self.path, self.cuda_graphs, self.shapes_kept = Path(path).expanduser(), cuda_graphs, shapes_kept
        if shapes_kept < 1:
            raise InvalidRequest(f"shapes_kept is {shapes_kept}; it must be 1 or more")
        if queue is None and torch.device(device).type != "cuda":
            raise InvalidRequest(f"device is {quoted(str(device))}; TensorRT engines run on 'cuda' and 'cuda:<number>'")
        package = package_of_plan(self.path)
        self._trt = load_package(package) if trt is None else trt
        self._queue = GpuQueue(torch.device(device)) if queue is None else queue
        self.device = self._queue.device
        self._logger = forwarder(self._trt)
        self._lock = threading.Lock()
        self._kept: LruDict[tuple, _Shaped] = LruDict()
        self._kernels = Path(kernels).expanduser() if kernels is not None else None
        self._names = tuple(by_address)
        with self._queue.here():
            self._runtime, self._engine = open_engine(self._trt, self._logger, self.path)
            self._describe()
            self._config, self._cache = self._runtime_config()
            # allocate on the queue's stream, where the buffers are used: memory freed elsewhere may still be written to
            with self._queue.ordered():
                # all contexts share one scratch buffer, because only one runs at a time
                self._scratch = self._buffer(self._engine.device_memory_size_v2)
                self._static = {
                    name: self._buffer(max(self._bytes(name, most) for _, most in self._bounds[name]))
                    for name in self.inputs
                    if not name.startswith(self._names)
                }

    @property
    def layers(self) -> EngineLayers | None:
        """Return the engine's layers; None if it was built without their names."""
        return inspect_engine(self._trt, self._open())

    @property
    def nbytes(self) -> int:
        """Return the bytes on the device of the engine, its scratch memory and its buffers."""
        if self._engine is None:
            return 0
        held = [self._scratch, *self._static.values()]
        return self.path.stat().st_size + sum(buffer.nbytes for buffer in held)

    def run(
        self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Run the engine and return its outputs by name, ready in the order of torch's current stream.

        inputs: every input of the engine, on its device. outputs: tensors to write to; missing ones are allocated.

        Raises EngineMismatch for shapes and types that it was not built for, InvalidRequest for unknown or missing
        names and for tensors that can't be read or written in place, OutOfMemory, and ExportError for any other
        failure.
        """
        given = dict(outputs or {})
        with self._lock:
            self._open()
            shapes = self._check(inputs)
            check_outputs(self.path.name, given, self.outputs)
            with self._queue.here():
                shaped = self._shaped(shapes)
                self._check_outputs(shaped, given)
                # allocated on torch's current stream, to which the allocator returns their memory
                results = {n: given[n] if n in given else torch.empty_like(x) for n, x in shaped.outputs.items()}
                addresses = {name: x.data_ptr() for name, x in inputs.items() if name not in shaped.inputs}
                with self._queue.ordered():
                    for name, buffer in shaped.inputs.items():
                        buffer.copy_(inputs[name])
                    self._execute(shaped, addresses)
                    for name, x in shaped.outputs.items():
                        results[name].copy_(x)
        return results

    def close(self) -> None:
        """Free the engine and all recorded graphs, and write the kernel cache; idempotent."""
        with self._lock:
            if self._engine is None:
                return
            self._queue.wait()
            try:
                if self._kernels is not None and self._cache is not None:
                    with writing(self._kernels):
                        write_whole(self._kernels, memoryview(self._cache.serialize()))
            finally:
                self._kept.clear()
                self._static.clear()
                self._scratch = self._config = self._cache = None
                # the engine must be freed before its runtime
                self._engine = None
                self._runtime = None

    def _open(self):
        if self._engine is None:
            raise ExportError(f"the session of {self.path.name} was closed; open another one")
        return self._engine

    def _describe(self) -> None:
        """Set inputs and outputs by name as (type, dims, -1 for varying ones), and every profile's bounds."""
        engine, trt = self._open(), self._trt
        self.inputs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self.outputs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._bounds: dict[str, list[Bounds]] = {}
        self.profiles = engine.num_optimization_profiles
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            found = torch_dtype(trt, engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name))
            if engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT:
                self.outputs[name] = found
                continue
            self.inputs[name] = found
            if -1 in found[1]:
                corners = [engine.get_tensor_profile_shape(name, p) for p in range(self.profiles)]
                self._bounds[name] = [(tuple(least), tuple(most)) for least, _, most in corners]
            else:
                self._bounds[name] = [(found[1], found[1])] * self.profiles

    def _runtime_config(self) -> tuple[Any, Any]:
        """Return the contexts' configuration and the cache of compiled kernels, or (None, None) for `tensorrt`."""
        trt = self._trt
        if not hasattr(trt, "IRuntimeCache"):
            return None, None
        config = self._open().create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        # compile a shape's kernels at its first use: a recorded graph would keep the fallback kernels
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        cache = config.create_runtime_cache()
        if self._kernels is not None and self._kernels.is_file() and not cache.deserialize(self._kernels.read_bytes()):
            log.info("%s is of another GPU, driver or version; kernels are compiled anew", self._kernels)
        config.set_runtime_cache(cache)
        return config, cache

    def _buffer(self, size: int) -> torch.Tensor:
        return torch.empty(max(size, 1), dtype=torch.uint8, device=self.device)

    def _bytes(self, name: str, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.inputs[name][0].itemsize

    def _check(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
        """Return the inputs' shapes. Raises InvalidRequest and EngineMismatch."""
        free = {n: (dtype, [None if d == -1 else d for d in dims]) for n, (dtype, dims) in self.inputs.items()}
        check_inputs(self.path.name, self.device, inputs, free)
        for name, x in inputs.items():
            if name not in self._static and not (x.is_contiguous() and x.data_ptr() % ALIGNMENT == 0):
                raise InvalidRequest(
                    f"input {name} is read where it lies, and must be contiguous at a multiple of {ALIGNMENT} bytes; "
                    "give a copy of it"
                )
        return {name: tuple(x.shape) for name, x in inputs.items()}

    def _profile(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the tightest profile that accepts the shapes. Raises EngineMismatch if none does."""
        outside = []
        fitting = []
        for profile in range(self.profiles):
            wrong = [name for name, shape in shapes.items() if not _within(shape, self._bounds[name][profile])]
            if wrong:
                outside.append(f"profile {profile} takes {_span(self._bounds[wrong[0]][profile])} for {wrong[0]}")
                named = wrong[0]
            else:
                fitting.append((sum(math.prod(self._bounds[name][profile][1]) for name in shapes), profile))
        if fitting:
            return min(fitting)[1]
        raise EngineMismatch(
            f"{self.path.name} was not built for {named} of shape {list(shapes[named])}: {'; '.join(outside)}. Export "
            "the engine with a profile that holds it"
        )

    def _shaped(self, shapes: Mapping[str, tuple[int, ...]]) -> _Shaped:
        key = tuple(shapes.items())
        shaped = self._kept.use(key)
        if shaped is not None:
            return shaped
        profile = self._profile(shapes)
        for oldest in self._kept.beyond(self.shapes_kept - 1):
            self._queue.wait()  # its context may still be running
            del self._kept[oldest]
        with self._queue.ordered():
            shaped = self._kept[key] = self._new_shaped(profile, shapes)
        return shaped

    def _new_shaped(self, profile: int, shapes: Mapping[str, tuple[int, ...]]) -> _Shaped:
        trt = self._trt
        how = trt.ExecutionContextAllocationStrategy.USER_MANAGED if self._config is None else self._config
        context = self._open().create_execution_context(how)
        if context is None:
            raise self._failure("could not make a context")
        assert self._scratch is not None
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.nbytes)
        done = context.set_optimization_profile_async(profile, self._queue.handle)
        for name, shape in shapes.items():
            done = done and context.set_input_shape(name, shape)
        if not done:
            raise self._failure("refuses the inputs' shapes")
        inputs = {}
        for name, buffer in self._static.items():
            dtype = self.inputs[name][0]
            inputs[name] = buffer[: self._bytes(name, shapes[name])].view(dtype).view(shapes[name])
            context.set_tensor_address(name, inputs[name].data_ptr())
        outputs = {}
        for name, (dtype, _) in self.outputs.items():
            outputs[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=self.device)
            context.set_tensor_address(name, outputs[name].data_ptr())
        shaped = _Shaped(context, inputs, outputs)
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(self._queue.handle):
            shaped.recordable = False
            log.info("%s has work that CUDA graphs can't record; it runs without them", self.path.name)
        return shaped

    def _check_outputs(self, shaped: _Shaped, given: Mapping[str, torch.Tensor]) -> None:
        for name, x in given.items():
            made = shaped.outputs[name]
            check_output(name, x, made.dtype, made.shape, made.device)

    def _execute(self, shaped: _Shaped, addresses: dict[str, int]) -> None:
        """Replay the graph; else run, and record if the previous run had the same addresses."""
        if shaped.graph is not None and shaped.recorded == addresses:
            shaped.graph.replay()
            return
        if shaped.bound != addresses:
            for name, address in addresses.items():
                if not shaped.context.set_tensor_address(name, address):
                    raise self._failure(f"refuses the address of {name}")
            shaped.bound = addresses
        elif shaped.ran and shaped.recordable and self.cuda_graphs:
            # record only after a run, because the first one does setup that can't be recorded
            shaped.graph, shaped.recorded = None, addresses
            try:
                shaped.graph = self._queue.record(lambda: self._enqueue(shaped))
            except (RuntimeError, ExportError, OutOfMemory) as error:
                shaped.recordable = False
                log.warning("%s could not be recorded as a CUDA graph and runs without: %s", self.path.name, error)
            else:
                shaped.graph.replay()
                return
        self._enqueue(shaped)
        shaped.ran = True

    def _enqueue(self, shaped: _Shaped) -> None:
        if not shaped.context.execute_async_v3(self._queue.handle):
            raise self._failure("failed")

    def _failure(self, what: str) -> ExportError | OutOfMemory:
        reason = self._logger.last_errors()
        kind = OutOfMemory if "memory" in reason.lower() else ExportError
        return kind(f"{self.path.name} {what}: {reason}")


def _within(shape: tuple[int, ...], bounds: Bounds) -> bool:
    return all(low <= side <= high for side, low, high in zip(shape, *bounds))


def _span(bounds: Bounds) -> str:
    return "[" + ", ".join(str(low) if low == high else f"{low} to {high}" for low, high in zip(*bounds)) + "]"
