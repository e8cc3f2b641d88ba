"""How many OpenMP threads there are, and how they wait for one another: what a busy machine's time depends on.

A step is thousands of small parallel loops. Threads that spin at the end of each use up their share of a busy core with
waiting, and are then put aside while the others wait for them: steps took fifty times as long. Threads that sleep cost
a wake-up for each loop, and their share of the machine is all they need.
"""

import logging
import os
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

# what says how threads wait, or that somebody has thought about it
WAIT_POLICY = "OMP_WAIT_POLICY"
_CHOSEN = (WAIT_POLICY, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_fitted = False


def wait_asleep() -> None:
    """Have OpenMP's threads sleep while they wait, unless the environment says how they wait.

    The runtime reads the environment when it is loaded, with torch; where torch is there already, this changes nothing
    but programs that this one starts.
    """
    if not any(name in os.environ for name in _CHOSEN):
        os.environ[WAIT_POLICY] = "passive"
        if "torch" in sys.modules:
            logger.info("torch was imported before stylefast, so its threads spin while they wait, which is slow on a "
                        "busy machine; import stylefast first, or set %s=passive", WAIT_POLICY)  # fmt: skip


def fit_to_quota() -> None:
    """Take no more threads than the processor time that a container gives this process; once, when a model is loaded.

    PyTorch counts a machine's cores and knows nothing of quotas. A count in the environment is left as it is, and so is
    a call of `torch.set_num_threads` after the first model was loaded.
    """
    global _fitted
    if _fitted:
        return
    _fitted = True
    import torch

    quota = cpu_quota()
    if quota is None or any(os.environ.get(name) for name in _COUNTS):
        return
    most = max(1, int(quota))
    if torch.get_num_threads() > most:
        logger.info("%d CPU threads instead of %d: this process has the time of %.1f cores",
                    most, torch.get_num_threads(), quota)  # fmt: skip
        torch.set_num_threads(most)


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores' worth of time that control groups give this process, the least of all groups above it; None: no limit."""
    found = []
    for folder in _groups(root, own):
        try:
            if (folder / "cpu.max").is_file():
                limit, period = (folder / "cpu.max").read_text().split()
            elif (folder / "cpu.cfs_quota_us").is_file():
                limit, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
            else:
                continue
            if limit != "max" and int(limit) > 0:
                found.append(int(limit) / int(period))
        except (OSError, ValueError, ZeroDivisionError):
            continue  # a file that can't be read limits nothing that we could know of
    return min(found, default=None)


def _groups(root: Path, own: Path) -> list[Path]:
    """The folders of this process's groups and of those above them, in either version of control groups."""
    folders = [root, root / "cpu", root / "cpu,cpuacct"]
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        parts = [part for part in path.split("/") if part not in ("", "..")]
        folders += [base.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]
    return folders
