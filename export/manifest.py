"""Manifest of an export folder: its graphs, their source and target, the hash of every file, and whether it is trusted.

`manifest.json` is written last, so a folder without one is not an export. Files of most kinds are code: before
loading them, read the manifest and check that they are unchanged (`check_files`), trusted (`check_trust`) and made for
this model and chip (`check_fits`). Nothing here imports torch.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from stylefast import values
from stylefast.code_caches import foreign
from stylefast.errors import EngineMismatch, ExportError, ModelFormatError, ModelNotFound, UntrustedEngine
from stylefast.values import quoted

MANIFEST = "manifest.json"
FORMAT = 1
KINDS = ("onnx", "tensorrt", "aoti", "triton-repo")
# kinds whose files are executable code, not only numbers and standard operators
CODE = ("tensorrt", "aoti", "triton-repo")
COMPONENTS = (
    "unet",
    "vae_decoder",
    "text_encoder",
    "text_encoder_2",
    "text_projector",
    "image_encoder",
    "image_projector",
)
ANY_TARGET = "any"
SHOWN_DIGITS = 12
_LARGEST_MANIFEST = 16 * 2**20
_HASH_THREADS = 4
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """A file of the folder: its path below it with "/" between the parts, bytes and hash. Raises ModelFormatError."""

    name: str
    bytes: int
    sha256: str

    def __post_init__(self):
        _check_name(self.name)
        values.whole_number(f"{MANIFEST}: bytes of {self.name}", self.bytes, 0, error=ModelFormatError)
        if not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise ModelFormatError(
                f"{MANIFEST}: sha256 of {self.name} is {quoted(self.sha256)}; it must be 64 hex digits"
            )


@dataclass(frozen=True)
class GraphEntry:
    """One exported graph. Raises ModelFormatError.

    component: one of COMPONENTS. file: the one to open; files: all that it needs, including external data. shape: of a
    UNet, the fields of its `GraphShape`. inputs, outputs: (name, type's name, dims), dims being numbers, or names if
    they may vary. fixed: dimension -> its only size. opset: of ONNX. extra: values specific to a kind.
    """

    component: str
    file: str
    files: tuple[str, ...]
    shape: dict[str, Any] = field(default_factory=dict)
    inputs: tuple[tuple, ...] = ()
    outputs: tuple[tuple, ...] = ()
    fixed: dict[str, int] = field(default_factory=dict)
    opset: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.component not in COMPONENTS:
            raise ModelFormatError(
                f"{MANIFEST} has a graph of {quoted(self.component)}; this version of stylefast knows "
                f"{', '.join(COMPONENTS)}"
            )
        object.__setattr__(self, "files", _tuple("files", self.files))
        for name in self.files:
            _check_name(name)
        if self.file not in self.files:
            raise ModelFormatError(
                f"{MANIFEST}: the graph's file {quoted(self.file)} is not among its files {quoted(self.files)}"
            )
        for name in ("inputs", "outputs"):
            tensors = tuple(_tensor(name, tensor) for tensor in _tuple(name, getattr(self, name)))
            object.__setattr__(self, name, tensors)
        for name in ("shape", "fixed", "extra"):
            if not isinstance(getattr(self, name), Mapping):
                raise ModelFormatError(f"{MANIFEST}: {name} of {self.file} is no object")
            object.__setattr__(self, name, dict(getattr(self, name)))
        for dimension, size in self.fixed.items():
            values.whole_number(f"{MANIFEST}: {self.file} is fixed, its {dimension}", size, 1, error=ModelFormatError)
        if self.opset is not None:
            values.whole_number(f"{MANIFEST}: the opset of {self.file}", self.opset, error=ModelFormatError)
        if not isinstance(self.shape.get("flavour", ""), str):
            raise ModelFormatError(f"{MANIFEST}: the flavour of {self.file} is {quoted(self.shape['flavour'])}")

    @property
    def label(self) -> str:
        """Return the name used in messages: "unet-live" or "vae_decoder", for example."""
        return "-".join(filter(None, (self.component, self.flavour)))

    @property
    def flavour(self) -> str | None:
        """Return a UNet's flavour: "plain", "live" or "banked"; None for other components."""
        return self.shape.get("flavour")


@dataclass(frozen=True)
class Manifest:
    """Content of an export folder, its source and its target. Raises ModelFormatError.

    stylefast: the version that wrote it. fingerprint: of the weights. dtype: "float16". target: "any", "cpu", "cuda",
    or chips joined by commas ("sm89,sm120"). toolchain: packages that made the files, name -> version. profiles: ranges
    of sizes that TensorRT engines were built for, by the graph's label.
    """

    kind: str
    stylefast: str
    model: str
    fingerprint: str
    dtype: str
    target: str
    toolchain: dict[str, str]
    graphs: tuple[GraphEntry, ...]
    files: tuple[FileEntry, ...]
    profiles: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def __post_init__(self):
        _check_format(self.format)
        if self.kind not in KINDS:
            raise ModelFormatError(f"{MANIFEST} says kind {quoted(self.kind)}; there are {', '.join(KINDS)}")
        for name in ("stylefast", "model", "fingerprint", "dtype", "target"):
            values.text(f"{MANIFEST}: {name}", getattr(self, name), error=ModelFormatError)
        for name in ("toolchain", "profiles"):
            if not isinstance(getattr(self, name), Mapping):
                raise ModelFormatError(f"{MANIFEST}: {name} is no object")
            object.__setattr__(self, name, dict(getattr(self, name)))
        for name in ("graphs", "files"):
            object.__setattr__(self, name, _tuple(name, getattr(self, name)))
        names = [entry.name for entry in self.files]
        if len(set(names)) != len(names):
            raise ModelFormatError(f"{MANIFEST} lists a file twice")
        for graph in self.graphs:
            unlisted = sorted(set(graph.files) - set(names))
            if unlisted:
                raise ModelFormatError(f"{MANIFEST}: {graph.label} needs {unlisted[0]}, which is not among the files")

    @property
    def digest(self) -> str:
        """Return the manifest's sha256, 64 hex digits; it covers the whole folder by the hashes of all files."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def targets(self) -> tuple[str, ...]:
        """Return the targets, split at commas."""
        return tuple(part.strip() for part in self.target.split(","))

    @property
    def bytes(self) -> int:
        """Return the size of all files together."""
        return sum(entry.bytes for entry in self.files)

    def graph(self, component: str, flavour: str | None = None) -> GraphEntry | None:
        """Return the graph of a component, of a UNet in one flavour; None if the folder has none."""
        wanted = (graph for graph in self.graphs if (graph.component, graph.flavour) == (component, flavour))
        return next(wanted, None)

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary for `json.dumps`, which `from_json` reads."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found["graphs"] = [graph_to_json(graph) for graph in self.graphs]
        found["files"] = [{f.name: getattr(entry, f.name) for f in fields(entry)} for entry in self.files]
        return found

    @classmethod
    def from_json(cls, found: Any) -> "Manifest":
        """Return the manifest from the result of `to_json`. Raises ModelFormatError for anything else."""
        if isinstance(found, Mapping):
            _check_format(found.get("format"))
        _check_fields("the manifest", found, {f.name for f in fields(cls)})
        return cls(
            **dict(found)
            | {
                "graphs": tuple(graph_from_json(graph) for graph in _tuple("graphs", found["graphs"])),
                "files": tuple(_file_from_json(entry) for entry in _tuple("files", found["files"])),
            }
        )


def graph_to_json(graph: GraphEntry) -> dict[str, Any]:
    """Return a dictionary for `json.dumps`, with lists in place of tuples."""
    found = {f.name: getattr(graph, f.name) for f in fields(graph)}
    found["files"] = list(graph.files)
    for name in ("inputs", "outputs"):
        found[name] = [[tensor, dtype, list(dims)] for tensor, dtype, dims in found[name]]
    return found


def graph_from_json(found: Any) -> GraphEntry:
    """Return the entry from the result of `graph_to_json`. Raises ModelFormatError."""
    _check_fields("a graph", found, {f.name for f in fields(GraphEntry)})
    return GraphEntry(**found)


def versions(*packages: str) -> dict[str, str]:
    """Return the versions of those packages that are installed, for a manifest's toolchain."""
    found = {}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def read_manifest(folder: str | Path) -> Manifest:
    """Read the manifest of an export folder, without checking its files.

    Raises ModelNotFound if there is no export, ModelFormatError if its manifest is damaged or of another format.
    """
    folder = values.path("the folder of an export", folder)
    path = folder / MANIFEST
    if not os.path.isdir(folder):
        shown = values.shown_path(folder)
        raise ModelNotFound(f"there is no export at {shown}; make it with `stylefast export`, or check the path")
    if not os.path.isfile(path):
        raise ModelNotFound(
            f"{folder} has no {MANIFEST}, so it is no export, or one that was not finished; run `stylefast export` "
            "with the same arguments to go on with it"
        )
    try:
        content = values.read_json(path, "it", error=ModelFormatError, largest=_LARGEST_MANIFEST)
    except ModelFormatError as error:
        raise ModelFormatError(f"{path} can't be read ({error}); export the model again") from error
    return Manifest.from_json(content)


def file_entry(folder: Path, name: str) -> FileEntry:
    """Return the entry of a file in its current state."""
    path = folder / name
    return FileEntry(name, path.stat().st_size, sha256_of(path))


def sha256_of(path: Path) -> str:
    """Return a file's sha256, 64 hex digits."""
    values.no_device("the export's file", path, error=ExportError)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: str | Path, manifest: Manifest, names: Iterable[str] | None = None, deep: bool = True) -> None:
    """Raise ExportError for the first file that is missing, truncated or altered.

    names: only these of the manifest's files. deep: compare hashes (a few seconds for SDXL), not only sizes.
    """
    problem = next(iter(file_problems(folder, manifest, names, deep).values()), None)
    if problem is not None:
        raise ExportError(f"{problem}; export the model again, or copy the whole folder once more")


def file_problems(
    folder: str | Path, manifest: Manifest, names: Iterable[str] | None = None, deep: bool = True
) -> dict[str, str]:
    """Return a problem per file, in the manifest's order; empty if all files are fine. Arguments as `check_files`.

    Raises ExportError for `names` that the manifest doesn't list.
    """
    folder = Path(folder).expanduser()
    wanted = None if names is None else set(names)
    known = {entry.name: entry for entry in manifest.files}
    unknown = sorted((wanted or set()) - known.keys())
    if unknown:
        raise ExportError(f"{MANIFEST} in {folder} lists no {unknown[0]}; it has {', '.join(known) or 'no files'}")
    entries = [entry for entry in manifest.files if wanted is None or entry.name in wanted]
    data = {name for graph in manifest.graphs for name in graph.files if name != graph.file}

    def problem(entry: FileEntry) -> str | None:
        return _file_problem(folder / entry.name, entry, entry.name in data, deep)

    with ThreadPoolExecutor(_HASH_THREADS) as pool:  # hashing releases the GIL
        found = list(pool.map(problem, entries))
    return {entry.name: what for entry, what in zip(entries, found) if what is not None}


def _file_problem(path: Path, entry: FileEntry, external_data: bool, deep: bool) -> str | None:
    try:
        if not path.is_file():
            return f"missing external data: {path} is not there" if external_data else f"missing file: {path}"
        size = path.stat().st_size
        if size < entry.bytes:
            return f"truncated: {path} has {size} of {entry.bytes} bytes"
        if size > entry.bytes:
            return f"altered: {path} has {size} bytes where {MANIFEST} says {entry.bytes}"
        found = sha256_of(path) if deep else entry.sha256
    except OSError as error:
        return f"unreadable: {path} ({error.strerror or error})"
    if found != entry.sha256:
        return f"altered: {path} has sha256 {found[:SHOWN_DIGITS]} where {MANIFEST} says {entry.sha256[:SHOWN_DIGITS]}"
    return None


def check_fits(
    manifest: Manifest,
    *,
    kind: str | None = None,
    fingerprint: str | None = None,
    dtype: Any = None,
    target: str | None = None,
    toolchain: Mapping[str, str] | None = None,
) -> None:
    """Raise EngineMismatch for the first argument that the export was not made for; None is not compared.

    dtype: a torch type or its name. target: one, e.g. "sm89". toolchain: installed versions of packages whose files
    load only in the version that made them.
    """
    if kind is not None and manifest.kind != kind:
        raise EngineMismatch(f"the export is of kind {manifest.kind}, not {kind}; run `stylefast export {kind}`")
    # type before fingerprint: it changes the fingerprint, and users can choose it
    if dtype is not None and manifest.dtype != str(dtype).removeprefix("torch."):
        wanted = str(dtype).removeprefix("torch.")
        raise EngineMismatch(
            f"the export has dtype {manifest.dtype}, the model {wanted}; load it with dtype {manifest.dtype}, or "
            f"export with --dtype {wanted}"
        )
    if fingerprint is not None and manifest.fingerprint != fingerprint:
        raise EngineMismatch(
            f"the export was made from other weights (model {manifest.model}, fingerprint "
            f"{manifest.fingerprint[:SHOWN_DIGITS]}) than those loaded ({fingerprint[:SHOWN_DIGITS]}); load that "
            "model, or export this one"
        )
    if target is not None and not {target, ANY_TARGET} & set(manifest.targets):
        raise EngineMismatch(
            f"the export was built for {manifest.target}, and this is {target}; run `stylefast export "
            f"{manifest.kind} --target {target}`"
        )
    for name, version in (toolchain or {}).items():
        made = manifest.toolchain.get(name)
        if made != version:
            raise EngineMismatch(
                f"the export was made with {name} {made or 'of unknown version'}, and {version} is installed; install "
                "that version, or export again"
            )


def _check_format(found: Any) -> None:
    if found != FORMAT:
        raise ModelFormatError(
            f"{MANIFEST} has format {quoted(found)}; this version of stylefast reads format {FORMAT}: export again, or "
            "use the version that wrote it"
        )


def _check_name(name: Any) -> None:
    """Check that a file's path stays in the folder, also on systems with other separators. Raises ModelFormatError."""
    parts = values.text(f"{MANIFEST}: a file's name", name, error=ModelFormatError).split("/")
    if not parts or any(part in ("", ".", "..") or set(part) & set("\\:\0") for part in parts) or name == MANIFEST:
        raise ModelFormatError(
            f"{MANIFEST} lists a file {quoted(name)}; it must be the plain path of a file in the folder"
        )


def _tensor(what: str, found: Any) -> tuple[str, str, tuple[int | str, ...]]:
    """Return (name, type's name, dims) of an input or output. Raises ModelFormatError."""
    if isinstance(found, list | tuple) and len(found) == 3 and isinstance(found[2], list | tuple):
        name, dtype, dims = found
        sized = all(isinstance(dim, int | str) and not isinstance(dim, bool) for dim in dims)
        if isinstance(name, str) and isinstance(dtype, str) and sized:
            return name, dtype, tuple(dims)
    raise ModelFormatError(f"{MANIFEST}: {what} hold {quoted(found)}; each must be [name, type, dims]")


def _tuple(name: str, found: Any) -> tuple:
    if not isinstance(found, list | tuple):
        raise ModelFormatError(f"{MANIFEST}: {name} is {quoted(found)}; it must be a list")
    return tuple(found)


def _file_from_json(found: Any) -> FileEntry:
    _check_fields("a file", found, {f.name for f in fields(FileEntry)})
    return FileEntry(**found)


def _check_fields(what: str, found: Any, known: set[str]) -> None:
    if not isinstance(found, Mapping) or set(map(str, found)) != known:
        given = quoted(sorted(map(str, found))) if isinstance(found, Mapping) else type(found).__name__
        raise ModelFormatError(f"{MANIFEST} is damaged: {what} has {given} instead of {', '.join(sorted(known))}")


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
            f"{manifest.digest[:SHOWN_DIGITS]}; this is a different export, or it was altered; check where it came from"
        )
    if manifest.kind not in CODE:
        return
    reason = foreign(folder, (MANIFEST, *(entry.name for entry in manifest.files)))
    if reason is not None:
        raise UntrustedEngine(
            f"the export's files are code, and {reason}. If you trust their source, pass the digest that "
            "`stylefast export` printed there: --trust DIGEST, or trust= in Python"
        )
