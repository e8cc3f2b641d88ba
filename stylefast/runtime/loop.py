"""The step loop: one UNet call per step for every picture that is still running."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from stylefast.errors import NumericsError
from stylefast.kernels.guided_step import guided_step
from stylefast.models.unet import UNet
from stylefast.runtime.conditions import Conditions
from stylefast.runtime.pinning import Pin
from stylefast.runtime.table import BatchTable, TableBuilder
from stylefast.runtime.trajectory import Trajectory

# called after every step with (step, steps of the longest request, latents of the pictures asked for and still running)
StepCallback = Callable[[int, int, torch.Tensor], None]


@dataclass
class _State:
    """Latents and sampler memory of the running pictures, row p belonging to `active[p]`."""

    active: list[Trajectory]
    latents: torch.Tensor  # [pictures, channels, h, w] fp32
    anchor: torch.Tensor  # [pictures, channels, h, w]
    history: torch.Tensor  # [pictures, 2, channels, h, w]

    def keep(self, members: Sequence[int]):
        """Drop all pictures but `members`."""
        index = torch.tensor(members, device=self.latents.device)
        self.active = [self.active[i] for i in members]
        self.latents, self.anchor, self.history = self.latents[index], self.anchor[index], self.history[index]


@torch.inference_mode()
def denoise(
    unet: UNet,
    trajectories: Sequence[Trajectory],
    conditions: Conditions,
    noise_shape: tuple[int, int, int],
    pins: Mapping[Trajectory, Pin],
    callback: StepCallback | None = None,
) -> dict[int, torch.Tensor]:
    """Run `trajectories` (all of one size) to their end.

    Args:
        noise_shape: (channels, h, w) of the latents.
        pins: the latents of references that are real pictures, see `runtime.pinning`.

    Returns the final latents [channels, h, w] fp32 by output number. Raises NumericsError when latents are not finite.
    """
    device = unet.device
    generators = {t: torch.Generator("cpu").manual_seed(t.request.seed) for t in trajectories}
    latents = torch.stack([
        pins[t](0).to(device) if t in pins else _initial_noise(t, noise_shape, generators[t]).to(device)
        for t in trajectories
    ])  # fmt: skip
    state = _State(list(trajectories), latents, torch.zeros_like(latents),
                   latents.new_zeros(len(trajectories), 2, *noise_shape))  # fmt: skip
    tables = TableBuilder(conditions, unet.layout, device)
    total = max(t.schedule.steps for t in trajectories)
    done: dict[int, torch.Tensor] = {}

    for step in range(total):
        table = tables.build(state.active, step)
        prediction = _predict(unet, conditions, state, table, step)
        _advance(state, table, prediction, step, generators)
        for p, t in enumerate(state.active):
            if t in pins:
                state.latents[p] = pins[t](step + 1)

        finished = [p for p, t in enumerate(state.active) if t.schedule.steps == step + 1]
        done |= {state.active[p].output: state.latents[p] for p in finished if state.active[p].output is not None}
        if callback is not None:
            shown = [p for p, t in enumerate(state.active) if t.output is not None]
            callback(step + 1, total, state.latents[shown])
        if finished and step + 1 < total:
            state.keep([p for p in range(len(state.active)) if p not in finished])

    _check_finite(done)
    return done


def _initial_noise(t: Trajectory, shape: tuple[int, int, int], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator) * t.schedule.init_noise_scale


def _predict(unet: UNet, conditions: Conditions, state: _State, table: BatchTable, step: int) -> torch.Tensor:
    """The model outputs of all rows, [rows, channels, h, w]."""
    scale = torch.stack([t.schedule.input_scale[step] for t in state.active]).to(state.latents.device)
    timesteps = torch.stack([t.schedule.timesteps[step] for t in state.active]).to(state.latents.device)
    time_ids = torch.tensor([[t.size[1], t.size[0], 0, 0, t.size[1], t.size[0]] for t in state.active])
    picture = table.picture
    embedding = unet.embed(
        timesteps[picture], conditions.pooled[table.text_page], time_ids.float().to(picture.device)[picture]
    )
    latents = (state.latents * scale[:, None, None, None])[picture].to(unet.dtype)
    return unet(latents, embedding, conditions.text_kv, conditions.image_kv, table.rows, masks=conditions.masks)


def _advance(state: _State, table: BatchTable, prediction: torch.Tensor, step: int, generators) -> None:
    """Guidance and the sampler's update for every picture at once."""
    device, active = state.latents.device, state.active
    noise = torch.zeros(state.latents.shape)
    for p, t in enumerate(active):
        if t.schedule.uses_noise:
            noise[p] = torch.randn(state.latents.shape[1:], generator=generators[t])
    state.latents, state.anchor, state.history = guided_step(
        state.latents, state.anchor, state.history, prediction, table.branch_rows, table.branch_weights,
        torch.tensor([t.request.guidance_rescale if len(t.weights) > 1 else 0.0 for t in active], device=device),
        torch.stack([t.schedule.denoised[step] for t in active]).to(device),
        torch.stack([t.schedule.update[step] for t in active]).to(device),
        noise.to(device),
    )  # fmt: skip


def _check_finite(done: dict[int, torch.Tensor]) -> None:
    bad = sorted(i for i, latents in done.items() if not bool(torch.isfinite(latents).all()))
    if bad:
        raise NumericsError(
            f"the latents of picture(s) {', '.join(map(str, bad))} hold NaN or infinity. "
            "Try dtype='float32' or 'bfloat16', a lower guidance, or an adapter scale below 2"
        )
