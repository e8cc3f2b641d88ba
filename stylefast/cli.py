"""The command `stylefast`. Each subcommand is a module in `stylefast.commands` and imports torch only when it runs."""

import os
import select
import sys
from collections.abc import Sequence

import stylefast
from stylefast.commands.signals import Signals
from stylefast.errors import InvalidRequest, StyleFastError

COMMANDS = ("generate", "bake", "train-lora", "export", "serve", "styles", "mcp", "demo", "bench", "info")
DEBUG = "STYLEFAST_DEBUG"
BAD_INPUT, FAILED, UNREAD = 2, 1, 141


def build_parser():
    """Return the `Parser` of all commands; it stores the function to call as `run` in the parsed arguments."""
    # imported here, so that `main` already handles signals
    import argparse
    from importlib import import_module

    from stylefast.commands.parser import Parser

    parser = Parser(
        prog="stylefast",
        description="Style-conditioned SDXL pictures: StyleAligned, InstantStyle and DreamStyler in one engine.",
        epilog='example: stylefast generate "a fish" "a house" --style-image photo.jpg\n\n'
        "exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM), 129 hung up,\n"
        "141 output pipe closed; errors are one line on stderr",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stylefast {stylefast.__version__}")
    parser.set_defaults(run=parser.show_help)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS:
        command = import_module(f"stylefast.commands.{name.replace('-', '_')}")
        subparser = subparsers.add_parser(
            name,
            help=command.SUMMARY,
            description=command.SUMMARY,
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        subparser.set_defaults(run=command.run)
        command.add_arguments(subparser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (listed by `stylefast --help`); errors are one line on stderr."""
    _open_streams()
    with Signals() as signals:
        try:
            from stylefast.commands.notices import names_as_they_are, warnings_on_stderr

            names_as_they_are()
            arguments = build_parser().parse_args(argv)
            with warnings_on_stderr():
                code = arguments.run(arguments)
            return code if _is_read() else UNREAD
        except SystemExit as stop:  # --help and --version
            return int(stop.code or 0) if _is_read() else UNREAD
        except (Exception, KeyboardInterrupt) as error:
            # a library interrupted while it is imported may raise ImportError
            if signals.received is not None or isinstance(error, KeyboardInterrupt):
                return _report(f"{signals.word}; no incomplete file was left", signals.exit_code)
            if isinstance(error, BrokenPipeError) and not _is_read():
                return UNREAD
            return _report(*_in_words(error))


def _open_streams() -> None:
    """Send standard streams that the caller closed to /dev/null; the next file opened would take their place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))


def _is_read() -> bool:
    """Flush stdout; return False if its reader is gone, as in `stylefast info | head -1`."""
    try:
        sys.stdout.flush()
        output = sys.stdout.fileno()
    except BrokenPipeError:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # replaced by the caller with something that is not a file
        return True
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return True
    # otherwise Python flushes again at exit and prints an error
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return False


def _in_words(error: BaseException) -> tuple[str, int]:
    """Return the message and exit code for an error."""
    if isinstance(error, InvalidRequest):
        return str(error), BAD_INPUT
    if isinstance(error, (StyleFastError, OSError)):
        return str(error), FAILED
    # other errors are bugs; still, no traceback by default
    return f"unexpected {type(error).__name__}: {error}; {DEBUG}=1 shows the traceback", FAILED


def _report(message: str, code: int) -> int:
    if os.environ.get(DEBUG) == "1":
        import traceback

        traceback.print_exc()
    from stylefast.commands.notices import one_line

    print("error:", one_line(message), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
