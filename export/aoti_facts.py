"""Metadata of an AOTInductor package, and checks that its code can run here.

PyTorch only warns about a package from another version or machine; here it is refused.
"""

import platform
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from stylefast import values
from stylefast.errors import EngineMismatch, ExportError
from stylefast.export.unet_graph import DIMENSIONS, GraphShape, Tensor, graph_inputs, graph_output, with_tokens
from stylefast.models.unet import UNet

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
_SHAPE = {field.name for field in fields(GraphShape)}
# features PyTorch reports that compilers never use on their own
_UNUSED = {"clflush", "clflushopt", "clwb", "sha", "aes"}


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
    if facts.get("format") != _FORMAT or not facts.keys() >= _FACTS or facts["shape"].keys() != _SHAPE:
        raise EngineMismatch(f"{path} was written by another version of stylefast; export the model again")
    return facts


def facts_of(unet: UNet, shape: GraphShape, fixed: dict[str, int], device: torch.device) -> dict[str, Any]:
    exact = with_tokens(unet, fixed) if {"height", "width"} <= fixed.keys() else fixed

    def described(tensor: Tensor) -> list:
        return [tensor.name, short_name(tensor.dtype), [exact.get(dim, dim) for dim in tensor.dims]]

    return {
        "format": _FORMAT,
        "shape": shape.to_dict(),
        "fixed": fixed,
        "inputs": [described(tensor) for tensor in graph_inputs(unet, shape)],
        "outputs": [described(graph_output(unet))],
        "sizes": DIMENSIONS,
        "target": target_of(device),
        "toolchain": _toolchain(),
        "machine": _machine(),
        "instructions": sorted(_instructions()),
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
    if facts["machine"] != _machine():
        raise EngineMismatch(f"{name} was made for {facts['machine']}, and this is {_machine()}; export the model here")
    lacking = sorted(set(facts["instructions"]) - _instructions())
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


def short_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _toolchain() -> dict[str, str]:
    found = {"torch": torch.__version__}
    with suppress(PackageNotFoundError):
        found["triton"] = version("triton")
    return found


def _machine() -> str:
    return f"{platform.system()} {platform.machine()}"


def _instructions() -> set[str]:
    """Return the CPU extensions that code generated here may use: it is compiled for this machine's CPU."""
    return {name for name, there in torch.cpu.get_capabilities().items() if there is True} - _UNUSED


def schema_of(operation: str) -> str:
    packet = getattr(torch.ops.stylefast, operation, None)
    return "" if packet is None else str(packet.default._schema)
