"""Trust check of an export's files: engines are code, so their origin must be trusted."""

from pathlib import Path

from stylefast.code_caches import foreign
from stylefast.errors import UntrustedEngine
from stylefast.export.manifest import CODE, MANIFEST, SHOWN_DIGITS, Manifest


def check_trust(folder: str | Path, manifest: Manifest, trust: str | None = None) -> None:
    """Raise UntrustedEngine if files that are code may come from another user.

    Files are trusted if the folder and all of its files belong to this user or root, and no other user can write to
    them or rename a folder above them; or if `trust` is the manifest's digest. ONNX files need no trust. A digest
    covers only files that `check_files` has compared with the manifest.
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
