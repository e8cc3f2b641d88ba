"""Folders from which code is loaded: whether another user could have written what is in them, and private ones instead.

Compiled regions, generated C++, Triton's binaries and exported engines are files that a later process runs. They are
safe if this user or root wrote them and no other user can replace them: neither the files, nor the folders they lie in,
nor any folder above, whose owner may rename what is in it.
"""

import atexit
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path, PurePosixPath

logger = logging.getLogger(__name__)

_ROOT = 0
# links on one path, as Linux has it
_MOST_LINKS = 40
# read by PyTorch's and Triton's compilers whenever they look for a file
_INDUCTOR, _TRITON = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"


def replaceable(path: str | Path) -> str | None:
    """Say why another user could put something else at `path`, through a folder above it; None if none could.

    Folders that don't exist yet count as safe: whoever creates them below a safe folder owns them.
    """
    if not hasattr(os, "getuid"):
        return None
    try:
        for folder in _folders_above(Path(path)):
            reason = _open_to_others(folder)
            if reason is not None:
                return reason
    except OSError as error:
        return f"{error.filename} can't be looked at ({error.strerror or error})"
    return None


def foreign(folder: str | Path, names: Iterable[str] = (), above: bool = True) -> str | None:
    """Say why another user may have written files below `folder`; None if none can have.

    names: paths of the files, relative to the folder. above: look at the folders above it, too (`replaceable`).
    """
    if not hasattr(os, "getuid"):
        return f"this system does not tell whose {folder} is"
    folder = Path(os.path.realpath(folder))
    names = list(names)
    inner = {parent for name in names for parent in PurePosixPath(name).parents if parent.parts}
    paths = (folder, *(folder / name for name in sorted((*map(str, inner), *names))))
    return (replaceable(folder) if above else None) or _first_foreign(paths, strict=True)


def foreign_below(folder: str | Path) -> str | None:
    """Say why another user may have written any file in `folder`, however deep; None if none can have.

    A folder that is not there holds nothing foreign.
    """
    if not hasattr(os, "getuid"):
        return None
    above, folder = replaceable(folder), Path(os.path.realpath(folder))
    if above is not None or not folder.exists():
        return above
    return _first_foreign(_everything(folder), strict=False)


def private_folder(wanted: str | Path, what: str, reason: str | None = None) -> Path:
    """Return `wanted` if no other user can have written what is in it, else a new empty folder of this process.

    what: what is kept there, for the warning that says why another folder is used. reason: why `wanted` can't be used,
    where the caller found out already. The other folder is removed when the process ends.
    """
    reason = reason or foreign_below(wanted)
    if reason is None:
        return Path(wanted)
    other = _own_temporary(what)
    logger.warning(
        "%s in %s is code and could come from another user: %s; it is ignored, and this process uses %s instead",
        what,
        wanted,
        reason,
        other,
    )
    return other


@contextmanager
def inductor_cache(folder: str | Path | None = None) -> Iterator[None]:
    """Keep what PyTorch compiles while it lasts in `folder`, unless the environment names another, or in its default.

    Whichever it is, another user must not be able to write to it; else a private one is used, with a warning.
    """
    import torch
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    before = os.environ.get(_INDUCTOR)
    if before not in (None, default_cache_dir()):
        wanted = before
    elif folder is not None:
        wanted = str(folder)
    else:
        # PyTorch finds graphs again without a look at what ATEN_CPU_CAPABILITY says, and code that was generated for
        # vectors of another width writes beyond the ends of tensors
        wanted = os.path.join(default_cache_dir(), f"stylefast-{torch.backends.cpu.get_cpu_capability().lower()}")
    os.environ[_INDUCTOR] = str(_checked(wanted, "compiled code"))
    try:
        yield
    finally:
        # PyTorch writes its default there as soon as it is asked for
        os.environ[_INDUCTOR] = before if before is not None else default_cache_dir()


@cache
def guard_triton_cache() -> None:
    """Point Triton to a private cache if another user can write to its own. Once a process, before the first launch."""
    import triton

    folder = _checked(triton.knobs.cache.dir, "Triton's compiled kernels")
    if str(folder) != triton.knobs.cache.dir:
        os.environ[_TRITON] = str(folder)


@cache
def _checked(wanted: str, what: str) -> Path:
    # once for each folder: what was safe when the process started stays so, for no other user can write there
    return private_folder(wanted, what)


@cache
def _own_temporary(what: str) -> Path:
    folder, owner = Path(tempfile.mkdtemp(prefix="stylefast-")), os.getpid()

    @atexit.register
    def remove():
        if os.getpid() == owner:  # a forked child leaves it to its parent
            shutil.rmtree(folder, ignore_errors=True)

    return folder


def _everything(folder: Path) -> Iterator[Path]:
    yield folder
    for parent, folders, files in os.walk(folder, onerror=_raise):
        yield from (Path(parent, name) for name in (*folders, *files))


def _first_foreign(paths: Iterable[Path], strict: bool) -> str | None:
    """strict: refuse what the user's own group may write, too, which some systems allow by default."""
    try:
        for path in paths:
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                return f"{path} is a link to elsewhere"
            if status.st_uid not in (os.getuid(), _ROOT):
                return f"{path} belongs to user {status.st_uid}, not to you ({os.getuid()})"
            if _others_write(status) or (strict and status.st_mode & stat.S_IWGRP):
                return f"others can write to {path} (mode {stat.S_IMODE(status.st_mode):o})"
    except OSError as error:
        return f"{error.filename} can't be looked at ({error.strerror or error})"
    return None


def _folders_above(path: Path) -> Iterator[Path]:
    """Every folder in which a step of the way to `path` is looked up, those that links lead through included."""
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
    # where the sticky bit is set, as in /tmp, only a file's owner may rename it
    if _others_write(status) and not status.st_mode & stat.S_ISVTX:
        return f"others can write to {folder} (mode {stat.S_IMODE(status.st_mode):o}) and may rename what is in it"
    return None


def _others_write(status: os.stat_result) -> bool:
    mode = status.st_mode
    return bool(mode & stat.S_IWOTH) or bool(mode & stat.S_IWGRP and not _is_users_own(status.st_gid))


@cache
def _is_users_own(group: int) -> bool:
    """Whether a group is the one that systems make for each user, with nobody else in it."""
    import grp
    import pwd

    try:
        user, entry = pwd.getpwuid(os.getuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return group == user.pw_gid and entry.gr_name == user.pw_name and set(entry.gr_mem) <= {user.pw_name}


def _raise(error: OSError) -> None:
    raise error
