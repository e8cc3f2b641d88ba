"""From requests to pictures in the batch: `RequestPlanner` checks and plans them, `Admission` makes their inputs.

Inputs are made piece by piece, so that slow work does not delay other pictures' steps. Encoders, file reads and the VAE
run alongside the steps, and so does loading a style bank's pages for the first step; the DDIM inversion of a reference
is a group that runs its steps in the batch like any other. Only writing the pages of prompts and pictures, and slots,
happens between two steps. `Joining` is a job in that state.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from stylefast.errors import ExportError, InvalidRequest
from stylefast.kernels.row_lora import RANK
from stylefast.models import vae as vaes
from stylefast.models.control_net import ControlNet
from stylefast.models.pictures import open_picture
from stylefast.models.repaint import Kept, fit_mask, fit_picture, resized
from stylefast.models.t2i_adapter import T2IAdapter
from stylefast.runtime.backends.base import StepNeeds
from stylefast.runtime.controls import ControlNets
from stylefast.runtime.loras import Lora, Loras, described, named
from stylefast.runtime.plan.pinning import Noised, inversion_of, inverted_pin, latents_pin, scheduler_config
from stylefast.runtime.plan.request import Request, check_size
from stylefast.runtime.plan.sample import Pin, Sample, SampleGroup, connected, plan_samples
from stylefast.runtime.runner import Runner
from stylefast.runtime.steps.conditions import Encoded
from stylefast.sampling.edm import is_edm
from stylefast.sampling.few_step import named_schedule
from stylefast.sampling.schedule import Schedule, schedule_digest
from stylefast.styles.bank import StyleBank
from stylefast.styles.style import ModelFacts, ReferenceStyle, asking
from stylefast.values import listed, quoted

# what an admission needs next: a call to make with `Runner.beside`, or groups to run to their end
Wanted = Callable[[], Any] | list[SampleGroup]


class RequestPlanner:
    """Planner that turns requests into samples of one model.

    scheduler_config: the model's, in diffusers' format. native_size: (width, height) in pixels. fingerprint: returns
    the current model's fingerprint, including LoRAs.
    """

    def __init__(
        self,
        runner: Runner,
        vae: torch.nn.Module,
        scheduler_config: Mapping,
        native_size: tuple[int, int],
        model: str,
        fingerprint: Callable[[], str],
        loras: Loras,
        controls: ControlNets,
    ):
        self.controls = controls
        self.runner, self.vae, self.native_size = runner, vae, native_size
        self.model, self.fingerprint, self._loras = model, fingerprint, loras
        self._config = scheduler_config
        self.downscale = vaes.downscale(vae)

    def samples(self, requests: Sequence[Request], loras: Mapping[str, Lora] | None = None) -> list[Sample]:
        """Return the samples for all pictures that `requests` need, including references. Raises like `check`."""
        self.check(requests, loras)
        return self._planned(requests, loras)

    def _planned(self, requests: Sequence[Request], loras: Mapping[str, Lora] | None) -> list[Sample]:
        samples = plan_samples(requests, self.schedule, self.native_size)
        enlarging = [sample for sample in samples if sample.output is not None and sample.request.upscale > 1]
        if enlarging:
            first_pass = self._planned([sample.request.first_pass() for sample in enlarging], loras)
            for sample, base in zip(enlarging, first_pass, strict=False):  # references come after the targets
                sample.base, sample.first_pass = base, first_pass
        for sample in samples:
            sample.loras = self._loras.uses(sample.request.lora_scales, loras)
            sample.networks = tuple(self.controls.find(control.network) for control in sample.controls)
        return samples

    def check(self, requests: Sequence[Request], loras: Mapping[str, Lora] | None = None) -> None:
        """Raise the errors that can be found without running anything; `loras`: those that names mean, as in `uses`.

        These concern styles for other layers, adapters, masks, learned vectors and positions of their tokens, banks
        that don't match, schedules, and sizes that never fit into memory or have no exported graph.
        """
        facts = ModelFacts(self.runner.unet.layout, self._config["_class_name"] if is_edm(self._config) else None)
        for style in dict.fromkeys(style for request in requests for style in request.styles):
            with asking(type(style), "check"):
                style.check(facts)
        for request in requests:
            self.runner.conditions.text_encoder.check_clip_skip(request.clip_skip or 0)
            style = request.reader
            if style is not None and style.reads.bank is not None:
                self._check_bank(request, style, style.reads.bank, loras)
        samples = self._planned(requests, loras)
        samples += next((sample.first_pass for sample in samples if sample.first_pass), [])
        for sample in samples:
            self._check_loras(sample)
            self._check_controls(sample)
            if sample.inverted:
                self.inversion(sample)
        needs = {sample: self.runner.conditions.check(sample) for sample in samples}
        self._check_text(max((tokens for _, tokens in needs.values()), default=0))
        for group in connected(samples):
            self._check_room(group, *(max(numbers) for numbers in zip(*(needs[sample] for sample in group))))

    def _check_text(self, tokens: int) -> None:
        """Raise ExportError for texts that are longer than those of exported graphs."""
        window, backend = self.runner.conditions.text_encoder.max_tokens, self.runner.backend
        limit = backend.limits.get("text_tokens", tokens) if backend.takes_long_texts else window
        if tokens > limit:
            chunks = tokens // window
            raise ExportError(
                f"a prompt of the request has {tokens} tokens in {chunks} chunks, but the graphs of backend "
                f"{quoted(backend.name)} take only {limit}; shorten it to {limit // window * (window - 2)} tokens, "
                f"export the model with --max-text-chunks {chunks}, or load it with backend='torch' or 'compile'"
            )

    def _check_loras(self, sample: Sample) -> None:
        """Raise ExportError for LoRAs that an exported graph can't apply."""
        names = listed(use.lora.name for use in sample.loras)
        backend, used = self.runner.backend, [use.lora for use in sample.loras if use.unet]
        rank = max((lora.rank for lora in used), default=0)
        instead = "load it with backend='torch' or 'compile'"
        if used and not backend.takes_loras:
            raise ExportError(
                f"the request uses LoRAs ({names}), but the graphs of backend {quoted(backend.name)} have no inputs "
                f"for them; export the model with --lora-rank {rank} --lora-slots {len(used)}, {instead}, or merge the "
                "LoRAs with engine.load_lora before the export"
            )
        slots, most = (backend.limits.get(name, 2**31) for name in ("lora_slots", "lora_rank"))
        if len(used) > slots:
            raise ExportError(
                f"the request uses {len(used)} LoRAs of the UNet ({names}), but the graphs of backend "
                f"{quoted(backend.name)} take {slots} per picture; use fewer, export the model with --lora-slots "
                f"{len(used)}, or {instead}"
            )
        if rank > most:
            wide = next(lora for lora in used if lora.rank == rank)
            raise ExportError(
                f"the LoRA {quoted(wide.name)} takes {rank} ranks in units of {RANK}, but the graphs of backend "
                f"{quoted(backend.name)} take {most}; export the model with --lora-rank {rank}, or {instead}"
            )
        text = any(use.text and any(use.lora.changes_text) for use in sample.loras)
        if text and not self.runner.conditions.text_encoder.runner.takes_loras:
            raise ExportError(
                f"the request uses LoRAs of the text encoders ({names}), which exported text encoders can't apply; "
                "give (strength, 0) for the UNet's part alone, or load the model with backend='torch' or 'compile'"
            )

    def _check_controls(self, sample: Sample) -> None:
        """Raise ExportError for control pictures that a backend can't apply, ImageError for unreadable ones.

        Raises InvalidRequest for those that their network can't read.
        """
        backend = self.runner.backend
        if sample.controls and not backend.takes_controls:
            raise ExportError(
                f"the request has a control picture, but backend {quoted(backend.name)} does not run ControlNets; load "
                "the model with backend='torch' or 'compile'"
            )
        guessing: dict[ControlNet | T2IAdapter, bool] = {}
        for control, network in zip(sample.controls, sample.networks, strict=True):
            network.mode_number(control.mode)
            if network.union is not None and guessing.setdefault(network, control.guess_mode) != control.guess_mode:
                raise InvalidRequest(
                    f"the union ControlNet {quoted(network.name)} reads all its pictures of a request at once, but "
                    "guess_mode is true for some and false for others; give all the same"
                )
            open_picture(control.image)
            if not isinstance(network, T2IAdapter):
                continue
            width, height = sample.size
            if control.guess_mode:
                raise InvalidRequest(
                    f"guess_mode is for ControlNets, and {quoted(network.name)} is a T2I-Adapter; leave it out"
                )
            if width % network.downscale or height % network.downscale:
                raise InvalidRequest(
                    f"size is {width}x{height}; with the T2I-Adapter {quoted(network.name)} both sides must be "
                    f"divisible by {network.downscale}"
                )

    def _check_room(self, group: Sequence[Sample], segments: int, tokens: int) -> None:
        """Raise OutOfMemory or ExportError for a group that could not run even alone."""
        latent_size = self.latent_shape(group[0].size)[1:]
        # a lower bound: readers may need further branches of a reference
        rows = max(sum(len(sample.step_weights[step]) for sample in group) for step in range(group[0].schedule.steps))
        rows += max(sample.network_runs for sample in group)
        banked = [sample.bank.info.references for sample in group if sample.bank is not None]
        references = max([*banked, *(len(sample.references) for sample in group)])
        texts = self.runner.conditions.text.nbytes_with(tokens)
        self.runner.budget.check_ever(self.runner.unet, rows, latent_size, texts)
        used = [[use.lora.rank for use in sample.loras if use.unet] for sample in group]
        loras, rank = max(map(len, used)), max((rank for ranks in used for rank in ranks), default=0)
        needs = StepNeeds(rows, latent_size, references, segments, bool(banked), loras, rank, tokens)
        self.runner.backend.check(needs)

    def schedule(self, request: Request, begin: int = 0) -> Schedule:
        """Return a request's schedule, for sampling that begins with a step.

        Raises InvalidRequest for an unknown scheduler or a count it can't take.
        """
        config = scheduler_config(request, self._config)
        return named_schedule(request.scheduler, request.steps, config, request.spacing, begin)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """Return (channels, h, w) of the latents of a picture of (width, height)."""
        width, height = check_size(size)
        if width % self.downscale or height % self.downscale:
            raise InvalidRequest(f"size is {width}x{height}; this model's must be divisible by {self.downscale}")
        return self.runner.unet.config["out_channels"], height // self.downscale, width // self.downscale

    def _check_bank(
        self, request: Request, style: ReferenceStyle, bank: StyleBank, loras: Mapping[str, Lora] | None
    ) -> None:
        schedule = self.schedule(request)
        layers = style.layer_mask(self.runner.unet.layout).nonzero().flatten().tolist()
        target = plan_samples([request], self.schedule, self.native_size)[0]
        used = self._loras.uses(request.lora_scales, loras)
        bank.check_fits(
            model=self.model,
            fingerprint=self.fingerprint(),
            scheduler=request.scheduler,
            steps=request.steps,
            size=target.size,
            branches=target.branches,
            layers=tuple(layers),
            clip_skip=request.clip_skip or 0,
            loras=described(used),
            lora_names=named(used),
        )
        # last, since it differs whenever the steps or the sampler do
        bank.check_fits(schedule=schedule_digest(schedule))

    def inversion(self, sample: Sample) -> Sample:
        """Return the inversion that a pinned reference needs first; see `pinning.inversion_of`."""
        return inversion_of(sample, self._config)

    def bake_plan(self, request: Request) -> tuple[Sample, list[Sample]]:
        """Return the sample of a bank's reader, and the references that the bank stores. Raises like `check`."""
        self.check([request])
        target, *references = self._planned([request], None)
        return target, references

    def read_picture(self, sample: Sample) -> tuple[torch.Tensor, Kept | None]:
        """Encode a sample's picture to latents [channels, h, w]; return also what its mask keeps, if it has one."""
        source, mask = sample.source, sample.request.mask
        assert source is not None
        picture = fit_picture(source, sample.size)
        pixels = picture[None].float() / 127.5 - 1
        with torch.inference_mode():
            latents = vaes.encode(self.vae, pixels.to(self.runner.unet.device))[0].float()
        return latents, None if mask is None else Kept(picture, fit_mask(mask, source, sample.size))

    def _kept(self, sample: Sample) -> Kept | None:
        """Return what a second pass keeps of the picture that its first began with."""
        image, mask, base = sample.request.image, sample.request.mask, sample.base
        if image is None or mask is None or base is None:
            return None
        if isinstance(mask, torch.Tensor):
            small = fit_mask(mask, image, base.size)
            large = F.interpolate(small[None, None], size=sample.size[::-1], mode="bilinear")[0, 0]
        else:
            large = fit_mask(mask, image, sample.size)
        return Kept(fit_picture(image, sample.size), large)

    @property
    def inpaints(self) -> bool:
        """Return whether the model is one for inpainting, which sees the mask and what it keeps beside the latents."""
        return self.runner.unet.config["in_channels"] > self.runner.unet.config["out_channels"]

    def mask_inputs(self, size: tuple[int, int], kept: Kept | None) -> torch.Tensor:
        """Return what an inpainting model sees beside the latents: mask and kept picture's latents, [5, h, w].

        kept: None: all of a picture of `size` (width, height) is made.
        """
        height, width = self.latent_shape(size)[1:]
        repainted, pixels = torch.ones(size[1], size[0]), torch.zeros(1, 3, size[1], size[0])
        if kept is not None:
            repainted = (kept.mask >= 0.5).float()  # the model was trained on black and white
            pixels = (kept.picture[None].float() / 127.5 - 1) * (1 - repainted)
        with torch.inference_mode():
            latents = vaes.encode(self.vae, pixels.to(self.runner.unet.device))[0].float().cpu()
            mask = F.interpolate(repainted[None, None], size=(height, width))[0]
            return torch.cat([mask, latents])

    def enlarge(self, sample: Sample, latents: torch.Tensor) -> tuple[torch.Tensor, Kept | None]:
        """Return finished latents [channels, h, w] at the size of a second pass, and what its mask keeps."""
        height, width = self.latent_shape(sample.size)[1:]
        with torch.inference_mode():
            if sample.request.upscale_mode == "latents":
                return F.interpolate(latents[None], size=(height, width), mode="bilinear")[0], self._kept(sample)
            picture = resized(vaes.decode(self.vae, latents[None], tile="auto")[0], sample.size)
            made = vaes.encode(self.vae, (2 * picture[None] - 1).to(latents.device))[0].float()
        return made, self._kept(sample)


class Admission:
    """Samples being turned into groups, which join the batch. `groups` are those admitted so far, in order of samples.

    The thread that has the turn asks `advance` for the next piece of work until it returns None. All or nothing: when
    `advance` raises, or after `close`, nothing is held.
    """

    def __init__(self, planner: RequestPlanner, samples: Sequence[Sample]):
        self._planner, self._runner = planner, planner.runner
        self.groups: list[SampleGroup] = []
        self._inversions: list[SampleGroup] = []
        self._first: Admission | None = None  # of the first pass
        self._finished: dict[int, torch.Tensor] | None = None  # output -> latents of the first pass
        self._going = self._go(samples)
        self._begun = False

    def advance(self, value: Any = None) -> Wanted | None:
        """Continue until work is needed, and return it; None when all are admitted.

        value: the result of the previously returned call. Raises InvalidRequest or a subclass for inputs that can't be
        made, OutOfMemory if there is no room.
        """
        try:
            wanted = self._going.send(value if self._begun else None)
            self._begun = True
            return wanted
        except StopIteration:
            return None

    def fail(self, error: BaseException) -> None:
        """Report that the previously returned call raised `error`; raise it again."""
        self._going.throw(error)

    def close(self) -> None:
        """Release everything held; a second call does nothing."""
        self._going.close()
        self._release()

    def _release(self) -> None:
        for group in [*self.groups, *self._inversions]:
            self._runner.retire(group)
        self.groups, self._inversions = [], []
        if self._first is not None:
            self._first.close()

    def _go(self, samples: Sequence[Sample]) -> Generator[Wanted, Any, None]:
        """Yield work; runs between two steps otherwise."""
        runner, store = self._runner, self._runner.conditions
        by_size: dict[tuple[int, int], list[Sample]] = {}
        for sample in samples:
            by_size.setdefault(sample.size, []).append(sample)
        made: Encoded | None = None
        try:
            for size, members in by_size.items():
                shape = self._planner.latent_shape(size)
                pins = yield from self._pins([one for one in members if one.pinned or one.begins])
                if self._planner.inpaints:
                    yield from self._mask_inputs(members, pins)
                made = yield from store.encoding(members, shape[1:])
                for one in connected(members):
                    group = self._admit(one, made, {sample: pins[sample] for sample in one if sample in pins})
                    self.groups.append(group)
                    yield from runner.staging(group)
                    opening = runner.backend.ready(group)
                    if opening is not None:
                        yield opening
                store.drop(made)
        except BaseException:
            self._release()
            raise
        finally:
            if made is not None:
                store.drop(made)

    def _mask_inputs(self, samples: Sequence[Sample], pins: Mapping[Sample, Pin]) -> Generator[Wanted, Any, None]:
        """Make what an inpainting model sees beside the latents of each sample."""
        for sample in samples:
            pin = pins.get(sample)
            kept = pin.kept if isinstance(pin, Noised) else None
            if sample.mask_inputs is None:
                sample.mask_inputs = yield partial(self._planner.mask_inputs, sample.size, kept)

    def _admit(self, samples: Sequence[Sample], made: Encoded, pins: dict[Sample, Pin]) -> SampleGroup:
        shape = self._planner.latent_shape(samples[0].size)
        conditions = self._runner.conditions.gather(samples, shape[1:], made)
        return self._runner.admit(samples, conditions, shape, pins)

    def _pins(self, samples: Sequence[Sample]) -> Generator[Wanted, Any, dict[Sample, Pin]]:
        """Return the pins of samples: those of real references, and of pictures that others begin with."""
        pins, inversions, model = {}, {}, self._planner.fingerprint()
        for sample in samples:
            if sample.pin is not None and sample.pin[0] == model:
                continue  # kept from an earlier attempt that ran out of memory
            if sample.held is not None:
                sample.pin = model, latents_pin(*sample.held)
                continue
            if sample.base is not None:
                if self._finished is None:
                    self._finished = yield from self._first_pass(sample.first_pass)
                made = self._finished[sample.base.output or 0]
                clean, kept = yield partial(self._planner.enlarge, sample, made)
            else:
                clean, kept = yield partial(self._planner.read_picture, sample)
            if sample.inverted:
                inversions[sample] = yield from self._invert(sample, clean)
            else:
                sample.pin = model, Noised(sample, clean, kept, keeps=not self._planner.inpaints)
        if inversions:
            yield list(inversions.values())
        for sample, group in inversions.items():
            sample.pin = model, inverted_pin(group.trail)
            self._runner.retire(group)
            self._inversions.remove(group)
        for sample in samples:
            assert sample.pin is not None
            pins[sample] = sample.pin[1]
        return pins

    def _first_pass(self, samples: Sequence[Sample]) -> Generator[Wanted, Any, dict[int, torch.Tensor]]:
        """Run the first pass of pictures to its end; return output -> latents [channels, h, w]."""
        first = self._first = Admission(self._planner, samples)
        yield from first._going
        yield first.groups
        finished: dict[int, torch.Tensor] = {}
        for group in first.groups:
            finished |= self._runner.results_of(group)
        first.close()
        return finished

    def _invert(self, sample: Sample, clean: torch.Tensor) -> Generator[Wanted, Any, SampleGroup]:
        """Return the group that inverts the picture of `sample` to noise."""
        inversion, store = self._planner.inversion(sample), self._runner.conditions
        inversion.start, (height, width) = clean, clean.shape[1:]
        if self._planner.inpaints:
            yield from self._mask_inputs([inversion], {})
        made = yield from store.encoding([inversion], (height, width))
        try:
            group = self._admit([inversion], made, {})
        finally:
            store.drop(made)
        self._inversions.append(group)
        return group


@dataclass(eq=False)
class HelperCall:
    """A call that an admission needs, made alongside the steps."""

    over: bool = False
    value: Any = None
    error: BaseException | None = None


@dataclass(eq=False)
class Joining:
    """A job that is about to join, and what it waits for."""

    admission: Admission
    first: bool  # whether it arrived while nothing ran: no step starts until its inputs are ready
    call: HelperCall | None = None
    inversions: list[SampleGroup] = field(default_factory=list)

    @property
    def waits(self) -> bool:
        """Return whether its call is unfinished."""
        return self.call is not None and not self.call.over
