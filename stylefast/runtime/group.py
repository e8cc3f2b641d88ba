"""Pictures that advance together: the unit that joins a batch, leaves it, and fails or succeeds as one."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from stylefast.models.layout import AttentionLayout
from stylefast.runtime.conditions import Conditions
from stylefast.runtime.rows import Phase, make_phase, phase_key
from stylefast.runtime.trajectory import Trajectory
from stylefast.sampling.tables import NEXT_LATENTS, NOISE

# from a step, 0 to the schedule's last plus one, to the latents [channels, h, w] that a reference is held at
Pin = Callable[[int], torch.Tensor]


class Group:
    """Trajectories that look at one another, at one step of one schedule length and one size.

    Holds all that changes with the step as arrays indexed by it, so that a step costs no look at Python objects but
    this one. `slots` are the places of its pictures in the latents of its size, given by the runtime by `put`.
    """

    def __init__(
        self,
        trajectories: Sequence[Trajectory],
        conditions: Conditions,
        pins: Mapping[Trajectory, Pin],
        layout: AttentionLayout,
        latent_shape: tuple[int, int, int],
    ):
        self.trajectories, self.conditions, self.pins = list(trajectories), conditions, pins
        self.latent_shape = latent_shape  # (channels, h, w)
        self.step = 0
        self.put(np.zeros(0, dtype=np.int64), torch.device("cpu"))
        # of an inversion, all latents [channels, h, w] that it has passed, the first before any step
        self.trail = [trajectories[0].start] if trajectories[0].start is not None else None
        self._generators = {t: torch.Generator("cpu").manual_seed(t.request.seed) for t in trajectories}
        self._drawn: tuple[int, torch.Tensor] = (-1, torch.zeros(0))

        schedules = [t.schedule for t in trajectories]
        self.steps = schedules[0].steps
        self.timestep = np.stack([s.timesteps.numpy() for s in schedules], axis=1)  # [steps, pictures]
        self.input_scale = np.stack([s.input_scale.numpy() for s in schedules], axis=1)
        self.denoised = np.stack([s.denoised.numpy() for s in schedules], axis=1)  # [steps, pictures, 2]
        self.update = np.stack([s.update.numpy() for s in schedules], axis=1)  # [steps, pictures, 2, 6]
        for i, t in enumerate(trajectories):
            if t in pins:
                # the next latents come in the place of fresh noise, and nothing else counts
                self.denoised[:, i], self.update[:, i] = 0, 0
                self.update[:, i, NEXT_LATENTS, NOISE] = 1
        self.rescale = np.array([t.request.guidance_rescale for t in trajectories], dtype=np.float32)
        self.time_ids = np.array(
            [[t.size[1], t.size[0], 0, 0, t.size[1], t.size[0]] for t in trajectories], dtype=np.float32
        )
        self.noisy = any(t in pins or t.schedule.uses_noise for t in trajectories)
        phases: dict[tuple, Phase] = {}
        self._phases: list[Phase] = []  # per step; equal ones are one object
        for step in range(self.steps):
            key = phase_key(trajectories, conditions, step)
            if key not in phases:
                phases[key] = make_phase(trajectories, conditions, layout, step)
            self._phases.append(phases[key])

    def put(self, slots: np.ndarray, device: torch.device) -> None:
        """Take slots [pictures] int64, or none. `places` are they on the device, `shown` those of pictures asked for:
        latents are looked up by them without waiting for the device."""
        asked = [t.output is not None for t in self.trajectories] if len(slots) else []
        self.slots: np.ndarray = slots
        self.places = torch.from_numpy(slots).to(device)
        self.shown = torch.from_numpy(slots[np.array(asked, dtype=bool)]).to(device)

    @property
    def pictures(self) -> int:
        """How many, references that are not returned included."""
        return len(self.trajectories)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.steps

    def phase(self, step: int | None = None) -> Phase:
        """Return the rows at a step, by default the current one."""
        return self._phases[self.step if step is None else step]

    @property
    def rows(self) -> int:
        """Rows of the UNet that the present step takes."""
        return self.phase().rows

    def first_latents(self) -> torch.Tensor:
        """Latents before step 0, [pictures, channels, h, w] float32."""
        return torch.stack([self._first_of(t) for t in self.trajectories])

    def noise(self) -> torch.Tensor:
        """Return the noise of the current step, [pictures, channels, h, w]; drawn once per step."""
        if self._drawn[0] != self.step:
            noise = torch.zeros(self.pictures, *self.latent_shape)
            for i, t in enumerate(self.trajectories):
                if t in self.pins:
                    noise[i] = self.pins[t](self.step + 1)
                elif t.schedule.uses_noise:
                    noise[i] = self._noise_of(t)
            self._drawn = (self.step, noise)
        return self._drawn[1]

    def _first_of(self, t: Trajectory) -> torch.Tensor:
        if t in self.pins:
            return self.pins[t](0).float().cpu()
        if t.start is not None:
            return t.start.float().cpu()
        return self._noise_of(t) * t.schedule.init_noise_scale

    def _noise_of(self, t: Trajectory) -> torch.Tensor:
        return torch.randn(self.latent_shape, generator=self._generators[t], dtype=torch.float32)
