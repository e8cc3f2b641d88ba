"""AOTInductor packages: the UNet's graph compiled ahead of time, so that a process starts without a compiler.

stylefast's operations stay custom ops: a package calls `torch.ops.stylefast.*`, which choose kernels on the machine
that runs it, and only the code between them is generated. That code requires the PyTorch version and the CPU
instructions or GPU architecture that it was compiled with. A package records these in its metadata, which `AotiSession`
reads before it loads anything.

Weights are part of the package, or stay outside (`weights=False`) and are the engine's own tensors, held once in
memory.
"""

import json
import os
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from stylefast.code_caches import inductor_cache
from stylefast.errors import (
    EngineMismatch,
    ExportError,
    InvalidRequest,
    MissingDependency,
    OutOfMemory,
    StyleFastError,
)
from stylefast.export.aoti_facts import KEY, check_machine, facts_of, package_facts, schema_of, short_name, target_of
from stylefast.export.unet_graph import (
    OUTPUT,
    GraphShape,
    Tensor,
    graph_inputs,
    graph_output,
    trace,
)
from stylefast.kernels.checks import integers_within
from stylefast.models.prepacked import channels_last
from stylefast.models.unet import UNet

SUFFIX = ".pt2"
_MODEL = "model"  # the name PyTorch gives a package's only model
_WEIGHT = "unet."  # prefix of parameter names in the graph
_SETTINGS = {
    # biases of few channels would otherwise be compiled into the code and could not be replaced
    "always_keep_tensor_constants": True,
    # use the thread count of the running process, not that of the exporting one
    "cpp.dynamic_threads": True,
}


@dataclass(frozen=True)
class AotiReport:
    """Result of `export_aoti`.

    target: "cpu" or a GPU's architecture, such as "sm90"; toolchain: name -> version; operations: custom op -> its
    calls in the graph; weights: whether the package contains them.
    """

    path: Path
    bytes: int
    seconds: float
    target: str
    toolchain: dict[str, str]
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    operations: dict[str, int]
    weights: bool


def export_aoti(
    unet: UNet,
    shape: GraphShape,
    path: str | Path,
    *,
    fixed: Mapping[str, int] | None = None,
    device: str | torch.device = "cpu",
    weights: bool = True,
) -> AotiReport:
    """Compile a UNet for this machine's CPU or GPU into the package `path`, a file that ends in .pt2.

    fixed: sizes that don't vary, of `unet_graph.DIMENSIONS`; all others may. weights: False leaves them out;
    `AotiSession.set_weights` must then be called before the first run, and the UNet may be on the meta device. The UNet
    is not modified or moved.

    Raises MissingDependency without a C++ compiler or, for a GPU, without Triton; InvalidRequest for arguments that
    don't fit; ExportError if PyTorch can't compile the graph or the file can't be written. `path` is written
    atomically.
    """
    path, device = Path(path).expanduser(), torch.device(device)
    _check_request(unet, path, device, weights)
    _check_toolchain(device)
    start = time.perf_counter()
    twin = _twin(unet, device, weights)
    program = trace(twin, shape, fixed)
    operations = _operations(program)
    facts = facts_of(twin, shape, dict(fixed or {}), device) | {
        "operations": {name: schema_of(name) for name in operations},
        "weights": weights,
        "parameters": _parameters(program),
    }
    settings = _SETTINGS | {
        "aot_inductor.metadata": {KEY: json.dumps(facts)},
        "aot_inductor.package_constants_in_so": weights,
    }
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-") as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own deprecations
            part = os.path.join(folder, path.name)
            with inductor_cache():
                torch._inductor.aoti_compile_and_package(program, package_path=part, inductor_configs=settings)
            os.replace(part, path)
    except OSError as error:
        raise ExportError(f"{path} can't be written: {error.strerror or error}") from error
    except StyleFastError:
        raise
    except Exception as error:  # of many types without a common base
        raise ExportError(
            f"PyTorch {torch.__version__} could not compile the UNet ({shape.flavour}) for {facts['target']}: "
            f"{_line(error)}. Sizes that are fixed (fixed={{'height': .., 'width': ..}}) are easier on it"
        ) from error
    inputs, outputs = tuple(graph_inputs(twin, shape)), (graph_output(twin),)
    seconds, size = time.perf_counter() - start, path.stat().st_size
    return AotiReport(path, size, seconds, facts["target"], facts["toolchain"], inputs, outputs, operations, weights)


class AotiSession:
    """Loaded package, ready to run. A package is code: check its origin first.

    device: "cpu" or "cuda:<number>". Runs are serialised: a second thread waits.

    Raises ExportError for a file that is missing, truncated or foreign, or that PyTorch can't load; EngineMismatch for
    one made with another version of PyTorch or stylefast, or for another kind of CPU or GPU.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu"):
        self.path, self.device = Path(path).expanduser(), torch.device(device)
        facts = package_facts(self.path)
        check_machine(self.path.name, facts, self.device)
        self.shape = GraphShape.from_dict(facts["shape"])
        self.inputs, self.outputs = (
            {name: (getattr(torch, dtype), tuple(dims)) for name, dtype, dims in facts[kind]}
            for kind in ("inputs", "outputs")
        )
        self._sizes = {name: tuple(limits) for name, limits in facts["sizes"].items()}
        self._parameters, self._weights = facts["parameters"], None
        self._ready, self._lock = bool(facts["weights"]), threading.Lock()
        self._own_bytes = self.path.stat().st_size
        index = -1 if self.device.index is None else self.device.index
        try:
            # same as torch._inductor.aoti_load_package, which imports a compiler and takes seconds
            loader = torch._C._aoti.AOTIModelPackageLoader(str(self.path), _MODEL, True, 1, index)
        except (RuntimeError, OSError) as error:
            raise ExportError(
                f"PyTorch can't load {self.path.name}; copy it once more, or export the model again ({_line(error)})"
            ) from error
        self._loader = loader

    @property
    def nbytes(self) -> int:
        """Return the package's size in bytes, about its memory use; shared weights don't count."""
        return self._own_bytes if self._loader is not None else 0

    def set_weights(self, state: Mapping[str, torch.Tensor]) -> int:
        """Use these weights, a UNet's `state_dict()`, from the next run on; return the number of bytes copied.

        Tensors are shared, so later writes to them affect the next run, except those whose strides differ from those
        that the package was compiled for: these are copied. Weights inside the package keep their memory.

        Raises EngineMismatch for weights that are missing or of other types or shapes, InvalidRequest for tensors on
        another device.
        """
        taken, copied = {}, 0
        with self._lock:
            self._check_open()
            missing = self._parameters.keys() - state.keys()
            if missing:
                raise EngineMismatch(
                    f"the weights have no {min(missing)}, which {self.path.name} reads; load the model that was "
                    "exported, or export this one"
                )
            for name, (dtype, shape, strides) in self._parameters.items():
                x = state[name].detach()
                if not _same_device(x.device, self.device):
                    raise InvalidRequest(f"{name} is on {x.device}, the session of {self.path.name} on {self.device}")
                if (short_name(x.dtype), list(x.shape)) != (dtype, shape):
                    raise EngineMismatch(
                        f"{name} is {short_name(x.dtype)} {list(x.shape)}, and {self.path.name} was exported for "
                        f"{dtype} {shape}; load the model that was exported, or export this one"
                    )
                if not _lies(x, strides):
                    x = torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device).copy_(x)
                    copied += x.numel() * x.element_size()
                taken[_WEIGHT + name] = x
            self._loader.load_constants(taken, False, True, True)
            # the package stores only addresses; keep the tensors alive
            self._weights, self._ready = taken, True
        return copied

    def run(
        self, inputs: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Run the graph and return its output by name.

        inputs: every input of the graph, on the session's device. outputs: a tensor that "output" is copied to, of its
        type and shape; without one, the package's own tensor is returned. On a GPU all work is on torch's current
        stream.

        Raises EngineMismatch for tensors and sizes that the package was not made for, InvalidRequest for unknown or
        missing names and an output of another type, shape or device, OutOfMemory, and ExportError for any other
        failure.
        """
        sizes = self._check(inputs)
        if self.device.type == "cpu":
            _check_pages(inputs, sizes)
        given = dict(outputs or {})
        unknown = sorted(given.keys() - self.outputs.keys())
        if unknown:
            raise InvalidRequest(f"{self.path.name} has no output {unknown[0]!r}; it has {', '.join(self.outputs)}")
        if OUTPUT in given:
            self._check_output(given[OUTPUT], sizes)
        tensors = [inputs[name].contiguous() for name in self.inputs]
        with self._lock:
            self._check_open()
            if not self._ready:
                raise ExportError(f"{self.path.name} holds no weights; call set_weights(unet.state_dict()) first")
            try:
                with torch.no_grad():
                    (made,) = self._loader.boxed_run(tensors)
            except StyleFastError:
                raise
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
                    raise OutOfMemory(f"{self.path.name} ran out of memory: {_line(error)}") from error
                raise ExportError(f"{self.path.name} failed: {_line(error)}") from error
        if OUTPUT not in given:
            return {OUTPUT: made}
        given[OUTPUT].copy_(made)
        return given

    def close(self) -> None:
        """Free the code and the weights; idempotent."""
        with self._lock:
            self._loader = self._weights = None

    def _check_open(self) -> None:
        if self._loader is None:
            raise ExportError(f"the session of {self.path.name} was closed; open another one")

    def _check(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, int]:
        """Return the sizes of named dimensions.

        Raises InvalidRequest or EngineMismatch for unfit inputs: generated code has no checks and would read out of
        bounds.
        """
        if inputs.keys() != self.inputs.keys():
            missing, unknown = sorted(self.inputs.keys() - inputs.keys()), sorted(inputs.keys() - self.inputs.keys())
            what = f"needs input {missing[0]!r}" if missing else f"has no input {unknown[0]!r}"
            raise InvalidRequest(f"{self.path.name} {what}; its inputs are {', '.join(self.inputs)}")
        sizes: dict[str, int] = {}
        for name, (dtype, dims) in self.inputs.items():
            x = inputs[name]
            if not _same_device(x.device, self.device):
                raise InvalidRequest(f"input {name} is on {x.device}, the session of {self.path.name} on {self.device}")
            if x.dtype != dtype:
                raise EngineMismatch(
                    f"input {name} is {short_name(x.dtype)}, and {self.path.name} was exported for "
                    f"{short_name(dtype)}; load the model in that type, or export it in this one"
                )
            fits = len(dims) == x.ndim and all(
                side == (dim if isinstance(dim, int) else sizes.setdefault(dim, side))
                for side, dim in zip(x.shape, dims)
            )
            if not fits:
                agreed = ", ".join(f"{dim}={sizes[dim]}" for dim in dims if dim in sizes)
                raise EngineMismatch(
                    f"input {name} has shape {list(x.shape)}, and {self.path.name} was exported for {list(dims)}"
                    + (f" with {agreed}" if agreed else "")
                )
        for dim, size in sizes.items():
            low, high = self._sizes.get(dim, (0, size))
            if not low <= size <= high:
                raise EngineMismatch(
                    f"{dim} is {size}, and {self.path.name} was exported for {low} to {high}; export it for more"
                )
        return sizes

    def _check_output(self, x: torch.Tensor, sizes: Mapping[str, int]) -> None:
        dtype, dims = self.outputs[OUTPUT]
        shape = [sizes.get(dim, dim) for dim in dims]
        if x.dtype != dtype or list(x.shape) != shape or not _same_device(x.device, self.device):
            raise InvalidRequest(
                f"the tensor for output {OUTPUT} is {short_name(x.dtype)} {list(x.shape)} on {x.device}; it must be "
                f"{short_name(dtype)} {shape} on {self.device}"
            )


def _check_pages(inputs: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> None:
    """Raise InvalidRequest for an index out of range, on which generated code would crash the process."""
    pages = sizes["rows"] + sizes.get("pages", 0)
    ranges = {
        "text_page": (0, sizes["text_pages"], "pages of text"),
        "image_page": (-1, sizes.get("image_pages", 0), "image pages (-1: none)"),
        "image_lengths": (0, sizes.get("image_tokens", 0) + 1, "numbers of image tokens"),
        "image_mask": (-1, sizes.get("masks", 0), "masks (-1: everywhere)"),
        "self_page": (-1, pages, "pages of rows and banks (-1: none)"),
        "adain_page": (-1, pages, "pages of rows and banks (-1: none)"),
        "norm_page": (-1, pages, "pages of rows and banks (-1: none)"),
    }
    for name, limits in ranges.items():
        if name in inputs:
            integers_within(name, inputs[name], *limits)


def _check_request(unet: UNet, path: Path, device: torch.device, weights: bool) -> None:
    if path.suffix != SUFFIX:
        raise InvalidRequest(f"path is {str(path)!r}; a package's name ends in {SUFFIX}")
    if not path.parent.is_dir():
        raise InvalidRequest(f"there is no folder {path.parent}; make it first")
    if device.type not in ("cpu", "cuda"):
        raise InvalidRequest(f"device is {str(device)!r}; packages are made for 'cpu' and 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("a package for a GPU is made on a machine that has one, and this has none; device='cpu'")
    if weights and unet.device.type == "meta":
        raise InvalidRequest("the UNet lies on the meta device and has no weights to put in; weights=False leaves them")


def _check_toolchain(device: torch.device) -> None:
    # also for GPUs, whose kernels are launched from C++
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "cl") if name):
        raise MissingDependency(
            "AOTInductor generates C++ and no compiler was found (CXX, g++, clang++, cl); install one, or export on "
            "another machine of this kind: running a package takes none"
        )
    if device.type == "cuda" and find_spec("triton") is None:
        raise MissingDependency(
            "AOTInductor generates Triton kernels and triton is not installed; "
            "`pip install 'stylefast[triton]'` brings it"
        )


def _twin(unet: UNet, device: torch.device, weights: bool) -> UNet:
    """Return an unpacked UNet on a device in the engine's memory layout; it shares tensors if none have to be moved.

    Without weights, uninitialised tensors stand in for moved ones, because their values are not needed.
    """
    state = dict(unet.state_dict())
    if not _same_device(unet.device, device):
        move = (lambda x: x.to(device)) if weights else (lambda x: torch.empty_like(x, device=device))
        state = {name: move(x) for name, x in state.items()}
        channels_last(state)
    return UNet.from_state(unet.config, state)


def _operations(program: torch.export.ExportedProgram) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in program.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "namespace", None) == "stylefast":
            name = node.target.name().removeprefix("stylefast::")
            found[name] = found.get(name, 0) + 1
    return found


def _parameters(program: torch.export.ExportedProgram) -> dict[str, list]:
    """Return type, shape and strides of the weights that the graph reads; it doesn't read the text projections."""
    found = {}
    for node in program.graph.nodes:
        name = program.graph_signature.inputs_to_parameters.get(node.name)
        if name is not None and node.users:
            x = program.state_dict[name]
            found[name.removeprefix(_WEIGHT)] = [short_name(x.dtype), list(x.shape), list(x.stride())]
    return found


def _lies(x: torch.Tensor, strides: list[int]) -> bool:
    """Return whether strides match, ignoring size-1 dimensions."""
    return all(have == want or side == 1 for have, want, side in zip(x.stride(), strides, x.shape))


def _same_device(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index or 0) == (other.index or 0)


def _line(error: Exception) -> str:
    """Return the message on one line, without the Python stack that PyTorch appends."""
    return " ".join(str(error).split()).split(" At: ")[0][:400]


__all__ = ["AotiReport", "AotiSession", "export_aoti", "package_facts", "target_of"]
