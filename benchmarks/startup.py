"""Startup times: importing stylefast, loading the embedded model, four pictures of 20 steps.

    python -m benchmarks.startup [--runs 3]

Each run is a separate process; writes benchmarks/results/startup.json with the median of the runs and all of them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import stylefast as sf

RESULTS = Path(__file__).parent / "results" / "startup.json"

PROBES = {
    "import_torch_seconds": "import torch",
    "import_stylefast_after_torch_seconds": "import torch; mark(); import stylefast",
    "import_engine_after_torch_seconds": "import torch; mark(); from stylefast import Engine",
    "load_tiny_seconds": "from stylefast import Engine; mark(); Engine.from_pretrained('tiny', device='cpu')",
    "four_pictures_20_steps_seconds": (
        "import stylefast as sf; engine = sf.Engine.from_pretrained('tiny', device='cpu'); mark();"
        "engine.generate(['a fish', 'a cat', 'a house', 'a boat in neon style'], steps=20)"
    ),
    "four_aligned_pictures_20_steps_seconds": (
        "import stylefast as sf; engine = sf.Engine.from_pretrained('tiny', device='cpu'); mark();"
        "engine.generate(['a fish in neon style', 'a cat', 'a house', 'a boat'], sf.StyleAligned(), steps=20)"
    ),
}
_CLOCK = "import time\nstart = time.perf_counter()\ndef mark():\n    global start\n    start = time.perf_counter()\n"


def seconds(source: str) -> float:
    """Return the wall time of `source` in a fresh interpreter, from its last `mark()`."""
    lines = source.replace("; ", ";").replace(";", "\n")
    program = f"{_CLOCK}{lines}\nprint('seconds', time.perf_counter() - start)"
    output = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    return float(output.rsplit("seconds", 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    runs = {name: [round(seconds(source), 3) for _ in range(arguments.runs)] for name, source in PROBES.items()}
    result = {
        "median": {name: statistics.median(values) for name, values in runs.items()},
        "runs": runs,
        "environment": {
            "cpu_count": os.cpu_count(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "stylefast": sf.__version__,
        },
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["median"], indent=1))


if __name__ == "__main__":
    main()
