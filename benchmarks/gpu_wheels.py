"""Pure-Python packages for `make gpu`, as files to copy with the checkout to a machine without a network.

    make gpu-wheels     here, where pip reaches an index: wheels into build/gpu-wheels
    make gpu            there: unpack packages that are not installed into build/gpu-packages, for its processes

Compiled packages (torch, triton, numpy, safetensors, tokenizers, pillow) must be installed on that machine. Versions
are those of constraints.txt. Exit code of the download: 1 if a wheel was not available.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import invalidate_caches
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
WHEELS, UNPACKED = CHECKOUT / "build" / "gpu-wheels", CHECKOUT / "build" / "gpu-packages"
# imports of the engine, tests and benchmarks, and their pure-Python dependencies
PACKAGES = (
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "huggingface_hub",
    "importlib_metadata",
    "zipp",
    "pytest",
    "pytest-xdist",
    "execnet",
    "iniconfig",
    "pluggy",
    "Pygments",
    "packaging",
    "hypothesis",
    "sortedcontainers",
    "tqdm",
)
# the newest wheels of these are compiled; the last pure-Python one works as well
UNPINNED = ("hypothesis",)
PURE = "-none-any.whl"


def download(folder: Path = WHEELS) -> int:
    """Download the wheels of `PACKAGES`, replacing those in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"):
        old.unlink()
    pinned = (CHECKOUT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as temporary:
        constraints = Path(temporary, "constraints.txt")
        constraints.write_text("\n".join(line for line in pinned if line.split("==")[0] not in UNPINNED))
        # a nonexistent platform, so that pip finds only pure-Python wheels
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
            "--platform",
            "any",
            "-c",
            str(constraints),
            "-d",
            str(folder),
            *PACKAGES,
        ]
        if subprocess.run(command).returncode:
            print("error: pip could not fetch the wheels; its message is above", file=sys.stderr)
            return 1
    wheels = sorted(folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    print(f"{len(wheels)} wheels, {size:.0f} MiB, in {folder}; carry that folder along with the checkout")
    return 0


def bring(wheels: Path = WHEELS, unpacked: Path = UNPACKED) -> list[str]:
    """Unpack wheels of packages that are not installed here, for this process and its child processes.

    Returns their names. Installed packages are used as they are, whatever their version.
    """
    shutil.rmtree(unpacked, ignore_errors=True)
    found = []
    for wheel in sorted(wheels.glob(f"*{PURE}")):
        name = wheel.name.split("-")[0]
        if not _installed(name):
            with zipfile.ZipFile(wheel) as content:
                content.extractall(unpacked)
            found.append(name)
    if found:
        sys.path.append(str(unpacked))
        invalidate_caches()
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(unpacked))))
    return found


def _installed(name: str) -> bool:
    try:
        distribution(re.sub("_", "-", name))
    except PackageNotFoundError:
        return False
    return True


def main(argv: Sequence[str] = ()) -> int:
    """Run the download; see the module."""
    return download(*map(Path, argv[:1]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
