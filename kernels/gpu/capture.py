"""CUDA graphs of work that was prepared beforehand: captured without waiting for the device, and cleaned up after one
that fails.

`torch.cuda.graph` waits for the device and empties the allocator's cache at every capture, which stalls whoever else
uses the card. Its exit ends the capture before it restores the stream: where ending raises, as it does for every
capture that was invalidated, the thread stays on the side stream, and the allocator takes the capture for still
running. Here the stream is restored by its own context whatever happens, and the allocator is told.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

# graphs whose capture could not be ended: PyTorch's allocator of pinned memory may still ask them whether a stream is
# theirs, so they must not be freed
_broken: list[torch.cuda.CUDAGraph] = []


def capture(
    call: Callable[[], None], stream: torch.cuda.Stream, pool: Any = None, room: int | None = None
) -> torch.cuda.CUDAGraph:
    """Record what `call` puts on `stream`, a side stream, as a graph with `replay()`; nothing runs.

    pool: memory that graphs share, of `torch.cuda.graph_pool_handle`; None: one of its own. room: bytes that `call`
    allocates, as far as known: PyTorch can't give back what it keeps for later while a capture is under way, so that
    is done before, if the device has less than that free. Other threads may allocate and wait meanwhile.

    Raises whatever `call` or CUDA raises; stream, device and allocator are then as they were, but the pool must not be
    used again.
    """
    device, pool = stream.device, torch.cuda.graph_pool_handle() if pool is None else pool
    if room is not None and torch.cuda.mem_get_info(device)[0] < room:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    # in this order, as the stream's context makes its device the current one
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
    """End a capture that failed, and tell PyTorch's allocator if CUDA's refusal kept PyTorch from doing so."""
    # the first error is the one to tell: these are its consequences, or say that there is nothing to end
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
    end, release = (getattr(torch._C, f"_cuda_{name}", None) for name in ("endAllocateToPool", "releasePool"))
    if end is not None and release is not None:
        try:
            end(device.index, pool)
        except RuntimeError:
            pass  # ended in order
        else:
            release(device.index, pool)
            _broken.append(graph)
    with contextlib.suppress(RuntimeError):
        graph.reset()
