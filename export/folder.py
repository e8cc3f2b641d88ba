"""Export folders that appear complete or not at all; an interrupted export can be resumed.

Files are written to `<folder>.part`, which is renamed at the end. In it, `unfinished.json` records finished files, with
hashes, and the arguments they were made with: an export started again with the same arguments resumes from it. A lock
next to it, `<folder>.part.lock`, keeps out a second export; the lock of a process that died blocks no other.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stylefast import values
from stylefast.code_caches import foreign
from stylefast.errors import ExportError, InvalidRequest, ModelFormatError, StyleFastError
from stylefast.export.manifest import MANIFEST, FileEntry, Manifest, check_files, file_entry
from stylefast.whole_files import sync, write_whole

logger = logging.getLogger(__name__)

RECORD = "unfinished.json"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# published files must not be writable by other users, because they may be code
_OTHERS_WRITE = 0o022


class UnfinishedExport:
    """Folder being filled, at `path`. Created by `publishing`.

    For every graph: call `finished`; if it returns None, write the files below `path` and call `record`. At the end
    pass the manifest to `complete`.
    """

    def __init__(self, target: Path, arguments: str, say: Callable[[str], None]):
        self.target, self.path = target, _beside(target, ".part")
        self._arguments, self._say = arguments, say
        self._manifest: Manifest | None = None
        self._graphs = self._take_over()
        self.path.mkdir(mode=0o755, exist_ok=True)
        self._write_record()
        self.sweep()

    def finished(self, name: str) -> Any | None:
        """Return the detail that `record` stored for a graph if its files are unchanged, else None."""
        found = self._graphs.get(name)
        if found is None:
            return None
        whole = all(
            _is_plain_file(self.path / entry.name) and file_entry(self.path, entry.name) == entry
            for entry in found["files"]
        )
        if whole:
            return found["detail"]
        self._say(f"the files of {name} in {self.path} are not as they were written; it is made again")
        del self._graphs[name]
        self._write_record()
        return None

    def record(self, name: str, files: Sequence[str], detail: Any = True) -> tuple[FileEntry, ...]:
        """Record files, paths below `path`, as finished; return their entries for the manifest.

        detail: JSON that `finished` returns, such as a graph's entry. Recording a name again replaces it.
        """
        for file in files:
            _close_to_others(self.path / file)
        entries = tuple(file_entry(self.path, file) for file in files)
        self._graphs[name] = {"files": entries, "detail": detail}
        self._write_record()
        return entries

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Return the entries of all recorded files, each file once, in the order of recording."""
        return tuple({entry.name: entry for graph in self._graphs.values() for entry in graph["files"]}.values())

    @property
    def finished_bytes(self) -> int:
        """Return the bytes of recorded files on the disk."""
        return sum(entry.bytes for entry in self.files)

    def complete(self, manifest: Manifest) -> None:
        """Set the manifest; `publishing` publishes the folder at its end. Raises ExportError for unrecorded files."""
        recorded = set(self.files)
        unrecorded = [entry.name for entry in manifest.files if entry not in recorded]
        if unrecorded:
            raise ExportError(f"the manifest lists {unrecorded[0]}, which was not recorded as finished")
        self._manifest = manifest

    def sweep(self) -> list[str]:
        """Remove all files that are not recorded; return their names."""
        if not self.path.is_dir():
            return []
        gone = []
        keep = {self.path / entry.name for entry in self.files} | {self.path / RECORD}
        for path in sorted(self.path.rglob("*"), reverse=True):  # contents before their folder
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path not in keep:
                path.unlink()
                gone.append(path.relative_to(self.path).as_posix())
        return gone

    def discard_if_empty(self) -> None:
        """Remove the folder if it has nothing to resume from."""
        if not self._graphs:
            shutil.rmtree(self.path, ignore_errors=True)

    def publish(self) -> None:
        """Write the manifest and rename the folder to its target, replacing an old export. Raises ExportError.

        Recorded files that the manifest does not list, such as graphs that engines were built from, are removed.
        """
        if self._manifest is None:
            raise ExportError(f"the export to {self.target} ended without a manifest; nothing was published")
        if gone := self.sweep():
            logger.warning("%s were not recorded, and are no part of the export", ", ".join(gone))
        listed = {entry.name for entry in self._manifest.files}
        for entry in self.files:
            if entry.name not in listed:
                (self.path / entry.name).unlink(missing_ok=True)
        # files were hashed when recorded; check again that none vanished since
        check_files(self.path, self._manifest, deep=False)
        text = json.dumps(self._manifest.to_json(), indent=1)
        (self.path / MANIFEST).write_text(text, encoding="utf-8")
        for path in (*self.path.rglob("*"), self.path):
            _close_to_others(path)
            sync(path)
        self._move()
        (self.target / RECORD).unlink(missing_ok=True)
        sync(self.target.parent)

    def _move(self) -> None:
        aside = _beside(self.target, ".replaced")
        occupied = self.target.is_dir() and any(self.target.iterdir())
        if occupied:
            os.rename(self.target, aside)
        try:
            os.rename(self.path, self.target)  # also replaces an empty folder
        except OSError:
            if occupied:
                os.rename(aside, self.target)
            raise
        if occupied:
            shutil.rmtree(aside, ignore_errors=True)

    def _take_over(self) -> dict[str, dict]:
        """Return what an earlier export with the same arguments recorded, or {} to start anew. Raises ExportError."""
        if not os.path.lexists(self.path):
            return {}
        stranger = None if self.path.is_dir() else f"{self.path} is no folder"
        recorded = (self.path / RECORD).is_file()
        # another user's files must not be trusted or removed; our own are hashed before they are reused
        stranger = stranger or foreign(self.path, (RECORD,) if recorded else (), above=False)
        if (
            stranger is None
            and not recorded
            and any(not path.name.startswith(f".{RECORD}.") for path in self.path.iterdir())
        ):
            stranger = f"{self.path} was not left by an export"
        if stranger is not None:
            raise ExportError(f"{stranger}, and stands where files are collected; remove it, or choose another folder")
        try:
            record = values.load_json((self.path / RECORD).read_bytes(), "the record", error=ModelFormatError)
            arguments = record["arguments"]
            graphs = {
                name: {"files": tuple(FileEntry(**entry) for entry in graph["files"]), "detail": graph["detail"]}
                for name, graph in record["graphs"].items()
            }
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError, ModelFormatError):
            self._say(f"the record in {self.path} is damaged; the export starts anew")
            return {}
        if arguments != self._arguments:
            self._say(f"{self.path} was begun with other arguments, versions or weights; the export starts anew")
            return {}
        if graphs:
            self._say(f"goes on with {self.path}, where {', '.join(graphs)} are finished")
        return graphs

    def _write_record(self) -> None:
        graphs = {
            name: {"files": [vars(entry) for entry in graph["files"]], "detail": graph["detail"]}
            for name, graph in self._graphs.items()
        }
        text = json.dumps({"arguments": self._arguments, "graphs": graphs})
        write_whole(self.path / RECORD, text.encode(), mode=0o644)


@contextmanager
def publishing(
    folder: str | Path,
    overwrite: bool = False,
    *,
    arguments: Any = None,
    needed: int = 0,
    say: Callable[[str], None] = logger.info,
) -> Iterator[UnfinishedExport]:
    """Fill an export folder that appears only when the block ends without error.

    arguments: JSON of all that determines the files; an unfinished export is resumed only if they are the same. needed:
    bytes that the export will take on the disk. say: called with a message when an export is resumed or starts anew.

    If the block fails, recorded files are kept for the next run, and the rest removed. Raises InvalidRequest for an
    unfit target (see `check_target`), ExportError if another export to it is in progress or the disk is full.
    """
    target = check_target(folder, overwrite)
    with _disk_errors(target), _only_one(target):
        _put_back(target)
        check_target(target, overwrite)
        export = UnfinishedExport(target, _digest(arguments), say)
        try:
            _check_room(target, needed - export.finished_bytes)
            yield export
            export.publish()
        except BaseException:
            _clean_up(export)
            raise


def check_target(folder: str | Path, overwrite: bool = False) -> Path:
    """Return the absolute path that an export may be written to, with links resolved.

    Raises InvalidRequest if it is a file, can't be written, holds an export while overwrite=False, or holds anything
    else, which is never replaced.
    """
    target = Path(os.path.realpath(values.path("the folder of an export", folder)))
    if target.exists() and not target.is_dir():
        raise InvalidRequest(f"{target} is a file; an export is a folder, so choose another name")
    holder = next(parent for parent in target.parents if parent.exists()) if target.parent != target else target
    if not holder.is_dir():
        raise InvalidRequest(f"{holder} is a file, so {target} can't be made; choose another folder")
    if not os.access(holder, os.W_OK | os.X_OK) or target == target.parent:
        raise InvalidRequest(f"{holder} can't be written to; choose another folder")
    if target.is_dir() and any(target.iterdir()):
        if not (target / MANIFEST).is_file():
            raise InvalidRequest(f"{target} holds other things than an export; choose another folder")
        if not overwrite:
            raise InvalidRequest(f"{target} exists; pass --overwrite to replace it, or choose another folder")
    return target


def _clean_up(export: UnfinishedExport) -> None:
    try:
        export.sweep()
        export.discard_if_empty()
    except OSError as error:  # the failure that led here is more informative
        logger.warning("%s could not be cleaned up (%s)", export.path, error)


def _put_back(target: Path) -> None:
    """Finish a replacement that was interrupted between moving the old export aside and removing it."""
    aside = _beside(target, ".replaced")
    if not os.path.lexists(aside):
        return
    if not (aside / MANIFEST).is_file():
        raise ExportError(f"{aside} is in the way: an export that is replaced is kept there for a moment; move it")
    if target.exists():
        shutil.rmtree(aside)
    else:
        os.rename(aside, target)


@contextmanager
def _only_one(target: Path) -> Iterator[None]:
    """Hold the target's lock. Raises ExportError if another process holds it."""
    path = _beside(target, ".part.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(descriptor, 64).decode(errors="replace").strip()
            os.close(descriptor)
            raise ExportError(
                f"another export to {target} is running ({f'process {holder}' if holder else 'since just now'}); wait "
                "for it, stop it, or choose another folder"
            ) from error
        # the previous holder removes the file when done, in which case this descriptor is of the removed file
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turn file-system errors, also from deep within a library, into ExportError."""
    try:
        yield
    except StyleFastError:
        raise
    except Exception as error:
        cause = _disk_error(error, target)
        if cause is None:
            raise
        if cause.errno in _DISK_FULL:
            raise ExportError(
                f"the disk of {target} is full; free some room and run the same command again, which goes on with what "
                "is finished, or choose a folder on another disk"
            ) from error
        raise ExportError(f"can't write to {target} ({cause.strerror or cause}); choose another folder") from error


def _disk_error(error: BaseException | None, target: Path) -> OSError | None:
    """Return the error of a full disk or of one of this export's files from a chain of causes, or None."""
    ours = (str(target), str(_beside(target, ".part")))
    while error is not None:
        if isinstance(error, OSError):
            named = isinstance(error.filename, str) and error.filename.startswith(ours)
            if error.errno in _DISK_FULL or named:
                return error
        error = error.__cause__ or error.__context__
    return None


def _check_room(target: Path, needed: int) -> None:
    free = values.free_bytes(_beside(target, ".part"))
    if free is not None and needed > free:
        raise ExportError(
            f"the export takes another {needed / 1e9:.3g} GB, and the disk of {target} has {free / 1e9:.3g} GB free; "
            "free some room, export fewer flavours, or choose a folder on another disk"
        )


def _digest(arguments: Any) -> str:
    return hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()


def _beside(target: Path, ending: str) -> Path:
    return target.with_name(target.name + ending)


def _is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _close_to_others(path: Path) -> None:
    path.chmod(path.stat().st_mode & ~_OTHERS_WRITE)
