"""Files that appear whole or not at all."""

import errno
import os
import secrets
from pathlib import Path

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


def write_whole(path: Path, *content: bytes | memoryview, overwrite: bool = True, mode: int = 0o666) -> None:
    """Write a file atomically, through a temporary one in the same folder; on any failure the old file stays.

    overwrite: False never replaces a file. mode: the new file's permissions, less the umask. Raises FileExistsError if
    the name is taken, and OSError.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.writelines(content)
            file.flush()
            os.fsync(file.fileno())  # a full disk or network quota may be reported only here
        put_in_place(part, path, overwrite)
    finally:
        part.unlink(missing_ok=True)


def put_in_place(part: Path, path: Path, overwrite: bool = True) -> None:
    """Give a finished file its name. With overwrite=False, raise FileExistsError if the name is taken.

    The temporary name may remain; the caller removes it.
    """
    if overwrite:
        os.replace(part, path)
        return
    try:
        os.link(part, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # file system without hard links, such as FAT: reserve the name with an empty file, then replace it atomically
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            os.replace(part, path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
