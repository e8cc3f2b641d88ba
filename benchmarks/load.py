"""Measure an engine under load: how long other requests delay a running job, and what a busy machine costs.

    python -m benchmarks load [--only gap,busy] [--minutes 10] [--out FILE]

Two kinds of cases on the embedded model, on a CPU. "gap ...": a job of many steps runs while the engine gets another
request; measures its longest pause between two steps, against the slowest step of any job in that time. "busy": eight
pictures in a separate process, alone and alongside a process that keeps all cores busy, in turn.
Writes benchmarks/results/load-cpu.json. Exit code as for `python -m benchmarks runtime`.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import stylefast as sf
from benchmarks.kernels.measure import Budget
from benchmarks.runtime.cases import Case, Figure, Outcome
from benchmarks.runtime.command import run, summary_text
from stylefast.errors import InvalidRequest

RESULTS = Path(__file__).parent / "results" / "load-cpu.json"
MOST_GAP, MOST_COST = 2.0, 3.0
LONG = 900  # steps of the watched job, which is cancelled at the end
QUIET_STEPS = 20  # steps to wait before and after the request
PICTURES, STEPS, ROUNDS = 8, 20, 3
BURNING = 1.0  # seconds of load before anything is timed
DRAW = f"""
import time, stylefast as sf
engine = sf.Engine.from_pretrained("tiny", device="cpu")
engine.generate(["a fish"] * {PICTURES}, steps=1)
for _ in range({ROUNDS}):
    input()
    start = time.perf_counter()
    engine.generate(["a fish"] * {PICTURES}, steps={STEPS})
    print(time.perf_counter() - start, flush=True)
"""
# ways for threads to wait: stylefast's setting, and others
WAITING = {
    "shortly": "spin briefly, then sleep: stylefast's setting",
    "asleep": "sleep at once: `OMP_WAIT_POLICY=passive`",
    "spinning": "spin for milliseconds: torch imported first",
}
SPINNING = "import torch\n" + DRAW  # threads wait as by PyTorch's default
BURN = "import os\nfor _ in range(os.cpu_count() - 1):\n    if not os.fork(): break\nwhile True: pass"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", help="beginnings of the names of the cases to measure, by commas")
    parser.add_argument("--minutes", type=float, default=10.0, help="cases that can't be done by then are not begun")
    parser.add_argument("--out", type=Path, help="file to write (with --only: none unless given)")
    arguments = parser.parse_args(argv)
    chosen = cases()
    if arguments.only:
        chosen = [case for case in chosen if case.name.startswith(tuple(arguments.only.split(",")))]
        if not chosen:
            print(f"error: --only names no case; there are {', '.join(c.name for c in cases())}", file=sys.stderr)
            return 2
    path = arguments.out or (None if arguments.only else RESULTS)
    content = run(chosen, "cpu", False, Budget(arguments.minutes), path)
    print(summary_text(content, path))
    return 1 if content["unproved"] else 0


def cases() -> list[Case]:
    """Return a case for every kind of request during a running job, and one for a busy machine."""
    return [*(gap(name, kind) for name, kind in BESIDE.items()), busy()]


def markdown(content: dict[str, Any]) -> str:
    """Format a results file as the tables of docs/serving.md."""
    gaps = [result["details"] for result in content["results"] if result["case"].startswith("gap")]
    apart = all("apart_ms" in seen for seen in gaps)  # files of earlier versions don't have it
    titles = [
        "served while a job runs",
        "largest gap",
        *["end to end"] * apart,
        "slowest step then (alone)",
        "gap / step",
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for result in content["results"]:
        name, _, case = result["case"].partition(": ")
        if name == "gap":
            what, seen = result["what"].removeprefix("a running job beside "), result["details"]
            note = " (refused)" if str(seen.get("answer", "")).startswith("refused") else ""
            ends = f"{seen['apart_ms']:.0f} ms | " if apart else ""
            lines.append(
                f"| {what}{note} | {seen['gap_ms']:.0f} ms | {ends}{seen['slowest_step_ms']:.0f} ms "
                f"({seen['slowest_step_alone_ms']:.0f} ms) | {result['figures'][0]['value']:.2f} |"
            )
    busy = next(result for result in content["results"] if result["case"] == "busy")
    lines += ["", "| waiting threads | idle machine | a busy loop on every core | |", "|---|---|---|---|"]
    for how, what in WAITING.items():
        idle, beside = (_median(busy["details"][f"{when} {how}"]) for when in ("alone_s", "busy_s"))
        lines.append(f"| {what} | {idle:.1f} s | {beside:.1f} s | {beside / idle:.1f}x |")
    return "\n".join(lines)


# requests during a running job


class Watched:
    """A long job of an engine: start and end of its steps, and the slowest step of any job."""

    def __init__(self, engine: sf.Engine):
        self.steps: list[tuple[float, float]] = []
        self.slowest = 0.0
        advance = engine.runner.step

        def timed(groups, *rest):
            start = time.perf_counter()
            failed = advance(groups, *rest)
            end = time.perf_counter()
            self.slowest = max(self.slowest, end - start)
            if any(group.steps == LONG for group in groups):
                self.steps.append((start, end))
            return failed

        engine.runner.step = timed
        self.job = engine.submit(sf.Request("a fish", steps=LONG), output="latents")
        self.go_on()  # warm up: the first steps create what later steps reuse
        self.slowest = 0.0
        self.go_on()
        self.alone, self.slowest = self.slowest, 0.0
        self.steps.clear()

    def go_on(self) -> None:
        """Wait for `QUIET_STEPS` more steps."""
        seen = len(self.steps)
        while len(self.steps) < seen + QUIET_STEPS and not self.job.done():
            time.sleep(0.01)

    @property
    def gap(self) -> float:
        """Return the longest time in seconds between the end of one step and the start of the next."""
        return max((b[0] - a[1] for a, b in zip(self.steps, self.steps[1:])), default=math.nan)

    @property
    def apart(self) -> float:
        """Return the longest time in seconds between the ends of two steps, which is what a watcher of the job sees."""
        return max((b[1] - a[1] for a, b in zip(self.steps, self.steps[1:])), default=math.nan)


class Beside(NamedTuple):
    """A kind of request: its description, a function that makes it, and what that needs, made before the job runs."""

    what: str
    ask: Callable[..., Any]  # of the engine, and what `before` returned if there is one
    before: Callable[[sf.Engine], Any] | None = None


def gap(name: str, kind: Beside) -> Case:
    """Measure the largest gap in a running job during one kind of request."""
    expected = Figure("largest gap / slowest step", None, MOST_GAP, at_most=True)

    def measure(budget: Budget) -> Outcome:
        engine = sf.Engine.from_pretrained("tiny", device="cpu")
        try:
            given = () if kind.before is None else (kind.before(engine),)
            watched = Watched(engine)
            start = time.perf_counter()
            answer = kind.ask(engine, *given)
            seconds = time.perf_counter() - start
            watched.go_on()
        finally:
            engine.close()
        figure = Figure(expected.what, watched.gap / watched.slowest, MOST_GAP, at_most=True)
        details = {
            "gap_ms": round(1e3 * watched.gap, 1),
            "apart_ms": round(1e3 * watched.apart, 1),
            "slowest_step_ms": round(1e3 * watched.slowest, 1),
            "slowest_step_alone_ms": round(1e3 * watched.alone, 1),
            "request_s": round(seconds, 2),
            "steps_meanwhile": len(watched.steps) - QUIET_STEPS,
        }
        if isinstance(answer, str):
            details["answer"] = answer
        return Outcome(figures=[figure], details=details)

    return Case(f"gap: {name}", f"a running job beside {kind.what}", measure, (expected,))


def _drawn(**options) -> Callable[[sf.Engine], Any]:
    return lambda engine: engine.submit(sf.Request("a house", **{"steps": 6} | options)).result().images


def _picture(engine: sf.Engine) -> Path:
    return next(iter(engine.references().values()))


def _inverted(engine: sf.Engine) -> Any:
    style = sf.StyleAligned(_picture(engine), prompt="a fish", noise="ddim")
    return _drawn(style=style, scheduler="ddim", steps=20)(engine)


def _baked(engine: sf.Engine) -> sf.StyleBank:
    """Return a bank whose pages are only in its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "style.bank"
        engine.bake(sf.StyleAligned(_picture(engine)), steps=6, path=path)
        return sf.StyleBank.load(path)  # the file stays open


def _row_lora(engine: sf.Engine) -> Any:
    name = engine.loras.add(next(iter(engine.lora_files().values())))
    return _drawn(loras={name: 1.0})(engine)


def _weights(engine: sf.Engine) -> str:
    try:
        with engine.scheduler.changing_weights():
            return "taken"
    except InvalidRequest as refusal:
        return f"refused: {refusal}"


def _adapter(engine: sf.Engine) -> Any:
    return engine.load_adapter(engine._components.adapter_path, name="again")


def _export(engine: sf.Engine) -> Any:
    """Export the model from another engine in this process and open the graphs that it needs."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("STYLEFAST_CACHE")
        os.environ["STYLEFAST_CACHE"] = folder
        try:
            other = sf.Engine.from_pretrained("tiny", device="cpu", backend="onnxruntime")
        finally:
            os.environ.pop("STYLEFAST_CACHE")
            if before is not None:
                os.environ["STYLEFAST_CACHE"] = before
        with other:
            return other.generate("a fish", steps=1).images


BESIDE: dict[str, Beside] = {
    "nothing": Beside("nothing else", lambda engine: time.sleep(0.5)),
    "prompt": Beside("a request with a new prompt", _drawn()),
    "picture": Beside(
        "an InstantStyle request with a new picture",
        lambda engine: _drawn(style=sf.InstantStyle(_picture(engine)))(engine),
    ),
    "reference": Beside(
        "a StyleAligned request with a new picture",
        lambda engine: _drawn(style=sf.StyleAligned(_picture(engine)))(engine),
    ),
    "bank": Beside(
        "a request with a bank that was not read yet",
        lambda engine, bank: _drawn(style=sf.StyleAligned(bank))(engine),
        before=_baked,
    ),
    "inversion": Beside("a StyleAligned request with noise='ddim', 20 steps", _inverted),
    "generate": Beside("a call of generate", lambda engine: engine.generate("a boat", steps=6).images),
    "bake": Beside(
        "baking a style of 6 steps",
        lambda engine: engine.bake(sf.StyleAligned(_picture(engine)), steps=6).info.steps,
    ),
    "adapter": Beside("loading an adapter", _adapter),
    "row lora": Beside("adding a LoRA, and a request with it", _row_lora),
    "weights": Beside("merging a LoRA into the weights", _weights),
    "size": Beside("the first request of another size", _drawn(size=(96, 64))),
    "decode": Beside("decoding a picture of 16 times the area", _drawn(size=(256, 256), steps=1)),
    "export": Beside("another engine's first export and graphs", _export),
}


# a busy machine


def busy() -> Case:
    """Measure the cost of a second process that keeps all cores busy."""
    expected = Figure("busy / idle", None, MOST_COST, at_most=True)
    what = f"{PICTURES} pictures of {STEPS} steps in a process of their own, alone and beside a busy loop per core"

    def measure(budget: Budget) -> Outcome:
        figures, details = [], {}
        for how in WAITING:
            alone, beside = in_turn(
                SPINNING if how == "spinning" else DRAW, {"OMP_WAIT_POLICY": "passive"} if how == "asleep" else {}
            )
            cost = _median([b / a for a, b in zip(alone, beside)])
            goal = MOST_COST if how == "shortly" else None
            figures.append(Figure(f"busy / idle{'' if goal else f', threads {how}'}", cost, goal, at_most=True))
            details |= {f"alone_s {how}": [round(x, 2) for x in alone], f"busy_s {how}": [round(x, 2) for x in beside]}
        return Outcome(figures=figures, details=details)

    return Case("busy", what, measure, (expected,), seconds=200)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def in_turn(program: str, given: dict[str, str]) -> tuple[list[float], list[float]]:
    """Return the seconds of every round of a program, without and with load; given: environment variables."""
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in ours} | given
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    times: tuple[list[float], list[float]] = ([], [])
    try:
        for _ in range(ROUNDS):
            for process, found, burning in zip(started, times, (False, True)):
                burner = subprocess.Popen([sys.executable, "-c", BURN], start_new_session=True) if burning else None
                try:
                    time.sleep(BURNING)
                    process.stdin.write("\n")
                    process.stdin.flush()
                    found.append(float(process.stdout.readline()))
                finally:
                    if burner is not None:
                        os.killpg(burner.pid, signal.SIGKILL)
                        burner.wait()
    finally:
        for process in started:
            process.stdin.close()
            process.kill()
            process.wait()
    return times


if __name__ == "__main__":
    sys.exit(main())
