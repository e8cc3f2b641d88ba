"""All benchmarks under one command: `python -m benchmarks kernels --device cpu`."""

import sys
from importlib import import_module

BENCHMARKS = {
    "banks": "benchmarks.banks",
    "compare": "benchmarks.compare",
    "copies": "benchmarks.copies",
    "export_sdxl": "benchmarks.export_sdxl",
    "exports": "benchmarks.exports",
    "gpu": "benchmarks.gpu",
    "kernels": "benchmarks.kernels.command",
    "leak": "benchmarks.leak",
    "load": "benchmarks.load",
    "loras": "benchmarks.loras",
    "pictures": "benchmarks.pictures",
    "planning": "benchmarks.planning",
    "reading": "benchmarks.reading",
    "runtime": "benchmarks.runtime.command",
    "serving": "benchmarks.serving.command",
    "startup": "benchmarks.startup",
    "tiny_model": "benchmarks.tiny_model.command",
    "tiny_quality": "benchmarks.tiny_quality",
    "warm_start": "benchmarks.warm_start",
}


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in BENCHMARKS:
        known = name in ("-h", "--help")
        usage = f"usage: python -m benchmarks {{{','.join(BENCHMARKS)}}} [--help]"
        print(usage if known else f"{usage}\nno benchmark is called {name!r}", file=sys.stdout if known else sys.stderr)
        return 0 if known else 2
    sys.argv = [f"{sys.argv[0]} {name}", *sys.argv[2:]]
    return import_module(BENCHMARKS[name]).main() or 0


if __name__ == "__main__":
    sys.exit(main())
