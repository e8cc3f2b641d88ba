"""AOTInductor packages: the UNet's graph compiled ahead of time, so that a process starts without a compiler.

stylefast's operations stay custom ops: a package calls `torch.ops.stylefast.*`, which choose kernels on the machine
that runs it, and only the code between them is generated. That code requires the PyTorch version and the CPU
instructions or GPU architecture that it was compiled with. A package records these in its metadata, which `AotiSession`
reads before it loads anything: PyTorch itself would only warn.

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
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch._C._aoti

from stylefast import values
from stylefast.code_caches import cpu_instructions, inductor_cache, machine
from stylefast.errors import EngineMismatch, ExportError, InvalidRequest, MissingDependency, OutOfMemory, StyleFastError
from stylefast.export.manifest import versions
from stylefast.export.onnx_file import described
from stylefast.export.sessions import check_inputs, check_output, check_outputs, same_device
from stylefast.export.unet_graph import (
    OUTPUT,
    GraphShape,
    Tensor,
    dimensions,
    graph_inputs,
    graph_output,
    short_name,
    trace,
    with_tokens,
)
from stylefast.kernels.checks import integers_within
from stylefast.models.prepacked import channels_last
from stylefast.models.row_loras import NO_UNIT
from stylefast.models.unet import UNet
from stylefast.whole_files import put_in_place, sync

KEY, _FORMAT = "stylefast", 1  # KEY: metadata key of the facts
_FACTS = {
    "shape",
    "fixed",
    "inputs",
    "outputs",
    "sizes",
    "target",
    "toolchain",
    "machine",
    "instructions",
    "operations",
    "weights",
    "parameters",
}


def package_facts(path: str | Path) -> dict[str, Any]:
    """Return a package's metadata without running any of its code.

    "shape" (of a `GraphShape`), "fixed", "inputs" and "outputs" ([name, type, dims]), "sizes" (dimension -> least and
    most), "target", "toolchain", "weights" (whether it contains them), "parameters" (name -> type, shape, strides),
    "operations" (custom op -> its schema), "machine" and "instructions" of the CPU.

    Raises ExportError for a file that is missing, truncated, or not a stylefast package, and EngineMismatch for one of
    another stylefast version.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ExportError(f"there is no package at {path}; run `stylefast export aoti`, or check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if name.endswith("_metadata.json")]
            read = partial(values.load_json, what="its metadata", kind=dict)
            found = [read(archive.read(name)).get(KEY) for name in names]
        facts = next((read(text) for text in found if text), None)
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ExportError(f"{path} is truncated, damaged or no package ({error}); export the model again") from error
    if not isinstance(facts, dict):
        raise ExportError(f"{path} is a package that stylefast has not written; run `stylefast export aoti`")
    if facts.get("format") != _FORMAT or not facts.keys() >= _FACTS or not GraphShape.knows(facts["shape"]):
        raise EngineMismatch(f"{path} was written by another version of stylefast; export the model again")
    return facts


def facts_of(unet: UNet, shape: GraphShape, fixed: dict[str, int], device: torch.device) -> dict[str, Any]:
    known = with_tokens(unet, fixed)
    return {
        "format": _FORMAT,
        "shape": shape.to_dict(),
        "fixed": fixed,
        "inputs": described([t.fixed(known) for t in graph_inputs(unet, shape)]),
        "outputs": described([graph_output(unet).fixed(known)]),
        "sizes": dimensions(unet, shape),
        **made_on(device),
    }


def made_on(device: str | torch.device) -> dict[str, Any]:
    """Return the facts of a package compiled now that `check_machine` compares, apart from the graph's operations.

    Raises InvalidRequest for a device that packages can't be compiled for here.
    """
    _check_device(torch.device(device))
    return {
        "target": target_of(device),
        "toolchain": {"torch": torch.__version__} | versions("triton"),
        "machine": machine(),
        "instructions": cpu_instructions(),
    }


def check_machine(name: str, facts: Mapping[str, Any], device: torch.device) -> None:
    """Raise EngineMismatch if a package's code can't run on this machine and device."""
    made, here = facts["toolchain"]["torch"], torch.__version__
    if made != here:
        raise EngineMismatch(
            f"{name} was made with PyTorch {made}, and this is {here}; install that version, or export the model again"
        )
    for operation, schema in facts["operations"].items():
        if schema != schema_of(operation):
            raise EngineMismatch(
                f"{name} was made with another version of stylefast, whose {operation} takes other arguments; export "
                "the model again"
            )
    kind = "cpu" if facts["target"] == "cpu" else "cuda"
    if device.type != kind:
        raise EngineMismatch(f"{name} was made for {facts['target']}, and the device is {device}; export it for that")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EngineMismatch(f"{name} was made for {facts['target']}, and this machine has no GPU")
    if target_of(device) != facts["target"]:
        raise EngineMismatch(
            f"{name} was made for {facts['target']}, and {device} is {target_of(device)}; export it for that one"
        )
    if facts["machine"] != machine():
        raise EngineMismatch(f"{name} was made for {facts['machine']}, and this is {machine()}; export the model here")
    lacking = sorted(set(facts["instructions"]) - set(cpu_instructions()))
    if lacking:
        raise EngineMismatch(
            f"{name} was made on a CPU with {', '.join(lacking)}, which this one does not have; export the model here"
        )


def target_of(device: str | torch.device) -> str:
    """Return a device's target name: "cpu", or a GPU's architecture, such as "sm90"."""
    device = torch.device(device)
    if device.type == "cpu":
        return "cpu"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def schema_of(operation: str) -> str:
    packet = getattr(torch.ops.stylefast, operation, None)
    return "" if packet is None else str(packet.default._schema)


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
            part = Path(folder) / path.name
            with inductor_cache():
                torch._inductor.aoti_compile_and_package(program, package_path=str(part), inductor_configs=settings)
            sync(part)
            put_in_place(part, path)
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
            loader = self._open()
            missing = self._parameters.keys() - state.keys()
            if missing:
                raise EngineMismatch(
                    f"the weights have no {min(missing)}, which {self.path.name} reads; load the model that was "
                    "exported, or export this one"
                )
            for name, (dtype, shape, strides) in self._parameters.items():
                x = state[name].detach()
                if not same_device(x.device, self.device):
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
            loader.load_constants(taken, False, True, True)
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
        sizes = check_inputs(self.path.name, self.device, inputs, self.inputs)
        self._check_sizes(sizes)
        if self.device.type == "cpu":
            _check_pages(inputs, sizes)
        given = dict(outputs or {})
        check_outputs(self.path.name, given, self.outputs)
        if OUTPUT in given:
            dtype, dims = self.outputs[OUTPUT]
            check_output(OUTPUT, given[OUTPUT], dtype, [sizes.get(dim, dim) for dim in dims], self.device)
        tensors = [inputs[name].contiguous() for name in self.inputs]
        with self._lock:
            loader = self._open()
            if not self._ready:
                raise ExportError(f"{self.path.name} holds no weights; call set_weights(unet.state_dict()) first")
            try:
                with torch.no_grad():
                    (made,) = loader.boxed_run(tensors)
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

    def _open(self):
        if self._loader is None:
            raise ExportError(f"the session of {self.path.name} was closed; open another one")
        return self._loader

    def _check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Raise EngineMismatch for sizes out of range: generated code has no checks and would read out of bounds."""
        for dim, size in sizes.items():
            low, high = self._sizes.get(dim, (0, size))
            if not low <= size <= high:
                raise EngineMismatch(
                    f"{dim} is {size}, and {self.path.name} was exported for {low} to {high}; export it for more"
                )


def _check_pages(inputs: Mapping[str, torch.Tensor], sizes: Mapping[str, int]) -> None:
    """Raise InvalidRequest for an index out of range, on which generated code would crash the process."""
    pages = sizes["rows"] + sizes.get("pages", 0)
    ranges = {
        "text_page": (0, sizes["text_pages"], "pages of text"),
        "text_lengths": (1, sizes.get("text_tokens", 0) + 1, "numbers of tokens"),
        "image_page": (-1, sizes.get("image_pages", 0), "image pages (-1: none)"),
        "image_lengths": (0, sizes.get("image_tokens", 0) + 1, "numbers of image tokens"),
        "image_mask": (-1, sizes.get("masks", 0), "masks (-1: everywhere)"),
        "self_page": (-1, pages, "pages of rows and banks (-1: none)"),
        "adain_page": (-1, pages, "pages of rows and banks (-1: none)"),
        "norm_page": (-1, pages, "pages of rows and banks (-1: none)"),
    }
    if "lora_unit" in inputs:
        most = max(size for name, size in sizes.items() if name.startswith("units_"))
        ranges["lora_unit"] = (NO_UNIT, most, "units of the largest pool (-1: none)")
    for name, limits in ranges.items():
        if name in inputs:
            integers_within(name, inputs[name], *limits)


def _check_request(unet: UNet, path: Path, device: torch.device, weights: bool) -> None:
    if path.suffix != SUFFIX:
        raise InvalidRequest(f"path is {values.quoted(str(path))}; a package's name ends in {SUFFIX}")
    if not path.parent.is_dir():
        raise InvalidRequest(f"there is no folder {path.parent}; make it first")
    _check_device(device)
    if weights and unet.device.type == "meta":
        raise InvalidRequest(
            "the UNet is on the meta device and has no weights to include; weights=False leaves them out"
        )


def _check_device(device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise InvalidRequest(f"device is {values.quoted(str(device))}; packages are made for 'cpu' and 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("a package for a GPU is made on a machine that has one, and this has none; device='cpu'")


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
    if not same_device(unet.device, device):
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


def _line(error: Exception) -> str:
    """Return the message on one line, without the Python stack that PyTorch appends."""
    return " ".join(str(error).split()).split(" At: ")[0][:400]
