"""`stylefast styles`: the styles of a server's folder: list them, pack one into a file, unpack a file."""

import argparse
import sys
from pathlib import Path

from stylefast.errors import InvalidRequest

SUMMARY = "List the styles that a server registers, and move them as single files."
EXAMPLES = """\
examples:
  stylefast styles list --styles styles
  stylefast styles pack neon --styles styles --out neon.zip
  stylefast styles unpack neon.zip --styles styles

Digests of all files are checked before anything is written. docs/serving-http.md says what a style's folder has."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="list the styles of a folder", allow_abbrev=False)
    packing = actions.add_parser("pack", help="write a style into a file", allow_abbrev=False)
    unpacking = actions.add_parser("unpack", help="register the style of a file", allow_abbrev=False)
    packing.add_argument("style", metavar="NAME|FOLDER", help="a style of --styles, or the folder of one")
    packing.add_argument("--out", metavar="FILE", required=True, help="file to write")
    packing.add_argument("--overwrite", action="store_true", help="replace an existing file")
    packing.add_argument("--styles", metavar="DIR", help="folder of styles that NAME is in")
    unpacking.add_argument("file", metavar="FILE", help="what `pack` wrote")
    unpacking.add_argument("--name", help="name of the style (default: the one it was packed under)")
    unpacking.add_argument("--limit", metavar="BYTES", default="64GB", help="bytes of all files (default: %(default)s)")
    for one in (listing, unpacking):
        one.add_argument("--styles", metavar="DIR", required=True, help="folder of styles")


def run(arguments: argparse.Namespace) -> int:
    """Do what is asked."""
    return {"list": _list, "pack": _pack, "unpack": _unpack}[arguments.action](arguments)


def _list(arguments: argparse.Namespace) -> int:
    from stylefast.serving.registry import StyleRegistry

    for name, found in StyleRegistry(arguments.styles).scan().items():
        print(name, f"can't be used: {found.fault}" if found.fault else _shown(found.usable()), sep="\t")
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    from stylefast.serving.registry import StyleRegistry
    from stylefast.serving.style_archive import pack
    from stylefast.values import typed_path

    if arguments.styles is not None:
        folder = StyleRegistry(arguments.styles).find(arguments.style).path
    else:
        folder = typed_path("the style", arguments.style)
    out = typed_path("--out", arguments.out)
    try:
        manifest = pack(folder, out, arguments.overwrite)
    except FileExistsError:
        raise InvalidRequest(f"{out} exists; pass --overwrite to replace it, or choose another --out") from None
    print(_shown(manifest), file=sys.stderr)
    print(out)
    return 0


def _unpack(arguments: argparse.Namespace) -> int:
    from stylefast.options import parse_bytes
    from stylefast.serving.registry import StyleRegistry
    from stylefast.serving.style_archive import UNPACKED_BYTES, unpack

    limit = parse_bytes("--limit", arguments.limit) or UNPACKED_BYTES
    registry = StyleRegistry(arguments.styles)
    found = unpack(Path(arguments.file), registry, arguments.name, limit)
    print(_shown(found.usable()), file=sys.stderr)
    print(found.path)
    return 0


def _shown(manifest) -> str:
    from stylefast.serving.style_archive import described

    about = described("", manifest)
    what = [*about["kinds"], *(f"LoRA {name}" for name in about["loras"]), *(["baked"] if about["baked"] else [])]
    licence = about["licence"] or "not stated"
    return f"{', '.join(what)}; {about['bytes'] / 1e6:.1f} MB; licence: {' '.join(licence.split())}"
