"""The command `stylefast`. Each subcommand lives in `stylefast.commands`, and loads torch only when it runs."""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

import stylefast
from stylefast.commands import bake, bench, demo, export, generate, info
from stylefast.errors import InvalidRequest, StyleFastError

COMMANDS = (generate, bake, export, demo, bench, info)
DEBUG = "STYLEFAST_DEBUG"
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130


class _Parser(argparse.ArgumentParser):
    """argparse that reports a bad argument as this project does: one line, no usage above it."""

    def error(self, message):
        raise InvalidRequest(f"{message} (see `{self.prog} --help`)")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `run` of the parsed arguments is the function to call."""
    parser = _Parser(
        prog="stylefast",
        description="Style-conditioned SDXL pictures: StyleAligned, InstantStyle and DreamStyler in one engine.",
        epilog='example: stylefast generate "a fish" "a house" --style-image photo.jpg',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stylefast {stylefast.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2]
        subparser = subparsers.add_parser(
            name, help=command.SUMMARY, description=command.SUMMARY, epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        )  # fmt: skip
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 2 for bad input, 1 for other failures; errors are one line on stderr."""
    try:
        arguments = build_parser().parse_args(argv)
        return arguments.run(arguments)
    except SystemExit as stop:  # --help and --version
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _report("interrupted; nothing half-written was left behind", INTERRUPTED)
    except InvalidRequest as error:
        return _report(str(error), BAD_INPUT)
    except StyleFastError as error:
        return _report(str(error), FAILED)
    except OSError as error:
        return _report(str(error), FAILED)
    except Exception as error:  # whatever else breaks is our mistake, and still no reason to show a traceback
        return _report(f"unexpected {type(error).__name__}: {error}; {DEBUG}=1 shows where it happened", FAILED)


def _report(message: str, code: int) -> int:
    if os.environ.get(DEBUG) == "1":
        traceback.print_exc()
    print("error:", " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
