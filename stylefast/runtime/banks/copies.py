"""Copies between host tensors, and from files into them, in lists that threads of an executor work off.

In C++ a list is copied without the interpreter's lock. Without the extension each of its pieces takes the lock again,
which beside a busy Python thread takes longer (`benchmarks/copies.py`).
"""

import os
from collections.abc import Sequence
from concurrent.futures import Executor, Future

import numpy as np
import torch

from stylefast._extension import extension
from stylefast.errors import InvalidRequest
from stylefast.models.stored_tensors import Span

# one list per thread would wait for the slowest of them
_LISTS = 8


def start_copies(
    executor: Executor, sources: Sequence[torch.Tensor | Span], destinations: Sequence[torch.Tensor]
) -> list[Future[None]]:
    """Copy the bytes of sources[i], a tensor or a span of a file, into destinations[i], in any order.

    Futures hold the tensors and files until they are done, and then have the error of a file that could not be read.

    Raises:
        InvalidRequest: lists of different lengths; tensors that are not on the CPU, not contiguous, of different sizes,
            or overlap.
        RuntimeError: the executor was shut down.
    """
    if len(sources) != len(destinations):
        raise InvalidRequest(f"{len(sources)} sources and {len(destinations)} destinations; give one for the other")
    for i, (source, destination) in enumerate(zip(sources, destinations)):
        if source.nbytes != destination.nbytes:
            raise InvalidRequest(f"source {i} has {source.nbytes} bytes, but destination {i} has {destination.nbytes}")
        for name, tensor in (("source", source), ("destination", destination)):
            if isinstance(tensor, torch.Tensor) and not (tensor.is_cpu and tensor.is_contiguous()):
                raise InvalidRequest(
                    f"{name} {i} of shape {tuple(tensor.shape)} on {tensor.device} must be contiguous and on the CPU"
                )
        if isinstance(source, torch.Tensor) and abs(source.data_ptr() - destination.data_ptr()) < source.nbytes:
            raise InvalidRequest(f"source {i} and destination {i} overlap")
    lists = range(min(_LISTS, len(sources)))
    return [executor.submit(copy_blocks, sources[i::_LISTS], destinations[i::_LISTS]) for i in lists]


def copy_blocks(sources: Sequence[torch.Tensor | Span], destinations: Sequence[torch.Tensor]) -> None:
    """Copy a list of pieces now. Raises the error of a file that can't be read or was modified meanwhile."""
    module = extension()
    if module is None:
        return copy_blocks_ref(sources, destinations)
    starts = [source.offset if isinstance(source, Span) else source.data_ptr() for source in sources]
    files = [source.file.descriptor if isinstance(source, Span) else -1 for source in sources]
    failed, reason = module.copy_blocks(
        np.array(starts, np.int64),
        np.array([destination.data_ptr() for destination in destinations], np.int64),
        np.array([destination.nbytes for destination in destinations], np.int64),
        np.array(files, np.int32),
    )
    if failed >= 0:
        file = sources[failed].file
        raise file.unreadable(os.strerror(reason)) if reason else file.changed()
    _check_files(sources)


def copy_blocks_ref(sources: Sequence[torch.Tensor | Span], destinations: Sequence[torch.Tensor]) -> None:
    """Do what `copy_blocks` does, piece by piece."""
    for source, destination in zip(sources, destinations):
        if isinstance(source, Span):
            source.file.read_into(source, destination)
        else:
            _bytes_of(destination).copy_(_bytes_of(source))
    _check_files(sources)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _check_files(sources: Sequence[torch.Tensor | Span]) -> None:
    for file in {id(source.file): source.file for source in sources if isinstance(source, Span)}.values():
        file.check()
