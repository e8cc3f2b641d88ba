"""The styles in a folder on disk: listed, read, written and removed, by several servers and commands at once.

Each style is a folder (see `style_files`) that appears and goes by renaming, so that nobody sees half of one. Writers
take turns by a lock on the folder of styles; work in progress lies in folders whose names begin with a dot, locked by
those who write them, so that what a killed writer left is told apart and removed.
"""

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stylefast import values
from stylefast.errors import StyleError
from stylefast.serving.style_files import (
    MANIFEST,
    Manifest,
    StyleFile,
    StyleFolder,
    file_digest,
    safe_file,
    safe_name,
)
from stylefast.values import quoted
from stylefast.whole_files import sync, write_whole

# larger files are compared with their digests when the style is first used, since a list must not take minutes
HASHED_BYTES = 8 * 2**20
BANK_SUFFIX = ".bank"
_NEW, _GONE = ".new-", ".gone-"
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)


class StyleExists(StyleError):
    """A style of this name is registered already."""


class UnknownStyle(StyleError):
    """No style of this name is registered."""


class ReadOnlyStyles(StyleError):
    """The folder of styles can't be written, or is gone."""


@dataclass(frozen=True)
class Registered:
    """A style on disk. fault: why it can't be used; None: it can."""

    name: str
    path: Path
    manifest: Manifest | None
    fault: str | None = None
    stamp: tuple[Any, ...] = ()  # changes when a file does

    def usable(self) -> Manifest:
        """Return the manifest. Raises StyleError if the style has a fault."""
        if self.fault is not None or self.manifest is None:
            raise StyleError(f"the style {quoted(self.name)} can't be used: {self.fault}")
        return self.manifest


class StyleRegistry:
    """The styles in a folder. Raises StyleError if there is no such folder.

    taken: names that styles here may not have, since the model comes with styles of these names.
    """

    def __init__(self, folder: str | Path, taken: Sequence[str] = ()):
        folder = values.path("the folder of styles", folder, error=StyleError)
        if not folder.is_dir():
            raise StyleError(f"the folder of styles {values.shown_path(folder)} does not exist; create it")
        self.folder = folder.resolve()
        self.taken: Sequence[str] = taken
        self._known: dict[str, Registered] = {}
        self._scanned = -1.0

    # reading

    def scan(self, max_age: float = 0.0) -> dict[str, Registered]:
        """Return all styles by name, those with a fault too; a list of the last `max_age` seconds will do."""
        if self._scanned >= 0 and time.monotonic() - self._scanned <= max_age:
            return self._known
        try:
            with os.scandir(self.folder) as entries:
                names = sorted(e.name for e in entries if e.name[0] != "." and (e.is_dir() or e.is_symlink()))
        except OSError as error:
            raise StyleError(f"the folder of styles can't be read: {error.strerror or error}") from None
        alike = Counter(name.lower() for name in names)
        taken = {name.lower(): name for name in self.taken}
        found: dict[str, Registered] = {}
        for name in names:
            entry = self._read(name)
            if name.lower() in taken:
                other = taken[name.lower()]
                fault = f"the model comes with a style {quoted(other)}; rename the folder"
                entry = replace(entry, fault=fault)
            elif alike[name.lower()] > 1:
                fault = "another style's name differs only by capital letters; rename one of the folders"
                entry = replace(entry, fault=fault)
            found[entry.name] = entry
        self._known, self._scanned = found, time.monotonic()
        return found

    def find(self, name: str) -> Registered:
        """Return a style as it is now. Raises UnknownStyle."""
        found = self.scan()
        if name not in found:
            raise UnknownStyle(f"no style {quoted(name)} is registered{values.did_you_mean(name, found)}")
        return found[name]

    def check_clashes(self) -> None:
        """Raise StyleError if a folder has the name of a style that comes with the model."""
        ours = {name.lower(): name for name in self.taken}
        for name in self.scan():
            if name.lower() in ours:
                raise StyleError(
                    f"the style {quoted(ours[name.lower()])} comes with the model, and {self.folder / name} has the "
                    "same name; rename the folder"
                )

    def _read(self, name: str) -> Registered:
        path, before = self.folder / name, self._known.get(name)
        try:
            safe_name(name, "the folder")
        except StyleError as error:
            return Registered(quoted(name)[1:-1], path, None, str(error))
        manifest = None
        try:
            with StyleFolder(path) as folder:
                stamps = [folder.stamp(MANIFEST)]
                known = before.manifest if before is not None and before.stamp[:1] == tuple(stamps) else None
                manifest = known or folder.manifest()
                stamps += [folder.stamp(file) for file in manifest.files]
                if before is not None and before.manifest is not None and before.stamp == tuple(stamps):
                    return self._read_before(before, manifest)
                for file, wanted in manifest.files.items():
                    if folder.stamp(file)[1] != wanted.bytes or wanted.bytes <= HASHED_BYTES:
                        folder.check(file, wanted)
            return Registered(name, path, manifest, None, tuple(stamps))
        except FileNotFoundError:
            return Registered(name, path, None, "it was removed just now")
        except (StyleError, OSError) as error:
            return Registered(name, path, manifest, str(error))

    def _read_before(self, before: Registered, manifest: Manifest) -> Registered:
        # a fault that lies in other folders' names is found anew each time
        return Registered(before.name, before.path, manifest, None, before.stamp)

    # writing

    @contextmanager
    def draft(self) -> Iterator["Draft"]:
        """Make a folder for a style in the making, which is removed at the end unless it was published."""
        path = self.folder / f"{_NEW}{secrets.token_hex(8)}"
        with self._turn():
            self._sweep()
            path.mkdir()
            held = _hold(path)
        try:
            yield Draft(self, path)
        finally:
            if held is not None:
                os.close(held)
            shutil.rmtree(path, ignore_errors=True)

    def publish(self, draft: "Draft", name: str, manifest: Manifest) -> Registered:
        """Give a finished draft its name. Raises StyleExists, and StyleError for a name that is not safe."""
        self.check_free(name)
        content = _written(replace(manifest, files=dict(draft.files)))
        with self._turn():
            self.check_free(name)
            write_whole(draft.path / MANIFEST, content)
            sync(draft.path)
            try:
                os.rename(draft.path, self.folder / name)
            except OSError as error:
                if error.errno in _TAKEN:
                    raise StyleExists(f"a style {quoted(name)} is registered already; choose another name") from None
                raise
            sync(self.folder)
        return self.find(name)

    def check_free(self, name: str) -> None:
        """Raise StyleExists if a name is taken, also in other capital letters, and StyleError if it is not safe.

        Raises ReadOnlyStyles if the folder is gone.
        """
        safe_name(name)
        try:
            there = os.listdir(self.folder)
        except OSError as error:
            raise ReadOnlyStyles(f"the folder of styles can't be read: {error.strerror or error}") from None
        for other in [*self.taken, *(other for other in there if not other.startswith("."))]:
            if other.lower() == name.lower():
                raise StyleExists(f"a style {quoted(other)} is registered already; choose another name, or delete it")

    def add_bank(
        self, name: str, draft: "Draft", file: Path, style: int, settings: Mapping[str, Any], before: Registered
    ) -> Registered:
        """Add a bank to a style, in place of an earlier one; requests then have the bank's settings unless they say.

        file: in the draft's folder. before: the style as it was when it was baked. Raises StyleError if it has changed
        since.
        """
        with file.open("rb") as stream:
            digest, size = file_digest(stream), os.fstat(stream.fileno()).st_size
        target = f"bank-{digest[:12]}{BANK_SUFFIX}"
        with self._turn():
            found = self.find(name)
            manifest = found.usable()
            if found.stamp != before.stamp:
                raise StyleError(f"the style {quoted(name)} was changed while it was baked; bake it again")
            old = [bank for bank, number in manifest.banks if number == style and bank != target]
            files = {name: one for name, one in manifest.files.items() if name not in old}
            banks = [(bank, number) for bank, number in manifest.banks if number != style]
            manifest = replace(
                manifest,
                files={**files, target: StyleFile(digest, size)},
                banks=[*banks, (target, style)],
                defaults={**manifest.defaults, **settings},
            )
            os.rename(file, found.path / target)
            write_whole(found.path / MANIFEST, _written(manifest))
            sync(found.path)
            for bank in old:
                (found.path / safe_file(bank)).unlink(missing_ok=True)
        return self.find(name)

    def remove(self, name: str) -> None:
        """Remove a style, also one with a fault; whoever has its files open keeps them. Raises UnknownStyle."""
        gone = self.folder / f"{_GONE}{secrets.token_hex(8)}"
        with self._turn():
            self._sweep()
            path = self.find(safe_name(name)).path
            try:
                os.rename(path, gone)
            except FileNotFoundError:
                raise UnknownStyle(f"no style {quoted(name)} is registered") from None
            sync(self.folder)
        # others may be reading the list, so it is replaced
        self._known = {other: one for other, one in self._known.items() if other != name}
        _discard(gone)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Be the only writer of the folder. Raises ReadOnlyStyles."""
        if not os.access(self.folder, os.W_OK):
            raise ReadOnlyStyles(f"the folder of styles {self.folder} can't be written here; use the server that can")
        descriptor = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(OSError):  # of a file system without locks: renaming alone keeps writers apart
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        except OSError as error:
            if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise ReadOnlyStyles(f"the folder of styles can't be written: {error.strerror}") from None
            raise
        finally:
            os.close(descriptor)

    def _sweep(self) -> None:
        """Remove what writers left that were killed; call it within `_turn`."""
        for name in os.listdir(self.folder):
            if name.startswith((_NEW, _GONE)):
                held = _hold(self.folder / name)
                if held is not None:
                    os.close(held)
                    _discard(self.folder / name)


class Draft:
    """A style in the making, in a folder of its own that no list shows."""

    def __init__(self, registry: StyleRegistry, path: Path):
        self.path, self._registry = path, registry
        self.files: dict[str, StyleFile] = {}

    def add(self, name: str, content: bytes) -> str:
        """Write a file and note its digest. Returns its name. Raises StyleError for a name that is not safe."""
        write_whole(self.path / safe_file(name), content, overwrite=False)
        self.files[name] = StyleFile(hashlib.sha256(content).hexdigest(), len(content))
        return name

    def note(self, name: str, digest: str, size: int) -> None:
        """Note a file that was written by other means."""
        self.files[safe_file(name)] = StyleFile(digest, size)

    def write_manifest(self, manifest: Manifest) -> Manifest:
        """Write `style.json` before publishing, so that an engine can try the style. Returns what was written."""
        manifest = replace(manifest, files=dict(self.files))
        write_whole(self.path / MANIFEST, _written(manifest))
        return manifest

    def publish(self, name: str, manifest: Manifest) -> Registered:
        """Give the draft its name; see `StyleRegistry.publish`."""
        return self._registry.publish(self, name, manifest)


def now() -> str:
    """Return the time for a manifest's "created"."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _written(manifest: Manifest) -> bytes:
    content = manifest.to_json()
    Manifest.of(content)  # what would be refused when it is read is not written
    return json.dumps(content, indent=1).encode()


def _hold(path: Path) -> int | None:
    """Lock a folder of work in progress, and return the descriptor; None if another writer has it, or it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _discard(path: Path) -> None:
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
