"""From a hub id to a folder on this machine: the cache first, then a download of only the files that are needed."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from stylefast.errors import ModelNotFound
from stylefast.models.weight_files import offline

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHT_STEMS = ("diffusion_pytorch_model", "model")


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form owner/name (and is no path to a file)."""
    return bool(_HUB_ID.fullmatch(source)) and not source.endswith((".safetensors", ".ckpt", ".pt", ".bin"))


def pick_weights(names: Iterable[str], half: bool, variant: str | None = "auto") -> list[str]:
    """The weight files to load among the file names of one component's folder; empty if there are none.

    `half`: 16-bit files are preferred, else 32-bit ones; either is taken if it is the only one. `variant` other than
    "auto" (None for the plain files, or a name such as "fp16") allows only that one. Of several shards, all are given.
    """
    names = set(names)
    order = (("fp16", None) if half else (None, "fp16")) if variant == "auto" else (variant,)
    for chosen in order:
        mark = f".{chosen}" if chosen else ""
        for stem in _WEIGHT_STEMS:
            if f"{stem}{mark}.safetensors" in names:
                return [f"{stem}{mark}.safetensors"]
            # both spellings are published: model.fp16-00001-of-00002.safetensors, model-00001-of-00002.fp16.safetensors
            tag = re.escape(mark)
            shard = re.compile(rf"{stem}(?:{tag}-\d+-of-\d+|-\d+-of-\d+{tag})\.safetensors")
            shards = sorted(name for name in names if shard.fullmatch(name))
            if shards:
                return shards
    return []


def wanted_files(names: Iterable[str], half: bool, variant: str | None, components: Iterable[str]) -> list[str]:
    """Of all file names of a repository, those that loading `components` ("" is the root itself) will read."""
    names = list(names)
    wanted = [name for name in names if name == "model_index.json"]
    for component in components:
        lead = f"{component}/" if component else ""
        inside = [n[len(lead):] for n in names if n.startswith(lead) and "/" not in n[len(lead):]]
        texts = [n for n in inside if n.endswith((".json", ".txt")) and ".index." not in n and n != "model_index.json"]
        wanted += [lead + name for name in texts + pick_weights(inside, half, variant)]
    return wanted


def hub_folder(
    repo_id: str,
    complete: Callable[[Path], bool],
    select: Callable[[list[str]], list[str]],
    local_files_only: bool = False,
) -> Path:
    """Folder of a hub repository's snapshot.

    A cached snapshot that is `complete` is taken without asking the network; otherwise the files that `select` picks
    from the repository's list are downloaded. Raises ModelNotFound, saying what to fetch and where to put it.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(huggingface_hub.snapshot_download(repo_id, local_files_only=True))
        if complete(folder):
            return folder
    except LocalEntryNotFoundError:
        pass
    if local_files_only or offline():
        raise ModelNotFound(_how_to_get(repo_id, "downloads are switched off"))
    try:
        listing = huggingface_hub.HfApi().model_info(repo_id, timeout=15).siblings
        folder = huggingface_hub.snapshot_download(repo_id, allow_patterns=select([file.rfilename for file in listing]))
    except RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"the hub has no model {repo_id!r} that you may read; check the name, or `hf auth login` if it is private"
        ) from error
    except Exception as error:
        # the hub's client lets every kind of network error through; to the caller all mean the same
        reason = f"the hub can't be reached ({' '.join([type(error).__name__, *str(error).splitlines()[:1]])})"
        raise ModelNotFound(_how_to_get(repo_id, reason)) from error
    folder = Path(folder)
    if not complete(folder):
        raise ModelNotFound(f"{repo_id!r} holds no model of the demanded kind in .safetensors form")
    return folder


def _how_to_get(repo_id: str, reason: str) -> str:
    import huggingface_hub

    name = repo_id.split("/")[-1]
    return (
        f"{repo_id!r} is not in the cache ({huggingface_hub.constants.HF_HUB_CACHE}) and {reason}. On a machine with "
        f"network run `hf download {repo_id} --local-dir {name}` (formerly `huggingface-cli download`), copy the "
        f"folder {name} here and give its path instead of the id; model='tiny' needs no download"
    )
