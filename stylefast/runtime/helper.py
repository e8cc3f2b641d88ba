"""A thread beside the step loop, for what would make pictures on their way wait: encoding for those that join, decoding
for those that are done.
"""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

# what a task returns that wants to be called again, after the others had their turn
AGAIN = object()
# told what a task returned, or what it raised
Then = Callable[[Any, BaseException | None], None]


class Helper:
    """Works off tasks in turn: functions, called until they return something else than AGAIN.

    idle_seconds: without work after which the thread ends; the next task starts another.
    """

    def __init__(self, idle_seconds: Callable[[], float]):
        self._idle_seconds = idle_seconds
        self._changed = threading.Condition()
        self._tasks: deque[tuple[Callable[[], Any], Then]] = deque()
        self._thread: threading.Thread | None = None
        self._closed: BaseException | None = None

    @property
    def inside(self) -> bool:
        """Whether the caller is this thread."""
        return threading.current_thread() is self._thread

    def run(self, task: Callable[[], Any], then: Then) -> None:
        """Begin a task; `then`, which must not raise, is called in the helper's thread when it is over.

        After `close`, `then` is called at once.
        """
        with self._changed:
            closed = self._closed
            if closed is None:
                self._tasks.append((task, then))
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="stylefast-helper", daemon=True)
                    self._thread.start()
                self._changed.notify_all()
        if closed is not None:
            then(None, closed)

    def close(self, error: BaseException) -> None:
        """End after the present call; tasks that are not over end with `error`."""
        with self._changed:
            self._closed, thread = error, self._thread
            self._changed.notify_all()
        if thread is not None and not self.inside:
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
            except BaseException as raised:  # whatever it is, it belongs to the task
                error = raised
            if value is AGAIN:
                with self._changed:
                    self._tasks.append((task, then))
            else:
                then(value, error)
            del task, then, value, error  # an idle thread keeps nothing alive
        for _, then in left:
            then(None, self._closed)
