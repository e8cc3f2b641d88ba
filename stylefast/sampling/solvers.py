"""Samplers as tables of coefficients.

Every sampler here is linear in six things: the latents, an anchor (the corrected latents before the last predictor
step; only UniPC keeps one), this step's x0, those of the last step and of the one before, and fresh noise. So a step
is a 2x6 matrix, and rows of a batch under different samplers share one update.

Variance-preserving samplers (DDIM, DPM++, UniPC, LCM) hold `alpha z0 + s noise` with `alpha**2 + s**2 = 1`; Euler
samplers hold `z0 + sigma noise`, `sigma = s / alpha`, and show the model `alpha` times that.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from stylefast.errors import InvalidRequest
from stylefast.sampling.noise_levels import (
    PREDICTION_TYPES,
    alphas_cumprod,
    karras_sigmas,
    spaced_timesteps,
    timesteps_of,
    training_sigmas,
)

# columns of an update, and its rows
LATENTS, ANCHOR, X0, PREVIOUS_X0, X0_BEFORE_THAT, NOISE = range(6)
NEXT_LATENTS, NEXT_ANCHOR = range(2)


class Tables(NamedTuple):
    """What a solver returns, float64; meanings as in `schedule.Schedule`."""

    timesteps: np.ndarray  # [steps]
    input_scale: np.ndarray  # [steps]
    denoised: np.ndarray  # [steps, 2]
    update: np.ndarray  # [steps, 2, 6]
    forward: np.ndarray  # [steps + 1, 2]
    init_noise_scale: float = 1.0


def ddim(config: Mapping, steps: int, eta: float) -> Tables:
    """DDIM (Song et al. 2021), Eq. 12 and 16; eta 0 is deterministic, 1 is DDPM's ancestral sampling.

    The step length is always `num_train_timesteps // steps`, also where the spacing rounds to other distances: that
    is what published samplers do and what seeds were shared under.
    """
    trained = alphas_cumprod(config)
    timesteps = spaced_timesteps(config, steps, open_end=False)
    now = timesteps.astype(np.int64)
    then = now - config["num_train_timesteps"] // steps
    final = 1.0 if config["set_alpha_to_one"] else trained[0]
    abar = trained[now]
    abar_then = np.where(then >= 0, trained[np.maximum(then, 0)], final)

    alpha, s = np.sqrt(abar), np.sqrt(1 - abar)
    variance = (1 - abar_then) / (1 - abar) * (1 - abar / abar_then)
    deviation = eta * np.sqrt(np.maximum(variance, 0.0))
    # noise = (latents - alpha x0) / s is put into Eq. 12, which leaves no small divisor at the clean end
    direction = np.sqrt(np.maximum(1 - abar_then - deviation**2, 0.0)) / s
    update = np.zeros((steps, 2, 6))
    update[:, NEXT_LATENTS, LATENTS] = direction
    update[:, NEXT_LATENTS, X0] = np.sqrt(abar_then) - direction * alpha
    update[:, NEXT_LATENTS, NOISE] = deviation
    forward = _forward(np.append(abar, abar_then[-1]))
    return Tables(timesteps, np.ones(steps), _denoised(config, alpha, s), update, forward)


def euler(config: Mapping, steps: int, karras: bool) -> Tables:
    """Euler's method on the probability-flow ODE (Karras et al. 2022, Alg. 1 without its second order)."""
    timesteps, sigmas = _euler_levels(config, steps, karras)
    update = np.zeros((steps, 2, 6))
    # latents + (latents - x0) / sigma * (sigma' - sigma)
    ratio = sigmas[1:] / sigmas[:-1]
    update[:, NEXT_LATENTS, LATENTS] = ratio
    update[:, NEXT_LATENTS, X0] = 1 - ratio
    return _exploding(config, timesteps, sigmas, update)


def euler_ancestral(config: Mapping, steps: int) -> Tables:
    """Euler down to sigma_down, then fresh noise sigma_up, with sigma_down**2 + sigma_up**2 = sigma'**2."""
    timesteps, sigmas = _euler_levels({**config, "final_sigmas_type": "zero"}, steps, karras=False)
    now, then = sigmas[:-1], sigmas[1:]
    up = then * np.sqrt(now**2 - then**2) / now
    ratio = np.sqrt(then**2 - up**2) / now
    update = np.zeros((steps, 2, 6))
    update[:, NEXT_LATENTS, LATENTS] = ratio
    update[:, NEXT_LATENTS, X0] = 1 - ratio
    update[:, NEXT_LATENTS, NOISE] = up
    return _exploding(config, timesteps, sigmas, update)


def dpmpp_2m(config: Mapping, steps: int, karras: bool) -> Tables:
    """DPM-Solver++(2M), midpoint form (Lu et al. 2022, Alg. 2): x0 is extrapolated from its last two values."""
    timesteps, sigmas = _multistep_levels(config, steps, karras, round_karras=_trained_on_integers(config))
    alpha, s = _alpha_s(sigmas)
    few = config["lower_order_final"] and steps < 15
    first_order_end = config["euler_at_final"] or few or sigmas[-1] == 0
    update = np.zeros((steps, 2, 6))
    for i in range(steps):
        row = update[i, NEXT_LATENTS]
        row[LATENTS] = s[i + 1] / s[i]
        # 1 - e**-h, with h the step in log(alpha / s)
        gain = alpha[i + 1] * (1 - sigmas[i + 1] / sigmas[i])
        row[X0] = gain
        if i > 0 and not (i == steps - 1 and first_order_end):
            slope = 0.5 * gain * _log_ratio(sigmas[i], sigmas[i + 1]) / _log_ratio(sigmas[i - 1], sigmas[i])
            row[X0] += slope
            row[PREVIOUS_X0] = -slope
    return _preserving(config, timesteps, sigmas, update)


def unipc(config: Mapping, steps: int, karras: bool) -> Tables:
    """UniPC, order 2, B2(h) = e**h - 1 (Zhao et al. 2023, Alg. 5 to 8).

    A step first corrects the latents it was given, now that the model has been evaluated there, then predicts the
    next ones from the corrected. The correction starts from the corrected latents of the last step: the anchor.
    """
    timesteps, sigmas = _multistep_levels(config, steps, karras, round_karras=True)
    if karras and config["final_sigmas_type"] == "sigma_min":
        sigmas[-1] = sigmas[-2]
    order_before = 0
    update = np.zeros((steps, 2, 6))
    for i in range(steps):
        if i > 0 and i - 1 not in config["disable_corrector"]:
            corrected = _unipc_corrector(sigmas, i, order_before)
        else:
            corrected = np.eye(6)[LATENTS]
        # the second order divides by h, which is infinite on the way to sigma 0 and may be 0 in the last step
        first_order_end = config["lower_order_final"] or sigmas[-1] in (0, sigmas[-2])
        order = 1 if i == 0 or (i == steps - 1 and first_order_end) else 2
        update[i, NEXT_ANCHOR] = corrected
        update[i, NEXT_LATENTS] = _unipc_predictor(sigmas, i, order, corrected)
        order_before = order
    return _preserving(config, timesteps, sigmas, update)


def lcm(config: Mapping, steps: int) -> Tables:
    """Latent consistency sampling (Luo et al. 2023, Alg. 3): jump to x0, put noise of the next level on it.

    Timesteps are a subset of the `original_inference_steps` that the model was distilled on; x0 carries the
    boundary condition c_skip, c_out. Raises InvalidRequest for more steps than those.
    """
    original, total = config["original_inference_steps"], config["num_train_timesteps"]
    if steps > original:
        raise InvalidRequest(
            f"lcm can't take {steps} steps: the model was distilled on {original} (original_inference_steps); "
            "take fewer"
        )
    distilled = (np.arange(1, original + 1) * (total // original) - 1)[::-1]
    now = distilled[np.floor(np.linspace(0, original, num=steps, endpoint=False)).astype(np.int64)]
    abar = alphas_cumprod(config)[now]
    alpha, s = np.sqrt(abar), np.sqrt(1 - abar)

    scaled, data = now * config["timestep_scaling"], 0.5
    c_skip = data**2 / (scaled**2 + data**2)
    c_out = scaled / np.sqrt(scaled**2 + data**2)
    denoised = c_out[:, None] * _denoised(config, alpha, s)
    denoised[:, 0] += c_skip

    update = np.zeros((steps, 2, 6))
    update[:, NEXT_LATENTS, X0] = np.append(alpha[1:], 1.0)
    update[:, NEXT_LATENTS, NOISE] = np.append(s[1:], 0.0)
    return Tables(now.astype(np.float64), np.ones(steps), denoised, update, _forward(np.append(abar, 1.0)))


def _euler_levels(config: Mapping, steps: int, karras: bool) -> tuple[np.ndarray, np.ndarray]:
    # timesteps [steps], sigmas [steps + 1]
    trained = training_sigmas(config)
    timesteps = spaced_timesteps(config, steps, open_end=False, fractional=True)
    sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
    if karras:
        sigmas = karras_sigmas(config, sigmas[0], sigmas[-1], steps)
        timesteps = timesteps_of(sigmas, trained)
    return timesteps, np.append(sigmas, _final_sigma(config, trained[0]))


def _multistep_levels(config: Mapping, steps: int, karras: bool, round_karras: bool) -> tuple[np.ndarray, np.ndarray]:
    # timesteps [steps], sigmas [steps + 1]; unlike Euler's, Karras spacing here spans all trained levels
    trained = training_sigmas(config)
    if karras:
        sigmas = karras_sigmas(config, trained[-1], trained[0], steps)
        timesteps = timesteps_of(sigmas, trained)
        # diffusers cuts the fractions off where it does not round
        timesteps = timesteps.round() if round_karras else np.floor(timesteps)
    else:
        timesteps = spaced_timesteps(config, steps, open_end=True)
        sigmas = np.interp(timesteps, np.arange(len(trained)), trained)
    if np.any(np.diff(sigmas) >= 0):
        raise InvalidRequest(
            f"{steps} steps with {config['timestep_spacing']!r} spacing repeat a timestep, which multistep samplers "
            "can't take; take fewer steps or spacing='trailing'"
        )
    return timesteps, np.append(sigmas, _final_sigma(config, trained[0]))


def _trained_on_integers(config: Mapping) -> bool:
    return config["beta_schedule"] != "squaredcos_cap_v2"


def _final_sigma(config: Mapping, smallest: float) -> float:
    kind = config["final_sigmas_type"]
    if kind not in ("zero", "sigma_min"):
        raise InvalidRequest(f"final_sigmas_type {kind!r} is unknown; choose 'zero' or 'sigma_min'")
    return 0.0 if kind == "zero" else smallest


def _unipc_predictor(sigmas: np.ndarray, i: int, order: int, corrected: np.ndarray) -> np.ndarray:
    # coefficients [6] of the latents at sigmas[i + 1], from the corrected latents at sigmas[i]
    alpha, s = _alpha_s(sigmas[i : i + 2])
    decay = sigmas[i + 1] / sigmas[i] - 1  # e**-h - 1
    row = s[1] / s[0] * corrected
    row[X0] -= alpha[1] * decay
    if order == 2:
        h = _log_ratio(sigmas[i], sigmas[i + 1])
        r = -_log_ratio(sigmas[i - 1], sigmas[i]) / h
        slope = alpha[1] * decay * 0.5 / r
        row[X0] += slope
        row[PREVIOUS_X0] -= slope
    return row


def _unipc_corrector(sigmas: np.ndarray, i: int, order: int) -> np.ndarray:
    # coefficients [6] of the corrected latents at sigmas[i]; `order` is that of the prediction they correct
    alpha, s = _alpha_s(sigmas[i - 1 : i + 1])
    h = _log_ratio(sigmas[i - 1], sigmas[i])
    decay = sigmas[i] / sigmas[i - 1] - 1
    row = np.zeros(6)
    row[ANCHOR] = s[1] / s[0]
    row[PREVIOUS_X0] = -alpha[1] * decay
    if order == 1:
        weight_now, weight_before = 0.5, 0.0
    else:
        # the two conditions of Eq. 5: R rho = phi / B2, solved by hand
        r = -_log_ratio(sigmas[i - 2], sigmas[i - 1]) / h
        phi_2 = decay / -h - 1
        phi_3 = phi_2 / -h - 0.5
        rho_before = (phi_2 - 2 * phi_3) / decay / (1 - r)
        weight_now = phi_2 / decay - rho_before
        weight_before = rho_before / r
    row[X0] = -alpha[1] * decay * weight_now
    row[X0_BEFORE_THAT] = -alpha[1] * decay * weight_before
    row[PREVIOUS_X0] += alpha[1] * decay * (weight_now + weight_before)
    return row


def _exploding(config: Mapping, timesteps: np.ndarray, sigmas: np.ndarray, update: np.ndarray) -> Tables:
    alpha, s = _alpha_s(sigmas[:-1])
    denoised = _denoised(config, alpha, s)
    # the latents are 1 / alpha times the variance-preserving ones
    denoised[:, 0] *= alpha
    forward = np.stack([np.ones_like(sigmas), sigmas], axis=1)
    peak = sigmas.max()
    init = peak if config["timestep_spacing"] in ("linspace", "trailing") else np.sqrt(peak**2 + 1)
    return Tables(timesteps, alpha, denoised, update, forward, float(init))


def _preserving(config: Mapping, timesteps: np.ndarray, sigmas: np.ndarray, update: np.ndarray) -> Tables:
    alpha, s = _alpha_s(sigmas)
    denoised = _denoised(config, alpha[:-1], s[:-1])
    return Tables(timesteps, np.ones(len(timesteps)), denoised, update, np.stack([alpha, s], axis=1))


def _denoised(config: Mapping, alpha: np.ndarray, s: np.ndarray) -> np.ndarray:
    # [steps, 2]: x0 from variance-preserving latents and the model's output
    kind = config["prediction_type"]
    if kind == "epsilon":
        if np.any(alpha == 0):
            raise InvalidRequest(
                "the first timestep holds no signal (rescale_betas_zero_snr), so epsilon prediction can't be turned "
                "into a picture there; use a v_prediction model, or spacing='leading'"
            )
        return np.stack([1 / alpha, -s / alpha], axis=1)
    if kind == "v_prediction":
        return np.stack([alpha, -s], axis=1)
    if kind == "sample":
        return np.stack([np.zeros_like(alpha), np.ones_like(alpha)], axis=1)
    raise InvalidRequest(f"prediction_type {kind!r} is unknown; choose one of {', '.join(PREDICTION_TYPES)}")


def _forward(abar: np.ndarray) -> np.ndarray:
    return np.stack([np.sqrt(abar), np.sqrt(1 - abar)], axis=1)


def _alpha_s(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    alpha = 1 / np.sqrt(sigmas**2 + 1)
    return alpha, sigmas * alpha


def _log_ratio(sigma_from: float, sigma_to: float) -> float:
    # the step h in log(alpha / s) from one noise level to a lower one
    return float(np.log(sigma_from) - np.log(sigma_to))
