"""Learned style vectors and their files: one set of vectors per noise stage and text encoder.

The native format is safetensors, `stylefast-msti/1`: `stages.clip_l` [T, n, width 1] and `stages.clip_g`
[T, n, width 2], stage 0 being the low-noise end, plus `clip_l` [n, width 1] and `clip_g` [n, width 2], a single-stage
fallback for other tools. Files of other trainers are recognised by their keys.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stylefast import values
from stylefast.errors import StyleError
from stylefast.models.text import POOLED_POLICIES
from stylefast.styles.embedding_files import StyleFile, read_files
from stylefast.whole_files import write_whole

FORMAT = "stylefast-msti/1"
SDXL_WIDTHS = (768, 1280)
_NAME = re.compile(r"[^\s<>{}]+")
_LONGEST_NAME = 200


@dataclass(frozen=True, eq=False)
class StageEmbedding:
    """The learned vectors of one style.

    `clip_l` [T, n, width 1] and `clip_g` [T, n, width 2], fp32, stage 0 = low noise (the last steps), stage T-1 = high
    noise (the first). `name` is the placeholder: `<name>` in a prompt. `pooled_policy` says where the pooled state is
    taken: "eos", or "first_added_token" for vectors trained that way (stock diffusers). `metadata`: strings.
    Raises StyleError for shapes that do not match and for values that are not finite.
    """

    name: str
    clip_l: Tensor
    clip_g: Tensor
    pooled_policy: str = "eos"
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            raise StyleError(
                f"a style can't be called {values.quoted(self.name)}; use a name without spaces, < > or braces"
            )
        values.text("a style's name", self.name, longest=_LONGEST_NAME, error=StyleError)
        for key in ("clip_l", "clip_g"):
            rows = getattr(self, key)
            if isinstance(rows, Tensor):
                values.dense_tensor(f"{key} of the style {values.quoted(self.name)}", rows, error=StyleError)
            whole = isinstance(rows, Tensor) and rows.ndim == 3 and rows.numel() and not rows.is_complex()
            if not whole:
                found = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
                raise StyleError(
                    f"{key} of the style {values.quoted(self.name)} is {found}; it must be [stages, vectors, width]"
                )
            if not torch.isfinite(rows.float()).all():
                raise StyleError(
                    f"{key} of the style {values.quoted(self.name)} contains NaN or infinity; train or export it again"
                )
            object.__setattr__(self, key, rows.float())
        if self.clip_l.shape[:2] != self.clip_g.shape[:2]:
            raise StyleError(
                f"the style {values.quoted(self.name)} has {tuple(self.clip_l.shape[:2])} stages and vectors for "
                f"encoder 1, but {tuple(self.clip_g.shape[:2])} for encoder 2; both must agree"
            )
        values.one_of(
            f"pooled policy of the style {values.quoted(self.name)}",
            self.pooled_policy,
            POOLED_POLICIES,
            error=StyleError,
        )
        strings = isinstance(self.metadata, Mapping) and all(
            isinstance(k, str) and isinstance(v, str) for k, v in self.metadata.items()
        )
        if not strings:
            raise StyleError(f"the metadata of the style {values.quoted(self.name)} must map strings to strings")

    @property
    def stages(self) -> int:
        """Return T, the number of noise stages; 1 for ordinary textual inversions."""
        return self.clip_l.shape[0]

    @property
    def widths(self) -> tuple[int, int]:
        """Return the widths of the vectors for encoder 1 and encoder 2."""
        return self.clip_l.shape[2], self.clip_g.shape[2]

    def stage(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the vectors of one stage, [n, width 1] and [n, width 2]. Raises StyleError beyond T-1."""
        if not 0 <= index < self.stages:
            raise StyleError(
                f"stage {index} of the style {values.quoted(self.name)} does not exist; it has 0 to {self.stages - 1}"
            )
        return self.clip_l[index], self.clip_g[index]

    def collapsed(self) -> "StageEmbedding":
        """Return a single-stage version for tools without stages: the stages' mean direction at their mean norm."""
        return StageEmbedding(
            self.name, _mean_vector(self.clip_l), _mean_vector(self.clip_g), self.pooled_policy, self.metadata
        )

    def check_widths(self, widths: tuple[int, int]) -> None:
        """Raise StyleError unless the vectors match the text encoders' embedding widths."""
        if self.widths != tuple(widths):
            raise StyleError(
                f"the vectors of the style {values.quoted(self.name)} are {self.widths[0]} and {self.widths[1]} wide, "
                f"but the text encoders of this model need {widths[0]} and {widths[1]}; use an embedding trained for "
                "this model"
            )


def load_embedding(
    source: str | Path | tuple | list,
    name: str | None = None,
    *,
    widths: tuple[int, int] | None = SDXL_WIDTHS,
    pooled_policy: str | None = None,
) -> StageEmbedding:
    """Read learned style vectors.

    `source`: a file, a folder or a pair of files (encoder 1, encoder 2). Recognised: `stylefast-msti/1`; kohya, A1111
    and ComfyUI files with `clip_l` and `clip_g`; diffusers' `text_encoders_0/1`; diffusers' pair of one-key files (in a
    folder: `learned_embeds.safetensors` and `learned_embeds_2.safetensors`); pairs of A1111 `string_to_param` files, of
    bare tensors and of DreamStyler `.bin` files with keys `<token>-T{k}`; an embedding inside a LoRA file
    (`bundle_emb.NAME.clip_l`), `name` picking one of several. Formats without stages give one stage.
    `name`: the placeholder; None: the file's own token or stem. `widths`: the model's widths, None to skip the check.
    `pooled_policy`: overrides the file; pairs and diffusers files default to "first_added_token", others to "eos".
    Raises StyleError for files that are missing, damaged, foreign, or made for another model.
    """
    file = read_files(source, name)
    file_name = name or re.sub(r"[\s<>{}]+", "-", file.name).strip("-") or "style"
    metadata = dict(file.metadata)
    if metadata.get("format", "").startswith("stylefast-msti/"):
        _check_own_format(file)
    policy = pooled_policy or metadata.get("pooled_policy") or file.pooled_policy
    embedding = StageEmbedding(file_name, file.clip_l, file.clip_g, policy, metadata)
    if widths is not None:
        embedding.check_widths(widths)
    return embedding


def save_embedding(embedding: StageEmbedding, path: str | Path, *, collapsed: bool = False) -> Path:
    """Write a safetensors file atomically; returns its path. Raises StyleError if it can't be written.

    `collapsed` omits the stages and writes only `clip_l` and `clip_g`, for tools that reject further keys.
    """
    single = embedding.collapsed()
    tensors = {"clip_l": single.clip_l[0], "clip_g": single.clip_g[0]}
    metadata = {k: v for k, v in embedding.metadata.items() if k not in ("format", "T", "n", "stage_order")}
    metadata.update(token=f"<{embedding.name}>", pooled_policy=embedding.pooled_policy)
    if not collapsed:
        tensors |= {"stages.clip_l": embedding.clip_l, "stages.clip_g": embedding.clip_g}
        metadata.setdefault("num_train_timesteps", "1000")
        metadata.update(
            format=FORMAT,
            T=str(embedding.stages),
            n=str(embedding.clip_l.shape[1]),
            stage_order="low_noise_first",
        )
    return _write(tensors, metadata, Path(path))


def _check_own_format(file: StyleFile) -> None:
    found = file.metadata
    if found["format"] != FORMAT:
        raise StyleError(
            f"{file.path} has the format {values.quoted(found['format'])}, not {values.quoted(FORMAT)}; update "
            "stylefast to read it"
        )
    expected = {
        "T": str(file.clip_l.shape[0]),
        "n": str(file.clip_l.shape[1]),
        "stage_order": "low_noise_first",
        "num_train_timesteps": "1000",
    }
    for key, value in expected.items():
        if found.get(key) != value:
            raise StyleError(
                f"{file.path} has {key}={values.quoted(found.get(key))}, but its tensors and this version need "
                f"{values.quoted(value)}; the file is damaged or edited: export it again"
            )


def _mean_vector(rows: Tensor) -> Tensor:
    # [T, n, width] -> [1, n, width]; rescaled, since the plain mean is shorter than its parts and would act more weakly
    mean = rows.mean(dim=0, keepdim=True)
    if rows.shape[0] == 1:
        return mean
    length = rows.norm(dim=-1, keepdim=True).mean(dim=0, keepdim=True)
    return mean * (length / mean.norm(dim=-1, keepdim=True).clamp_min(1e-12))


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> Path:
    from safetensors.torch import save

    content = save({key: value.detach().float().cpu().clone() for key, value in tensors.items()}, metadata)
    try:
        write_whole(path, content)
    except OSError as error:
        raise StyleError(f"can't write {path}: {error.strerror or error}; choose a folder you may write to") from error
    return path
