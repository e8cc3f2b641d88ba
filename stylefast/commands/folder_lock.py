"""One writer of a folder at a time, and files that appear whole, under a name that nobody else took in between."""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stylefast.commands.notices import warn
from stylefast.errors import InvalidRequest

LOCK = ".stylefast.lock"
# of pictures alone: a bank that is being baked into the same folder has a temporary much like them
_PART = re.compile(r"\..+\.png\.[0-9a-f]{8}\.part", re.IGNORECASE)
PATIENCE = 60.0  # seconds; writing the pictures of a call takes less
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


def beside(target: Path) -> Path:
    """The lock file of something that is yet to be made."""
    return target.with_name(f".{target.name}.lock")


@contextmanager
def only_writer(target: Path, lock: Path, patience: float = PATIENCE, required: bool = False) -> Iterator[bool]:
    """Be the only stylefast that writes to `target` while the block runs; whether the lock file is held.

    The lock of a process that died is free, and a file system without locks does not keep the block from running. Nor
    does a holder that takes longer than `patience` seconds, but for a lock that is `required`: then InvalidRequest is
    raised.
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
    """The lock's descriptor, None where there are no locks. Raises BlockingIOError if another process keeps it."""
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
                raise BlockingIOError(f"another stylefast writes to {target}") from None
            if not said:
                warn(f"another stylefast writes to {target}; waiting for it")
                said = True
            time.sleep(0.02)
            continue
        except OSError:
            os.close(descriptor)
            return None
        # who held it before removed the file at the end, and then this is no longer the one at that path
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        os.close(descriptor)


def remove_parts(folder: Path) -> None:
    """Remove temporary files of pictures that a writer left when it was killed. For the holder of the folder's lock."""
    for path in folder.iterdir():
        if _PART.fullmatch(path.name) and not path.is_dir():
            with contextlib.suppress(FileNotFoundError, PermissionError):  # somebody else's
                path.unlink()


def write_whole(path: Path, content: bytes, overwrite: bool) -> None:
    """Write a file that appears at once or not at all. Raises FileExistsError if the name is taken, OSError."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())  # a full disk or quota of a network drive may show only here
        if overwrite:
            os.replace(part, path)
        else:
            _give_name(part, path)
    finally:
        part.unlink(missing_ok=True)


def _give_name(part: Path, path: Path) -> None:
    """Like a rename, but it fails where the name is taken."""
    try:
        os.link(part, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # a file system without hard links, such as FAT: take the name with an empty file, and fill it in one move
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(part, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
