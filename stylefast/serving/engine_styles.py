"""Registered styles in the engine's process: read once, checked against their digests, and shared by all requests.

What a request needs of a style is in memory or held open, so that a style may be deleted while requests use it.
"""

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stylefast.errors import StyleError, StyleFastError
from stylefast.record import from_record
from stylefast.record_values import ORIGIN, Origin, Sources, pixel_digest
from stylefast.serving.style_files import MANIFEST, Manifest, StyleFolder
from stylefast.slots import LruDict
from stylefast.values import quoted

if TYPE_CHECKING:
    from stylefast.engine import Engine
    from stylefast.styles.style import Style

MOST_HELD = 64


@dataclass(frozen=True)
class Shelved:
    """A style that is ready for requests.

    styles: as it is written; with_banks: with banks in place of references, which fit some requests alone; the same if
    it has none. loras: strengths by the names that the engine knows.
    """

    stamp: tuple[int, int, int]
    manifest: Manifest
    styles: "Sequence[Style]"
    with_banks: "Sequence[Style]"
    loras: Mapping[str, Any]


class StyleShelf:
    """The styles of a folder that were used lately. May be used by several threads."""

    def __init__(self, engine: "Engine", folder: str | Path):
        self._engine, self.folder = engine, Path(folder).expanduser().resolve()
        self._held: LruDict[str, Shelved] = LruDict()
        self._lock = threading.Lock()
        self._retired: set[str] = set()
        # by name, as long as somebody reads the style
        self._reading: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()

    def get(self, name: str) -> Shelved:
        """Return a style as it is on disk now; one that was deleted, as it was. Raises StyleError."""
        with self._lock:
            turn = self._reading.setdefault(name, threading.Lock())
        with turn:
            with self._lock:
                known = self._held.get(name)
            try:
                with StyleFolder(self.folder / name) as folder:
                    stamp = folder.stamp(MANIFEST)
                    if known is None or known.stamp != stamp:
                        known = self._read(name, folder, stamp)
            except FileNotFoundError:
                if known is None:
                    raise StyleError(f"the style {quoted(name)} was deleted") from None
            self._keep(name, known)
            return known

    def try_out(self, name: str, path: str | Path) -> Shelved:
        """Read a style that is not registered yet, and keep nothing of it. Raises StyleError and other errors."""
        with StyleFolder(Path(path)) as folder:
            return self._read(name, folder, folder.stamp(MANIFEST), keep=False)

    def recorded(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return a picture's record with files of the folder by their styles' names: "neon/ink.safetensors"."""
        parts = {name: _without_folder(record[name], self.folder) for name in ("call", "lora_files") if name in record}
        return {**record, **parts}

    def _keep(self, name: str, found: Shelved) -> None:
        with self._lock:
            before = self._held.use(name)
            self._held[name] = found
            gone = [] if before is None or before is found else [before]
            gone += [self._held.pop(oldest) for oldest in self._held.beyond(MOST_HELD)]
            if not gone:
                return
            # a request may be about to name those of a style that went just now, so they go with the next one
            retired, self._retired = self._retired, {lora for one in gone for lora in one.loras}
            used = {lora for one in self._held.values() for lora in one.loras} | self._retired
            for lora in retired - used:
                if lora in self._engine.loras:
                    self._engine.loras.remove(lora)

    def _read(self, name: str, folder: StyleFolder, stamp: tuple[int, int, int], keep: bool = True) -> Shelved:
        try:
            manifest = folder.manifest()
            sources = _FolderSources(name, folder, manifest)
            # as a request would have them, so that styles that exclude one another and wrong settings are refused here
            request = {"prompt": "a picture", **manifest.defaults, "style": list(manifest.styles)}
            styles: Sequence[Style] = from_record([request], sources=sources)[0].styles
            banked = list(styles)
            for file, number in manifest.banks:
                banked[number] = with_bank(styles[number], sources.bank(file))
            loras = self._loras(name, folder, manifest, keep)
            return Shelved(stamp, manifest, styles, banked, loras)
        except StyleFastError as error:
            # paths of the server are nobody's business
            said = str(error).replace(f"{folder.path}/", "")
            raise StyleError(f"the style {quoted(name)} can't be used: {said}") from error

    def _loras(self, name: str, folder: StyleFolder, manifest: Manifest, keep: bool) -> dict[str, Any]:
        found = {}
        for file, strength in manifest.loras.items():
            wanted = manifest.files[file]
            # no name from outside has a slash and a digest, and another content is another name
            lora = f"style/{name}/{file}@{wanted.sha256[:16]}"
            if lora not in self._engine.loras:
                folder.check(file, wanted)
                self._engine.loras.add(folder.path / file, lora)
                if not keep:
                    self._engine.loras.remove(lora)
            found[lora] = strength
        return found


def with_bank(style: Any, bank: Any) -> Any:
    """Return a StyleAligned whose reference is a bank. Raises StyleError for other styles."""
    from stylefast.styles.style_aligned import StyleAligned

    if not isinstance(style, StyleAligned):
        raise StyleError(f"a {type(style).__name__} reads no bank; only StyleAligned does")
    return replace(style, reference=bank, prompt=None, seed=0, noise="forward")


class _FolderSources(Sources):
    """Files that the styles of a manifest may name: those of their own folder that the manifest lists, no others."""

    def __init__(self, name: str, folder: StyleFolder, manifest: Manifest):
        super().__init__(None, folder.path)
        self._name, self._folder, self._manifest = name, folder, manifest

    def picture(self, entry: Any, mask: bool = False) -> Any:
        """Return a picture in memory, which is recorded by the style's name."""
        from stylefast.models.masks import open_mask
        from stylefast.models.pictures import open_picture

        if not isinstance(entry, str):
            return super().picture(entry, mask)
        content = self._folder.read(entry, self._manifest.files[self._listed(entry)])
        if mask:
            return open_mask(content)
        found = open_picture(content)
        found.info[ORIGIN] = Origin({"path": f"{self._name}/{entry}", "sha256": pixel_digest(found)})
        return found

    def bank(self, entry: Any) -> Any:
        """Return a bank, whose file stays open."""
        from stylefast.styles.bank import StyleBank

        return StyleBank.load(self._checked(entry), verify=False)

    def embedding(self, entry: Any) -> tuple[Any, str | None]:
        """Return the path of learned vectors, or several."""
        if isinstance(entry, str):
            return self._checked(entry), None
        if isinstance(entry, list):
            return tuple(map(self._checked, entry)), None
        return super().embedding(entry)

    def image_embeds(self, entry: Any) -> Any:
        """Return the path of image embeddings."""
        return self._checked(entry) if isinstance(entry, str) else super().image_embeds(entry)

    def _listed(self, name: Any) -> str:
        if not isinstance(name, str) or name not in self._manifest.files:
            known = ", ".join(self._manifest.files) or "none"
            raise StyleError(f"{quoted(name)} is no file of the style; it has {known[:200]}")
        return name

    def _checked(self, name: Any) -> str:
        """Return the path of a file with the digest of the manifest."""
        self._folder.check(name, self._manifest.files[self._listed(name)])
        return str(self._folder.path / name)

    def _absolute(self, text: Any) -> str:
        return self._checked(text)

    def _shipped(self, text: Any) -> str:
        return self._checked(text)


def _without_folder(value: Any, folder: Path) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_folder(one, folder) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_folder(one, folder) for one in value]
    prefix = f"{folder}/"
    return value.removeprefix(prefix) if isinstance(value, str) and value.startswith(prefix) else value
