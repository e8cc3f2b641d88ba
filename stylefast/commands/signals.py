"""Signals that stop a command: it cleans up, prints a word and exits with the code that shells expect."""

import signal
import threading
from collections.abc import Callable
from types import FrameType

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
if hasattr(signal, "SIGHUP"):  # the terminal was closed
    _WORDS[signal.SIGHUP] = "hung up"


class Stopped(KeyboardInterrupt):
    """Raised on a signal. Like KeyboardInterrupt on Ctrl-C, it is not caught by handlers of ordinary errors.

    A subclass, because Python ends a process by SIGINT, whatever its exit code, once a plain KeyboardInterrupt has left
    code that a C library evaluated.
    """


class Signals:
    """Context that turns signals into exceptions while a command runs, so that temporary files are removed.

    The first signal raises Stopped; a second one ends the process at once. A signal that was already ignored, as under
    nohup, stays ignored. Outside the main thread nothing is changed.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    @property
    def word(self) -> str:
        """Return how the command ended, for a message."""
        return _WORDS[self.received or signal.SIGINT]

    @property
    def exit_code(self) -> int:
        """Return 128 plus the signal's number."""
        return 128 + (self.received or signal.SIGINT)

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in _WORDS:
                if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        for other in self._before:
            signal.signal(other, signal.SIG_DFL)
        raise Stopped
