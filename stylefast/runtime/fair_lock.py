"""A lock that is given in the order in which it is asked for.

The step loop takes and leaves its lock without pause, and Python's own lock may then pass by a waiting thread for
seconds: another call, a bake, an admission.
"""

import os
import threading
from collections import deque


class FairLock:
    """First come, first served; may be taken again by the thread that holds it. A context manager.

    In a forked process, whose only thread is the one that forked, it is free unless that thread holds it.
    """

    def __init__(self):
        self._depth, self._owner = 0, None
        self._make()

    def _make(self) -> None:
        self._process, self._guard = os.getpid(), threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        if self._owner != threading.get_ident():
            self._owner: int | None = None
            self._depth = 0

    def __enter__(self) -> "FairLock":
        me = threading.get_ident()
        if self._process != os.getpid():
            self._make()
        with self._guard:
            if self._owner == me:
                self._depth += 1
                return self
            if self._owner is None and not self._waiting:
                self._owner, self._depth = me, 1
                return self
            turn = threading.Event()
            self._waiting.append(turn)
        try:
            turn.wait()
            with self._guard:
                # whoever left the lock handed it over without saying to whom
                self._owner, self._depth = me, 1
        except BaseException:
            self._give_up(turn)
            raise
        return self

    def __exit__(self, *_) -> None:
        if self._process != os.getpid():
            self._make()
        with self._guard:
            self._depth -= 1
            if self._depth == 0:
                self._hand_over()

    def _hand_over(self) -> None:
        if self._waiting:
            self._owner = -1  # nobody may slip in between
            self._waiting.popleft().set()
        else:
            self._owner = None

    def _give_up(self, turn: threading.Event) -> None:
        """Ctrl-C while waiting: leave the queue, or pass on what was handed over in the same moment."""
        with self._guard:
            if turn in self._waiting:
                self._waiting.remove(turn)
            elif turn.is_set():
                self._hand_over()
