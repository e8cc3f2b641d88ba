"""Style banks on disk: safetensors files that are filled in place, published atomically and read on demand.

An SDXL bank takes about 25 GB, so it is never gathered in memory: a temporary file of the final size is mapped and
filled page by page, then hashed, synced and renamed. Finished files are read, never mapped (see
`models.stored_tensors`). Each writer locks its own temporary file: of two writers the last one wins, with a complete
file, and temporaries of killed writers are recognised by their free locks.

The header's metadata holds two strings: `stylefast_bank`, a JSON object, and `stylefast_bank_sha256`, a hash of that
string and of every tensor's name, type, shape and bytes in the order of names. The hash stays valid if a tool rewrites
the file in another order.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from stylefast import values
from stylefast.errors import ModelFormatError, ModelNotFound, OutOfMemory, StyleError
from stylefast.models.digests import tensor_bytes
from stylefast.models.stored_tensors import StoredTensors
from stylefast.models.weight_files import PICKLED
from stylefast.styles.bank_size import TensorSpec
from stylefast.whole_files import put_in_place, sync

METADATA = "stylefast_bank"
CHECKSUM = "stylefast_bank_sha256"
_NO_CHECKSUM = "0" * 64
_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
}
# the tensor data starts at a page boundary; tensors are aligned to 64 bytes where their sizes allow it
_PAGE = 4096
_ALIGNMENT = 64
_HASH_THREADS = 8


class BankFile:
    """A bank's file during writing: `tensors` are views of the temporary file, to be filled before `publish`.

    `metadata` is the JSON stored under METADATA. Raises StyleError if the path can't be written or, with
    overwrite=False, exists; OutOfMemory up front if the disk is too full.
    """

    def __init__(self, path: str | Path, specs: Mapping[str, TensorSpec], metadata: str, overwrite: bool = True):
        # keep a symbolic link and replace its target
        self.path = Path(os.path.realpath(values.path("a style bank", path, error=StyleError)))
        self.overwrite = values.flag("overwrite", overwrite, error=StyleError)
        self.tensors: dict[str, Tensor] = {}
        self._temporary: Path | None = None
        self._descriptor = -1
        self._check_target()
        header, offsets, size = _lay_out(specs, metadata)
        self._checksum_at = header.index(_NO_CHECKSUM.encode())
        try:
            _remove_stale(self.path)
            self._reserve(size)
            os.pwrite(self._descriptor, header, 0)
            content = torch.from_file(str(self._temporary), shared=True, size=size, dtype=torch.uint8)
        except OSError as error:
            self.discard()
            raise self._unwritable(error) from error
        except BaseException:
            self.discard()
            raise
        for name, spec in specs.items():
            own = content[offsets[name] : offsets[name] + spec.nbytes]
            self.tensors[name] = own.view(spec.dtype).view(spec.shape)

    def publish(self, checksum: str) -> Path:
        """Write the checksum, sync the file and move it to its final path. Returns the path.

        Raises StyleError if the path can't be written or, with overwrite=False, exists.
        """
        self.tensors = {}
        try:
            os.pwrite(self._descriptor, checksum.encode(), self._checksum_at)
            os.fsync(self._descriptor)
            assert self._temporary is not None
            put_in_place(self._temporary, self.path, self.overwrite)
        except FileExistsError as error:
            raise self._taken() from error
        except OSError as error:
            raise self._unwritable(error) from error
        finally:
            self.discard()
        # some network file systems can't sync folders; the file is already in place, so ignore that
        with contextlib.suppress(OSError):
            sync(self.path.parent)
        return self.path

    def discard(self) -> None:
        """Remove the temporary file if it still exists; the target file is not touched."""
        self.tensors = {}
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
            self._temporary = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _check_target(self) -> None:
        if self.path.suffix in PICKLED:
            raise StyleError(f"{self.path.name} would be mistaken for a pickle; name it {self.path.stem}.bank")
        if self.path.is_dir():
            raise StyleError(
                f"{values.shown_path(self.path)} is a folder; give the bank a file name, such as brand.bank"
            )
        if not self.path.parent.is_dir():
            shown = values.shown_path(self.path.parent)
            raise StyleError(f"the folder {shown} does not exist; create it, or save the bank elsewhere")
        if not self.overwrite and self.path.exists():
            raise self._taken()

    def _reserve(self, size: int) -> None:
        """Create, lock and allocate the temporary file. Raises OutOfMemory if the disk is too full."""
        while True:
            name = self.path.with_name(f".{self.path.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
            self._descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            self._temporary = name
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
            if self._temporary.exists():
                break
            # another writer considered it stale and removed it between creation and locking
            os.close(self._descriptor)
        try:
            free = values.free_bytes(self.path.parent)
            if free is not None and free < size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # in a sparse file, a full disk would show only as a fatal signal on writing a mapped page
            os.posix_fallocate(self._descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            free = values.free_bytes(self.path.parent) or 0
            raise OutOfMemory(
                f"the bank {self.path.name} takes {size / 1e9:.3g} GB ({size} bytes), but {self.path.parent} has "
                f"only {free / 1e9:.3g} GB ({free} bytes) free or allowed; free space, save it elsewhere, or bake "
                "fewer steps, store='hidden' or dtype='float8_e4m3fn'"
            ) from error

    def _taken(self) -> StyleError:
        return StyleError(
            f"{values.shown_path(self.path)} exists already; save it under another name, or with overwrite=True"
        )

    def _unwritable(self, error: OSError) -> StyleError:
        return StyleError(
            f"can't write the bank {values.shown_path(self.path)}: {error.strerror or error}; choose another place"
        )


def read_bank(path: str | Path) -> tuple[str, str, StoredTensors]:
    """Open a bank's file. Returns its metadata (JSON), checksum and tensors by name, whose data is not read yet.

    Raises StyleError if the file is missing, truncated, not a safetensors file, or not a bank.
    """
    path = Path(path)
    if not os.path.isfile(path):
        near = values.did_you_mean_beside(path, (".bank",))
        raise StyleError(f"no style bank found at {values.shown_path(path)}; check the path{near}")
    try:
        tensors = StoredTensors(path, f"the style bank {path}", StyleError)
    except (ModelNotFound, ModelFormatError) as error:
        raise StyleError(f"can't read the style bank {path}: {error}") from error
    except OSError as error:
        raise StyleError(f"can't read the style bank {path}: {error.strerror or error}") from error
    metadata, checksum = (tensors.header.metadata.get(name) for name in (METADATA, CHECKSUM))
    if not isinstance(metadata, str) or not isinstance(checksum, str):
        raise StyleError(f"{path} is a safetensors file, but not a style bank; bake one with Engine.bake")
    return metadata, checksum, tensors


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Return types and shapes of tensors by name, without reading the data of stored tensors."""
    if isinstance(tensors, StoredTensors):
        return {name: TensorSpec(tensors.dtype(name), tensors.shape(name)) for name in tensors}
    return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def bank_checksum(metadata: str, tensors: Mapping[str, Tensor]) -> str:
    """Return SHA-256 over `metadata` and every tensor in the order of names, as 64 hexadecimal digits.

    Tensors are hashed separately, several in parallel, so that the disk limits the speed rather than one core.
    """
    names, specs = sorted(tensors), specs_of(tensors)
    with ThreadPoolExecutor(min(_HASH_THREADS, os.cpu_count() or 1)) as threads:
        digests = list(threads.map(lambda name: _digest(name, specs[name], tensors), names))
    if isinstance(tensors, StoredTensors):
        tensors.check()
    return hashlib.sha256(hashlib.sha256(metadata.encode()).digest() + b"".join(digests)).hexdigest()


def check_specs(tensors: Mapping[str, Tensor], specs: Mapping[str, TensorSpec], name: str) -> None:
    """Raise StyleError unless `tensors` match `specs` exactly in names, types and shapes."""
    missing, extra = sorted(specs.keys() - tensors.keys()), sorted(tensors.keys() - specs.keys())
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"holds {extra[0]}, which a bank of its kind does not have"
        raise StyleError(
            f"the style bank {name} {what} ({len(missing)} tensors missing, {len(extra)} unexpected); bake it again"
        )
    held = specs_of(tensors)
    for key, spec in specs.items():
        found = held[key]
        if found != spec:
            raise StyleError(
                f"{key} of the style bank {name} is {found.dtype} {found.shape}, but its metadata states "
                f"{spec.dtype} {spec.shape}; bake it again"
            )


def write_bank(
    path: str | Path, metadata: str, tensors: Mapping[str, Tensor], overwrite: bool, check: Callable[[str], None]
) -> Path:
    """Write existing tensors one after another. `check` receives the checksum before the file is published."""
    specs = specs_of(tensors)
    file = BankFile(path, specs, metadata, overwrite)
    try:
        for name, tensor in tensors.items():
            file.tensors[name].copy_(tensor)
        checksum = bank_checksum(metadata, file.tensors)
        check(checksum)
        return file.publish(checksum)
    except BaseException:
        file.discard()
        raise


def _lay_out(specs: Mapping[str, TensorSpec], metadata: str) -> tuple[bytes, dict[str, int], int]:
    """Return (header with a placeholder checksum, offset of each tensor in the file, size of the file)."""

    def place(name):
        # the format allows no gaps: multiples of 64 bytes go first, then wide types before narrow ones, so all stay
        # aligned to their type
        return (False, 0) if specs[name].nbytes % _ALIGNMENT == 0 else (True, -specs[name].dtype.itemsize)

    # the checksum comes first, so that searching for it can't match metadata text
    header: dict[str, dict] = {"__metadata__": {CHECKSUM: _NO_CHECKSUM, "format": "pt", METADATA: metadata}}
    starts, end = {}, 0
    for name in sorted(specs, key=place):
        starts[name], end = end, end + specs[name].nbytes
        header[name] = {
            "dtype": _CODES[specs[name].dtype],
            "shape": specs[name].shape,
            "data_offsets": (starts[name], end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
    begin = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: begin + start for name, start in starts.items()}, begin + end


def _digest(name: str, spec: TensorSpec, tensors: Mapping[str, Tensor]) -> bytes:
    found = hashlib.sha256(f"{name} {spec.dtype} {spec.shape} ".encode())
    if isinstance(tensors, StoredTensors):
        for piece in tensors.chunks(name):
            found.update(piece)
    else:
        found.update(tensor_bytes(tensors[name]))
    return found.digest()


def _remove_stale(target: Path) -> None:
    """Remove temporaries of this target whose writers are dead, that is, whose lock is free."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.\d+\.[0-9a-f]{{8}}\.part")
    for name in os.listdir(target.parent):
        if not pattern.fullmatch(name):
            continue
        # already removed, or another user's
        with contextlib.suppress(FileNotFoundError, PermissionError):
            descriptor = os.open(target.parent / name, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(target.parent / name)
            except BlockingIOError:
                continue
            finally:
                os.close(descriptor)
