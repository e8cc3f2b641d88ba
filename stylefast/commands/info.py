"""`stylefast info`: versions, devices, models and caches, and the form of each operation with the reason."""

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import stylefast
from stylefast import values
from stylefast.commands.bank_report import bank_lines, collect_bank
from stylefast.commands.export_report import collect_engines, engines_lines
from stylefast.errors import InvalidRequest

SUMMARY = "Show versions, devices, kernels, models and caches, or the contents of a style bank or an export."
EXAMPLES = """examples:
  stylefast info
  stylefast info --json
  stylefast info --bank brand.bank
  stylefast info --engines tiny-onnx
"""
PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "numpy",
    "pillow",
    "triton",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx",
)
# distributions that provide the same package
_EDITIONS = {"onnxruntime": ("onnxruntime-gpu",), "tensorrt": ("tensorrt-cu13", "tensorrt-cu12")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add all options."""
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument(
        "--bank",
        metavar="FILE.bank",
        type=Path,
        help="show what this style bank was made from, its size, and whether it is unchanged (exit code 1 if not)",
    )
    parser.add_argument(
        "--engines",
        metavar="FOLDER",
        type=Path,
        help=(
            "show the contents of this export, whether its files are unchanged (exit code 1 if not), and whether "
            "they may be run"
        ),
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the result of `collect`, `collect_bank` or `collect_engines`."""
    if arguments.bank is not None and arguments.engines is not None:
        raise InvalidRequest("--bank and --engines can't be combined; give one")
    if arguments.bank is not None:
        found, lines = collect_bank(arguments.bank), bank_lines
    elif arguments.engines is not None:
        found, lines = collect_engines(arguments.engines), engines_lines
    else:
        found, lines = collect(), _lines
    print(json.dumps(found, indent=2) if arguments.json else "\n".join(lines(found)))
    return 0 if found.get("unaltered", True) else 1


def collect() -> dict[str, Any]:
    """Return everything that `stylefast info` shows, ready for `json.dumps`."""
    return {
        "stylefast": stylefast.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "extension": _extension(),
        "operations": _operations(),
        "models": {"tiny": _tiny()},
        "caches": {"models": _hub_cache()},
    }


def _version(package: str) -> str | None:
    for name in (package, *_EDITIONS.get(package, ())):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _devices() -> list[dict[str, Any]]:
    import torch

    devices = [{"name": "cpu", "threads": torch.get_num_threads(), "cores": os.cpu_count()}]
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        devices.append({"name": f"cuda:{i}", "card": card.name, "memory_gb": round(card.total_memory / 1e9, 1)})
    return devices


def _extension() -> dict[str, Any]:
    from stylefast._extension import extension, extension_error
    from stylefast.kernels.registry import instruction_set

    found = {"found": extension() is not None, "reason": extension_error()}
    try:
        return {**found, "instructions": instruction_set()}
    except InvalidRequest as error:
        return {**found, "instructions": f"none ({error})"}


def _operations() -> list[dict[str, Any]]:
    from stylefast.kernels import registry

    return registry.report()


def _tiny() -> dict[str, Any]:
    from stylefast.models.checkpoint import TINY, load_components
    from stylefast.record_values import shipped

    if not (TINY / "model_index.json").is_file():
        return {"found": False, "folder": str(TINY)}
    size = sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file())
    return {
        "found": True,
        "folder": str(TINY),
        "megabytes": round(size / 1e6, 1),
        "fingerprint": load_components("tiny", device="cpu").fingerprint,
        "references": list(shipped(TINY, "references")),
        "styles": list(shipped(TINY, "styles")),
        "loras": list(shipped(TINY, "loras")),
    }


def _hub_cache() -> dict[str, Any]:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    indices = folder.glob("models--*/snapshots/*/model_index.json") if folder.is_dir() else ()
    names = {index.parents[2].name.removeprefix("models--").replace("--", "/") for index in indices if _is_sdxl(index)}
    return {"folder": str(folder), "sdxl": sorted(names)}


def _is_sdxl(index: Path) -> bool:
    try:
        name = values.read_json(index, "the model's index", kind=dict).get("_class_name")
    except InvalidRequest:
        return False
    return isinstance(name, str) and "StableDiffusionXL" in name


def _lines(found: dict[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["packages"].items())
    lines = [
        f"stylefast {found['stylefast']}, Python {found['python']}, {found['platform']}",
        f"packages    {packages}",
    ]
    for device in found["devices"]:
        details = ", ".join(f"{name} {value}" for name, value in device.items() if name != "name")
        lines.append(f"device      {device['name']} ({details})")
    extension = found["extension"]
    found_text = f"C++ extension found, instructions {extension['instructions'] or 'none that it could use'}"
    lines.append(f"extension   {found_text if extension['found'] else extension['reason']}")
    width = max(len(row["operation"]) for row in found["operations"])
    for row in found["operations"]:
        lines.append(f"operation   {row['operation']:{width}}  {row['form'] or 'none':6}  {row['reason']}")
    tiny = found["models"]["tiny"]
    if tiny["found"]:
        known = f"{tiny['megabytes']} MB, fingerprint {tiny['fingerprint'][:12]}, {tiny['folder']}"
        lines.append(f"model       tiny: {known}")
        lines.append(f"            --style-image {', '.join(tiny['references']) or 'none'}")
        lines.append(f"            --learned {', '.join(tiny['styles']) or 'none'}")
        lines.append(f"            LoRAs in its folder loras: {', '.join(tiny['loras']) or 'none'}")
    else:
        lines.append(f"model       tiny: not in this installation ({tiny['folder']})")
    cache = found["caches"]["models"]
    lines.append(f"cache       {cache['folder']}: SDXL models {', '.join(cache['sdxl']) or 'none'}")
    return lines
