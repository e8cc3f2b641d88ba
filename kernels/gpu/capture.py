"""CUDA graph capture that doesn't synchronise the device and recovers from failed captures.

`torch.cuda.graph` synchronises the device and empties the allocator's cache at every capture, which stalls other users
of the GPU. It also ends the capture before it restores the stream: if ending raises, as it does for every invalidated
capture, the thread stays on the side stream, and the allocator assumes that the capture is still running. Here a
context manager restores the stream in every case, and the allocator is told that the capture has ended.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

# graphs whose capture could not be ended; kept alive because PyTorch's pinned-memory allocator may still query them
# about a stream
_broken: list[torch.cuda.CUDAGraph] = []


def capture(
    call: Callable[[], None], stream: torch.cuda.Stream, pool: Any = None, room: int | None = None
) -> torch.cuda.CUDAGraph:
    """Record the work that `call` puts on `stream`, a side stream, as a graph with `replay()`; nothing runs.

    pool: memory pool to share between graphs, from `torch.cuda.graph_pool_handle`; None creates one. room: bytes that
    `call` allocates, if known. PyTorch can't free cached memory during a capture, so the cache is emptied first if the
    device has less than that free. Other threads may allocate and synchronise during the capture.

    Raises the errors of `call` and CUDA; stream, device and allocator are then restored, but the pool must not be
    used again.
    """
    device, pool = stream.device, torch.cuda.graph_pool_handle() if pool is None else pool
    if room is not None and torch.cuda.mem_get_info(device)[0] < room:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    # order matters: the stream's context also makes its device current
    with torch.cuda.device(device), torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            call()
            graph.capture_end()
        except BaseException:
            _abandon(graph, device, pool)
            raise
    return graph


def _abandon(graph: torch.cuda.CUDAGraph, device: torch.device, pool: Any) -> None:
    """End a failed capture, and tell PyTorch's allocator if a CUDA error kept PyTorch from doing so."""
    # keep the first error: those raised here are its consequences, or say that no capture is active
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    end, release = (getattr(torch._C, f"_cuda_{name}", None) for name in ("endAllocateToPool", "releasePool"))
    if end is not None and release is not None:
        try:
            end(device.index, pool)
        except RuntimeError:
            pass  # capture was ended properly
        else:
            release(device.index, pool)
            _broken.append(graph)
    with contextlib.suppress(RuntimeError):
        graph.reset()
