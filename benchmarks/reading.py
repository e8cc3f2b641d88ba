"""Cost of reading files of tensors instead of mapping them: pages of a style bank, and a model's weights.

    python -m benchmarks reading [--rounds 5] [--megabytes 800]

Writes benchmarks/results/reading-cpu.json. Truncating a mapped file kills the process, so stylefast reads. Both ways
copy the same bytes from the system's page cache to the same place, in turn: layer by layer into a permanent block (as
for pages), and into separate tensors (as for weights). Mapped weights cost nothing until they are used, so both ways
sum them once, which touches every byte. There is no goal: this is the price of a process that a truncated file can't
kill.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.environment import environment
from benchmarks.kernels.report import write
from stylefast.models.stored_tensors import StoredTensors

RESULTS = Path(__file__).parent / "results" / "reading-cpu.json"
TENSORS = 70  # the number of SDXL's self-attention layers


def pages_mapped(path: Path, blocks: list[torch.Tensor]) -> None:
    with safe_open(str(path), framework="pt") as file:
        for i, block in enumerate(blocks):
            block.copy_(file.get_tensor(f"kv.{i}"))


def pages_read(path: Path, blocks: list[torch.Tensor]) -> None:
    stored = StoredTensors(path)
    for i, block in enumerate(blocks):
        stored.read_into(stored.span(f"kv.{i}"), block)
    stored.check()


def weights_mapped(path: Path, _) -> None:
    with safe_open(str(path), framework="pt") as file:
        tensors = [file.get_tensor(name) for name in list(file.keys())]
    _touch(tensors)


def weights_read(path: Path, _) -> None:
    stored = StoredTensors(path)
    _touch([stored[name] for name in stored])


def _touch(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.view(torch.int64).sum()


def seconds(call: Callable, path: Path, blocks: list[torch.Tensor]) -> float:
    """Return CPU time, which load from other programs affects less than wall time."""
    start = time.process_time()
    call(path, blocks)
    return time.process_time() - start


def measured(path: Path, blocks: list[torch.Tensor], rounds: int) -> dict:
    found = {}
    for what, mapped, read in (("pages", pages_mapped, pages_read), ("weights", weights_mapped, weights_read)):
        for way in (mapped, read):
            seconds(way, path, blocks)
        runs = [(seconds(mapped, path, blocks), seconds(read, path, blocks)) for _ in range(rounds)]
        found[what] = {
            "mapped_seconds": round(statistics.median(a for a, _ in runs), 4),
            "read_seconds": round(statistics.median(b for _, b in runs), 4),
            "read_to_mapped": round(statistics.median(b / a for a, b in runs), 3),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=int, default=800, help="size of the file; a step of SDXL in fp16 has 843")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    place = environment("cpu")
    count = arguments.megabytes * 1_000_000 // TENSORS // 2 // 4 * 4
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "page.safetensors")
        save_file({f"kv.{i}": torch.zeros(count, dtype=torch.float16) for i in range(TENSORS)}, path)
        blocks = [torch.zeros(count, dtype=torch.float16) for _ in range(TENSORS)]
        result = {"bytes": path.stat().st_size, "rounds": arguments.rounds, **measured(path, blocks, arguments.rounds)}
    write(arguments.out, {"results": result, "environment": place})
    for what in ("pages", "weights"):
        row = result[what]
        print(f"{what}: mapped {row['mapped_seconds']} s, read {row['read_seconds']} s, {row['read_to_mapped']}x")
