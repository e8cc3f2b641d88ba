"""The DPM-Solver++ family: x0 extrapolated in log(alpha / s), on the ODE or the diffusion SDE.

With h the step in log(alpha / s), y the rate at which x0 takes over (h on the ODE, 2h on the SDE) and ' marking the
next level, a step is

    latents' = (s' / s) e^(h - y) latents + alpha' (1 - e^-y) x0 + (correction by past x0) + s' sqrt(1 - e^-2h) noise

where only the SDE adds noise (DPM-Solver++, Lu et al. 2022, arXiv 2211.01095).
"""

from collections.abc import Mapping

import numpy as np

from stylefast.sampling.tables import (
    ANCHOR,
    LATENTS,
    NEXT_ANCHOR,
    NEXT_LATENTS,
    NOISE,
    PREVIOUS_X0,
    X0,
    X0_BEFORE_THAT,
    Tables,
    alpha_s,
    log_ratio,
    preserving,
)


def dpmpp_multistep(
    config: Mapping, timesteps: np.ndarray, sigmas: np.ndarray, *, order: int, sde: bool, start: int = 0
) -> Tables:
    """Build the tables of DPM-Solver++(2M) and (3M) and their SDE forms; past x0 come from the last one or two steps.

    timesteps [steps], sigmas [steps + 1], from `spacing.multistep_levels`. start: the step that sampling begins with,
    so that there is no past x0 before. Order 2 is the midpoint form. Order 3 on
    the SDE is k-diffusion's "3M SDE", whose second step uses the integral form; diffusers flips the sign of one
    constant in its third-order term, which leaves that term finite as h goes to 0.
    """
    steps = len(timesteps)
    few = config["lower_order_final"] and steps < 15
    first_order_end = config["euler_at_final"] or few or sigmas[-1] in (0, sigmas[-2])
    update = np.zeros((steps, 2, 6))
    for i in range(steps):
        row = update[i, NEXT_LATENTS]
        gain = _first_order(row, LATENTS, sigmas[i], sigmas[i + 1], sde)
        row[X0] = gain
        if i <= start or (i == steps - 1 and first_order_end):
            continue
        h, h_last = log_ratio(sigmas[i], sigmas[i + 1]), log_ratio(sigmas[i - 1], sigmas[i])
        y = 2 * h if sde else h
        alpha, _ = alpha_s(sigmas[i + 1])
        # coefficient of x0's first derivative in log(alpha / s), times h
        phi_2 = alpha * (np.expm1(-y) / y + 1)
        if order == 2 or i == start + 1 or (i == steps - 2 and few):
            slope = (phi_2 if order == 3 and sde else 0.5 * gain) * h / h_last
            row[X0] += slope
            row[PREVIOUS_X0] = -slope
        else:
            h_before = log_ratio(sigmas[i - 2], sigmas[i - 1])
            # coefficient of the second divided difference, times h**2
            phi_3 = alpha * ((np.expm1(-y) / y + 1) / y - 0.5)
            bend = (phi_2 * h_last / h - phi_3) * h**2 / (h_last + h_before)
            slope = phi_2 * h / h_last + bend / h_last
            row[X0] += slope
            row[PREVIOUS_X0] = -slope - bend / h_before
            row[X0_BEFORE_THAT] = bend / h_before
    return preserving(config, timesteps, sigmas, update)


def dpmpp_sde(config: Mapping, timesteps: np.ndarray, sigmas: np.ndarray, start: int = 0) -> Tables:
    """Build the tables of DPM++ SDE: second-order SDE steps over two levels, with a model evaluation in the middle.

    timesteps [steps], sigmas [steps + 1], from `spacing.multistep_levels`; steps counts evaluations. The first half
    of a pair is a first-order step; the second restarts from the latents before the pair, the anchor, with its own
    noise. start: the step that sampling begins with; where that is the second of a pair, it is of first order too.
    """
    steps = len(timesteps)
    lower_order_end = config["lower_order_final"] or sigmas[-1] == 0
    update = np.zeros((steps, 2, 6))
    for i in range(steps):
        row = update[i, NEXT_LATENTS]
        update[i, NEXT_ANCHOR, LATENTS] = 1.0
        if i % 2 == 0 or i == start or (i == steps - 1 and lower_order_end):
            row[X0] = _first_order(row, LATENTS, sigmas[i], sigmas[i + 1], sde=True)
            continue
        gain = _first_order(row, ANCHOR, sigmas[i - 1], sigmas[i + 1], sde=True)
        slope = 0.5 * gain * log_ratio(sigmas[i - 1], sigmas[i + 1]) / log_ratio(sigmas[i - 1], sigmas[i])
        row[X0] = slope
        row[PREVIOUS_X0] = gain - slope
    return preserving(config, timesteps, sigmas, update)


def _first_order(row: np.ndarray, start: int, sigma: float, sigma_next: float, sde: bool) -> float:
    # writes the coefficients of the starting latents (column `start`) and the noise into `row` [6]; returns x0's
    alpha, s = alpha_s(np.array([sigma, sigma_next]))
    decay = sigma_next / sigma  # e**-h
    row[start] = s[1] / s[0]
    if not sde:
        return alpha[1] * (1 - decay)
    row[start] *= decay
    row[NOISE] = s[1] * np.sqrt(1 - decay**2)
    return alpha[1] * (1 - decay**2)
