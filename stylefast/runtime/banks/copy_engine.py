"""Background copies between host tensors, and from files into them, in the given order.

Style banks are read from their files into pinned blocks while the model runs. The work is done in C++ if the extension
is built, else by the Python twin below.
"""

import ctypes
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from stylefast._extension import extension, extension_error
from stylefast.errors import InvalidRequest, MissingDependency
from stylefast.models.stored_tensors import Span
from stylefast.runtime.steps.planner import BACKENDS


class Ticket:
    """A list of copies in progress. Chunks complete in order: k chunks done means the first k."""

    def __init__(self, engine, raw, sources: Sequence[torch.Tensor | Span], outcomes: np.ndarray):
        self._engine, self._raw, self._outcomes = engine, raw, outcomes
        self._spans = {i: source for i, source in enumerate(sources) if isinstance(source, Span)}

    @property
    def chunks(self) -> int:
        """Return the number of copies in the list."""
        return self._raw.chunks

    @property
    def done(self) -> bool:
        """Return whether all copies are done."""
        return self.progress() == self.chunks

    def progress(self) -> int:
        """Count the completed copies, which are the first in the list."""
        return self._engine.progress(self._raw)

    def wait(self, chunks: int = -1) -> None:
        """Block until the first `chunks` copies are done (-1: all), without the GIL.

        Raises IndexError for more chunks than the ticket has.
        """
        self._engine.wait(self._raw, chunks)

    def check(self) -> None:
        """Raise the error of a file that could not be read or was modified; call it when all copies are done."""
        for i, span in self._spans.items():
            outcome = int(self._outcomes[i])
            if outcome > 0:
                raise span.file.unreadable(os.strerror(outcome))
            if outcome < 0:
                raise span.file.changed()
        for file in {id(span.file): span.file for span in self._spans.values()}.values():
            file.check()


class CopyEngine:
    """Background threads that process one queue of copies. Thread-safe.

    Args:
        threads: number of threads; chunks are still reported in order.
        capacity: chunks that may wait before `copy` blocks.
        backend: "cpp", "python", or "auto" (C++ if it is built). The twin copies with one thread.

    Raises:
        InvalidRequest: threads or capacity below 1, an unknown backend.
        MissingDependency: backend "cpp" without the extension.
    """

    def __init__(self, threads: int = 1, capacity: int = 4096, *, backend: str = "auto"):
        if backend not in BACKENDS:
            raise InvalidRequest(f"backend {backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
        if backend == "cpp" and extension() is None:
            raise MissingDependency(extension_error())
        if threads < 1 or capacity < 1:
            raise InvalidRequest(f"threads is {threads} and capacity {capacity}, but both must be 1 or more")
        if backend == "python" or extension() is None:
            self.backend, self._engine = "python", _Engine(capacity)
        else:
            self.backend, self._engine = "cpp", extension().CopyEngine(threads, capacity)
        self._held = deque()  # (raw ticket, its tensors): their memory must stay until the copies are done
        # also runs at exit, before modules are torn down
        self._finalizer = weakref.finalize(self, _close, self._engine, os.getpid())

    def copy(self, sources: Sequence[torch.Tensor | Span], destinations: Sequence[torch.Tensor]) -> Ticket:
        """Copy the bytes of sources[i], a tensor or file span, into destinations[i], in this order.

        Tensors and files are kept alive until they are copied, even if the ticket is dropped. Blocks, without the GIL,
        while the queue is full. File errors are raised by `Ticket.check`.

        Raises:
            InvalidRequest: lists of different lengths, tensors that are not on the CPU, not contiguous, of different
            sizes in bytes, or that overlap.
            RuntimeError: after `close`.
        """
        if len(sources) != len(destinations):
            raise InvalidRequest(f"{len(sources)} sources and {len(destinations)} destinations; give one for the other")
        for i, (source, destination) in enumerate(zip(sources, destinations)):
            _check_pair(i, source, destination)
        self._let_go()
        outcomes = np.zeros(len(sources), dtype=np.int32)
        raw = self._engine.submit(*_lists(self.backend, sources, destinations), outcomes)
        self._held.append((raw, list(sources), list(destinations), outcomes))
        return Ticket(self._engine, raw, sources, outcomes)

    def close(self) -> None:
        """Finish the queue and end the threads. A second call does nothing."""
        self._finalizer()
        self._held.clear()

    def __enter__(self) -> "CopyEngine":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _let_go(self) -> None:
        # another thread may remove the first entry after a look at it, so remove it first and put it back if unfinished
        while self._held:
            try:
                first = self._held.popleft()
            except IndexError:
                return
            if self._engine.progress(first[0]) < first[0].chunks:
                self._held.appendleft(first)
                return


def _check_pair(i: int, source: torch.Tensor | Span, destination: torch.Tensor) -> None:
    stored = isinstance(source, Span)
    for name, tensor in (*(() if stored else (("source", source),)), ("destination", destination)):
        if tensor.device.type != "cpu":
            raise InvalidRequest(f"{name} {i} is on {tensor.device}, but must be on the CPU")
        if not tensor.is_contiguous():
            raise InvalidRequest(f"{name} {i} of shape {tuple(tensor.shape)} is not contiguous")
    size, room = source.nbytes, destination.nbytes
    if size != room:
        raise InvalidRequest(f"source {i} has {size} bytes, but destination {i} has {room}")
    if not stored and abs(source.data_ptr() - destination.data_ptr()) < size:
        raise InvalidRequest(f"source {i} and destination {i} overlap")


def _lists(backend, sources, destinations):
    if backend == "python":
        return [source if isinstance(source, Span) else _bytes_of(source) for source in sources], destinations
    columns = (
        [source.offset if isinstance(source, Span) else source.data_ptr() for source in sources],
        [t.data_ptr() for t in destinations],
        [source.nbytes for source in sources],
    )
    files = [source.file.descriptor if isinstance(source, Span) else -1 for source in sources]
    return (*(np.array(column, dtype=np.int64) for column in columns), np.array(files, dtype=np.int32))


def _bytes_of(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8)


class _RawTicket:
    def __init__(self, chunks: int):
        self.chunks, self.copied = chunks, 0


class _Engine:
    """Python twin of csrc/copy_engine.cpp, with one thread."""

    def __init__(self, capacity: int):
        self.queue = queue.Queue(capacity)
        self.changed = threading.Condition()
        self.lists = threading.Lock()  # held while a list is submitted, so that lists don't interleave
        self.closed = False
        # a daemon thread, since Python joins other threads before it runs the finalizer that ends this one
        self.thread = threading.Thread(target=self.work, daemon=True, name="stylefast-copy")
        self.thread.start()

    def work(self):
        while (chunk := self.queue.get()) is not None:
            ticket, source, destination, outcomes, i = chunk
            if isinstance(source, Span):
                outcomes[i] = _read(source, destination)
            else:
                _bytes_of(destination).copy_(source)
            with self.changed:
                ticket.copied += 1
                self.changed.notify_all()

    def submit(self, sources, destinations, outcomes):
        with self.lists:
            if self.closed:
                raise RuntimeError("the copy engine is closed")
            ticket = _RawTicket(len(sources))
            for i, (source, destination) in enumerate(zip(sources, destinations)):
                self.queue.put((ticket, source, destination, outcomes, i))
            return ticket

    def progress(self, ticket):
        with self.changed:
            return ticket.copied

    def wait(self, ticket, chunks=-1):
        if not -1 <= chunks <= ticket.chunks:
            raise IndexError(f"chunks is {chunks}, but the ticket has {ticket.chunks}")
        with self.changed:
            self.changed.wait_for(lambda: ticket.copied >= (ticket.chunks if chunks == -1 else chunks))

    def close(self):
        with self.lists:
            if not self.closed:
                self.closed = True
                self.queue.put(None)
                self.thread.join()


def _close(engine, process: int) -> None:
    """Stop an engine's threads; in a forked process, which lacks them, leak the engine instead."""
    if os.getpid() == process:
        engine.close()
    else:
        # its destructor would wait for the threads
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))


def _read(span: Span, destination: torch.Tensor) -> int:
    """Read a span; return 0, -1 if the file ends early, or an error number, as csrc's engine does."""
    content, done = memoryview(_bytes_of(destination).numpy()), 0
    try:
        while done < span.nbytes:
            count = os.preadv(span.file.descriptor, [content[done:]], span.offset + done)
            if count == 0:
                return -1
            done += count
    except OSError as error:
        return error.errno
    return 0
