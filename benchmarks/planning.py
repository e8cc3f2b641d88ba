"""Host time of planning a batch and of holding bank pages, in C++ and in the plain references.

    python -m benchmarks planning [--rounds 300]

Writes benchmarks/results/planning-cpu.json. A batch of n rows is sets of four pictures in two branches, of which three
read the first one's keys; the pool holds a page for each of n rows, as a step acquires and releases them when all are
resident. Forms run in turn; times are medians in microseconds, checks of arguments included.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.environment import environment
from benchmarks.kernels.report import write
from stylefast.runtime.banks.page_pool import PageBooksRef, PagePool
from stylefast.runtime.steps.step_buffers import LIVE, plan_pages, plan_pages_ref

RESULTS = Path(__file__).parent / "results" / "planning-cpu.json"
ROWS = (8, 64, 512)
WHAT = ("plan a batch", "acquire and release pages")


def planning(rows: int) -> dict[str, Callable]:
    pictures, branches, references = [], [], []
    for row in range(rows):
        picture = row // 2
        pictures.append(picture)
        branches.append(row % 2)
        references.append([(picture - picture % 4, LIVE)] if picture % 4 else [])
    batch = np.array(pictures), np.array(branches), references
    return {"cpp": lambda: plan_pages(*batch), "python": lambda: plan_pages_ref(*batch)}


def holding(pages: int) -> dict[str, Callable]:
    keys = np.array([(page % 8, page // 8, page % 2, 0) for page in range(pages)])
    calls = {}
    for name in ("cpp", "python"):
        pool = PagePool(2 * pages)
        if name == "python":
            pool._books = PageBooksRef(2 * pages)
        pool.filled(pool.prefetch(keys).slots)

        def step(pool: PagePool = pool) -> None:
            pool.wait(pool.acquire(keys).slots)
            pool.release(keys)

        calls[name] = step
    return calls


def measured(calls: dict[str, Callable], rounds: int) -> dict[str, float]:
    runs = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            runs[name].append(time.perf_counter() - start)
    found = {f"{name}_us": round(1e6 * statistics.median(times), 1) for name, times in runs.items()}
    return found | {"python_to_cpp": round(found["python_us"] / found["cpp_us"], 2)}


def markdown(content: dict) -> str:
    """Return the table of docs/serving.md."""
    lines = ["| rows or pages | what | C++ | Python | ratio |", "|---|---|---|---|---|"]
    for row in content["results"]["cases"]:
        times = f"{row['cpp_us']:.0f} µs | {row['python_us']:.0f} µs | {row['python_to_cpp']:.1f}"
        lines.append(f"| {row['rows']} | {row['what']} | {times} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    place = environment("cpu")
    cases = [
        {"what": what, "rows": rows} | measured(make(rows), arguments.rounds)
        for what, make in zip(WHAT, (planning, holding))
        for rows in ROWS
    ]
    result = {"results": {"rounds": arguments.rounds, "cases": cases}, "environment": place}
    write(arguments.out, result)
    print(markdown(result))


if __name__ == "__main__":
    main()
