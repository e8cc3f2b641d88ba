"""Two checkouts against each other, measured in turn so that a change of the machine's speed hits both.

    python -m benchmarks compare --old ../stylefast-before [--rounds 5] [--processes 3]

Both need a built extension. A process for each holds the embedded model and the operations' inputs, and runs one case
when it is told to; the cases alternate between the two, the one that goes first changes every round. Writes
benchmarks/results/compare-cpu.json: seconds of both, and the median of the rounds' ratios (new / old).
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.environment import environment
from benchmarks.kernels.report import write

RESULTS = Path(__file__).parent / "results" / "compare-cpu.json"

# runs in both checkouts, so it uses only names that both have; prints one line a case: the seconds that it took
WORKER = r"""
import sys, time
import torch
import stylefast as sf
from stylefast import kernels

torch.set_num_threads(int(sys.argv[1]))
engine = sf.Engine.from_pretrained("tiny", device="cpu", dtype="float32")
picture = next(iter(engine.references().values()))
bank = engine.bake(sf.StyleAligned(picture), steps=8)
prompts = ["a fish", "a house", "a cat", "a tree"]

def draw(count, style=None, **settings):
    engine.generate(prompts[:count], style, steps=8, output="latents", **settings)

def jobs():
    styles = [None, sf.StyleAligned(bank), sf.InstantStyle(picture), sf.DreamStyler(engine.styles()["chalk"])]
    given = [engine.submit(sf.Request(p, style=s, steps=8), output="latents") for p, s in zip(prompts, styles)]
    [job.result() for job in given]

random = torch.Generator().manual_seed(0)
def normal(*shape): return torch.randn(*shape, generator=random)
rows, tokens, heads, width = 8, 1024, 10, 64
q, k, v = (normal(rows, tokens, heads, width) for _ in range(3))
page = torch.full((rows, 1), -1); page[1::2, 0] = torch.arange(0, rows, 2)
table = (page, torch.ones(rows, dtype=torch.int64), torch.ones(rows, 1), torch.zeros(rows, 1))
text_k, text_v = normal(rows, 77, heads, width), normal(rows, 77, heads, width)
hidden, wide = normal(rows, tokens, heads * width), normal(rows, tokens, 8 * heads * width)
weight, bias, feature = normal(640), normal(640), normal(rows, 640, 32, 32)

CASES = {
    "1 picture": lambda: draw(1),
    "4 pictures": lambda: draw(4),
    "4 pictures, StyleAligned from a bank": lambda: draw(4, sf.StyleAligned(bank)),
    "4 jobs of four kinds": jobs,
    "shared_attention": lambda: kernels.shared_attention(q, k, v, *table),
    "gated_cross_attention": lambda: kernels.gated_cross_attention(q, text_k, text_v, torch.arange(rows)),
    "token_stats": lambda: kernels.token_stats(q, k, v),
    "group_norm_silu": lambda: kernels.group_norm_silu(feature, 32, weight, bias, 1e-5, True),
    "layer_norm": lambda: kernels.layer_norm(hidden, weight, bias, 1e-5),
    "geglu": lambda: kernels.geglu(wide),
}
with torch.inference_mode():
    for run in CASES.values():
        run(), run()
    print("|".join(CASES), flush=True)
    for line in sys.stdin:
        run, times = CASES[line.strip()], []
        begun = time.perf_counter()
        while not times or time.perf_counter() - begun < 0.3:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        print(min(times), flush=True)
"""


class Checkout:
    """A process that runs cases with the code of one checkout."""

    def __init__(self, folder: Path, threads: int):
        variables = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(threads)}
        words = [sys.executable, "-c", WORKER, str(threads)]
        self._process = subprocess.Popen(
            words, cwd=folder, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.cases = self._line().split("|")

    def run(self, case: str) -> float:
        """Return the seconds that a case takes."""
        assert self._process.stdin is not None
        self._process.stdin.write(case + "\n")
        self._process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        if not line:
            raise SystemExit("a checkout's process ended early; see its error above")
        return line


def measured(old: Checkout, new: Checkout, rounds: int, only: list[str] | None = None) -> dict[str, list]:
    """Return the seconds of both for each round of each case."""
    times: dict[str, list[tuple[float, float]]] = {case: [] for case in new.cases if only is None or case in only}
    for turn in range(rounds):
        for case, found in times.items():
            if turn % 2:
                second = new.run(case)
                found.append((old.run(case), second))
            else:
                found.append((old.run(case), new.run(case)))
    return times


def compared(times: dict[str, list[tuple[float, float]]]) -> list[dict]:
    """Return for each case the median seconds of both, and the median of the rounds' ratios."""
    return [
        {
            "case": case,
            "old_ms": round(1e3 * statistics.median(one for one, _ in found), 3),
            "new_ms": round(1e3 * statistics.median(one for _, one in found), 3),
            "ratio": round(statistics.median(two / one for one, two in found), 3),
        }
        for case, found in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--old", type=Path, required=True, help="the other checkout, with its extension built")
    parser.add_argument("--rounds", type=int, default=5, help="of each pair of processes")
    parser.add_argument("--processes", type=int, default=3, help="pairs of processes: each has its luck with memory")
    parser.add_argument("--only", help="cases to measure, by commas")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    place = environment("cpu")
    only = arguments.only.split(",") if arguments.only else None
    times: dict[str, list[tuple[float, float]]] = {}
    for _ in range(arguments.processes):
        old = Checkout(arguments.old.resolve(), arguments.threads)
        new = Checkout(Path(__file__).resolve().parents[1], arguments.threads)
        try:
            for case, found in measured(old, new, arguments.rounds, only).items():
                times.setdefault(case, []).extend(found)
        finally:
            old.close()
            new.close()
    rows = compared(times)
    commit = subprocess.run(["git", "-C", arguments.old, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    result = {
        "old": commit.strip(),
        "rounds": arguments.rounds * arguments.processes,
        "threads": arguments.threads,
        "cases": rows,
    }
    write(arguments.out, {"results": result, "environment": place})
    for row in rows:
        print(f"{row['case']:40}{row['old_ms']:10.2f} ms{row['new_ms']:10.2f} ms{row['ratio']:8.3f}")


if __name__ == "__main__":
    main()
