"""Requests to samples: which pictures a batch denoises, including those that only serve as a reference.

A sample is one picture on its way from noise to image. A request adds one; a style with its own reference adds another,
shared by every request that needs exactly the same one. A baked reference adds none, because its readers use the bank's
pages. Only a bank of latents adds one, which is held at those latents.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from stylefast.errors import InvalidRequest
from stylefast.models.pictures import PictureSource
from stylefast.runtime.loras import LoraUse
from stylefast.runtime.plan.request import Request
from stylefast.sampling.guidance import (
    BRANCHES,
    FULL,
    GuidanceInterval,
    branch_weights_per_step,
    guidance_weights,
)
from stylefast.sampling.schedule import Schedule
from stylefast.styles.bank import StyleBank
from stylefast.styles.style import ReferenceStyle, Style


@dataclass(eq=False)
class Sample:
    """One picture of the batch: a requested target, or a reference that targets read."""

    request: Request  # for a reference: its reader's, with the styles and the seed of the reference
    prompt: str  # empty for a real picture without a caption
    schedule: Schedule
    size: tuple[int, int]  # (width, height) in pixels
    weights: dict[str, float]  # of the branches that make up its own prediction
    output: int | None = None  # place among the results; None: not returned
    branches: tuple[str, ...] = ()  # the rows it has: its own branches and those its readers need
    references: list["Sample"] = field(default_factory=list)
    bank: StyleBank | None = None  # the baked style whose pages it reads
    picture: PictureSource | None = None  # a real reference: its latents are the noised picture at every step
    held: tuple[StyleBank, int] | None = None  # a reference run again from a bank's latents: which of its references
    start: torch.Tensor | None = None  # an inversion's: the latents [channels, h, w] that it begins with
    pin: tuple[str, Callable[[int], torch.Tensor]] | None = None  # a reference's, and the model that it was made with
    reference_of: ReferenceStyle | None = None  # the style whose reference this sample is
    reader: ReferenceStyle | None = None  # how this sample reads its references
    leads: bool = False  # first of a group whose members are each other's references
    loras: tuple[LoraUse, ...] = ()  # set by the planner

    @property
    def pinned(self) -> bool:
        """Return whether its latents are given at every step instead of predicted."""
        return self.picture is not None or self.held is not None

    @property
    def inverted(self) -> bool:
        """Return whether it is pinned to its picture's DDIM inversion."""
        style = self.reference_of
        return self.picture is not None and style is not None and style.reads.noise == "ddim"

    def require(self, branches: Iterable[str]) -> None:
        """Add `branches` to the rows that run."""
        self.branches = tuple(branch for branch in BRANCHES if branch in self.branches or branch in branches)

    @cached_property
    def step_weights(self) -> list[dict[str, float]]:
        """Return, for every step, branch -> weight of its prediction."""
        interval = GuidanceInterval(*self.request.guidance_interval)
        return branch_weights_per_step(self.weights, self.schedule.steps, interval)

    def shares(self, step: int) -> bool:
        """Return whether it reads its references at `step`."""
        if self.reader is None or not (self.references or self.bank is not None):
            return False
        return self.reader.active(step, self.schedule.steps)


def plan_samples(
    requests: Sequence[Request], schedule_of: Callable[[Request], Schedule], native_size: tuple[int, int]
) -> list[Sample]:
    """Return all samples that `requests` need: the targets in their order, then the references that are not returned.

    Requests with the same style, whose reference is the call's first picture, form a group led by that picture.
    Raises InvalidRequest when the members of a group can't run step by step together.
    """
    targets = [_target(i, request, schedule_of(request), native_size) for i, request in enumerate(requests)]
    hidden: dict[tuple, Sample] = {}
    groups: dict[int, list[Sample]] = {}
    for target in targets:
        style = target.request.reader
        if style is None:
            continue
        target.reader, wanted = style, style.reads
        if wanted.of_call:
            groups.setdefault(id(style), []).append(target)
            continue
        if wanted.bank is not None and wanted.bank.info.store != "latents":
            target.bank = wanted.bank
            continue
        sources = range(wanted.bank.info.references) if wanted.bank is not None else wanted.pictures or [None]
        for i, picture in enumerate(sources):
            # a picture is held at every step's noise level, whatever its readers' guidance
            own = ()
            if picture is None:
                own = (*target.weights.items(), target.request.guidance_rescale, target.request.guidance_interval)
            texts = (target.request.negative_prompt, target.request.negative_prompt_2, target.request.prompt_syntax)
            key = (id(style), i, *_pace(target), *texts, target.request.clip_skip, *own)
            key += tuple(id(other) for other in shared_styles(target.request, style))
            key += tuple(target.request.lora_scales.items())
            if key not in hidden:
                hidden[key] = _reference(target, style, i, picture)
            target.references.append(hidden[key])

    for members in groups.values():
        _join_group(members)
    everyone = targets + list(hidden.values())
    for sample in everyone:
        sample.require(sample.weights)
    # readers add the rows they need once every sample has its own; full sharing is mutual, so do it twice
    for _ in range(2):
        for sample in everyone:
            for reference in sample.references:
                reference.require(sample.branches)
    return everyone


def _target(index: int, request: Request, schedule: Schedule, native_size) -> Sample:
    context = next((s.context_guidance for s in request.styles if s.context_guidance is not None), None)
    weights = guidance_weights(request.guidance, context)
    return Sample(request, request.prompt, schedule, request.size or native_size, weights, output=index)


def _reference(target: Sample, style: ReferenceStyle, number: int, picture: Any) -> Sample:
    wanted = style.reads
    styles = shared_styles(target.request, style)
    request = replace(target.request, style=styles, seed=wanted.seed, prompt_2=None)
    weights = dict(target.weights) if picture is None else {FULL: 1.0}
    reference = Sample(request, wanted.prompt or "", target.schedule, target.size, weights, reference_of=style)
    if wanted.bank is None:
        reference.picture = picture
    else:
        # the bank's contents were made without the reader's other styles
        info = wanted.bank.info
        texts = {name: getattr(info, name) for name in ("negative_prompt", "negative_prompt_2", "prompt_syntax")}
        reference.request = replace(request, style=(), clip_skip=info.clip_skip, **texts)
        reference.prompt, reference.held = wanted.bank.info.prompt, (wanted.bank, number)
    return reference


def connected(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Return sets of samples that reference one another and must advance together, ordered by first member."""
    parent = {sample: sample for sample in samples}

    def root(sample: Sample) -> Sample:
        while parent[sample] is not sample:
            sample = parent[sample]
        return sample

    for sample in samples:
        for reference in sample.references:
            parent[root(reference)] = root(sample)
    sets: dict[Sample, list[Sample]] = {}
    for sample in samples:
        sets.setdefault(root(sample), []).append(sample)
    return list(sets.values())


def shared_styles(request: Request, reader: ReferenceStyle) -> list[Style]:
    """Return the styles of a request that the reference of `reader`, one of them, shares.

    All others with `share_styles`, and always those that the negative prompt names, which is the reference's as well.
    """
    others = [style for style in request.styles if style is not reader]
    return others if reader.reads.share_styles else [s for s in others if s.named_in(request.negatives)]


def _join_group(members: list[Sample]):
    """Make the first member the reference of the others; with full sharing all attend to all."""
    leader = members[0]
    for member in members[1:]:
        if _pace(member) != _pace(leader):
            raise InvalidRequest(
                "requests that share the first prompt's picture as their reference must have equal steps, "
                f"scheduler, spacing and size; the first has {_describe(leader)}, another {_describe(member)}. Give "
                "the style its own reference or prompt to mix them"
            )
        member.references = [leader]
    leader.leads = True
    if leader.reader is not None and leader.reader.reads.mutual:
        for member in members:
            member.references = [other for other in members if other is not member]
    else:
        leader.reader = None


def _pace(sample: Sample) -> tuple:
    request = sample.request
    return request.steps, request.scheduler, sample.size, request.spacing


def _describe(sample: Sample) -> str:
    steps, scheduler, (width, height), spacing = _pace(sample)
    return f"{steps} steps of {scheduler} at {width}x{height}{f', {spacing} spacing' if spacing else ''}"
