"""`stylefast bench`: measure the kernels, or find launch configurations for this GPU."""

import argparse
import subprocess
import sys
from pathlib import Path

import stylefast
from stylefast.errors import InvalidRequest, StyleFastError

SUMMARY = "Measure the kernels against PyTorch, or tune them for this GPU."
EXAMPLES = """examples:
  stylefast bench kernels --device cpu --quick
  stylefast bench kernels --device cuda --minutes 5 --out kernels.json
  stylefast bench --tune --operation shared_attention --minutes 5
"""
CHECKOUT = Path(stylefast.__file__).resolve().parent.parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for what to measure and for how long."""
    parser.add_argument("what", nargs="?", choices=("kernels",), help="what to measure; needs a checkout of stylefast")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="with kernels (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that everything runs")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    parser.add_argument("--tune", action="store_true", help="time launch configurations on this GPU and keep the best")
    parser.add_argument(
        "--operation", action="append", metavar="NAME", help="with --tune: only this operation; may be repeated"
    )
    parser.add_argument("--minutes", type=float, help="time to spend (default: 30, with --tune 10)")
    parser.add_argument(
        "--out", type=Path, help="file for the figures; with --tune the folder for <gpu>.json (default: the package's)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure or tune, according to the arguments."""
    if arguments.tune == bool(arguments.what):
        raise InvalidRequest("give either what to measure (stylefast bench kernels) or --tune")
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise InvalidRequest(f"--minutes is {arguments.minutes:g}; it must be above 0")
    if arguments.tune:
        return _tune(arguments)
    if arguments.operation:
        raise InvalidRequest("--operation needs --tune")
    return _measure(arguments)


def _measure(arguments: argparse.Namespace) -> int:
    # run in a separate process: benchmarks are not part of the package and set the process's thread count
    if not (CHECKOUT / "setup.py").is_file() or not (CHECKOUT / "benchmarks" / "__main__.py").is_file():
        raise StyleFastError(
            f"an installed stylefast does not include the benchmarks ({CHECKOUT}); run this in a checkout of the "
            "project"
        )
    words = ["kernels", "--device", arguments.device]
    words += [f"--{name}" for name in ("quick", "check") if getattr(arguments, name)]
    for name in ("threads", "minutes"):
        if getattr(arguments, name) is not None:
            words += [f"--{name}", f"{getattr(arguments, name):g}"]
    if arguments.out is not None:
        words += ["--out", str(arguments.out.resolve())]
    return subprocess.run([sys.executable, "-m", "benchmarks", *words], cwd=CHECKOUT).returncode


def _tune(arguments: argparse.Namespace) -> int:
    import torch

    if not torch.cuda.is_available():
        raise StyleFastError("--tune times kernels on a CUDA device, but PyTorch finds none on this machine")
    from stylefast.kernels import configs
    from stylefast.kernels.gpu import tune

    content = tune.tune(arguments.operation, arguments.minutes or 10.0)
    path = tune.write(content, arguments.out or configs.FOLDER)
    print(f"wrote {path}")
    if arguments.out is not None:
        print(f"it is used when STYLEFAST_TUNING={arguments.out.resolve()} is set")
    return 0
