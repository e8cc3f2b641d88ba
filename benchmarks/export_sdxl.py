"""SDXL at full size through the exporters: ONNX and TensorRT-RTX engines of all flavours, random weights.

Every stage runs in its own process, whose time and peak memory are measured. Weights are generated one at a time, so
that only the exporter determines the memory use. Takes some 20 GB of disk, and the memory that it reports.

    python -m benchmarks export_sdxl                         # all flavours, ONNX and an engine for sm89
    python -m benchmarks export_sdxl --flavours banked --targets sm89,sm120
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from benchmarks.environment import environment
from stylefast.export.unet_graph import FLAVOURS, GraphShape, graph_inputs
from stylefast.models.unet import UNet

RESULT = Path(__file__).parent / "results" / "export-sdxl.json"
PROFILE = "rows=2:2:4,size=1024x1024,pages=1:1:2"
# of SDXL base 1.0, as published
CONFIG = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


class RandomWeights(Mapping):
    """A UNet's parameters, generated on each access and not kept."""

    def __init__(self, unet: UNet, dtype: torch.dtype):
        self._held, self._dtype = {name: x.shape for name, x in unet.state_dict().items()}, dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        # all different, because builders store equal weights only once
        shape, draw = self._held[name], torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if len(shape) == 1:
            return torch.full(shape, float(name.endswith("weight")), dtype=self._dtype)
        spread = (shape[1:].numel()) ** -0.5
        return torch.empty(shape, dtype=self._dtype).uniform_(-spread, spread, generator=draw)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def meta_unet(dtype: torch.dtype) -> UNet:
    """Make SDXL's UNet without weights."""
    with torch.device("meta"):
        return UNet(CONFIG).to(dtype).eval().requires_grad_(False)


def write_onnx(folder: Path, flavour: str, dtype: torch.dtype) -> dict:
    """Export one flavour's graph; the first one in a folder also writes the weights."""
    from stylefast.export.onnx_file import WEIGHTS, StoredTensor, WeightFile, export_unet

    unet, stored = meta_unet(dtype), folder / "weights.json"
    weights = None
    if stored.is_file():
        found = {name: StoredTensor(*place) for name, place in json.loads(stored.read_text()).items()}
        weights = WeightFile(folder / WEIGHTS, found)
    entry, weights = export_unet(unet, GraphShape(flavour), folder, weights=weights, state=RandomWeights(unet, dtype))
    stored.write_text(json.dumps(weights.tensors))
    graph = folder / entry.file
    return {
        "graph_bytes": graph.stat().st_size,
        "weight_bytes": weights.path.stat().st_size,
        "inputs": len(entry.inputs),
        "opset": entry.opset,
        **_check(graph),
    }


def _check(graph: Path) -> dict:
    import onnx

    onnx.checker.check_model(str(graph))
    return {"nodes": len(onnx.load(str(graph), load_external_data=False).graph.node), "checker": "clean"}


def build(folder: Path, flavour: str, targets: list[str], dtype: torch.dtype) -> dict:
    """Build one flavour's engine; it is deleted once its size is known."""
    from stylefast.export.tensorrt_build import build_engine
    from stylefast.export.tensorrt_profiles import Profile

    unet, profile = meta_unet(dtype), Profile.parse(PROFILE)
    shapes = profile.shapes(graph_inputs(unet, GraphShape(flavour)), unet.attention_sizes)
    path = folder / f"unet-{flavour}.engine"
    report = build_engine(folder / f"unet-{flavour}.onnx", path, targets, [shapes])
    path.unlink()
    layers = report.layers
    return {
        "engine_bytes": report.bytes,
        "own_peak_gb": round(report.peak_memory / 1e9, 2),
        "package": report.package,
        "version": report.version,
        "targets": targets,
        "profile": PROFILE,
        "attentions": report.network.attentions,
        "fused_attentions": layers and layers.fused_attentions,
        "kernels": layers and layers.kernels,
        "plugins": list(report.network.plugins),
    }


def in_process(stage: list[str]) -> dict:
    """Run a stage of this file in a fresh process; return its output, seconds, and its peak memory in GB."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.export_sdxl", *stage]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise SystemExit(f"{' '.join(stage)} failed ({done.returncode})")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    found["peak_gb"] = found.pop("own_peak_gb")
    return {"seconds": round(time.perf_counter() - start, 1), **found}


def markdown(content: dict) -> str:
    """Format a results file as the table of docs/export.md."""
    names = (
        "flavour",
        "inputs",
        "ONNX: seconds",
        "peak",
        "weights, graph",
        "engine: seconds",
        "peak",
        "size",
        "attentions fused",
    )
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    rows = {(row["flavour"], row["stage"]): row for row in content["rows"]}
    for flavour in dict.fromkeys(row["flavour"] for row in content["rows"]):
        graph, engine = rows[flavour, "onnx"], rows[flavour, "tensorrt"]
        lines.append(
            f"| {flavour} | {graph['inputs']} | {graph['seconds']:.0f} | {graph['peak_gb']:.1f} GB "
            f"| {graph['weight_bytes'] / 1e9:.2f} GB, {graph['graph_bytes'] / 1e6:.1f} MB | {engine['seconds']:.0f} "
            f"| {engine['peak_gb']:.1f} GB | {engine['engine_bytes'] / 1e9:.2f} GB "
            f"| {engine['fused_attentions']} of {engine['attentions']} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flavours", default=",".join(FLAVOURS))
    parser.add_argument("--targets", default="sm89")
    parser.add_argument("--folder", type=Path, default=Path("build/export-sdxl"))
    parser.add_argument("--stage", choices=("onnx", "tensorrt"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dtype, targets = torch.float16, arguments.targets.split(",")
    if arguments.stage:
        flavour = arguments.flavours
        if arguments.stage == "onnx":
            found = write_onnx(arguments.folder, flavour, dtype)
        else:
            found = build(arguments.folder, flavour, targets, dtype)
        own = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)
        print(json.dumps({"own_peak_gb": own} | found))
        return 0
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    result = {
        "benchmark": "export_sdxl",
        "environment": environment("cpu"),
        "dtype": "float16",
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "rows": [],
    }
    try:
        for flavour in arguments.flavours.split(","):
            for stage in ("onnx", "tensorrt"):
                where = ["--stage", stage, "--flavours", flavour, "--folder", str(arguments.folder)]
                row = {"flavour": flavour, "stage": stage, **in_process([*where, "--targets", arguments.targets])}
                print(json.dumps(row), file=sys.stderr)
                result["rows"].append(row)
                RESULT.write_text(json.dumps(result, indent=1) + "\n")
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
