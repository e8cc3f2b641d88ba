"""`stylefast mcp`: tools for agents, over standard input and output."""

import argparse
import os
from importlib.util import find_spec

from stylefast.errors import MissingDependency

SUMMARY = "Offer a running service to agents, by the Model Context Protocol on standard input and output."
EXAMPLES = """\
example: stylefast serve --model tiny &
         stylefast mcp --url http://localhost:8000

Its tools are list_styles, generate_image and edit_image. STYLEFAST_API_KEY is the service's key, if it asks for one."""
KEY = "STYLEFAST_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "--url", default="http://localhost:8000", help="address of `stylefast serve` (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Answer an agent until it closes standard input."""
    if find_spec("mcp") is None:
        raise MissingDependency("the package mcp is missing; pip install 'stylefast[mcp]' brings it")
    from stylefast.serving.mcp_tools import make_tools

    make_tools(arguments.url, os.environ.get(KEY)).run("stdio")
    return 0
