"""Tensors in safetensors files, read on demand and never memory-mapped.

Truncating a mapped file during use, as `cp new.bank brand.bank` does, kills the process by SIGBUS; rewriting it
silently changes its users' data. Reading detects both and raises an error.
"""

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from stylefast.errors import ModelFormatError
from stylefast.models.quantised import check_storage, dequantised
from stylefast.models.weight_files import WeightHeader, read_header

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_CHUNK = 2**24  # bytes


class Span(NamedTuple):
    """Byte range of a file that holds a tensor or a contiguous part of one."""

    file: "StoredTensors"
    offset: int
    nbytes: int


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name; each look-up reads a tensor into new memory.

    what: the file's name in messages; error: the class of its errors; any_ending: as in `read_header`. The file stays
    open, so replacing it by another (as every `save` and `bake` here does) has no effect; writing into it or truncating
    it is detected.

    Raises ModelNotFound and ModelFormatError as `read_header` does.
    """

    def __init__(
        self,
        path: str | Path,
        what: str | None = None,
        error: type[Exception] = ModelFormatError,
        any_ending: bool = False,
    ):
        self.path, self._error = Path(path), error
        self._what = what or self.path.name
        self.header, self.descriptor = _open(self.path, any_ending)
        self._close = weakref.finalize(self, os.close, self.descriptor)
        self._state = _state(self.descriptor)

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.header.tensors)

    def __len__(self) -> int:
        return len(self.header.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.header.tensors

    def dtype(self, name: str) -> torch.dtype:
        """Return the type of a tensor. Raises `error` for a type that PyTorch lacks."""
        kind = self.header.tensors[name][0]
        if kind not in _DTYPES:
            raise self._error(f"{self._what} contains {name} in {kind}, which PyTorch can't read")
        return _DTYPES[kind]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.header.tensors[name][1]

    def span(self, name: str, place: Sequence[int] = ()) -> Span:
        """Return the span of a tensor, or of its part at the leading indices `place`. Raises IndexError."""
        offset, nbytes = self.header.offsets[name], _nbytes(self.dtype(name), self.shape(name))
        for index, side in zip(place, self.shape(name)):
            if not 0 <= index < side:
                raise IndexError(f"{name} has shape {list(self.shape(name))}, which has no index {list(place)}")
            nbytes //= side
            offset += index * nbytes
        return Span(self, offset, nbytes)

    def read(self, name: str, place: Sequence[int] = ()) -> Tensor:
        """Read a tensor, or its part at the leading indices `place`, into new memory.

        Raises `error` if the file can't be read, or was written to since it was opened.
        """
        found = torch.empty(self.shape(name)[len(place) :], dtype=self.dtype(name))
        self.read_into(self.span(name, place), found)
        self.check()
        return found

    def read_into(self, span: Span, target: Tensor) -> None:
        """Read bytes into a contiguous CPU tensor of equal size. Raises `error` as `read` does; see also `check`."""
        content = target.detach().reshape(-1).view(torch.uint8).numpy().data
        done = 0
        try:
            while done < span.nbytes:
                count = os.preadv(self.descriptor, [content[done:]], span.offset + done)
                if count == 0:
                    raise self.changed()
                done += count
        except OSError as error:
            raise self.unreadable(error.strerror or str(error)) from error

    def chunks(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a tensor piece by piece; each piece is valid only until the next one is read."""
        span = self.span(name)
        buffer = torch.empty(min(span.nbytes, _CHUNK), dtype=torch.uint8)
        for start in range(0, span.nbytes, _CHUNK):
            piece = buffer[: min(_CHUNK, span.nbytes - start)]
            self.read_into(Span(self, span.offset + start, piece.nbytes), piece)
            yield piece.numpy().data

    def check(self) -> None:
        """Raise `error` if the file was modified or truncated since it was opened, so that data read may be mixed."""
        if _state(self.descriptor) != self._state:
            raise self.changed()

    def unreadable(self, reason: str) -> Exception:
        """Return the error for a file that can't be read."""
        return self._error(f"can't read {self._what}: {reason}")

    def close(self) -> None:
        """Close the file; later reads fail."""
        self._close()

    def changed(self) -> Exception:
        """Return the error for a file that was modified or truncated during use."""
        return self._error(
            f"{self._what} was written to while it was in use; load it again, and replace such files by renaming "
            "(mv), not by copying over them (cp)"
        )


def load_weights(
    path: str | Path, *, dtype: torch.dtype, device: torch.device | str, prefix: str = ""
) -> dict[str, Tensor]:
    """Load all tensors whose name starts with `prefix`, floating ones in `dtype`; names are unchanged.

    Scales of float8 weights are applied. Raises ModelNotFound, and ModelFormatError for a damaged file or an
    unsupported packed format.
    """
    stored = StoredTensors(path)
    names = [name for name in stored if name.startswith(prefix)]
    check_storage({name: stored.header.tensors[name] for name in names}, stored.path.name)
    tensors = {name: stored[name].to(device) for name in names}
    stored.close()
    return dequantised(tensors, dtype, stored.path.name)


def _open(path: Path, any_ending: bool) -> tuple[WeightHeader, int]:
    """Return header and descriptor of the same file, even if the path is replaced meanwhile."""
    while True:
        header = read_header(path, any_ending=any_ending)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ModelFormatError(f"can't read {path.name}: {error.strerror or error}") from error
        if read_header(path, any_ending=any_ending) == header and os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return header, descriptor
        os.close(descriptor)


def _state(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


def _nbytes(dtype: torch.dtype, shape: Sequence[int]) -> int:
    count = dtype.itemsize
    for side in shape:
        count *= side
    return count
