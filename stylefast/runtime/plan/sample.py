"""Requests to samples, and samples to groups and their rows.

A sample is one picture on its way from noise to image. A request adds one; a style with its own reference adds another,
shared by every request that needs exactly the same one. A baked reference adds none, because its readers use the bank's
pages. Only a bank of latents adds one, which is held at those latents.

Samples that read one another form a group: the unit that joins a batch, leaves it, and fails or succeeds as one. The
rows of a group hold the settings of its styles as columns of numbers, ordered by sample, then by branch. They stay the
same from step to step until a window opens or closes, so they are made once for all such steps.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from stylefast.errors import InvalidRequest, StyleError
from stylefast.models.control_net import ControlNet
from stylefast.models.layout import AttentionLayout
from stylefast.models.pictures import PictureSource
from stylefast.models.row_table import CONCAT, PLAIN, SWAP
from stylefast.models.t2i_adapter import T2IAdapter
from stylefast.runtime.loras import LoraUse
from stylefast.runtime.plan.calibration import Calibration, calibrated_steps
from stylefast.runtime.plan.control import Control
from stylefast.runtime.plan.request import Request, check_size
from stylefast.runtime.plan.windows import Windows, window_count
from stylefast.sampling.guidance import (
    BRANCHES,
    FULL,
    NULL,
    GuidanceInterval,
    branch_weights_per_step,
    guidance_weights,
)
from stylefast.sampling.schedule import Schedule, first_step
from stylefast.sampling.tables import NEXT_LATENTS, NOISE
from stylefast.styles.bank import StyleBank
from stylefast.styles.style import ReferenceStyle, Rows, Style, asking

if TYPE_CHECKING:  # built on samples
    from stylefast.runtime.steps.conditions import Conditions, ControlUse, ImageSegment

# from a step, 0 to the schedule's last plus one, to the latents [channels, h, w] that a reference is held at
Pin = Callable[[int], torch.Tensor]


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
    pin: tuple[str, Pin] | None = None  # of a real picture, and the model that it was made with
    mask_inputs: torch.Tensor | None = None  # what an inpainting model sees beside its latents, [5, h, w]
    base: "Sample | None" = None  # of the first pass: what a second pass enlarges and begins with
    first_pass: list["Sample"] = field(default_factory=list)  # if it has a base: all samples of the call's first pass
    begin: int = 0  # the step from which its latents are predicted; before, they are its request's noised picture
    first: int = 0  # the step from which it has rows: its own beginning, or that of the first that reads it
    reference_of: ReferenceStyle | None = None  # the style whose reference this sample is
    reader: ReferenceStyle | None = None  # how this sample reads its references
    window_of: "Sample | None" = None  # of a window: the first window of its picture, which is the one returned
    leads: bool = False  # first of a group whose members are each other's references
    loras: tuple[LoraUse, ...] = ()  # set by the planner
    controls: tuple[Control, ...] = ()  # pictures that steer it
    networks: tuple[ControlNet | T2IAdapter, ...] = ()  # which read them, set by the planner

    @property
    def pinned(self) -> bool:
        """Return whether its latents are given at every step instead of predicted."""
        return self.picture is not None or self.held is not None

    @property
    def inverted(self) -> bool:
        """Return whether it is pinned to its picture's DDIM inversion."""
        style = self.reference_of
        return self.picture is not None and style is not None and style.reads.noise == "ddim"

    @property
    def source(self) -> PictureSource | None:
        """Return the picture that is encoded: what it is pinned to, or what it begins with."""
        if self.picture is not None:
            return self.picture
        return None if self.base is not None else self.request.image

    @property
    def begins(self) -> bool:
        """Return whether it begins with a picture instead of noise."""
        return self.base is not None or (self.output is not None and self.request.image is not None)

    def require(self, branches: Iterable[str]) -> None:
        """Add `branches` to the rows that run."""
        self.branches = tuple(branch for branch in BRANCHES if branch in self.branches or branch in branches)

    @cached_property
    def step_weights(self) -> list[dict[str, float]]:
        """Return, for every step, branch -> weight of its prediction."""
        interval = GuidanceInterval(*self.request.guidance_interval)
        return branch_weights_per_step(self.weights, self.schedule.steps, interval)

    def steers(self, control: Control, network: ControlNet | T2IAdapter, step: int, branch: str) -> bool:
        """Return whether one of its control pictures acts on a branch at `step`."""
        guessed = (control.guess_mode or network.pools) and branch == NULL
        return (
            step >= self.begin and not guessed and control.active(step - self.begin, self.schedule.steps - self.begin)
        )

    @property
    def network_runs(self) -> int:
        """Return how many networks' rows one row of it has; a union ControlNet reads all its pictures at once."""
        unions = [network for network in self.networks if network.union is not None]
        return len(self.networks) - len(unions) + len(set(unions))

    def shares(self, step: int) -> bool:
        """Return whether it reads its references at `step`."""
        if self.reader is None or step < self.begin or not (self.references or self.bank is not None):
            return False
        return self.reader.active(step, self.schedule.steps)


def plan_samples(
    requests: Sequence[Request], schedule_of: Callable[[Request, int], Schedule], native_size: tuple[int, int]
) -> list[Sample]:
    """Return all samples that `requests` need: the targets in their order, then the references that are not returned.

    Requests with the same style, whose reference is the call's first picture, form a group led by that picture.
    schedule_of: returns the schedule of a request, for sampling that begins with a step. Raises InvalidRequest when the
    members of a group can't run step by step together.
    """
    targets = [_target(i, request, schedule_of, native_size) for i, request in enumerate(requests)]
    windows = [window for target in targets for window in _further_windows(target)]
    hidden: dict[tuple, Sample] = {}
    groups: dict[int, list[Sample]] = {}
    for target in [*targets, *windows]:
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
            key += tuple(id(one) for one in target.controls if one.of_reference() is not None)
            key += () if target.window_of is None else (id(target.window_of),)
            if key not in hidden:
                hidden[key] = _reference(target, style, i, picture, schedule_of)
            reference = hidden[key]
            if reference.pinned:
                reference.begin = min(reference.begin, target.begin)
            target.references.append(reference)

    for members in groups.values():
        _join_group(members)
    everyone = [*targets, *hidden.values(), *windows]
    for sample in everyone:
        sample.require(sample.weights)
        sample.first = sample.begin
    # readers add the rows they need once every sample has its own; full sharing is mutual, so do it twice
    for _ in range(2):
        for sample in everyone:
            for reference in sample.references:
                reference.require(sample.branches)
                reference.first = min(reference.first, sample.first)
    return everyone


def _target(index: int, request: Request, schedule_of: Callable[[Request, int], Schedule], native_size) -> Sample:
    begin, size = 0, request.size or native_size
    if request.upscale > 1:
        begin, size = first_step(request.steps, request.upscale_strength), enlarged(size, request.upscale)
    elif request.image is not None:
        begin = first_step(request.steps, request.strength)
    elif request.window is not None:
        size = request.window
    context = next((s.context_guidance for s in request.styles if s.context_guidance is not None), None)
    weights = guidance_weights(request.guidance, context)
    schedule = schedule_of(request, begin)
    target = Sample(
        request, request.prompt, schedule, size, weights, output=index, begin=begin, controls=request.controls
    )
    target.window_of = None if request.window is None else target
    return target


def _further_windows(target: Sample) -> list[Sample]:
    """Return all windows of a target's picture but the first, which is the target itself."""
    request = target.request
    if request.window is None or request.size is None or request.window_stride is None:
        return []
    count = window_count(request.size, request.window, request.window_stride, request.wrap)
    same = (request, target.prompt, target.schedule, target.size, target.weights)
    return [Sample(*same, window_of=target) for _ in range(count - 1)]


def enlarged(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Return (width, height) times a factor, to the nearest sides divisible by 8. Raises InvalidRequest."""
    width, height = (8 * round(side * factor / 8) for side in size)
    return check_size((width, height))


def _reference(target: Sample, style: ReferenceStyle, number: int, picture: Any, schedule_of) -> Sample:
    wanted = style.reads
    styles = shared_styles(target.request, style)
    request = replace(target.request.from_noise(), style=styles, seed=wanted.seed, prompt_2=None)
    weights = dict(target.weights) if picture is None else {FULL: 1.0}
    schedule = schedule_of(target.request, 0)  # a style may ask for one of its own
    controls = tuple(one for one in (control.of_reference() for control in target.controls) if one is not None)
    reference = Sample(
        request, wanted.prompt or "", schedule, target.size, weights, reference_of=style, controls=controls
    )
    if picture is not None or wanted.bank is not None:
        reference.begin = target.begin
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
        for other in [*sample.references, sample.window_of or sample]:
            parent[root(other)] = root(sample)
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


@dataclass(frozen=True)
class Reference:
    """A reference that a row reads: a picture of its group, or a page of a bank."""

    picture: int  # place in the group; -1 for a bank's page
    bank: StyleBank | None = None
    number: int = 0  # which of the bank's references


@dataclass(frozen=True, eq=False)
class GroupRows:
    """The rows of a group during steps that differ only in the step number: `rows` rows, `pictures` pictures."""

    picture: np.ndarray  # [rows] int64: place in the group
    branch: np.ndarray  # [rows] int64: place in BRANCHES
    text_page: np.ndarray  # [steps, rows] int64
    references: list[list[Reference]]  # per row
    columns: Rows  # columns written by styles
    segments: list[list["ImageSegment"]]  # per row
    loras: list[list[tuple[int, float]]]  # per row: places in the pool, and strengths
    controls: list[list["ControlUse"]]  # per row
    weights: np.ndarray  # [pictures, 4] float32 of the branches
    mutual: bool  # whether references may have references

    @property
    def rows(self) -> int:
        return len(self.picture)

    @property
    def width(self) -> int:
        """Return the largest number of references of a row."""
        return max(map(len, self.references), default=0)

    @property
    def segment_width(self) -> int:
        """Return the largest number of image segments of a row."""
        return max(map(len, self.segments), default=0)

    @property
    def control_rows(self) -> int:
        """Return the number of rows that ControlNets run."""
        return sum(len({use.network if use.numbers else use for use in row}) for row in self.controls)

    @property
    def lora_width(self) -> int:
        """Return the largest number of LoRAs of a row."""
        return max(map(len, self.loras), default=0)


class SampleGroup:
    """Samples that read one another, at one step, with one schedule length and one size.

    Everything that changes with the step is in arrays indexed by it, so that a step accesses no other Python objects.
    `slots` are the slots of its pictures in the latents of its size, set by the runner through `put`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        conditions: "Conditions",
        pins: Mapping[Sample, Pin],
        layout: AttentionLayout,
        latent_shape: tuple[int, int, int],
    ):
        self.samples, self.conditions, self.pins = list(samples), conditions, pins
        self.latent_shape = latent_shape  # (channels, h, w)
        self._windowed = [i for i, sample in enumerate(samples) if sample.window_of is not None]
        self.windows = windows_of(samples[self._windowed[0]], latent_shape) if self._windowed else None
        self.step = self.first = min(sample.first for sample in samples)
        self._calibrating = [self._calibrates(sample) for sample in samples]
        self.put(np.zeros(0, dtype=np.int64), torch.device("cpu"))
        # of an inversion, all latents [channels, h, w] that it has passed, the first before any step
        self.trail = [samples[0].start] if samples[0].start is not None else None
        self._generators = {sample: noise_generator(sample.request) for sample in samples}
        self._drawn: tuple[int, torch.Tensor] = (-1, torch.zeros(0))

        schedules = [sample.schedule for sample in samples]
        self.steps = schedules[0].steps
        self.timestep = np.stack([s.timesteps.numpy() for s in schedules], axis=1)  # [steps, pictures]
        self.input_scale = np.stack([s.input_scale.numpy() for s in schedules], axis=1)
        self.denoised = np.stack([s.denoised.numpy() for s in schedules], axis=1)  # [steps, pictures, 2]
        self.update = np.stack([s.update.numpy() for s in schedules], axis=1)  # [steps, pictures, 2, 6]
        for i, sample in enumerate(samples):
            held = self._held_until(sample)
            # the next latents are passed as the noise, and all other terms are 0
            self.denoised[:held, i], self.update[:held, i] = 0, 0
            self.update[:held, i, NEXT_LATENTS, NOISE] = 1
        self.rescale = np.array([sample.request.guidance_rescale for sample in samples], dtype=np.float32)
        self.time_ids = np.array(
            [[sample.size[1], sample.size[0], 0, 0, sample.size[1], sample.size[0]] for sample in samples],
            dtype=np.float32,
        )
        self.noisy = any(sample in pins or sample.schedule.uses_noise for sample in samples)
        all_rows: dict[tuple, GroupRows] = {}
        self._rows_at: list[GroupRows] = []  # per step, from the first; equal ones are one object
        for step in range(self.first, self.steps):
            key = rows_key(samples, conditions, step)
            if key not in all_rows:
                all_rows[key] = make_group_rows(samples, conditions, layout, step)
            self._rows_at.append(all_rows[key])

    def put(self, slots: np.ndarray, device: torch.device) -> None:
        """Set the slots [pictures] int64, or none.

        `places` has them on the device, `shown` those of the requested pictures, so that latents can be indexed without
        waiting for the device.
        """
        asked = [sample.output is not None for sample in self.samples] if len(slots) else []
        self.slots: np.ndarray = slots
        # (`pinning.Noised`, slot) of pictures of which a mask keeps a part
        self.repainted: list[tuple[Any, int]] = [
            (self.pins[sample], int(slot))
            for sample, slot in zip(self.samples, slots, strict=False)
            if sample.request.mask is not None
        ]
        # of pictures that take colours of a reference
        entries = enumerate(self._calibrating) if len(slots) else ()
        self.calibrated = [self._calibration(place, *entry) for place, entry in entries if entry is not None]
        self.places = torch.from_numpy(slots).to(device)
        if self.windows is not None and len(slots):
            self.window_places = self.places[self._windowed]
        self.shown = torch.from_numpy(slots[np.array(asked, dtype=bool)]).to(device)

    def _calibrates(self, sample: Sample) -> tuple[Sample, dict[int, float]] | None:
        """Return the reference whose colours a sample takes, and in which steps."""
        if sample.reader is None or not sample.reader.reads.calibrate or not sample.references:
            return None
        running = [step for step in range(sample.first, sample.schedule.steps) if sample.shares(step)]
        return sample.references[0], calibrated_steps(sample.schedule, running)

    def _calibration(self, place: int, reference: Sample, steps: dict[int, float]) -> Calibration:
        reader, pin = self.samples[place].reader, self.pins.get(reference)
        assert reader is not None
        if pin is not None and reference.pinned:
            colours: int | torch.Tensor = getattr(
                pin, "clean", pin(self.steps)
            )  # of a picture, or after a bank's steps
        else:
            colours = int(self.slots[self.samples.index(reference)])
        return Calibration(int(self.slots[place]), colours, reader.reads.calibrate, steps)

    @property
    def shown_shape(self) -> tuple[int, int, int]:
        """Return (channels, h, w) of the pictures that are returned."""
        return self.latent_shape if self.windows is None else self.windows.shape

    @property
    def pictures(self) -> int:
        """Return the number of pictures, including windows, and references that are not returned."""
        return len(self.samples)

    @property
    def done(self) -> int:
        """Return the number of steps that were made."""
        return self.step - self.first

    @property
    def total(self) -> int:
        """Return the number of steps to make."""
        return self.steps - self.first

    @property
    def finished(self) -> bool:
        """Return whether all steps are done."""
        return self.step >= self.steps

    def rows_at(self, step: int | None = None) -> GroupRows:
        """Return the rows at a step, by default the current one."""
        return self._rows_at[(self.step if step is None else step) - self.first]

    @property
    def rows(self) -> int:
        """Return the number of UNet rows in the current step."""
        return self.rows_at().rows

    @property
    def most_rows(self) -> int:
        """Return the number of rows, of the UNet and of ControlNets, in the step that has most."""
        return max(rows.rows + rows.control_rows for rows in self._rows_at)

    def first_latents(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the latents before the first step, [pictures, channels, h, w] float32.

        Also returns what an inpainting model sees beside them, [pictures, 5, h, w]; None for other models.
        """
        beside = [sample.mask_inputs for sample in self.samples if sample.mask_inputs is not None]
        latents = torch.stack([self._first_of(sample) for sample in self.samples])
        if self.windows is not None:
            first = self.samples[self._windowed[0]]
            noise = first_noise(first.request, self.windows.shape, self._generators[first])
            latents[self._windowed] = self.windows.cut(noise * first.schedule.init_noise_scale)
        return latents, torch.stack(beside) if beside else None

    def noise(self) -> torch.Tensor:
        """Return the noise of the current step, [pictures, channels, h, w]; drawn once per step."""
        if self._drawn[0] != self.step:
            noise = torch.zeros(self.pictures, *self.latent_shape)
            for i, sample in enumerate(self.samples):
                if self.step < self._held_until(sample):
                    noise[i] = self.pins[sample](self.step + 1)
                elif sample.schedule.uses_noise and sample.window_of is None:
                    noise[i] = self._noise_of(sample, self.latent_shape)
            if self.windows is not None and self.samples[self._windowed[0]].schedule.uses_noise:
                noise[self._windowed] = self.windows.cut(
                    self._noise_of(self.samples[self._windowed[0]], self.windows.shape)
                )
            self._drawn = (self.step, noise)
        return self._drawn[1]

    def _first_of(self, sample: Sample) -> torch.Tensor:
        if sample.start is not None:
            return sample.start.float().cpu()
        if sample.window_of is not None:
            return torch.zeros(self.latent_shape)  # a part of the whole picture's noise
        noise = first_noise(sample.request, self.latent_shape, self._generators[sample])
        # what is repainted at full strength begins with noise alone, as in diffusers
        if sample in self.pins and (sample.begin or sample.request.mask is None):
            return self.pins[sample](self.first).float().cpu()
        return noise * sample.schedule.init_noise_scale

    def _held_until(self, sample: Sample) -> int:
        """Return the step before which the latents of a sample are given by its pin."""
        return 0 if sample not in self.pins else self.steps if sample.pinned else sample.begin

    def _noise_of(self, sample: Sample, shape: tuple[int, int, int]) -> torch.Tensor:
        return torch.randn(shape, generator=self._generators[sample], dtype=torch.float32)


def windows_of(sample: Sample, latent_shape: tuple[int, int, int]) -> Windows:
    """Return the windows of a sample that is one; latent_shape: (channels, h, w) of a window's latents."""
    request, (channels, height, width) = sample.request, latent_shape
    assert request.size is not None and request.window_stride is not None
    scale = sample.size[0] // width
    whole = channels, request.size[1] // scale, request.size[0] // scale
    return Windows(whole, (height, width), request.window_stride // scale, request.wrap)


def noise_generator(request: Request) -> torch.Generator:
    """Return a generator of the request's noise from its start."""
    assert request.seed is not None  # a request draws one
    return torch.Generator("cpu").manual_seed(request.seed)


def first_noise(request: Request, shape: Sequence[int], generator: torch.Generator | None = None) -> torch.Tensor:
    """Return the noise that a request's picture begins with: its seed's, on the way to that of its variation.

    generator: of `noise_generator`, from which the noise of later steps is drawn too.
    """
    noise = torch.randn(*shape, generator=generator or noise_generator(request), dtype=torch.float32)
    if not request.variation_strength or request.variation_seed is None:
        return noise
    other = torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(request.variation_seed))
    return slerp(noise, other, request.variation_strength)


def slerp(one: torch.Tensor, other: torch.Tensor, share: float) -> torch.Tensor:
    """Return the tensor at a share of the way from one to another along the arc between them."""
    cosine = torch.dot(one.flatten() / one.norm(), other.flatten() / other.norm()).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle < 1e-4:
        return torch.lerp(one, other, share)
    return (torch.sin((1 - share) * angle) * one + torch.sin(share * angle) * other) / torch.sin(angle)


def rows_key(samples: Sequence[Sample], conditions: "Conditions", step: int) -> tuple:
    """Return a key that is equal for steps of one group with equal rows."""
    branches = branches_at(samples, step)
    segments = [
        s.style.active(step, sample.schedule.steps)
        for sample in samples
        for b in sample.branches
        for s in conditions.image_segments[sample, b]
    ]
    steering = [
        s.steers(control, network, step, FULL) for s in samples for control, network in zip(s.controls, s.networks)
    ]
    writing = [style.active(step, sample.schedule.steps) for sample in samples for style in sample.request.styles]
    weights = tuple(tuple(sample.step_weights[step]) for sample in samples)
    return (
        tuple(branches.values()),
        weights,
        tuple(sample.shares(step) for sample in samples),
        tuple(segments),
        tuple(steering),
        tuple(writing),
    )


def make_group_rows(
    samples: Sequence[Sample], conditions: "Conditions", layout: AttentionLayout, step: int
) -> GroupRows:
    """Return the rows of a group at `step`, and at all steps of an equal `rows_key`."""
    number = {sample: i for i, sample in enumerate(samples)}
    rows = [(sample, branch) for sample, branches in branches_at(samples, step).items() for branch in branches]
    columns = Rows.idle(len(rows), len(layout.layers))
    group_rows = GroupRows(
        picture=np.array([number[sample] for sample, _ in rows], dtype=np.int64),
        branch=np.array([BRANCHES.index(branch) for _, branch in rows], dtype=np.int64),
        text_page=np.stack([conditions.text_pages[row] for row in rows], axis=1),
        references=[_references(sample, number) if sample.shares(step) else [] for sample, _ in rows],
        columns=columns,
        segments=[
            [s for s in conditions.image_segments[row] if s.style.active(step, row[0].schedule.steps)] for row in rows
        ],
        loras=[[(conditions.held_loras[use.lora], use.unet) for use in sample.loras if use.unet] for sample, _ in rows],
        controls=[
            [use for use in conditions.controls.get(row, ()) if row[0].steers(use.control, use.network, step, row[1])]
            for row in rows
        ],
        weights=np.zeros((len(samples), len(BRANCHES)), dtype=np.float32),
        mutual=any(sample.reader is not None and sample.reader.reads.mutual for sample in samples),
    )
    for row, (sample, branch) in enumerate(rows):
        group_rows.weights[number[sample], group_rows.branch[row]] = sample.step_weights[step].get(branch, 0.0)
        for style in _writing(sample, step):
            if group_rows.references[row] or not isinstance(style, ReferenceStyle):
                with asking(type(style), "write_rows"):
                    style.write_rows(columns, row, layout, sample.leads)
    if not np.isin(columns.self_mode, (PLAIN, CONCAT, SWAP)).all():
        raise StyleError(f"a style wrote the mode {columns.self_mode.max()}; it must be PLAIN, CONCAT or SWAP")
    return group_rows


def _writing(sample: Sample, step: int) -> list[Style]:
    """Return the styles of a sample that may write its rows at a step; if two conflict, the later one wins."""
    return [style for style in sample.request.styles if style.active(step, sample.schedule.steps)]


def branches_at(samples: Sequence[Sample], step: int) -> dict[Sample, tuple[str, ...]]:
    """Return the branches in which each sample has rows: its own, and for a reference those of its readers.

    Before its first step a sample has none.
    """
    begun = [sample for sample in samples if step >= sample.first]
    if len(begun) == len(samples) and all(sample.step_weights[step] == sample.weights for sample in samples):
        return {sample: sample.branches for sample in samples}
    needed: dict[Sample, set[str]] = {sample: set() for sample in samples}
    needed |= {sample: set(sample.step_weights[step]) for sample in begun}
    # full sharing is mutual, so do it twice
    for _ in range(2):
        for sample in samples:
            for reference in sample.references:
                needed[reference] |= needed[sample]
    return {sample: tuple(b for b in BRANCHES if b in needed[sample]) for sample in samples}


def _references(sample: Sample, number: dict[Sample, int]) -> list[Reference]:
    if sample.bank is not None:
        return [Reference(-1, sample.bank, i) for i in range(sample.bank.info.references)]
    return [Reference(number[reference]) for reference in sample.references]
