"""One writer per folder at a time, and the removal of what killed writers left."""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stylefast.commands.notices import warn
from stylefast.errors import InvalidRequest

LOCK = ".stylefast.lock"
PICTURES = (".png", ".jpg", ".jpeg")
# only of pictures: a bank being baked into the same folder has a similar temporary name
_PART = re.compile(rf"\..+({'|'.join(map(re.escape, PICTURES))})\.[0-9a-f]{{8}}\.part", re.IGNORECASE | re.DOTALL)
PATIENCE = 60.0  # seconds; writing a call's pictures takes less


def beside(target: Path) -> Path:
    """Return the path of the lock file for a target that does not exist yet."""
    return target.with_name(f".{target.name}.lock")


@contextmanager
def only_writer(target: Path, lock: Path, patience: float = PATIENCE, required: bool = False) -> Iterator[bool]:
    """Hold the lock on `target` while the block runs; yield whether it is held.

    A dead process holds no lock. The block also runs without the lock on a file system without locks, or if another
    holder takes longer than `patience` seconds; if `required`, the latter raises InvalidRequest instead.
    """
    try:
        descriptor = _locked(lock, target, patience)
    except BlockingIOError as error:
        if required:
            raise InvalidRequest(f"{error}; wait for it, or choose another --out") from error
        descriptor = None
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            lock.unlink(missing_ok=True)
            os.close(descriptor)


def _locked(lock: Path, target: Path, patience: float) -> int | None:
    """Return the lock's descriptor, None without lock support. Raises BlockingIOError if another process keeps it."""
    deadline, said = time.monotonic() + patience, False
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            if time.monotonic() >= deadline:
                raise BlockingIOError(f"another stylefast is writing to {target}") from None
            if not said:
                warn(f"another stylefast is writing to {target}; waiting for it")
                said = True
            time.sleep(0.02)
            continue
        except OSError:
            os.close(descriptor)
            return None
        # the previous holder deletes the file on release: check that this descriptor is still the file at that path
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        os.close(descriptor)


def remove_parts(folder: Path) -> None:
    """Remove temporary picture files of killed writers. The caller must hold the folder's lock."""
    for path in folder.iterdir():
        if _PART.fullmatch(path.name) and not path.is_dir():
            with contextlib.suppress(FileNotFoundError, PermissionError):  # another user's file
                path.unlink()
