"""The paths that diffusers' schedulers and our schedules walk on a toy model, for comparison step by step."""

import copy
from functools import cache

import pytest
import torch

from stylefast.kernels.guided_step import guided_step
from stylefast.sampling import make_schedule
from tests.support.fp64 import noise_of_fp32

SHAPE = (1, 4, 5, 7)
SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SDE = {"algorithm_type": "sde-dpmsolver++"}


def toy_model(latents, timestep):
    """Roughly the noise in `latents`, bent so that errors of the sampler come back amplified."""
    return 0.9 * latents + 0.2 * torch.sin(3 * latents + timestep / 200)


def third_order_sde():
    """diffusers' third-order SDE solver with the constant -1/2 of its third-order term taken as +1/2.

    The term is alpha * ((1 - e^-y - y) / y^2 + 1/2) * D2 with y = 2h: it must vanish with y, as k-diffusion's does.
    """
    import diffusers

    class ThirdOrderSde(diffusers.DPMSolverMultistepScheduler):
        def multistep_dpm_solver_third_order_update(self, model_output_list, *args, sample=None, noise=None):
            reached = super().multistep_dpm_solver_third_order_update(model_output_list, sample=sample, noise=noise)
            before, last, now, then = self.sigmas[self.step_index - 2 : self.step_index + 2].log()
            h, h_last, h_before = now - then, last - now, before - last
            m0, m1, m2 = model_output_list[-1], model_output_list[-2], model_output_list[-3]
            bend = ((m0 - m1) / h_last - (m1 - m2) / h_before) * h**2 / (h_last + h_before)
            return reached + bend / (1 + (2 * then).exp()).sqrt()

    return ThirdOrderSde


def diffusers_scheduler(name, config):
    import diffusers

    for suffix in ("_karras", "_exponential"):
        if name.endswith(suffix):
            name, config = name.removesuffix(suffix), {**config, f"use{suffix}_sigmas": True}
    if name == "dpmpp_sde":
        # its timesteps are always spaced like "linspace"
        config = {key: value for key, value in config.items() if key not in ("timestep_spacing", "steps_offset")}
    kind, options = {
        "ddim": (diffusers.DDIMScheduler, {}),
        "euler": (diffusers.EulerDiscreteScheduler, {}),
        "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
        "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}),
        "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, SDE),
        "dpmpp_3m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3}),
        "dpmpp_3m_sde": (third_order_sde(), {**SDE, "solver_order": 3, "solver_type": "heun"}),
        "dpmpp_sde": (diffusers.DPMSolverSinglestepScheduler, {"lower_order_final": True, **SDE}),
        "unipc": (diffusers.UniPCMultistepScheduler, {}),
        "lcm": (diffusers.LCMScheduler, {}),
        "tcd": (diffusers.TCDScheduler, {}),
    }[name]
    return kind(**{**options, **config})


def diffusers_path(name, scheduler, eta, seed=0, dtype=torch.float32, start=0):
    """(inputs to the model, latents after each step) of diffusers' scheduler, timesteps set, from step `start`."""
    generator = torch.Generator().manual_seed(seed)
    latents = (torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma).to(dtype)
    extra = {"eta": eta} if name in ("ddim", "tcd") and eta is not None else {}
    if name in ("ddim", "tcd", "euler_ancestral", "lcm") or "_sde" in name:
        extra["generator"] = generator
    if name.startswith("dpmpp"):
        # its steps in log sigma are small differences: taken in float32 they are off by more than we allow
        scheduler.sigmas = scheduler.sigmas.double()
    inputs, path = [], []
    if start and hasattr(scheduler, "set_begin_index"):  # as its image-to-image pipelines do
        scheduler.set_begin_index(start)
    for timestep in scheduler.timesteps[start:]:
        seen = scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(toy_model(seen, timestep), timestep, latents, **extra).prev_sample
        inputs.append(seen)
        path.append(latents)
    return inputs, path


def our_path(schedule, seed=0, start=0):
    """(inputs to the model, latents after each step) of a Schedule, from step `start`."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(SHAPE, generator=generator) * schedule.init_noise_scale
    anchor, history = torch.zeros(SHAPE), torch.zeros(1, 2, *SHAPE[1:])
    one_branch = torch.tensor([[-1, -1, -1, 0]]), torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.zeros(1)
    inputs, path = [], []
    for i in range(start, schedule.steps):
        seen = latents * schedule.input_scale[i]
        output = toy_model(seen, schedule.timesteps[i])
        noise = torch.randn(SHAPE, generator=generator) if schedule.uses_noise else torch.zeros(SHAPE)
        latents, anchor, history = guided_step(
            latents,
            anchor,
            history,
            output,
            *one_branch,
            schedule.denoised[i : i + 1],
            schedule.update[i : i + 1],
            noise,
        )
        inputs.append(seen)
        path.append(latents)
    return inputs, path


def assert_same_path(name, config, steps, tolerance=1e-5, *, eta=None, timesteps=None, start=0):
    """make_schedule and diffusers' scheduler of that name and config agree in all they do."""
    scheduler = diffusers_scheduler(name, config)
    if timesteps is None:
        scheduler.set_timesteps(steps)
    else:
        scheduler.set_timesteps(timesteps=timesteps)
    schedule = make_schedule(name, steps, config, eta=eta, timesteps=timesteps, start=start)
    assert_schedule_walks(schedule, name, scheduler, tolerance, eta, start)


def assert_schedule_walks(schedule, name, scheduler, tolerance=1e-5, eta=None, start=0):
    """`schedule` walks the path of diffusers' `scheduler`, whose timesteps are set.

    To within `tolerance`; or, where the sums of a CPU take the two further apart, with an error against the path in
    fp64 that is at most twice the largest of theirs up to that step.
    """
    again = copy.deepcopy(scheduler)
    their_inputs, theirs = diffusers_path(name, scheduler, eta, start=start)
    torch.testing.assert_close(schedule.timesteps, scheduler.timesteps.float(), atol=1e-3, rtol=0)
    assert schedule.init_noise_scale == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)
    inputs, ours = our_path(schedule, start=start)

    @cache
    def exact():
        with noise_of_fp32():
            return diffusers_path(name, again, eta, dtype=torch.float64, start=start)

    for step in range(schedule.steps - start):
        # the latents of Euler samplers begin at some 14 (or 4096) times unit variance
        scale = max(1.0, float(theirs[step].abs().max()))
        pairs = ((ours, theirs, scale * tolerance), (inputs, their_inputs, tolerance * (1 + their_inputs[step].abs())))
        for which, (found, peer, allowed) in enumerate(pairs):
            if ((found[step] - peer[step]).abs() <= allowed).all():
                continue
            truth = exact()[1 - which]
            own = max(float((peer[i] - truth[i]).abs().max()) for i in range(step + 1))
            error = float((found[step] - truth[step]).abs().max())
            assert error <= 2 * own, f"step {step}: {error:.2e} from fp64, diffusers' own error is {own:.2e}"
