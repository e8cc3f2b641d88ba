"""Pictures, masks and learned vectors inside a record: by path, by name within the model's folder, or as base64."""

import base64
import binascii
import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from stylefast import values
from stylefast.errors import ImageError, StyleError
from stylefast.models.digests import tensor_bytes
from stylefast.models.masks import open_mask
from stylefast.models.pictures import SUFFIXES, PictureSource, open_picture
from stylefast.styles.bank import StyleBank
from stylefast.styles.embeddings import StageEmbedding
from stylefast.styles.image_embeds import read_image_embeds
from stylefast.values import quoted

# larger pictures rarely compress to EMBED_LIMIT, and trying takes seconds
EMBED_PIXELS = 512 * 512
# bank metadata that describes the reference
_BANK_FIELDS = ("prompt", "seed", "noise", "steps", "scheduler", "size", "guidance", "created")
_LONGEST_BASE64 = 64 * 2**20  # limit per entry of records from other sources
ORIGIN = "stylefast_origin"
EMBED_LIMIT = 48_000  # base64 characters per record, to keep a picture's metadata below 64 KB


def pixel_digest(picture: Image.Image) -> str:
    """Return 64 hex digits of a picture's size and RGB pixels; equal for a PNG and its lossless copy."""
    digest = hashlib.sha256(f"{picture.width}x{picture.height} RGB\n".encode())
    digest.update(picture.convert("RGB").tobytes())
    return digest.hexdigest()


def vector_digest(embedding: StageEmbedding) -> str:
    """Return 64 hex digits of a learned style's vectors and pooling policy."""
    digest = hashlib.sha256(embedding.pooled_policy.encode())
    for rows in (embedding.clip_l, embedding.clip_g):
        digest.update(f"\n{tuple(rows.shape)}\n".encode())
        digest.update(tensor_bytes(rows.float()))
    return digest.hexdigest()


@dataclass(frozen=True)
class Origin:
    """Origin of a picture in memory: `entry` stands for it in records. It is kept in `picture.info[ORIGIN]`."""

    entry: Mapping[str, Any]


class Store:
    """Converter from pictures, masks and vectors to entries of one record."""

    def __init__(self, model_folder: Path):
        self.model_folder = Path(model_folder).resolve()
        self.room = EMBED_LIMIT

    def picture(self, source: PictureSource | torch.Tensor | None, mask: bool = False) -> dict[str, Any] | None:
        """Return the entry of a picture or mask, None for no mask. Raises ImageError for unreadable files."""
        if source is None:
            return None
        if isinstance(source, torch.Tensor):
            return self.tensor(source)
        origin = source.info.get(ORIGIN) if isinstance(source, Image.Image) else None
        if isinstance(origin, Origin):  # a file's own text under this name is no Origin
            return dict(origin.entry)
        picture = open_mask(source) if mask else open_picture(source)
        entry = {"sha256": pixel_digest(picture)}
        if isinstance(source, (str, os.PathLike)):
            return self._path(Path(source)) | entry
        what = f"a picture of {picture.width}x{picture.height} pixels"
        if picture.width * picture.height > EMBED_PIXELS:
            return {"in_memory": what} | entry
        stream = BytesIO()
        picture.save(stream, "PNG", optimize=True)
        return self._inside("png", stream.getvalue(), what) | entry

    def bank(self, bank: StyleBank) -> dict[str, Any]:
        """Return the entry of a style bank: its file's path, and what it was baked from."""
        made = {name: value for name, value in bank.info.to_json().items() if name in _BANK_FIELDS}
        if bank.path is None:
            return {"bank": made, "in_memory": f"a style bank that was never saved ({bank.name})"}
        return {"bank": made, "sha256": bank.checksum} | self._path(bank.path)

    def embedding(self, embedding: StageEmbedding, source: Any, stage: int | None = None) -> dict[str, Any]:
        """Return the entry of learned vectors, read from `source`; `stage`: store only this stage."""
        if stage is not None:
            rows = slice(stage, stage + 1) if embedding.stages > 1 else slice(None)
            embedding = StageEmbedding(
                embedding.name, embedding.clip_l[rows], embedding.clip_g[rows], embedding.pooled_policy
            )
        entry = {"sha256": vector_digest(embedding)}
        if isinstance(source, (tuple, list)):
            return {"path": [str(Path(one).expanduser().resolve()) for one in source]} | entry
        if source is not None:
            return self._path(Path(source)) | entry
        what = f"the learned style {values.quoted(embedding.name)}"
        content = _pack({"clip_l": embedding.clip_l, "clip_g": embedding.clip_g})
        found = self._inside("safetensors", content, what) | entry
        return found | {"name": embedding.name, "pooled_policy": embedding.pooled_policy}

    def tensor(self, value: torch.Tensor, source: str | None = None) -> dict[str, Any]:
        """Return the entry of a mask or an embedding given as a tensor, or read from the file `source`."""
        values.dense_tensor("a tensor", value, error=ImageError)
        content = _pack({"tensor": value})
        entry = {"sha256": hashlib.sha256(content).hexdigest()}
        if source is not None:
            return self._path(Path(source)) | entry
        return self._inside("safetensors", content, f"a tensor of shape {list(value.shape)}") | entry

    def plain(self, value: Any) -> Any:
        """Return a value in a form that JSON can hold, see `plain`."""
        return plain(value)

    def _path(self, path: Path) -> dict[str, str]:
        path = path.resolve()
        if path.is_relative_to(self.model_folder):
            return {"shipped": path.relative_to(self.model_folder).as_posix()}
        return {"path": str(path)}

    def _inside(self, form: str, content: bytes, what: str) -> dict[str, str]:
        text = base64.b64encode(content).decode("ascii")
        if len(text) > self.room:
            return {"in_memory": what}
        self.room -= len(text)
        return {form: text}


def is_bank(source: Any) -> bool:
    """Return whether a style's reference, or its entry or path, is a style bank."""
    if isinstance(source, Mapping):
        return "bank" in source
    if isinstance(source, os.PathLike):
        source = values.path("a reference", source)
    return isinstance(source, StyleBank) or (isinstance(source, (str, os.PathLike)) and Path(source).suffix == ".bank")


class Sources:
    """Converter from entries of a record, or their handwritten forms, to pictures, masks and vectors."""

    def __init__(self, base: Path | None, model_folder: Path):
        self.base, self.model_folder = base, Path(model_folder)

    def is_bank(self, entry: Any) -> bool:
        """Return whether the entry of a reference, or its path, is a style bank."""
        return is_bank(entry)

    def bank(self, entry: Any) -> StyleBank:
        """Return the bank of an entry, or of a path relative to the file that names it. Raises StyleError."""
        if isinstance(entry, str):
            return StyleBank.load(self._absolute(entry))
        described = {key: value for key, value in entry.items() if key != "bank"}
        form, _ = _form(described, ("path", "shipped", "in_memory"), "a style bank", StyleError)
        if form == "in_memory":
            was = _word(entry["in_memory"])
            raise StyleError(f"the style was {was}, so it can't be read again; save banks before use")
        path = self._shipped(entry["shipped"]) if form == "shipped" else self._absolute(entry["path"])
        bank = StyleBank.load(path)
        if entry.get("sha256", bank.checksum) != bank.checksum:
            raise StyleError(f"the style bank {path} was baked again since this was recorded; its content differs")
        return bank

    def picture(self, entry: Any, mask: bool = False) -> Any:
        """Return a path as text, a PIL image, a mask tensor, or None for no mask. Raises ImageError and StyleError."""
        opened = open_mask if mask else open_picture
        if entry is None and mask:
            return None
        if isinstance(entry, str):
            path = find_picture(entry, self.model_folder, self.base)
            opened(path)
            return path
        form, entry = _form(entry, ("path", "shipped", "png", "safetensors", "in_memory"), "a picture", ImageError)
        if form == "safetensors":
            return self.tensor(entry)
        if form == "png":
            found = opened(_decoded(entry["png"], "a picture", ImageError))
        else:
            found = self._shipped(entry["shipped"]) if form == "shipped" else self._absolute(entry["path"])
        digest = pixel_digest(opened(found))
        if entry.get("sha256", digest) != digest:
            raise StyleError(
                f"the picture {found if isinstance(found, str) else 'in the record'} has different pixels than when "
                f"the call was recorded (sha256 {digest[:12]}, recorded {_word(entry['sha256'])[:12]}); put the "
                "original back"
            )
        return found

    def embedding(self, entry: Any) -> tuple[Any, str | None]:
        """Return DreamStyler's argument, and the digest that its vectors must have (None: any)."""
        if isinstance(entry, str):
            return find_learned(entry, self.model_folder, self.base), None
        if isinstance(entry, (list, tuple)) and all(isinstance(one, str) for one in entry):
            return tuple(self._absolute(one) for one in entry), None
        form, entry = _form(entry, ("path", "shipped", "safetensors", "in_memory"), "a learned style", StyleError)
        digest = entry.get("sha256")
        if form == "safetensors":
            rows = _unpack(entry["safetensors"], ("clip_l", "clip_g"), "a learned style")
            name, policy = entry.get("name", "style"), entry.get("pooled_policy", "eos")
            return StageEmbedding(name, rows["clip_l"], rows["clip_g"], policy), digest
        if form == "shipped":
            return self._shipped(entry["shipped"]), digest
        path = entry["path"]
        return (tuple(map(self._absolute, path)) if isinstance(path, list) else self._absolute(path)), digest

    def check_embedding(self, embedding: StageEmbedding, digest: str, source: Any) -> None:
        """Raise StyleError unless the vectors match the recorded digest."""
        found = vector_digest(embedding)
        if found != digest:
            raise StyleError(
                f"the learned style {values.quoted(embedding.name)} ({source or 'in the record'}) has different "
                f"vectors than when the call was recorded (sha256 {found[:12]}, recorded {_word(digest)[:12]}); put "
                "the original file back"
            )

    def image_embeds(self, entry: Any) -> torch.Tensor | str:
        """Return image embeddings as a tensor or their file's path. Raises StyleError if the file changed since."""
        if isinstance(entry, str):
            return self._absolute(entry)
        form, entry = _form(entry, ("path", "shipped", "safetensors", "in_memory"), "image embeddings", StyleError)
        if form == "safetensors":
            return self.tensor(entry)
        path = self._shipped(entry["shipped"]) if form == "shipped" else self._absolute(entry["path"])
        found = hashlib.sha256(_pack({"tensor": read_image_embeds(path)[0]})).hexdigest()
        if entry.get("sha256", found) != found:
            recorded = _word(entry["sha256"])[:12]
            raise StyleError(
                f"the image embeddings in {path} differ from those recorded with the call (sha256 {found[:12]}, "
                f"recorded {recorded}); put the original back"
            )
        return path

    def tensor(self, entry: Mapping) -> torch.Tensor:
        """Return a tensor stored inside the record. Raises StyleError if it was too large to be stored."""
        _, entry = _form(entry, ("safetensors", "in_memory"), "a tensor", StyleError)
        return _unpack(entry["safetensors"], ("tensor",), "a tensor")["tensor"]

    def _absolute(self, text) -> str:
        path = values.path("a path", text, error=StyleError)
        return str(path if self.base is None or path.is_absolute() else self.base / path)

    def _shipped(self, text) -> str:
        path = self.model_folder / values.path("a path", text, error=StyleError)
        if not path.resolve().is_relative_to(self.model_folder.resolve()) or not path.is_file():
            raise StyleError(
                f"{quoted(text)} does not come with the model in {self.model_folder}; load the recorded model"
            )
        return str(path)


def shipped(model_folder: Path, kind: str) -> dict[str, Path]:
    """Map name -> file of what ships with a model.

    kind: "styles" (learned ones), "loras", "references", or "control" (folders of control networks).
    """
    suffixes = SUFFIXES if kind == "references" else (".safetensors",)
    folder = Path(model_folder) / kind
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if kind == "control":
        return {file.name: file for file in files if (file / "config.json").is_file()}
    return {file.stem: file for file in files if file.suffix.lower() in suffixes}


def find_picture(text: str, model_folder: Path, base: Path | None = None) -> str:
    """Return the path of a picture given as a file or a shipped picture's name. Raises ImageError."""
    return _find(text, model_folder, base, "references", "picture", ImageError)


def find_learned(text: str, model_folder: Path, base: Path | None = None) -> str:
    """Return the path of a learned style given as a file, a folder, or a shipped style's name. Raises StyleError."""
    return _find(text, model_folder, base, "styles", "learned style", StyleError)


def _find(text: str, model_folder: Path, base: Path | None, kind: str, what: str, error: type) -> str:
    path = values.path(f"the path of a {what}", text, error=error)
    path = path if base is None or path.is_absolute() else base / path
    if text.strip() and os.path.lexists(path):
        return str(path)
    known = shipped(model_folder, kind)
    if text in known:
        return str(known[text])
    names = f"; the model comes with {', '.join(known)}" if known else ""
    shown = values.shown_path(path if text.strip() else text)
    near = values.did_you_mean(text, known) or values.did_you_mean_beside(path)
    raise error(f"no {what} found at {shown}; check the path{names}{near}")


def _form(entry, forms: tuple[str, ...], what: str, error: type) -> tuple[str, Mapping]:
    """Return which of `forms` an entry has, and the entry. Raises `error`, or StyleError."""
    found = [form for form in forms if isinstance(entry, Mapping) and form in entry]
    if not isinstance(entry, Mapping) or len(found) != 1:
        shown = quoted(sorted(map(str, entry)) if isinstance(entry, Mapping) else entry)
        raise error(f"{what} has {shown}; give its path, or one of {', '.join(forms[:-1])}")
    unknown = [name for name in entry if name not in (found[0], "sha256", "name", "pooled_policy")]
    if unknown:
        raise error(f"{what} has the unknown field {quoted(unknown[0])}; the known ones are {', '.join(forms)}, sha256")
    if found[0] == "in_memory":
        way = (
            "give its file: --from PICTURE --style-image FILE, --image FILE or --mask FILE, or put the path here"
            if what == "a picture"
            else "write it to a file and put its path here, or make the call again from Python"
        )
        raise StyleError(
            f"the call used {_word(entry['in_memory'])} from memory (sha256 {_word(entry.get('sha256'))[:12]}), too "
            f"large for the record; {way}"
        )
    return found[0], entry


def _word(text) -> str:
    """Return a record's own text for use in a message: short, without quotes around it."""
    return quoted(text)[1:-1][:60] if isinstance(text, str) else quoted(text)


def _pack(tensors: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # learned vectors mostly come from 16-bit files: store halves if that loses nothing
    if all(v.dtype == torch.float32 and torch.equal(v.half().float(), v) for v in plain.values()):
        return save({name: value.half() for name, value in plain.items()}, {"widened": "float32"})
    return save(plain)


def _unpack(text, names: tuple[str, ...], what: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    content = _decoded(text, what, StyleError)
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise StyleError(f"{what} in the record is damaged ({error}); use an undamaged copy of the file") from error
    if set(tensors) != set(names):
        held = quoted(", ".join(tensors))
        raise StyleError(f"{what} in the record contains {held} instead of {', '.join(names)}")
    widened = b'"widened"' in content[8 : 8 + int.from_bytes(content[:8], "little")]
    return {name: value.float() if widened else value for name, value in tensors.items()}


def _decoded(text, what: str, error: type) -> bytes:
    values.text(f"{what} in the record", text, longest=_LONGEST_BASE64, error=error)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as cause:
        raise error(f"{what} in the record is not base64 ({cause}); use an undamaged copy of the file") from cause


def plain(value: Any) -> Any:
    """Return a value in a form that JSON can hold; infinities become text, since JSON has none."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    raise StyleError(
        f"{quoted(value)} ({type(value).__name__}) can't be written into a record; use numbers, text and lists"
    )
