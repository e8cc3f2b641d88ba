"""Cache files of code compiled by PyTorch, for later processes.

A folder per combination of PyTorch, machine and model, with one file per process that compiled something new. A file is
PyTorch's own archive after an identifying line and a checksum. On a GPU the archive holds all generated code; on a CPU
it lacks the C++ compiler's output, so PyTorch's own cache folder is kept next to it.
"""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from stylefast.code_caches import cpu_instructions, inductor_cache, machine, private_folder, replaceable_inside
from stylefast.errors import InvalidRequest
from stylefast.whole_files import write_whole

logger = logging.getLogger(__name__)

VARIABLE = "STYLEFAST_CACHE"
_MAGIC = b"stylefast compiled regions 1\n"
# the newest are read, older ones removed
_MOST_FILES = 16


def default_folder() -> Path:
    """Return `STYLEFAST_CACHE`, or stylefast's folder in the user's cache. Raises InvalidRequest if it is relative."""
    given = os.environ.get(VARIABLE)
    if given:
        if not Path(given).is_absolute():
            raise InvalidRequest(f"{VARIABLE}={given} is not an absolute path; give the whole path of a folder")
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stylefast"


class CompileCache:
    """The files of one model on one kind of machine, below `folder`.

    A folder that another user can write to or replace is not used; a private one replaces it.
    """

    def __init__(self, folder: Path, config: dict, dtype: torch.dtype, device: torch.device):
        inner = Path("compile", _identity(config, dtype, device))
        try:
            reason = replaceable_inside(folder / inner)
        except OSError:
            reason = None  # nothing to read there; `save` says that nothing can be kept
        self.folder = (folder if reason is None else private_folder(folder, "compiled code", reason)) / inner
        self._loaded: set[tuple[str, str]] = set()  # (kind, key) of artifacts in loaded and saved files
        self._saved: Path | None = None  # this process's file
        self._skipped = False
        self._on_cpu = device.type == "cpu"

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Keep code compiled for a CPU inside the block here, unless the environment names another folder."""
        with inductor_cache(self.folder / "inductor" if self._on_cpu else None):
            yield

    def load(self) -> int:
        """Load all files into PyTorch; return the number of artifacts. Unusable files are skipped and logged."""
        for path in self._files():
            payload = _read(path)
            if payload is None:
                continue
            with self.compiling():
                info = torch.compiler.load_cache_artifacts(payload)
            if info is None:
                logger.warning("%s contains nothing that this PyTorch can load; it is ignored", path)
            else:
                self._loaded |= _keys(info)
        return len(self._loaded)

    def save(self) -> Path | None:
        """Write this process's compiled code if any of it is new; return the file, or None.

        PyTorch collects for the whole process, so code compiled by other parts of it is included. An unwritable folder
        is logged once: compiled code works without a cache.
        """
        found = torch.compiler.save_cache_artifacts()
        if found is None or _keys(found[1]) <= self._loaded:
            return None
        payload, info = found
        path = self.folder / f"{hashlib.sha256(payload).hexdigest()[:24]}.bin"
        try:
            _write(path, payload)
        except OSError as error:
            if not self._skipped:
                self._skipped = True
                logger.warning("compiled code can't be kept in %s (%s); every start compiles again", self.folder, error)
            return None
        if self._saved not in (None, path):
            self._saved.unlink(missing_ok=True)  # the new file includes its contents
        self._saved = path
        self._loaded |= _keys(info)
        for old in self._files(beyond=True):
            old.unlink(missing_ok=True)
        return path

    def _files(self, beyond: bool = False) -> list[Path]:
        """Return the newest files, newest first; with `beyond`, the remaining ones."""
        dated = []
        for path in self.folder.glob("*.bin"):
            try:
                dated.append((path.stat().st_mtime, path))
            except OSError:
                continue  # removed by another process meanwhile
        ordered = [path for _, path in sorted(dated, reverse=True)]
        return ordered[_MOST_FILES:] if beyond else ordered[:_MOST_FILES]


def _keys(info) -> set[tuple[str, str]]:
    return {(kind, key) for kind, keys in info.artifacts.items() for key in keys}


def _read(path: Path) -> bytes | None:
    """Return the archive in a file; None, with a warning, if it is damaged, foreign, or writable by others."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
                logger.warning("%s is code that another user could have written; it is ignored", path)
                return None
            magic, checksum, payload = file.read(len(_MAGIC)), file.read(32), file.read()
    except OSError as error:
        logger.warning("%s can't be read (%s); it is ignored", path, error)
        return None
    if magic != _MAGIC or hashlib.sha256(payload).digest() != checksum:
        logger.warning("%s is truncated, altered or from other software; it is ignored", path)
        return None
    return payload


def _write(path: Path, payload: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # a file that others may write to would not be read
    write_whole(path, _MAGIC, hashlib.sha256(payload).digest(), payload, mode=0o600)


def _identity(config: dict, dtype: torch.dtype, device: torch.device) -> str:
    """Return a digest of everything that compiled code depends on but PyTorch's own keys may miss."""
    if device.type == "cuda":
        chip = [torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)]
    else:
        chip = [machine(), torch.backends.cpu.get_cpu_capability(), cpu_instructions()]
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    facts = [torch.__version__, triton, platform.python_version(), chip, config, str(dtype)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:24]
