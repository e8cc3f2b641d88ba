"""The argument parser: one-line errors that name the relevant help and suggest the intended word."""

import argparse
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from stylefast import values
from stylefast.errors import InvalidRequest

_SHOWN = 200  # max characters of the user's input quoted in a message
_MOST = 1000  # max characters of argparse's own messages, which quote whole arguments
# option names of other tools -> ours
_ELSEWHERE = {
    "--prompt": "the prompt without an option in front",
    "--guidance-scale": "--guidance",
    "--cfg": "--guidance",
    "--cfg-scale": "--guidance",
    "--num-inference-steps": "--steps",
    "--num-images": "--count",
    "--num-images-per-prompt": "--count",
    "--batch-size": "--count",
    "--sampler": "--scheduler",
    "--width": "--size WIDTHxHEIGHT",
    "--height": "--size WIDTHxHEIGHT",
    "--resolution": "--size WIDTHxHEIGHT",
    "--ip-adapter": "--adapter",
    "--precision": "--dtype",
    "--checkpoint": "--model",
}


class Parser(argparse.ArgumentParser):
    """argparse with errors in this project's form: one line, without usage above it.

    An argument unknown to a subcommand is reported by that subcommand, so that its own help is named.
    """

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse as argparse does. Raises InvalidRequest for unrecognized arguments."""
        namespace, left = super().parse_known_args(args, namespace)
        if left:
            shown = textwrap.shorten(" ".join(left), _SHOWN, placeholder=" ...")
            self.error(f"unrecognized arguments: {shown}{self._meant(left[0])}")
        return namespace, left

    def show_help(self, arguments: argparse.Namespace) -> int:
        """Print the help; the `run` of a command that needs a subcommand."""
        self.print_help()
        return 0

    def error(self, message: str) -> NoReturn:
        """Raise InvalidRequest with the message and a pointer to the help."""
        message = message if len(message) <= _MOST else f"{message[:_MOST]} ..."
        raise InvalidRequest(f"{message} (see `{self.prog} --help`)")

    def _get_value(self, action, arg_string):
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            error.message = error.message.replace(repr(arg_string), values.quoted(arg_string))
            raise

    def _meant(self, word: str) -> str:
        name, _, _ = word.partition("=")
        if not name.startswith("-"):
            return "; write all prompts together, before the options or after them" if self._takes_prompts() else ""
        if name in _ELSEWHERE and self._takes_prompts():
            return f"; here that is {_ELSEWHERE[name]}"
        below = self._subparsers_by_name()
        home = next((other for other, parser in below.items() if name in parser._option_string_actions), None)
        if home is not None:
            return f"; it goes after the command: {self.prog} {home} ... {name}"
        return values.did_you_mean(name, self._option_string_actions)

    def _subparsers_by_name(self) -> dict[str, "Parser"]:
        found = {}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= action.choices
        return found

    def _takes_prompts(self) -> bool:
        return any(action.dest == "prompts" for action in self._actions)

    def _check_value(self, action, value):
        if action.choices is None or value in action.choices:
            return
        choices = ", ".join(map(str, action.choices))
        meant = values.did_you_mean(value, map(str, action.choices))
        raise argparse.ArgumentError(action, f"invalid choice: {values.quoted(value)}; choose from {choices}{meant}")
