"""How many OpenMP threads there are, and how they wait for one another: what a busy machine's time depends on.

A step is thousands of small parallel loops. Threads that spin at the end of each use up their share of a busy core with
waiting, and are then put aside while the others wait for them: steps took ten times as long. Threads that sleep at
once pay a wake-up for each loop. Those that spin shortly, and then sleep, are nearly as
fast as the first on an idle machine and take little more than their share of a busy one (`python -m benchmarks load`).
"""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

# what says how threads wait, or that somebody has thought about it
WAIT_POLICY = "OMP_WAIT_POLICY"
SPIN_COUNT = "GOMP_SPINCOUNT"  # of GNU's runtime, which PyTorch's wheels for Linux bring
SHORT_SPIN = "4000"
_CHOSEN = (WAIT_POLICY, SPIN_COUNT, "KMP_BLOCKTIME")
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_fitted = False
# seconds after which a thread that computes in Python lets another one run, in `giving_way`
SHORT_TURNS = 0.0003
_turns_lock = threading.Lock()
_giving_way, _turns_before = 0, 0.0


def wait_shortly() -> None:
    """Have OpenMP's threads spin shortly and then sleep while they wait, unless the environment says how they wait.

    The runtime reads the environment when it is loaded, with torch; where torch is there already, this changes nothing
    but programs that this one starts. Other runtimes than GNU's sleep at once.
    """
    if not any(name in os.environ for name in _CHOSEN):
        os.environ.update({WAIT_POLICY: "passive", SPIN_COUNT: SHORT_SPIN})
        if "torch" in sys.modules:
            logger.info(
                "torch was imported before stylefast, so its threads spin long while they wait, slow on a "
                "busy machine; import stylefast first, or set %s=%s",
                SPIN_COUNT,
                SHORT_SPIN,
            )


@contextmanager
def giving_way() -> Iterator[None]:
    """Let other threads run Python after 0.3 ms instead of 5, during minutes of work in Python such as an export.

    A step asks for the interpreter's lock at each of its thousands of calls, and waited a turn of the other thread each
    time: seconds, for a step of a tenth of one. It concerns the whole process, and is put back after the last use.
    """
    global _giving_way, _turns_before
    with _turns_lock:
        if not _giving_way:
            _turns_before = sys.getswitchinterval()
            sys.setswitchinterval(min(SHORT_TURNS, _turns_before))
        _giving_way += 1
    try:
        yield
    finally:
        with _turns_lock:
            _giving_way -= 1
            if not _giving_way:
                sys.setswitchinterval(_turns_before)


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
        logger.info(
            "%d CPU threads instead of %d: this process has the time of %.1f cores",
            most,
            torch.get_num_threads(),
            quota,
        )
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
