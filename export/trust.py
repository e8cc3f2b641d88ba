"""Whether the files of an export may be run: engines are code, and code needs somebody to vouch for it."""

import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from stylefast.errors import UntrustedEngine
from stylefast.export.manifest import CODE, MANIFEST, SHOWN_DIGITS, Manifest


def check_trust(folder: str | Path, manifest: Manifest, trust: str | None = None) -> None:
    """Raise UntrustedEngine if files that are code may come from somebody else.

    They are trusted if the folder and all of its files belong to this user and nobody else can write to them, or if
    `trust` is the manifest's digest. ONNX files need no trust. The hashes are `check_files`' business: a digest says
    nothing of files that nobody compared with it.
    """
    folder = Path(folder).expanduser()
    if trust is not None:
        if trust.strip().lower() == manifest.digest:
            return
        raise UntrustedEngine(
            f"the digest given for {folder} is {trust.strip()[:SHOWN_DIGITS]}, its manifest has "
            f"{manifest.digest[:SHOWN_DIGITS]}; this is another export than the one you vouch for, or it was altered"
        )
    if manifest.kind not in CODE:
        return
    reason = foreign(folder, (MANIFEST, *(entry.name for entry in manifest.files)))
    if reason is not None:
        raise UntrustedEngine(
            f"an engine file is code, and {reason}. If you know where it is from, vouch for it with the digest that "
            f"`stylefast export` printed there: --trust DIGEST, or trust= in Python"
        )


def foreign(folder: Path, names: Iterable[str]) -> str | None:
    """Why files below `folder` may have been written by somebody else than this user; None if they can't have been."""
    if not hasattr(os, "getuid"):
        return f"this system does not tell whose {folder} is"
    folder = Path(os.path.realpath(folder))
    inner = {parent for name in names for parent in PurePosixPath(name).parents if parent.parts}
    try:
        for path in (folder, *(folder / name for name in sorted((*map(str, inner), *names)))):
            status = path.lstat()
            if stat.S_ISLNK(status.st_mode):
                return f"{path} is a link to elsewhere"
            if status.st_uid != os.getuid():
                return f"{path} belongs to user {status.st_uid}, not to you ({os.getuid()})"
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return f"others can write to {path} (mode {stat.S_IMODE(status.st_mode):o})"
    except OSError as error:
        return f"{error.filename} can't be looked at ({error.strerror or error})"
    return None
