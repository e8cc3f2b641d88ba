"""Loading a page of SDXL's size into host memory, in C++ and piece by piece in Python.

    python -m benchmarks copies [--rounds 15]

Writes benchmarks/results/copies-cpu.json. Both forms run on the four threads that load pages, in turn: from memory and
from a file in the system's page cache, alone, beside a thread that calls small operations of PyTorch (as an engine
does), and beside one that only runs Python and so lets go of the interpreter's lock every 5 ms.
"""

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

from benchmarks.environment import environment
from benchmarks.kernels.report import write
from stylefast.models.stored_tensors import StoredTensors
from stylefast.runtime.banks import copies

RESULTS = Path(__file__).parent / "results" / "copies-cpu.json"
THREADS = 4
BESIDE = ("nothing", "operations", "Python")


def page() -> dict[str, torch.Tensor]:
    """Return what one page of a bank of SDXL at 1024x1024 holds: keys and values, statistics, group norms."""
    found = {}
    for i in range(70):
        tokens, width = (4096, 640) if i < 10 else (1024, 1280)
        found[f"kv.{i}"] = torch.ones(2, tokens, width, dtype=torch.float16)
        found |= {f"mean.{i}": torch.ones(3, width), f"variance.{i}": torch.ones(3, width)}
    return found | {f"norm.{i}": torch.ones(32) for i in range(92)}


def busy(kind: str, stop: threading.Event) -> None:
    x, count = torch.ones(64), 0
    while not stop.is_set():
        for _ in range(50):
            if kind == "operations":
                x.add_(1)
            count += 1


def load(executor: ThreadPoolExecutor, sources, destinations, kind: str) -> tuple[float, float]:
    """Return the seconds until the page is there, and those that its caller was kept."""
    stop = threading.Event()
    thread = threading.Thread(target=busy, args=(kind, stop))
    if kind != "nothing":
        thread.start()
    start = time.perf_counter()
    started = copies.start_copies(executor, sources, destinations)
    given = time.perf_counter()
    for one in started:
        one.result()
    ended = time.perf_counter()
    stop.set()
    if kind != "nothing":
        thread.join()
    return ended - start, given - start


def measured(sources, destinations, kind: str, rounds: int) -> dict[str, float]:
    forms: tuple[tuple[str, Callable], ...] = (("cpp", copies.copy_blocks), ("python", copies.copy_blocks_ref))
    runs: dict[str, list[tuple[float, float]]] = {"cpp": [], "python": []}
    with ThreadPoolExecutor(THREADS) as executor:
        for _ in range(rounds + 1):
            for name, form in forms:
                with mock.patch.object(copies, "copy_blocks", form):
                    runs[name].append(load(executor, sources, destinations, kind))
    found = {f"{name}_ms": round(1e3 * statistics.median(one for one, _ in runs[name][1:]), 1) for name in runs}
    ratios = [python / cpp for (python, _), (cpp, _) in zip(runs["python"][1:], runs["cpp"][1:])]
    kept = statistics.median(given for _, given in runs["cpp"][1:])
    return found | {"python_to_cpp": round(statistics.median(ratios), 2), "caller_ms": round(1e3 * kept, 2)}


def markdown(content: dict) -> str:
    """Return the table of docs/banks.md."""
    lines = ["| from | another thread runs | C++ | Python | ratio |", "|---|---|---|---|---|"]
    for row in content["results"]["loads"]:
        times = f"{row['cpp_ms']:.0f} ms | {row['python_ms']:.0f} ms | {row['python_to_cpp']:.2f}"
        lines.append(f"| {row['from']} | {row['beside']} | {times} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    place, tensors = environment("cpu"), page()
    destinations = [torch.zeros_like(tensor) for tensor in tensors.values()]
    loads = []
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder, "page.safetensors"))
        stored = StoredTensors(Path(folder, "page.safetensors"))
        for kind in BESIDE:
            for place_of, sources in (
                ("memory", list(tensors.values())),
                ("a file", [stored.span(k) for k in tensors]),
            ):
                row = measured(sources, destinations, kind, arguments.rounds)
                loads.append({"from": place_of, "beside": kind} | row)
    size = sum(tensor.nbytes for tensor in destinations)
    result = {"bytes": size, "pieces": len(tensors), "rounds": arguments.rounds, "loads": loads}
    write(arguments.out, {"results": result, "environment": place})
    print(markdown({"results": result}))


if __name__ == "__main__":
    main()
