"""The package's warnings while a command runs, as lines on stderr."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def warnings_on_stderr() -> Iterator[None]:
    """Show the package's log from WARNING up as lines on stderr, above a progress bar if there is one."""
    handler, logger = _Lines(logging.WARNING), logging.getLogger("stylefast")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(f"{record.levelname.lower()}: {record.getMessage()}")


def names_as_they_are() -> None:
    """Make stdout write file names that are not valid UTF-8 as their original bytes."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)  # a replaced stdout may lack it
    if reconfigure is not None:
        reconfigure(errors="surrogateescape")


def one_line(message: str) -> str:
    """Return a message as one line without what a terminal would obey: it may quote a picture or file of others."""
    line = " ".join(message.split())
    return line if line.isprintable() else "".join(x if x.isprintable() else ascii(x)[1:-1] for x in line)


def warn(message: str) -> None:
    """Print a warning of the command line itself."""
    say(f"warning: {message}")


def say(line: str) -> None:
    """Print one line on stderr, above a progress bar if there is one."""
    line, bars = one_line(line), sys.modules.get("tqdm")
    if bars is None:
        print(line, file=sys.stderr)
    else:
        bars.tqdm.write(line, file=sys.stderr)
