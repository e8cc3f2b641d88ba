"""Checks that no other user can have written code loaded from a folder; private folders as the fallback.

Compiled regions, generated C++, Triton's binaries and exported engines are files that a later process executes. They
are safe if this user or root wrote them and no other user can replace the files, the folders that hold them, or any
folder above, whose owner may rename its contents.
"""

import atexit
import errno
import hashlib
import logging
import os
import platform
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PurePosixPath

logger = logging.getLogger(__name__)

_ROOT = 0
_ACCESS_LIST = "system.posix_acl_access"
# max links on one path, as in Linux
_MOST_LINKS = 40
# read by PyTorch's and Triton's compilers at every file lookup
_INDUCTOR, _TRITON = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"
# features PyTorch reports that compilers never use on their own
_UNUSED = {"clflush", "clflushopt", "clwb", "sha", "aes"}


def machine() -> str:
    """Return the system and the kind of CPU that code compiled here is for, such as "Linux x86_64"."""
    return f"{platform.system()} {platform.machine()}"


def cpu_instructions() -> list[str]:
    """Return the CPU extensions that code compiled here may use: it is compiled for this machine's CPU."""
    import torch

    return sorted({name for name, there in torch.cpu.get_capabilities().items() if there is True} - _UNUSED)


def replaceable(path: str | Path) -> str | None:
    """Return the reason why another user could replace `path` through a folder above it; None if none could.

    Missing folders are skipped, although another user may create them below /tmp: see `replaceable_inside`.
    """
    if not hasattr(os, "getuid"):
        return None
    try:
        for folder in _folders_above(Path(path)):
            reason = _open_to_others(folder)
            if reason is not None:
                return reason
    except OSError as error:
        return f"{error.filename} can't be inspected ({error.strerror or error})"
    return None


def replaceable_inside(folder: str | Path) -> str | None:
    """Create `folder`, closed to other users, if it is missing; return the reason why one could replace what is in it.

    Raises OSError if it can't be created.
    """
    reason = replaceable(folder)
    if reason is None:
        _create(folder)
        reason = replaceable(Path(folder) / "any file")
    return reason


def foreign(folder: str | Path, names: Iterable[str] = (), above: bool = True) -> str | None:
    """Return the reason why another user may have written files below `folder`; None if none can have.

    names: paths of the files, relative to the folder. above: also check the folders above it (`replaceable`).
    """
    if not hasattr(os, "getuid"):
        return f"this system does not report the owner of {folder}"
    folder = Path(os.path.realpath(folder))
    names = list(names)
    inner = {parent for name in names for parent in PurePosixPath(name).parents if parent.parts}
    paths = (folder, *(folder / name for name in sorted((*map(str, inner), *names))))
    return (replaceable(folder) if above else None) or _first_foreign(paths, strict=True)


def foreign_below(folder: str | Path) -> str | None:
    """Return the reason why another user may have written any file in `folder`, at any depth; None if none can have."""
    if not hasattr(os, "getuid"):
        return None
    return replaceable(folder) or _first_foreign(_everything(Path(os.path.realpath(folder))), strict=False)


def private_folder(wanted: str | Path, what: str, reason: str | None = None) -> Path:
    """Return `wanted` if no other user can have written its contents, else a new empty folder of this process.

    A missing folder is created, closed to other users, and then checked like any other. what: the folder's contents,
    named in the warning. reason: why `wanted` can't be used, if already known. The new folder is removed when the
    process ends.
    """
    reason = reason or replaceable(wanted)
    if reason is None:
        try:
            _create(wanted)
        except OSError as error:
            other = _own_temporary(what)
            logger.warning(
                "%s can't be kept in %s (%s); this process uses %s instead",
                what,
                wanted,
                error.strerror or error,
                other,
            )
            return other
        reason = foreign_below(wanted)
    if reason is None:
        return Path(wanted)
    other = _own_temporary(what)
    logger.warning(
        "%s in %s is code that another user could have written: %s; it is ignored, and this process uses %s instead",
        what,
        wanted,
        reason,
        other,
    )
    return other


@contextmanager
def inductor_cache(folder: str | Path | None = None) -> Iterator[None]:
    """Keep PyTorch's compile cache in `folder` inside the block; a folder named by the environment takes precedence.

    None: a subfolder of PyTorch's default. If another user can write to the folder, a private one is used, with a
    warning.
    """
    import torch
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    before = os.environ.get(_INDUCTOR)
    if before not in (None, default_cache_dir()):
        wanted = before
    elif folder is not None:
        wanted = str(folder)
    else:
        # PyTorch's cache keys ignore ATEN_CPU_CAPABILITY, and code generated for another vector width writes beyond the
        # ends of tensors; nor do they know which instructions -march=native meant
        capability = torch.backends.cpu.get_cpu_capability().lower()
        cpu = hashlib.sha256(" ".join([machine(), *cpu_instructions()]).encode()).hexdigest()[:8]
        wanted = os.path.join(default_cache_dir(), f"stylefast-{capability}-{cpu}")
    os.environ[_INDUCTOR] = str(_checked(wanted, "compiled code"))
    try:
        yield
    finally:
        # PyTorch sets this variable to its default whenever it looks up the folder
        os.environ[_INDUCTOR] = before if before is not None else default_cache_dir()


@cache
def guard_triton_cache() -> None:
    """Point Triton to a private cache if another user can write to its own. Runs once, before the first launch."""
    from triton import knobs

    folder = _checked(knobs.cache.dir, "Triton's compiled kernels")
    if str(folder) != knobs.cache.dir:
        os.environ[_TRITON] = str(folder)


@cache
def _checked(wanted: str, what: str) -> Path:
    # cached: no other user can write to a folder that exists and was safe at the start, so it stays safe
    return private_folder(wanted, what)


@cache
def _own_temporary(what: str) -> Path:
    folder, owner = Path(tempfile.mkdtemp(prefix="stylefast-")), os.getpid()

    @atexit.register
    def remove():
        if os.getpid() == owner:  # a forked child must not remove its parent's folder
            shutil.rmtree(folder, ignore_errors=True)

    return folder


def _create(folder: str | Path) -> None:
    """Create a folder and those above it, each closed to other users whatever the umask; keep those that exist."""
    at, missing = Path(os.path.realpath(folder)), []
    while not os.path.lexists(at):
        missing.append(at)
        at = at.parent
    for one in reversed(missing):
        with suppress(FileExistsError):  # whoever was faster; the owner is checked afterwards
            os.mkdir(one, 0o700)
    if not os.path.isdir(os.path.realpath(folder)):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def _everything(folder: Path) -> Iterator[Path]:
    yield folder
    for parent, folders, files in os.walk(folder, onerror=_raise):
        yield from (Path(parent, name) for name in (*folders, *files))


def _first_foreign(paths: Iterable[Path], strict: bool) -> str | None:
    """Return the reason why a path is unsafe; `strict` also refuses paths that the user's own group may write."""
    try:
        for path in paths:
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                return f"{path} is a link to another place"
            if status.st_uid not in (os.getuid(), _ROOT):
                return f"{path} belongs to user {status.st_uid}, not to you ({os.getuid()})"
            if _others_write(path, status) or (strict and status.st_mode & stat.S_IWGRP):
                return f"others can write to {path} (mode {stat.S_IMODE(status.st_mode):o})"
    except OSError as error:
        return f"{error.filename} can't be inspected ({error.strerror or error})"
    return None


def _folders_above(path: Path) -> Iterator[Path]:
    """Yield every folder in which a component of `path` is looked up, including those reached through links."""
    todo = list(path.absolute().parts[1:])
    at, links = Path(path.absolute().anchor), 0
    while todo:
        yield at
        step = todo.pop(0)
        if step == "..":
            at = at.parent
            continue
        inside = at / step
        try:
            status = inside.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return
        if not stat.S_ISLNK(status.st_mode):
            at = inside
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(None, "too many links", str(path))
        if status.st_uid not in (os.getuid(), _ROOT):
            raise OSError(None, f"a link that belongs to user {status.st_uid}", str(inside))
        target = Path(os.readlink(inside))
        if target.is_absolute():
            at, target = Path(target.anchor), target.relative_to(target.anchor)
        todo = [*target.parts, *todo]


def _open_to_others(folder: Path) -> str | None:
    status = folder.stat()
    if status.st_uid not in (os.getuid(), _ROOT):
        return f"{folder} belongs to user {status.st_uid}, who may rename what is in it"
    # with the sticky bit, as in /tmp, only a file's owner may rename it
    if _others_write(folder, status) and not status.st_mode & stat.S_ISVTX:
        return f"others can write to {folder} (mode {stat.S_IMODE(status.st_mode):o}) and may rename what is in it"
    return None


def _others_write(path: Path, status: os.stat_result) -> bool:
    by_group = status.st_mode & stat.S_IWGRP and (_has_access_list(path) or not _is_users_own(status.st_gid))
    return bool(status.st_mode & stat.S_IWOTH or by_group)


def _has_access_list(path: Path) -> bool:
    """Return whether a POSIX access list names further users; the group's bits of the mode then limit what they may."""
    try:
        return bool(os.getxattr(path, _ACCESS_LIST))
    except (AttributeError, OSError):  # this system, this file system or this file has none
        return False


@cache
def _is_users_own(group: int) -> bool:
    """Return whether a group is the private one that systems create for each user, without other members."""
    import grp
    import pwd

    try:
        user, entry = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:
        return False
    members = {*entry.gr_mem, *(one.pw_name for one in pwd.getpwall() if one.pw_gid == group)}
    return group == user.pw_gid and entry.gr_name == user.pw_name and members <= {user.pw_name}


def _raise(error: OSError) -> None:
    raise error
