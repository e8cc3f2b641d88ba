"""Styles as single files: a zip with a manifest and the style's files by their digests.

`manifest.json` comes first: {"format": "stylefast-style-archive/1", "name": "neon", "style": the style.json}. Files are
called files/SHA256, so that equal ones are stored once and no entry can name a place outside. Equal styles give equal
archives.
"""

import hashlib
import json
import os
import secrets
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from stylefast import values
from stylefast.errors import StyleError
from stylefast.serving.registry import Registered, StyleRegistry
from stylefast.serving.style_files import MANIFEST_BYTES, MOST_FILES, Manifest, StyleFolder, safe_name
from stylefast.values import quoted
from stylefast.whole_files import put_in_place

FORMAT = "stylefast-style-archive/1"
UNPACKED_BYTES = 64 * 2**30  # a bank of SDXL takes about 25 GB
_FIRST, _FILES = "manifest.json", "files/"
_DATE = (1980, 1, 1, 0, 0, 0)
_CHUNK = 2**20
# these are compressed already, or numbers that hardly compress
_STORED = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif", ".bank", ".safetensors")


def pack(folder: str | Path, out: str | Path, overwrite: bool = False) -> Manifest:
    """Write the style in a folder into an archive, atomically. Returns its manifest.

    Raises StyleError if the style is damaged, FileExistsError if `out` exists, unless `overwrite`.
    """
    folder, out = Path(folder), Path(out)
    name = safe_name(Path(os.path.abspath(folder)).name)
    part = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        style = StyleFolder(folder)
    except FileNotFoundError:
        raise StyleError(f"no style found at {values.shown_path(folder)}; give its folder") from None
    try:
        with style, part.open("xb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            manifest = style.manifest()
            content = {"format": FORMAT, "name": name, "style": manifest.to_json()}
            archive.writestr(_info(_FIRST, zipfile.ZIP_DEFLATED), json.dumps(content, indent=1, sort_keys=True))
            written = set()
            for file, wanted in sorted(manifest.files.items()):
                if wanted.sha256 not in written:
                    written.add(wanted.sha256)
                    _add(archive, style, file, wanted.sha256)
            stream.flush()
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        put_in_place(part, out, overwrite)
    finally:
        part.unlink(missing_ok=True)
    return manifest


def _info(name: str, method: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _DATE)
    info.compress_type, info.external_attr = method, 0o644 << 16
    return info


def _add(archive: zipfile.ZipFile, style: StyleFolder, file: str, wanted: str) -> None:
    stored = PurePosixPath(file).suffix.lower() in _STORED
    info, digest = _info(_FILES + wanted, zipfile.ZIP_STORED if stored else zipfile.ZIP_DEFLATED), hashlib.sha256()
    with style.open(file) as source, archive.open(info, "w", force_zip64=True) as target:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            target.write(chunk)
    if digest.hexdigest() != wanted:
        raise StyleError(f"the style's file {file} was altered: its sha256 is not that of the manifest; put it back")


def unpack(
    file: str | Path, registry: StyleRegistry, name: str | None = None, limit: int = UNPACKED_BYTES
) -> Registered:
    """Register the style of an archive. Returns it.

    All digests are checked before anything is written. name: instead of the archive's. limit: bytes of all files.
    Raises StyleError for archives that are damaged, altered, too large or have other entries, and StyleExists.
    """
    file = values.path("an archive", file, error=StyleError)
    try:
        with file.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            found, manifest = _manifest(archive)
            name = safe_name(found if name is None else name)
            registry.check_free(name)
            entries = _entries(archive, manifest, limit)
            for digest, info in entries.items():
                _copied(archive, info, digest, None)
            with registry.draft() as draft:
                _check_room(draft.path, sum(one.bytes for one in manifest.files.values()))
                for target, wanted in manifest.files.items():
                    with (draft.path / target).open("xb") as output:
                        _copied(archive, entries[wanted.sha256], wanted.sha256, output)
                        output.flush()
                        os.fsync(output.fileno())
                    draft.note(target, wanted.sha256, wanted.bytes)
                return draft.publish(name, manifest)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise StyleError(f"{values.shown_path(file)} is no archive of a style, or damaged ({error})") from None
    except FileNotFoundError:
        raise StyleError(f"no archive found at {values.shown_path(file)}; check the path") from None


def _manifest(archive: zipfile.ZipFile) -> tuple[str, Manifest]:
    """Return the name and the manifest in an archive. Raises StyleError."""
    infos = archive.infolist()
    if not infos or infos[0].filename != _FIRST:
        raise StyleError(f"the archive does not begin with {_FIRST}; it was not written by `stylefast styles pack`")
    if len(infos) > MOST_FILES + 1:
        raise StyleError(f"the archive has {len(infos)} entries; at most {MOST_FILES + 1} are allowed")
    with archive.open(infos[0]) as stream:
        text = stream.read(MANIFEST_BYTES + 1)
    content = values.load_json(text, _FIRST, kind=dict, error=StyleError, largest=MANIFEST_BYTES)
    if content.get("format") != FORMAT or {*content} != {"format", "name", "style"}:
        raise StyleError(f"the archive has the format {quoted(content.get('format'))}, not {quoted(FORMAT)}")
    return content["name"], Manifest.of(content["style"])


def _entries(archive: zipfile.ZipFile, manifest: Manifest, limit: int) -> dict[str, zipfile.ZipInfo]:
    """Return the archive's files by digest. Raises StyleError unless they are exactly those of the manifest."""
    sizes = {one.sha256: one.bytes for one in manifest.files.values()}
    if (total := sum(one.bytes for one in manifest.files.values())) > limit:
        raise StyleError(f"the style has {total} bytes; at most {limit} are unpacked (--limit)")
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist()[1:]:
        digest = info.filename.removeprefix(_FILES)
        if not info.filename.startswith(_FILES) or digest not in sizes:
            raise StyleError(f"the archive has the entry {quoted(info.filename)}, which its manifest does not name")
        if digest in found:
            raise StyleError(f"the archive has the entry {quoted(info.filename)} twice")
        if info.file_size != sizes[digest]:
            raise StyleError(
                f"the entry {quoted(info.filename)} has {info.file_size} bytes, and the manifest says {sizes[digest]}"
            )
        found[digest] = info
    if missing := sizes.keys() - found.keys():
        raise StyleError(f"the archive lacks the file {min(missing)}; copy it again")
    return found


def _copied(archive: zipfile.ZipFile, info: zipfile.ZipInfo, wanted: str, target: BinaryIO | None) -> None:
    """Read an entry, and write it to `target` if there is one. Raises StyleError if its digest is another."""
    digest, left = hashlib.sha256(), info.file_size
    with archive.open(info) as source:
        while left > 0 and (chunk := source.read(min(_CHUNK, left))):
            digest.update(chunk)
            left -= len(chunk)
            if target is not None:
                target.write(chunk)
    if digest.hexdigest() != wanted:
        raise StyleError(f"the archive was altered: a file's sha256 is {digest.hexdigest()[:12]}, not {wanted[:12]}")


def _check_room(folder: Path, needed: int) -> None:
    free = values.free_bytes(folder)
    if free is not None and free < needed:
        raise StyleError(f"the style takes {needed} bytes, and {folder.parent} has {free} free; make room")


def described(name: str, manifest: Manifest) -> Mapping[str, Any]:
    """Return what lists show of a style."""
    return {
        "name": name,
        "kinds": [style.get("kind", style.get("type", "")) for style in manifest.styles],
        "loras": list(manifest.loras),
        "baked": bool(manifest.banks),
        "bytes": sum(one.bytes for one in manifest.files.values()),
        "licence": manifest.licence,
        "description": manifest.description,
        "created": manifest.created,
        "defaults": dict(manifest.defaults),
    }
