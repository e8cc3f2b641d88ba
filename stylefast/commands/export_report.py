"""Describe an export folder: for `stylefast info --engines`, and at the end of `stylefast export`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stylefast.commands.bank_report import shown_bytes
from stylefast.commands.model_options import DEFAULT_MODEL
from stylefast.options import EXPORTED

if TYPE_CHECKING:
    from stylefast.export.manifest import Manifest
    from stylefast.export.options import Options

_BACKENDS = {kind: backend for backend, kind in EXPORTED.items()}


def collect_engines(folder: Path) -> dict[str, Any]:
    """Return an export's manifest, problems with its files, and whether they may be run without --trust.

    Raises ModelNotFound, ModelFormatError.
    """
    from stylefast.errors import UntrustedEngine
    from stylefast.export.manifest import check_trust, file_problems, graph_to_json, read_manifest

    folder = folder.expanduser()
    manifest = read_manifest(folder)
    problems = file_problems(folder, manifest)
    try:
        check_trust(folder, manifest)
        untrusted = None
    except UntrustedEngine as error:
        untrusted = str(error)
    sizes = {entry.name: entry.bytes for entry in manifest.files}
    return {
        "path": str(folder),
        "bytes": manifest.bytes,
        "digest": manifest.digest,
        "unaltered": not problems,
        "problems": problems,
        "untrusted": untrusted,
        "manifest": manifest.to_json()
        | {
            "graphs": [
                graph_to_json(graph) | {"label": graph.label, "bytes": {name: sizes[name] for name in graph.files}}
                for graph in manifest.graphs
            ]
        },
    }


def engines_lines(found: dict[str, Any]) -> list[str]:
    """Format the result of `collect_engines` as lines."""
    manifest = found["manifest"]
    tools = ", ".join(f"{name} {version}" for name, version in manifest["toolchain"].items())
    made = f"by stylefast {manifest['stylefast'] or 'of unknown version'}"
    lines = [
        f"export      {found['path']}, {manifest['kind']}, {shown_bytes(found['bytes'])}",
        f"model       {manifest['model']}, fingerprint {manifest['fingerprint'][:12]}, {manifest['dtype']}",
        f"target      {manifest['target']}",
        f"made        {made}" + (f" with {tools}" if tools else "") + f", format {manifest['format']}",
    ]
    for graph in manifest["graphs"]:
        lines.append(f"graph       {graph['label']}: {_details(graph)}")
    for name, ranges in manifest["profiles"].items():
        lines.append(f"profiles    {name}: {ranges}")
    lines.append(f"digest      {found['digest']}")
    count = len(manifest["files"])
    if found["unaltered"]:
        lines.append(f"files       all {count} unchanged since they were written")
    lines += [f"files       {problem}" for problem in found["problems"].values()]
    lines.append(f"trust       {found['untrusted'] or 'loads without --trust'}")
    return lines


def report_lines(folder: Path, manifest: "Manifest", seconds: float) -> list[str]:
    """Return lines with the files written and the digest to pass to --trust on other machines."""
    lines = [f"{folder}: {len(manifest.graphs)} graphs, {shown_bytes(manifest.bytes)} in {seconds:.0f} s"]
    width = max((len(entry.name) for entry in manifest.files), default=0)
    lines += [f"  {entry.name:{width}}  {shown_bytes(entry.bytes)}" for entry in manifest.files]
    lines.append(f"digest, for --trust after copying the folder elsewhere: {manifest.digest}")
    return lines


def use_words(folder: Path, arguments: argparse.Namespace, options: "Options", auto: str) -> list[str]:
    """Return the command that uses an export; `auto` is the dtype that the engine would choose by default."""
    if options.kind == "triton-repo":
        return ["tritonserver", "--model-repository", str(folder)]
    words = ["stylefast", "generate", "a fish", "--backend", _BACKENDS[options.kind], "--engines", str(folder)]
    words += ["--model", arguments.model] if arguments.model != DEFAULT_MODEL else []
    for name in ("adapter", "image_encoder", "vae"):
        if getattr(arguments, name) is not None:
            words += [f"--{name.replace('_', '-')}", getattr(arguments, name)]
    return words + (["--dtype", options.dtype] if options.dtype != auto else [])


def _details(graph: dict[str, Any]) -> str:
    parts = [f"{name} ({shown_bytes(size)})" for name, size in graph["bytes"].items()]
    for name, one, many in (("references", "reference", "references"), ("segments", "segment", "segments")):
        if graph["shape"].get(name):
            count = graph["shape"][name]
            parts.append(f"{count} {one if count == 1 else many}")
    if graph["shape"].get("lora_slots"):
        slots = graph["shape"]["lora_slots"]
        parts.append(f"{slots} {'LoRA' if slots == 1 else 'LoRAs'} of rank {graph['shape']['lora_rank']}")
    if graph["shape"].get("text_chunks"):
        parts.append(f"texts of {graph['shape']['text_chunks']} chunks")
    if graph["fixed"]:
        parts.append("only " + ", ".join(f"{name} {size}" for name, size in graph["fixed"].items()))
    if graph["opset"] is not None:
        parts.append(f"opset {graph['opset']}")
    return ", ".join(parts)
