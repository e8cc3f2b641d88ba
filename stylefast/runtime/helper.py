"""A thread for slow work outside the step loop: encoding for joining pictures, decoding finished ones."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

# returned by a task that must be called again, after the other tasks had their turn
AGAIN = object()
# called with a task's result or error
Then = Callable[[Any, BaseException | None], None]


class Helper:
    """Thread that does tasks in turn: functions that are called until they return something other than AGAIN.

    idle_seconds: time without work after which the thread ends; the next task starts a new one.
    """

    def __init__(self, idle_seconds: Callable[[], float]):
        self._idle_seconds = idle_seconds
        self._changed = threading.Condition()
        self._tasks: deque[tuple[Callable[[], Any], Then]] = deque()
        self._thread: threading.Thread | None = None
        self._closed: BaseException | None = None

    @property
    def inside(self) -> bool:
        """Return whether the caller is this thread."""
        return threading.current_thread() is self._thread

    def run(self, task: Callable[[], Any], then: Then) -> None:
        """Start a task; `then`, which must not raise, is called in the helper's thread when it is done.

        After `close`, `then` is called at once.
        """
        with self._changed:
            closed = self._closed
            if closed is None:
                if self._thread is None:
                    thread = threading.Thread(target=self._run, name="stylefast-helper", daemon=True)
                    thread.start()  # waits for the condition, which is held here
                    self._thread = thread
                self._tasks.append((task, then))
                self._changed.notify_all()
        if closed is not None:
            then(None, closed)

    def close(self, error: BaseException, wait: bool = True) -> None:
        """Stop after the current call, and wait for that; unfinished tasks end with `error`."""
        with self._changed:
            self._closed, thread = error, self._thread
            self._changed.notify_all()
        if wait and thread is not None and not self.inside:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not (self._tasks or self._closed):
                    self._changed.wait(self._idle_seconds())
                if self._closed or not self._tasks:
                    self._thread = None
                    left, self._tasks = self._tasks, deque()
                    break
                task, then = self._tasks.popleft()
            value, error = None, None
            try:
                value = task()
            except BaseException as raised:  # any error is passed to the task's `then`
                error = raised
            if value is AGAIN:
                with self._changed:
                    self._tasks.append((task, then))
            else:
                then(value, error)
            del task, then, value, error  # an idle thread must keep nothing alive
        for _, then in left:
            then(None, self._closed)
