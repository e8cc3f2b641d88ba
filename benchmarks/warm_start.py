"""Time from process start to the first picture: compiled anew, compiled ahead of time, exported, or eager.

    python -m benchmarks.warm_start [--device cuda] [--runs 3] [--backends torch,compile,aoti,onnxruntime]

Every run is a separate process that imports stylefast, loads the embedded model and makes one picture. `compile` starts
with empty caches, `aoti` and `onnxruntime` with an export on disk, which is made once beforehand and timed separately.
A backend that can't run here is listed in the result with the reason. Writes benchmarks/results/warm-start.json; on a
GPU, warm-start-cuda.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import environment

RESULTS = Path(__file__).parent / "results"
EXPORTS = {"aoti": "aoti", "onnxruntime": "onnx"}  # backend -> kind of export
BACKENDS = ("torch", "compile", *EXPORTS)
# goal: a cold start takes at least this many times as long as one from a package
GOAL = 5.0
# caches of PyTorch and Triton that could hold an earlier process's compiled code
_CACHES = {"STYLEFAST_CACHE": "stylefast", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}

_PROGRAM = """
import sys, time
backend, device, engines, steps = sys.argv[1:]
import stylefast as sf
options = {"engines": engines} if engines else {}
engine = sf.Engine.from_pretrained("tiny", device=device, backend=backend, **options)
loaded = time.time()
engine.generate("a fish in neon style", steps=int(steps))
print("times", loaded, time.time())
"""


class Failed(Exception):
    """A process did not make its picture; the message says why."""


def first_picture(backend: str, device: str, engines: Path | None, steps: int, caches: Path) -> dict[str, float]:
    """Return the seconds from process start until the model was loaded and until the first picture was done."""
    arguments = [backend, device, str(engines or ""), str(steps)]
    start = time.time()
    output = _run(["-c", _PROGRAM, *arguments], caches)
    loaded, done = (float(word) for word in output.rsplit("times", 1)[1].split())
    return {"loaded": loaded - start, "first_picture": done - start}


def exported(backend: str, device: str, folder: Path, caches: Path) -> float:
    """Export the smallest graph that supports StyleAligned for a backend; return the seconds taken."""
    arguments = [
        "-m",
        "stylefast.cli",
        "export",
        EXPORTS[backend],
        "--model",
        "tiny",
        "--flavour",
        "live",
        "--out",
        str(folder),
        "--quiet",
    ]
    arguments += ["--target", device] if backend == "aoti" else ["--components", "unet"]
    start = time.time()
    _run(arguments, caches)
    return time.time() - start


def measure(backends: list[str], device: str, runs: int, steps: int) -> dict[str, Any]:
    """Return results by backend; backends take turns, so that changes in machine load affect all alike."""
    found: dict[str, Any] = {backend: {"runs": []} for backend in backends}
    with tempfile.TemporaryDirectory(prefix="warm-start-") as name:
        root = Path(name)
        engines = {}
        for backend in (backend for backend in backends if backend in EXPORTS):
            engines[backend] = root / backend
            try:
                seconds = exported(backend, device, engines[backend], root / "export-caches")
                found[backend]["export_seconds"] = round(seconds, 1)
            except Failed as error:
                found[backend]["failed"] = str(error)
        # stylefast's own kernels in a package are compiled by the first process and cached on a GPU
        kept = root / "kept-caches"
        for number in range(-1, runs):
            for backend, result in found.items():
                cold = backend == "compile"
                if "failed" in result or (number < 0 and cold):
                    continue
                caches = root / f"cold-caches-{number}" if cold else kept
                try:
                    times = first_picture(backend, device, engines.get(backend), steps, caches)
                except Failed as error:
                    result["failed"] = str(error)
                    continue
                # the first run only fills the disk cache
                if number >= 0:
                    result["runs"].append({name: round(value, 2) for name, value in times.items()})
    for result in found.values():
        if result["runs"] and "failed" not in result:
            for name in ("loaded", "first_picture"):
                result[f"{name}_seconds"] = statistics.median(run[name] for run in result["runs"])
    return found


def _run(arguments: list[str], caches: Path) -> str:
    environment = os.environ | {name: str(caches / folder) for name, folder in _CACHES.items()}
    for folder in _CACHES.values():
        (caches / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    made = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)
    if made.returncode:
        raise Failed((made.stderr.strip().splitlines() or [f"exit status {made.returncode}"])[-1])
    return made.stdout


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.warm_start", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="of %(default)s")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="of the picture (default: %(default)s)")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    backends = arguments.backends.split(",")
    unknown = sorted(set(backends) - set(BACKENDS))
    if unknown or arguments.runs < 1 or arguments.steps < 1:
        parser.error(f"no backend is called {unknown[0]!r}" if unknown else "--runs and --steps must be 1 or more")
    place = environment(arguments.device)
    found = measure(backends, arguments.device, arguments.runs, arguments.steps)
    result: dict[str, Any] = {"model": "tiny", "pictures": 1, "steps": arguments.steps, "backends": found}
    cold, warm = (found.get(name, {}).get("first_picture_seconds") for name in ("compile", "aoti"))
    if cold and warm:
        result["compile_over_aoti"] = {"ratio": round(cold / warm, 1), "goal": GOAL, "met": cold / warm >= GOAL}
    result["environment"] = place
    out = arguments.out or RESULTS / ("warm-start.json" if arguments.device == "cpu" else "warm-start-cuda.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    for backend, numbers in found.items():
        print(f"{backend:12} {numbers.get('failed') or numbers['first_picture_seconds']}")
    print(json.dumps(result.get("compile_over_aoti")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
