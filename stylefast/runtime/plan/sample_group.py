"""Pictures that advance together: the unit that joins a batch, leaves it, and fails or succeeds as one."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from stylefast.models.layout import AttentionLayout
from stylefast.runtime.plan.group_rows import GroupRows, make_group_rows, rows_key
from stylefast.runtime.plan.sample import Sample
from stylefast.runtime.steps.conditions import Conditions
from stylefast.sampling.tables import NEXT_LATENTS, NOISE

# from a step, 0 to the schedule's last plus one, to the latents [channels, h, w] that a reference is held at
Pin = Callable[[int], torch.Tensor]


class SampleGroup:
    """Samples that look at one another, at one step of one schedule length and one size.

    Holds all that changes with the step as arrays indexed by it, so that a step costs no look at Python objects but
    this one. `slots` are the places of its pictures in the latents of its size, given by the runner by `put`.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        conditions: Conditions,
        pins: Mapping[Sample, Pin],
        layout: AttentionLayout,
        latent_shape: tuple[int, int, int],
    ):
        self.samples, self.conditions, self.pins = list(samples), conditions, pins
        self.latent_shape = latent_shape  # (channels, h, w)
        self.step = 0
        self.put(np.zeros(0, dtype=np.int64), torch.device("cpu"))
        # of an inversion, all latents [channels, h, w] that it has passed, the first before any step
        self.trail = [samples[0].start] if samples[0].start is not None else None
        self._generators = {sample: torch.Generator("cpu").manual_seed(sample.request.seed) for sample in samples}
        self._drawn: tuple[int, torch.Tensor] = (-1, torch.zeros(0))

        schedules = [sample.schedule for sample in samples]
        self.steps = schedules[0].steps
        self.timestep = np.stack([s.timesteps.numpy() for s in schedules], axis=1)  # [steps, pictures]
        self.input_scale = np.stack([s.input_scale.numpy() for s in schedules], axis=1)
        self.denoised = np.stack([s.denoised.numpy() for s in schedules], axis=1)  # [steps, pictures, 2]
        self.update = np.stack([s.update.numpy() for s in schedules], axis=1)  # [steps, pictures, 2, 6]
        for i, sample in enumerate(samples):
            if sample in pins:
                # the next latents come in the place of fresh noise, and nothing else counts
                self.denoised[:, i], self.update[:, i] = 0, 0
                self.update[:, i, NEXT_LATENTS, NOISE] = 1
        self.rescale = np.array([sample.request.guidance_rescale for sample in samples], dtype=np.float32)
        self.time_ids = np.array(
            [[sample.size[1], sample.size[0], 0, 0, sample.size[1], sample.size[0]] for sample in samples],
            dtype=np.float32,
        )
        self.noisy = any(sample in pins or sample.schedule.uses_noise for sample in samples)
        all_rows: dict[tuple, GroupRows] = {}
        self._rows_at: list[GroupRows] = []  # per step; equal ones are one object
        for step in range(self.steps):
            key = rows_key(samples, conditions, step)
            if key not in all_rows:
                all_rows[key] = make_group_rows(samples, conditions, layout, step)
            self._rows_at.append(all_rows[key])

    def put(self, slots: np.ndarray, device: torch.device) -> None:
        """Take slots [pictures] int64, or none. `places` are they on the device, `shown` those of pictures asked for:
        latents are looked up by them without waiting for the device."""
        asked = [sample.output is not None for sample in self.samples] if len(slots) else []
        self.slots: np.ndarray = slots
        self.places = torch.from_numpy(slots).to(device)
        self.shown = torch.from_numpy(slots[np.array(asked, dtype=bool)]).to(device)

    @property
    def pictures(self) -> int:
        """How many, references that are not returned included."""
        return len(self.samples)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.steps

    def rows_at(self, step: int | None = None) -> GroupRows:
        """Return the rows at a step, by default the current one."""
        return self._rows_at[self.step if step is None else step]

    @property
    def rows(self) -> int:
        """Rows of the UNet that the present step takes."""
        return self.rows_at().rows

    def first_latents(self) -> torch.Tensor:
        """Latents before step 0, [pictures, channels, h, w] float32."""
        return torch.stack([self._first_of(sample) for sample in self.samples])

    def noise(self) -> torch.Tensor:
        """Return the noise of the current step, [pictures, channels, h, w]; drawn once per step."""
        if self._drawn[0] != self.step:
            noise = torch.zeros(self.pictures, *self.latent_shape)
            for i, sample in enumerate(self.samples):
                if sample in self.pins:
                    noise[i] = self.pins[sample](self.step + 1)
                elif sample.schedule.uses_noise:
                    noise[i] = self._noise_of(sample)
            self._drawn = (self.step, noise)
        return self._drawn[1]

    def _first_of(self, sample: Sample) -> torch.Tensor:
        if sample in self.pins:
            return self.pins[sample](0).float().cpu()
        if sample.start is not None:
            return sample.start.float().cpu()
        return self._noise_of(sample) * sample.schedule.init_noise_scale

    def _noise_of(self, sample: Sample) -> torch.Tensor:
        return torch.randn(self.latent_shape, generator=self._generators[sample], dtype=torch.float32)
