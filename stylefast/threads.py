"""Settings of OpenMP threads: how many run and how they wait, which decide the step time on a busy machine.

A step is thousands of small parallel loops. Threads that spin at the end of each loop use up their share of a busy core
and are then descheduled while the others wait for them, which made steps ten times slower. Threads that sleep at once
pay a wake-up per loop. Threads that spin briefly and then sleep are nearly as fast as spinning ones on an idle machine,
and take little more than their share of a busy one (`python -m benchmarks load`).
"""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

# if any variable in `_CHOSEN` is set, the user has chosen how threads wait
WAIT_POLICY = "OMP_WAIT_POLICY"
SPIN_COUNT = "GOMP_SPINCOUNT"  # read by GNU's runtime, which PyTorch's Linux wheels include
SHORT_SPIN = "4000"
_CHOSEN = (WAIT_POLICY, SPIN_COUNT, "KMP_BLOCKTIME")
_COUNTS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_fitted = _too_late = False
# switch interval in `giving_way`, in seconds
SHORT_TURNS = 0.0003
_turns_lock = threading.Lock()
_giving_way, _turns_before = 0, 0.0


def wait_shortly() -> None:
    """Make OpenMP threads spin briefly and then sleep while they wait, unless the environment says how they wait.

    The runtime reads the environment when torch is loaded; if torch is already loaded, this affects only child
    processes. Runtimes other than GNU's sleep at once.
    """
    global _too_late
    if not any(name in os.environ for name in _CHOSEN):
        os.environ.update({WAIT_POLICY: "passive", SPIN_COUNT: SHORT_SPIN})
        _too_late = "torch" in sys.modules


@contextmanager
def giving_way() -> Iterator[None]:
    """Set Python's switch interval to 0.3 ms instead of 5, during minutes of Python work such as an export.

    A step needs the interpreter's lock at each of its thousands of calls and waited one interval of the other thread
    each time: seconds, for a step of 0.1 s. This affects the whole process; the last user restores the old interval.
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
    """Limit threads to the CPU time that a container grants this process; runs once, when a model is loaded.

    Warns if torch was imported too early for `wait_shortly`, on a machine where that matters.
    PyTorch counts a machine's cores and ignores quotas. A count in the environment is kept, and so is one set with
    `torch.set_num_threads` after the first model was loaded.
    """
    global _fitted
    if _fitted:
        return
    _fitted = True
    import torch

    if _too_late and torch.get_num_threads() > 1 and not torch.cuda.is_available():
        logger.warning(
            "torch was imported before stylefast, so its threads spin for a long time while they wait, which is slow "
            "on a busy machine; import stylefast first, or set %s=%s",
            SPIN_COUNT,
            SHORT_SPIN,
        )
    quota = cpu_quota()
    if quota is None or any(os.environ.get(name) for name in _COUNTS):
        return
    most = max(1, int(quota))
    if torch.get_num_threads() > most:
        logger.info(
            "%d CPU threads instead of %d: this process has a CPU quota of %.1f cores",
            most,
            torch.get_num_threads(),
            quota,
        )
        torch.set_num_threads(most)


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Return this process's CPU quota in cores, the least of its control groups and those above; None: no limit."""
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
            continue  # ignore limits that can't be read
    return min(found, default=None)


def _groups(root: Path, own: Path) -> list[Path]:
    """Return the folders of this process's control groups and those above them, for versions 1 and 2."""
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
