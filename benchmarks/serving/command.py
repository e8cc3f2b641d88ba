"""Measure the HTTP service: what it adds to a request, admission under load beside its peers, and faults.

    python -m benchmarks serving [--only overhead,load,soak,crash,starts] [--requests 100] [--seconds 600]

overhead: one client, in turns with `Engine.generate`. load: Poisson arrivals of mixed styles, sizes and steps at 0.5,
0.8 and 1.1 of the service's own capacity, to the service, to the same service with one picture at a time, and to the
published methods on diffusers behind a lock. soak, crash and starts: what must not happen (`faults.py`). Writes
benchmarks/results/serving-cpu.json; parts that are not measured stay as they are there, each with the environment in
which it was. Returns 1 if a part has not passed.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.kernels.report import write
from benchmarks.serving.faults import crash, soak, starts
from benchmarks.serving.load import load
from benchmarks.serving.overhead import overhead
from benchmarks.serving.report import RESULTS, markdown


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", help="parts to measure, by commas")
    parser.add_argument("--requests", type=int, default=100, help="of each server at each load")
    parser.add_argument("--seconds", type=float, default=600.0, help="of the soak")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "overhead": overhead,
        "load": lambda: load(arguments.requests),
        "soak": lambda: soak(arguments.seconds),
        "crash": crash,
        "starts": starts,
    }
    chosen = arguments.only.split(",") if arguments.only else list(parts)
    if unknown := sorted(set(chosen) - parts.keys()):
        print(f"error: --only names {', '.join(unknown)}; there are {', '.join(parts)}", file=sys.stderr)
        return 2
    content = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {"results": {}}
    failed = []
    for part in chosen:
        place = environment("cpu")
        result = parts[part]()
        print(part, json.dumps(result, indent=1), flush=True)
        content["results"][part] = {**result, "environment": place}
        content["environment"] = place
        write(arguments.out, content)
        failed += [part] if result.get("passed") is False else []
    if "load" in chosen:
        print(markdown(content))
    if failed:
        print(f"not passed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
