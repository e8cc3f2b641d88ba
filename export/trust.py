"""Whether the files of an export may be run: engines are code, and code needs somebody to vouch for it."""

from pathlib import Path

from stylefast.code_caches import foreign
from stylefast.errors import UntrustedEngine
from stylefast.export.manifest import CODE, MANIFEST, SHOWN_DIGITS, Manifest


def check_trust(folder: str | Path, manifest: Manifest, trust: str | None = None) -> None:
    """Raise UntrustedEngine if files that are code may come from somebody else.

    They are trusted if the folder and all of its files belong to this user or root, and no other user can write to them
    or rename a folder above them; or if `trust` is the manifest's digest. ONNX files need no trust. Hashes are compared
    by `check_files`: a digest says nothing of files that were not compared with it.
    """
    folder = Path(folder).expanduser()
    if trust is not None:
        if trust.strip().lower() == manifest.digest:
            return
        raise UntrustedEngine(
            f"the digest given for {folder} is {trust.strip()[:SHOWN_DIGITS]}, its manifest has "
            f"{manifest.digest[:SHOWN_DIGITS]}; this is another export than the one you vouch for, or it was altered"
        )
    if manifest.kind not in CODE:
        return
    reason = foreign(folder, (MANIFEST, *(entry.name for entry in manifest.files)))
    if reason is not None:
        raise UntrustedEngine(
            f"an engine file is code, and {reason}. If you know where it is from, vouch for it with the digest that "
            f"`stylefast export` printed there: --trust DIGEST, or trust= in Python"
        )
