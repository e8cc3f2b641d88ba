"""Signals that ask a command to stop: it cleans up, leaves a word and the exit code that shells expect."""

import signal
import threading
from types import FrameType

_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
if hasattr(signal, "SIGHUP"):  # a terminal that was closed
    _WORDS[signal.SIGHUP] = "hung up"


class Stopped(KeyboardInterrupt):
    """A signal came. Handlers of ordinary errors don't catch it on the way, as they don't catch Ctrl-C.

    A class of its own: Python ends a process by SIGINT, whatever its exit code, once a plain KeyboardInterrupt left
    code that a C library had evaluated.
    """


class Signals:
    """Turns signals into exceptions while a command runs, so that temporary files are removed on the way out.

    The first signal raises Stopped; a second one ends the process at once. A signal that was
    ignored before, as under nohup, stays ignored. Outside the main thread nothing is changed.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    @property
    def word(self) -> str:
        """What became of the command, for a message."""
        return _WORDS[self.received or signal.SIGINT]

    @property
    def exit_code(self) -> int:
        """128 and the signal's number."""
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
