"""Local folders for hub ids: from the cache if complete, else by downloading only the needed files."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from stylefast import values
from stylefast.errors import InvalidRequest, ModelNotFound
from stylefast.models.weight_files import PICKLED, offline

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model")
_MOST_SHARDS = 1000


@dataclass(frozen=True)
class HubOptions:
    """Options of hub access.

    revision: a branch, tag or commit; None: the main branch. cache_dir: cache folder instead of Hugging Face's default.
    token: a user token; True or None uses the locally stored one, False none. force_download: download even cached
    files. local_files_only: never use the network. Raises InvalidRequest.
    """

    revision: str | None = None
    cache_dir: str | Path | None = None
    token: str | bool | None = field(default=None, repr=False)
    force_download: bool = False
    local_files_only: bool = False

    def __post_init__(self):
        for name in ("force_download", "local_files_only"):
            value = getattr(self, name)
            # callers pass None for the default
            object.__setattr__(self, name, False if value is None else values.flag(name, value))
        if self.revision is not None:
            values.text("revision", self.revision, longest=200, empty=False)
        if self.cache_dir is not None:
            object.__setattr__(self, "cache_dir", values.path("cache_dir", self.cache_dir))
        if self.token is not None and not isinstance(self.token, (bool, str)):
            raise InvalidRequest(f"token is a {type(self.token).__name__}; it must be a string, True, False or None")
        if isinstance(self.token, str):
            _check_token(self.token)
        if self.force_download and self.local_files_only:
            raise InvalidRequest("force_download and local_files_only contradict each other; give one of them")

    @property
    def cached(self) -> dict:
        """Return the arguments with which huggingface_hub locates a snapshot in the cache."""
        return {"revision": self.revision, "cache_dir": self.cache_dir}


AS_USUAL = HubOptions()


def _check_token(token: str) -> None:
    """Raise InvalidRequest, without quoting it, for a token that can't go into the header of a request."""
    if not (token.isascii() and token.isprintable() and 0 < len(token) <= 1000):
        raise InvalidRequest("token is not 1 to 1000 printable ASCII characters, as the hub's tokens are")


def is_hub_id(source: str) -> bool:
    """Return whether `source` has the form owner/name and no weight file's ending."""
    return bool(_HUB_ID.fullmatch(source)) and not source.endswith((".safetensors", ".ckpt", ".pt", ".bin", ".gguf"))


def cached_ids() -> list[str]:
    """List the ids of all repositories in the hub's cache, complete or not."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    names = [entry.name for entry in folder.glob("models--*")] if folder.is_dir() else []
    return sorted(name.removeprefix("models--").replace("--", "/") for name in names)


def pick_weights(names: Iterable[str], half: bool, variant: str | None = "auto") -> list[str]:
    """Return the weight files to load out of the file names in one component's folder; empty if there are none.

    `half`: prefer 16-bit files, else 32-bit ones; if only one kind exists, it is used. `variant` other than "auto"
    (None for the plain files, or a name such as "fp16") allows only that one. For sharded weights all shards are
    returned, including missing ones.
    """
    names = set(names)
    order = (("fp16", None) if half else (None, "fp16")) if variant == "auto" else (variant,)
    for chosen in order:
        mark = f".{chosen}" if chosen else ""
        for stem in _WEIGHT_STEMS:
            if f"{stem}{mark}.safetensors" in names:
                return [f"{stem}{mark}.safetensors"]
            # two spellings are in use: model.fp16-00001-of-00002.safetensors, model-00001-of-00002.fp16.safetensors
            tag = re.escape(mark)
            shard = re.compile(rf"({stem}(?:{tag})?-)\d{{1,6}}-of-(\d{{1,6}})((?:{tag})?\.safetensors)")
            sets = {match.group(1, 2, 3) for match in map(shard.fullmatch, names) if match}
            # the variant may come before or after the shard number
            sets = [found for found in sets if not mark or mark in found[0] or found[2].startswith(mark)]
            whole = {found: _shards(*found) for found in sorted(sets)}
            if whole:
                # prefer the set with the fewest missing files
                return min(whole.values(), key=lambda files: len(set(files) - names))
    return []


def _shards(start: str, count: str, end: str) -> list[str]:
    """Return the file names of a set of shards, at most _MOST_SHARDS."""
    most = min(int(count), _MOST_SHARDS)
    return [f"{start}{i:0{len(count)}}-of-{count}{end}" for i in range(1, most + 1)]


def present(folder: Path, half: bool, variant: str | None = "auto") -> list[str]:
    """Return the weight files of one component's folder, chosen by `pick_weights`.

    Raises ModelNotFound if there are none, listing the files found instead, or if shards are missing.
    """
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    files = pick_weights(names, half, variant)
    if not files:
        there = sorted(name for name in names if Path(name).suffix in (".safetensors", *PICKLED))
        raise ModelNotFound(
            f"{folder} has no .safetensors weights of variant {values.quoted(variant)}; it has "
            f"{', '.join(there) or 'no weights'}"
        )
    absent = [name for name in files if not (folder / name).is_file()]
    if absent:
        raise ModelNotFound(
            f"{folder} lacks {len(absent)} of its {len(files)} weight files ({', '.join(absent[:3])}); download "
            "them again"
        )
    return files


def is_whole(folder: Path, half: bool, variant: str | None = "auto") -> bool:
    """Return whether a component's folder holds its config and all of its weight files."""
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    files = pick_weights(names, half, variant)
    return bool(files) and all((folder / name).is_file() for name in (*files, "config.json"))


def wanted_files(names: Iterable[str], half: bool, variant: str | None, components: Iterable[str]) -> list[str]:
    """Return the file names of a repository that loading `components` ("" is the root) will read."""
    names = list(names)
    wanted = [name for name in names if name == "model_index.json"]
    for component in components:
        lead = f"{component}/" if component else ""
        inside = [n[len(lead) :] for n in names if n.startswith(lead) and "/" not in n[len(lead) :]]
        texts = [n for n in inside if n.endswith((".json", ".txt")) and ".index." not in n and n != "model_index.json"]
        wanted += [lead + name for name in texts + pick_weights(inside, half, variant)]
    return wanted


def hub_folder(
    repo_id: str,
    complete: Callable[[Path], bool],
    select: Callable[[list[str]], list[str]],
    options: HubOptions = AS_USUAL,
) -> Path:
    """Return the folder of a hub repository's snapshot.

    A cached snapshot that is `complete` is used without network access; otherwise the files that `select` picks from
    the repository's list are downloaded. Raises ModelNotFound, saying what to fetch and where to put it.
    """
    import huggingface_hub
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(huggingface_hub.snapshot_download(repo_id, local_files_only=True, **options.cached))
        if not options.force_download and complete(folder):
            return folder
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise ModelNotFound(
            f"{values.quoted(repo_id)} does not exist here and can't be an id on the hub either; check the path"
        ) from error
    if options.local_files_only or offline():
        raise ModelNotFound(_how_to_get(repo_id, "downloads are switched off", options))
    try:
        api = huggingface_hub.HfApi(token=options.token)
        listing = api.model_info(repo_id, revision=options.revision, timeout=15).siblings
        folder = huggingface_hub.snapshot_download(
            repo_id,
            allow_patterns=select([file.rfilename for file in listing or ()]),
            token=options.token,
            force_download=options.force_download,
            **options.cached,
        )
    except RevisionNotFoundError as error:
        raise ModelNotFound(
            f"{values.quoted(repo_id)} has no revision {values.quoted(options.revision)} on the hub; check its name"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"the hub has no model {values.quoted(repo_id)} that you may read; check the name, or `hf auth login` if "
            "it is private"
        ) from error
    except Exception as error:
        # the hub's client raises many kinds of network errors; callers need only one
        reason = f"the hub can't be reached ({' '.join([type(error).__name__, *str(error).splitlines()[:1]])})"
        raise ModelNotFound(_how_to_get(repo_id, reason, options)) from error
    folder = Path(folder)
    if not complete(folder):
        raise ModelNotFound(f"{values.quoted(repo_id)} holds no model of this kind in .safetensors form")
    return folder


def _how_to_get(repo_id: str, reason: str, options: HubOptions) -> str:
    import huggingface_hub

    name, cache = repo_id.split("/")[-1], options.cache_dir or huggingface_hub.constants.HF_HUB_CACHE
    which = "" if options.revision is None else f" --revision {options.revision}"
    near = values.did_you_mean(repo_id, [known for known in cached_ids() if known != repo_id])
    return (
        f"{values.quoted(repo_id)} is not complete in the cache ({cache}), and {reason}. On a machine with network run "
        f"`hf download {repo_id}{which} --local-dir {name}` (formerly `huggingface-cli download`), copy the folder "
        f"{name} here and give its path instead of the id; model='tiny' needs no download{near}"
    )
