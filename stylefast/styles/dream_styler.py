"""DreamStyler: a learned style token with one vector set per noise stage, and the prompts of its guidance branches.

The text branches of a request are
  full     the whole prompt, with the style token(s),
  context  the prompt without its style clause (no learned token, so the same at every stage),
  style    a content-free sentence with the style token(s),
and a step at timestep t uses the vectors of stage floor(t T / 1000): stage 0 is the low-noise end. A style named in
the negative prompt acts there, and in the prompt only if that names it too: most published embeddings for SDXL are
negative embeddings.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from stylefast import values
from stylefast.errors import InvalidRequest, PromptError, StyleError
from stylefast.models.text import Prompt
from stylefast.sampling.guidance import NULL, StyleContextGuidance
from stylefast.styles.embeddings import StageEmbedding, load_embedding
from stylefast.styles.style import ModelFacts, Style, Texts, read_settings

logger = logging.getLogger(__name__)

TEXT_BRANCHES = ("full", "context", "style")
TEMPLATE = "{prompt}, in the style of {style}"
STYLE_PROMPT = "A painting in the style of {style}"


def stage_of(timestep: float, stages: int, num_train_timesteps: int = 1000) -> int:
    """Return the noise stage of a timestep: floor(t T / num_train_timesteps), 0 = low noise, T-1 = high noise.

    Whole timesteps use integer arithmetic; fractional ones (Karras schedules) may reach `num_train_timesteps`, which
    belongs to the last stage. Raises InvalidRequest for a timestep outside [0, num_train_timesteps] or stages below 1.
    """
    t = float(timestep)
    if stages < 1:
        raise InvalidRequest(f"{stages} noise stages; at least 1 is needed")
    if not 0 <= t <= num_train_timesteps:
        raise InvalidRequest(f"timestep {t} is outside 0 to {num_train_timesteps}; check the schedule")
    stage = int(t) * stages // num_train_timesteps if t.is_integer() else math.floor(t * stages / num_train_timesteps)
    return min(stages - 1, stage)


@dataclass(frozen=True, eq=False)
class DreamStyler(Style):
    """A learned style, as one argument of a request.

    Args:
        embedding: a StageEmbedding, or a source for `load_embedding` (a file, a folder, a pair of files).
        context: words about the content, placed between the prompt's opening and the style clause, or at `{context}`.
        guidance: a StyleContextGuidance, or None for plain classifier-free guidance.
        stages: style mixing by stage, {stage: style}, each a DreamStyler, a StageEmbedding or a file, whose vectors
            replace that stage's (a style of one stage gives its only ones).
        towards: a second style, as `embedding`, with as many vectors: those in use are turned towards its own.
        share: how far, from 0 (not at all) to 1 (all the way), along the arc between each two vectors (slerp); their
            lengths change linearly.
        name: the placeholder, `<name>` in prompts; None: the embedding's own name.
        template: applied to prompts that contain neither `{style}` nor `<name>`; without `{style}` in it, such prompts
            raise PromptError. Not used for a style that the negative prompt names.
        style_prompt: text of the style branch.

    Raises StyleError for files and stages that do not fit.

    Examples:
        >>> style = sf.DreamStyler(engine.styles()["chalk"])
        >>> style.name, style.stage_count
        ('chalk', 6)
        >>> style.branch_prompts("a fish")["full"]
        'a fish, in the style of <chalk>'
        >>> len(engine.generate(["a fish", "a cat drawn with <chalk>"], style, steps=2).images)
        2
    """

    embedding: StageEmbedding | str | Path | Sequence
    context: str | None = None
    guidance: StyleContextGuidance | None = None
    stages: Mapping[int, object] | None = None
    towards: object | None = None
    share: float = 0.5
    name: str | None = None
    template: str = TEMPLATE
    style_prompt: str = STYLE_PROMPT
    source: str | tuple[str, ...] | None = field(init=False, default=None)
    towards_source: str | tuple[str, ...] | None = field(init=False, default=None)
    option: ClassVar[str] = "learned"
    aliases: ClassVar[Mapping[str, str]] = {"path": "embedding"}
    served: ClassVar[Mapping[str, str]] = {"name": "embedding"}

    def __post_init__(self):
        if self.name is not None:
            values.text("name", self.name, error=StyleError)
        embedding, source = _load(self.embedding, self.name)
        if self.name is not None and self.name != embedding.name:
            embedding = StageEmbedding(
                self.name, embedding.clip_l, embedding.clip_g, embedding.pooled_policy, embedding.metadata
            )
        object.__setattr__(self, "embedding", embedding)
        object.__setattr__(self, "source", source)
        object.__setattr__(self, "name", embedding.name)
        if self.context is not None and not values.prompt("context", self.context, error=StyleError).strip():
            raise StyleError(f"context is {values.quoted(self.context)}; give words about the content, or None")
        if self.guidance is not None and not isinstance(self.guidance, StyleContextGuidance):
            raise StyleError(f"guidance is {values.quoted(self.guidance)}; give a StyleContextGuidance or None")
        for field_name, needed in (("template", ("{prompt}",)), ("style_prompt", ("{style}",))):
            text = values.prompt(field_name, getattr(self, field_name), error=StyleError)
            if any(part not in text for part in needed):
                raise StyleError(f"{field_name} is {values.quoted(text)}; it must contain {' and '.join(needed)}")
        stages = {} if self.stages is None else values.builtins("stages", self.stages, error=StyleError)
        if not isinstance(stages, dict):
            raise StyleError(f"stages is {values.quoted(self.stages)}; it must be a dictionary, {{stage: style}}")
        object.__setattr__(self, "stages", self._mixed(stages))
        object.__setattr__(self, "share", values.real_number("share", self.share, 0, 1, error=StyleError))
        if self.towards is None:
            if self.share != type(self).share:
                raise StyleError(f"share is {self.share}, which has no effect without towards, the other style")
            return
        other, source = _lent(self.towards)
        object.__setattr__(self, "towards", other)
        object.__setattr__(self, "towards_source", source)
        self._check_fits(other, f"{values.quoted(self.name)} can't be turned towards it")
        for stage in range(self.stage_count):
            own, theirs = (len(vectors) for vectors in (self._own_vectors(stage)[0], _stage_of(other, stage)[0]))
            if own != theirs:
                raise StyleError(
                    f"the style {values.quoted(other.name)} has {theirs} vectors for stage {stage} and "
                    f"{values.quoted(self.name)} {own}; only equal numbers can be turned towards each other"
                )

    def _mixed(self, stages: Mapping) -> dict[int, StageEmbedding]:
        mixed = {}
        for stage, style in stages.items():
            try:
                stage = values.whole_number("stage", stage, 0, self.stage_count - 1, error=StyleError)
            except StyleError:
                raise StyleError(
                    f"stage {values.quoted(stage)} can't be replaced: the style {values.quoted(self.name)} has the "
                    f"stages 0 (last steps) to {self.stage_count - 1} (first steps), given as integers"
                ) from None
            other, _ = _lent(style)
            self._check_fits(other, f"can't provide stage {stage} for {values.quoted(self.name)}")
            mixed[stage] = other
        return mixed

    def _check_fits(self, other: StageEmbedding, why_not: str) -> None:
        """Raise StyleError for another style with other widths, stages or pooling."""
        other.check_widths(self.learned.widths)
        if other.stages not in (1, self.stage_count):
            raise StyleError(
                f"the style {values.quoted(other.name)} has {other.stages} stages and {why_not} with "
                f"{self.stage_count}; mix styles with the same number of stages, or with one"
            )
        if other.pooled_policy != self.learned.pooled_policy:
            raise StyleError(
                f"the style {values.quoted(other.name)} pools at {values.quoted(other.pooled_policy)}, "
                f"{values.quoted(self.name)} at {values.quoted(self.learned.pooled_policy)}; load one of them with "
                "the other's pooled_policy"
            )

    @property
    def learned(self) -> StageEmbedding:
        """Return the embedding as loaded from `embedding`, under this style's name."""
        assert isinstance(self.embedding, StageEmbedding)
        return self.embedding

    @property
    def stage_count(self) -> int:
        """Return T, the number of noise stages."""
        return self.learned.stages

    def stage_vectors(self, stage: int) -> tuple[Tensor, Tensor]:
        """Return a stage's vectors for encoder 1 [n, width 1] and encoder 2 [n, width 2], style mixing applied."""
        found = self._own_vectors(stage)
        if not isinstance(self.towards, StageEmbedding):
            return found
        first, second = (turned(*both, self.share) for both in zip(found, _stage_of(self.towards, stage), strict=True))
        return first, second

    def _own_vectors(self, stage: int) -> tuple[Tensor, Tensor]:
        """Return a stage's vectors before they are turned towards another style's."""
        other = (self.stages or {}).get(stage)
        return _stage_of(other if isinstance(other, StageEmbedding) else self.learned, stage)

    # for the engine, see `Style`

    def check(self, model: ModelFacts) -> None:
        """Raise StyleError for stages, which are ranges of timesteps, in a model without timesteps."""
        if self.stage_count > 1 and model.trained_on_noise_levels:
            raise StyleError(
                f"<{self.name}> has vectors for {self.stage_count} ranges of training timesteps, and this model "
                f"({model.trained_on_noise_levels}) was trained on noise levels instead; use a style with one stage"
            )

    @property
    def context_guidance(self) -> StyleContextGuidance | None:
        """Return the style and context guidance."""
        return self.guidance

    def named_in(self, text: str) -> bool:
        """Return whether a text has the style's placeholder."""
        return f"<{self.name}>" in text

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Return the context, if there is one."""
        return [("the style's context", self.context)] if self.context else []

    @property
    def placeholders(self) -> list[str]:
        """Return the placeholders of the learned token and the context."""
        return [f"<{self.name}>", "{style}", "{context}"]

    @classmethod
    def check_texts(cls, styles: Sequence["DreamStyler"], texts: Texts) -> None:
        """Raise PromptError or StyleError for tokens without a place; see `check_places`."""
        if texts.prompt:
            check_places(styles, texts.prompt, texts.negatives, NULL in texts.branches, texts.prompt_2)

    @classmethod
    def write_prompts(cls, styles: Sequence["DreamStyler"], texts: Texts) -> None:
        """Put learned tokens and contexts into the prompts, with each step's vectors.

        The branches "context" and "style" are derived from the words of "full".
        """
        prompts = " ".join([texts.prompt, texts.prompt_2 or ""])
        placed, negative = placed_styles(styles, prompts, texts.negatives)
        policy, null_policy = pooled_policy_of(placed), pooled_policy_of(negative)
        written = [branch for branch in texts.branches if branch != NULL]
        if placed:
            texts.pooling |= dict.fromkeys(written, policy)
        if placed and texts.prompt and written:
            _warn_of_idle(placed, texts)
            base = texts.per_step["full" if "full" in written else written[0]]
            for prompt, places in _steps_by_text(base):
                steps = texts.timesteps[places]
                found = prompts_per_step(
                    placed,
                    prompt.text or "",
                    steps,
                    written,
                    texts.train_timesteps,
                    prompt_2=prompt.text_2,
                    syntax=prompt.syntax,
                )
                for branch, prompts in found.items():
                    _put(texts.per_step[branch], places, prompts)
        if negative and NULL in texts.branches:
            texts.pooling[NULL] = null_policy
            _warn_of_idle(negative, texts)
            for prompt, places in _steps_by_text(texts.per_step[NULL]):
                found = negative_prompts(negative, prompt, texts.timesteps[places], texts.train_timesteps)
                _put(texts.per_step[NULL], places, found)

    def write_field(self, name: str, value: Any, store: Any) -> Any:
        """Return a field's value for a record; vectors by their files, if they came from some."""
        if name == "embedding":
            return store.embedding(value, self.source)
        if name == "towards":
            return store.embedding(value, self.towards_source)
        if name == "stages":
            # only this stage is used, so only it is stored
            return {str(stage): store.embedding(other, None, stage) for stage, other in value.items()}
        return asdict(value) if name == "guidance" else super().write_field(name, value, store)

    @classmethod
    def read_field(cls, name: str, value: Any, sources: Any) -> Any:
        """Return a field's value from a record; vectors by file, or written out."""
        if name == "embedding":
            return sources.embedding(value)[0]
        if name == "towards":
            return _read_other(value, sources)
        if name == "stages":
            return _read_stages(value, sources)
        if name == "guidance":
            return read_settings(name, value, StyleContextGuidance)
        return super().read_field(name, value, sources)

    def check_recorded(self, entry: Mapping[str, Any], sources: Any) -> None:
        """Raise StyleError if the vectors differ from those recorded."""
        recorded = entry.get("embedding")
        digest = recorded.get("sha256") if isinstance(recorded, Mapping) else None
        if digest is not None:
            sources.check_embedding(self.embedding, digest, self.source)

    def branch_prompts(self, prompt: str) -> dict[str, str]:
        """Return the texts of the branches "full", "context" and "style" for one prompt; see `branch_prompts`."""
        return branch_prompts([self], prompt)


_STAGE = re.compile(r"'?\d{1,4}'?")  # a whole number or its digits as text


def _read_stages(value: Any, sources: Any) -> dict[int, Any]:
    if not isinstance(value, Mapping) or not all(_STAGE.fullmatch(values.quoted(stage)) for stage in value):
        raise StyleError(f'stages is {values.quoted(value)}; it must look like {{"0": "other.safetensors"}}')
    stages = {}
    for stage, other in value.items():
        stages[int(stage)] = _read_other(other, sources)
    return stages


def _read_other(value: Any, sources: Any) -> Any:
    """Return another style's vectors or file. Raises StyleError if its vectors differ from those recorded."""
    found, digest = sources.embedding(value)
    if digest is not None:
        lender = DreamStyler(found)
        sources.check_embedding(lender.embedding, digest, lender.source)
    return found


def _steps_by_text(prompts: Sequence[Prompt]) -> list[tuple[Prompt, list[int]]]:
    """Return a prompt of each text and the steps that have it; another style may have written several."""
    found: dict[tuple, tuple[Prompt, list[int]]] = {}
    for step, prompt in enumerate(prompts):
        found.setdefault((prompt.text, prompt.text_2, prompt.syntax), (prompt, []))[1].append(step)
    return list(found.values())


def _put(into: list[Prompt], steps: Sequence[int], prompts: Sequence[Prompt]) -> None:
    """Replace prompts at some steps, and keep the vectors of another style's placeholders."""
    for step, prompt in zip(steps, prompts, strict=True):
        theirs = into[step].vectors
        into[step] = replace(prompt, vectors={**theirs, **prompt.vectors}) if theirs else prompt


def placed_styles(
    styles: Sequence[DreamStyler], prompt: str, negative_prompt: str
) -> tuple[list[DreamStyler], list[DreamStyler]]:
    """Return the styles that act in the prompt, and those that act in the negative prompt; a style may be in both.

    A style acts in the negative prompt if `<name>` occurs there, and in the prompt if `<name>` occurs there or not in
    the negative prompt.
    """
    negative = [style for style in styles if f"<{style.name}>" in negative_prompt]
    return [style for style in styles if style not in negative or f"<{style.name}>" in prompt], negative


def check_places(
    styles: Sequence[DreamStyler], prompt: str, negative_prompt: str, guided: bool, prompt_2: str | None = None
) -> None:
    """Check that a request's texts and learned styles fit together, before anything is encoded.

    `prompt_2`: for text encoder 2, None: the same. `guided`: whether the negative prompt is used at all.
    Raises PromptError or StyleError.
    """
    _check_styles(styles)
    if "{style}" in negative_prompt:
        raise PromptError(f"the negative prompt has a {{style}}; name the style there: <{styles[0].name}>")
    placed, negative = placed_styles(styles, " ".join([prompt, prompt_2 or ""]), negative_prompt)
    pooled_policy_of(placed)
    pooled_policy_of(negative)
    for style in negative:
        if style in placed:
            continue
        if not guided:
            raise StyleError(
                f"the style <{style.name}> acts only in the negative prompt, which is not used at this guidance; "
                "use a guidance above 1, or name the style in the prompt"
            )
        if style.context is not None or style.guidance is not None:
            given = "context" if style.context is not None else "guidance"
            raise StyleError(
                f"{given}= of the style <{style.name}> applies to the prompt, but only the negative prompt names "
                "the style; leave it out, or name the style in the prompt"
            )
        if "{style}" in prompt and not placed:
            raise PromptError(
                f"the prompt has a {{style}}, but only the negative prompt names <{style.name}>; name it in both, "
                f"or remove the {{style}}"
            )
    for text in (prompt, prompt_2) if placed else ():
        if text is not None and (text.strip() or text is prompt):
            branch_prompts(placed, text)


def branch_prompts(styles: Sequence[DreamStyler], prompt: str, syntax: str = "plain") -> dict[str, str]:
    """Return the texts of the branches "full", "context" and "style" for one prompt with one or more learned styles.

    `<name>` and `{style}` mark where tokens go; `{style}` takes all styles that the prompt does not name. Styles that
    have no place in the prompt are added by the first style's template. Contexts go to `{context}`, else before the
    style clause ("in the style of ..."). syntax: of the prompt. Raises PromptError if a token or context has no place.
    """
    _check_styles(styles)
    if not isinstance(prompt, str) or not prompt.strip():
        raise PromptError(f"the prompt is {values.quoted(prompt)}; say what the picture shows")
    tokens = [f"<{style.name}>" for style in styles]
    unnamed = ", ".join(token for token in tokens if token not in prompt)
    context = ", ".join(style.context.strip() for style in styles if style.context is not None)
    if "{style}" in prompt and not unnamed:
        raise PromptError(f"the prompt has a {{style}}, but names all styles ({', '.join(tokens)}); remove one")
    if "{context}" in prompt and not context:
        raise PromptError("the prompt has a {context}, but no style of the request has one; give context=...")

    text = prompt.strip()
    if "{style}" not in text and unnamed:
        # no str.format: other braces in the user's text must survive
        head, tail = styles[0].template.split("{prompt}", 1)
        text = head + text + tail
        if "{style}" not in text:
            raise PromptError(
                f"neither the prompt, nor the template {values.quoted(styles[0].template)}, nor the negative prompt "
                f"names {unnamed}; add it where it belongs"
            )
    text = text.replace("{style}", unnamed)

    clause = _style_clause(tokens)
    if "{context}" in text:
        text = text.replace("{context}", context)
    elif context:
        found = clause.search(text)
        if found is None:
            raise PromptError(
                f"the prompt {values.quoted(prompt)} has no style clause to put the context "
                f"{values.quoted(context)} before; "
                'add {context} where it belongs, or "in the style of {style}"'
            )
        opening = text[: found.start()].rstrip(" ,")
        text = f"{opening}, {context}{found[0]}{text[found.end() :]}" if opening else f"{context}, {text.lstrip(' ,')}"

    bare = clause.sub("", text)
    # a weight behind a token goes with it
    weight = r"(?:\++|-+)?" if syntax == "compel" else ""
    for token in tokens:
        bare = re.sub(re.escape(token) + weight, " ", bare)
    bare = re.sub(r"\s+([,.])", r"\1", re.sub(r"\s+", " ", bare)).strip(" ,")
    return {"full": text, "context": bare, "style": styles[0].style_prompt.replace("{style}", ", ".join(tokens))}


def prompts_per_step(
    styles: Sequence[DreamStyler],
    prompt: str,
    timesteps: Sequence[float] | Tensor,
    branches: Sequence[str] = ("full",),
    num_train_timesteps: int = 1000,
    *,
    prompt_2: str | None = None,
    syntax: str = "plain",
) -> dict[str, list[Prompt]]:
    """Build the Prompt of every branch at every step, for `TextEncoder.encode`.

    `prompt_2`: for text encoder 2, None: the same. `syntax`: of both.
    `timesteps`: [steps], the UNet's time input. Steps of the same stages share one Prompt object per branch; the
    context branch is one object for all steps.
    """
    texts = branch_prompts(styles, prompt, syntax)
    second: Mapping[str, str | None] = dict.fromkeys(texts, prompt_2)
    if prompt_2 is not None and prompt_2.strip():
        second = branch_prompts(styles, prompt_2, syntax)
    unknown = [branch for branch in branches if branch not in texts]
    if unknown:
        raise InvalidRequest(
            f"text branch {values.quoted(unknown[0])} is unknown; choose one of {', '.join(TEXT_BRANCHES)}"
        )
    steps = _stages_per_step(styles, timesteps, num_train_timesteps)
    made: dict[tuple, Prompt] = {}
    for branch in branches:
        for stages in steps:
            key = branch, (() if branch == "context" else stages)
            if key not in made:
                vectors = {style.learned.name: style.stage_vectors(k) for style, k in zip(styles, key[1], strict=False)}
                made[key] = Prompt(texts[branch], vectors, second[branch], syntax)
    return {branch: [made[branch, () if branch == "context" else s] for s in steps] for branch in branches}


def negative_prompts(
    styles: Sequence[DreamStyler],
    prompt: Prompt,
    timesteps: Sequence[float] | Tensor,
    num_train_timesteps: int = 1000,
) -> list[Prompt]:
    """Build the Prompt of the null branch at every step from one without vectors.

    `styles`: the styles named in the text. Steps of the same stages share one Prompt object.
    """
    steps = _stages_per_step(styles, timesteps, num_train_timesteps)
    made = {
        stages: replace(
            prompt, vectors={s.learned.name: s.stage_vectors(k) for s, k in zip(styles, stages, strict=True)}
        )
        for stages in set(steps)
    }
    return [made[stages] for stages in steps]


def _stages_per_step(
    styles: Sequence[DreamStyler], timesteps: Sequence[float] | Tensor, num_train_timesteps: int
) -> list[tuple[int, ...]]:
    counts = [style.stage_count for style in styles]
    return [tuple(stage_of(float(t), count, num_train_timesteps) for count in counts) for t in timesteps]


def _warn_of_idle(styles: Sequence[DreamStyler], texts: Texts) -> None:
    """Log a warning if no step that runs visits a mixed stage."""
    steps = _stages_per_step(styles, texts.timesteps[texts.begin :], texts.train_timesteps)
    for place, style in enumerate(styles):
        idle = sorted(set(style.stages or ()) - {stages[place] for stages in steps})
        if idle and texts.say:
            logger.warning("no step uses stage(s) %s of the style %r; mixing them has no effect", idle, style.name)


def pooled_policy_of(styles: Sequence[DreamStyler]) -> str:
    """Return the pooled policy that all styles share, "eos" without styles. Raises StyleError if they disagree."""
    policies = {style.learned.pooled_policy for style in styles}
    if len(policies) > 1:
        found = ", ".join(f"{style.name}: {style.learned.pooled_policy}" for style in styles)
        raise StyleError(f"the styles pool at different positions ({found}); load them with the same pooled_policy")
    return policies.pop() if policies else "eos"


def _load(source, name: str | None = None) -> tuple[StageEmbedding, str | tuple[str, ...] | None]:
    if isinstance(source, StageEmbedding):
        return source, None
    # widths are checked later, when the model is known
    embedding = load_embedding(source, name, widths=None)
    files = values.entries(source)
    return embedding, tuple(map(str, files)) if files is not None else str(source)


def _lent(style: Any) -> tuple[StageEmbedding, str | tuple[str, ...] | None]:
    """Return the vectors of a style that lends them to another, and their files.

    Raises StyleError for settings of it that have no effect there.
    """
    if not isinstance(style, DreamStyler):
        return _load(style)
    for name in ("context", "guidance"):
        if getattr(style, name) is not None:
            raise StyleError(
                f"{name}= of the style {values.quoted(style.name)} has no effect where it lends its vectors; give it "
                "to the style that takes them, or leave it out"
            )
    if not style.stages and style.towards is None:
        return style.learned, style.source
    stages = [style.stage_vectors(stage) for stage in range(style.stage_count)]
    if len({len(vectors) for vectors, _ in stages}) > 1:
        raise StyleError(f"the stages of {values.quoted(style.name)} have unequal numbers of vectors; lend one of them")
    learned, (first, second) = style.learned, (torch.stack(encoder) for encoder in zip(*stages, strict=True))
    return StageEmbedding(learned.name, first, second, learned.pooled_policy, learned.metadata), None


def _stage_of(style: StageEmbedding, stage: int) -> tuple[Tensor, Tensor]:
    return style.stage(stage if style.stages > 1 else 0)


def turned(vectors: Tensor, others: Tensor, share: float) -> Tensor:
    """Return vectors [n, width] turned by a share of the angle between each and its other; lengths change linearly.

    Vectors of no length and opposite ones have no arc between them: those move along a straight line.
    """
    x, y = vectors.double(), others.double()
    length, other = x.norm(dim=-1, keepdim=True), y.norm(dim=-1, keepdim=True)
    cosine = (x * y).sum(-1, keepdim=True) / (length * other)
    angle = torch.arccos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    direction = (torch.sin((1 - share) * angle) * x / length + torch.sin(share * angle) * y / other) / sine
    along = direction * torch.lerp(length, other, share)
    return torch.where(sine > 1e-6, along, torch.lerp(x, y, share)).to(vectors.dtype)


def _check_styles(styles: Sequence[DreamStyler]) -> None:
    if not styles:
        raise StyleError("no learned style given; at least one is needed")
    names = [style.name for style in styles]
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise StyleError(
            f"two styles of one request are called {values.quoted(double)}; give one of them another name="
        )


def _style_clause(tokens: Sequence[str]) -> re.Pattern:
    token = "(?:" + "|".join(map(re.escape, tokens)) + ")"
    # blanks are taken from their first one on: were every one of a long row a beginning, it would take hours
    return re.compile(
        rf"(?:(?<!\s)\s+)?(?:,\s*)?\bin the style of {token}(?:(?:\s*,\s*|\s+and\s+){token})*", re.IGNORECASE
    )
