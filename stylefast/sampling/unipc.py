"""UniPC: a multistep predictor that corrects each step once the model has been evaluated at its end."""

from collections.abc import Mapping

import numpy as np

from stylefast.sampling.tables import (
    ANCHOR,
    LATENTS,
    NEXT_ANCHOR,
    NEXT_LATENTS,
    PREVIOUS_X0,
    X0,
    X0_BEFORE_THAT,
    Tables,
    alpha_s,
    log_ratio,
    preserving,
)


def unipc(config: Mapping, timesteps: np.ndarray, sigmas: np.ndarray, start: int = 0) -> Tables:
    """Build the tables of UniPC, order 2, B2(h) = e**h - 1 (Zhao et al. 2023, Alg. 5 to 8).

    A step first uses the new model output to correct its input latents, then predicts the next latents from the
    corrected ones. The correction starts from the last step's corrected latents, the anchor.

    timesteps [steps], sigmas [steps + 1], from `spacing.multistep_levels`. start: the step that sampling begins with.
    """
    steps = len(timesteps)
    order_before = 0
    update = np.zeros((steps, 2, 6))
    for i in range(steps):
        if i > start and i - 1 not in config["disable_corrector"]:
            corrected = _corrector(sigmas, i, order_before)
        else:
            corrected = np.eye(6)[LATENTS]
        # order 2 divides by h, which is infinite for a step to sigma 0 and may be 0 in the last step
        first_order_end = config["lower_order_final"] or sigmas[-1] in (0, sigmas[-2])
        order = 1 if i <= start or (i == steps - 1 and first_order_end) else 2
        update[i, NEXT_ANCHOR] = corrected
        update[i, NEXT_LATENTS] = _predictor(sigmas, i, order, corrected)
        order_before = order
    return preserving(config, timesteps, sigmas, update)


def _predictor(sigmas: np.ndarray, i: int, order: int, corrected: np.ndarray) -> np.ndarray:
    # coefficients [6] of the latents at sigmas[i + 1], from the corrected latents at sigmas[i]
    alpha, s = alpha_s(sigmas[i : i + 2])
    decay = sigmas[i + 1] / sigmas[i] - 1  # e**-h - 1
    row = s[1] / s[0] * corrected
    row[X0] -= alpha[1] * decay
    if order == 2:
        h = log_ratio(sigmas[i], sigmas[i + 1])
        r = -log_ratio(sigmas[i - 1], sigmas[i]) / h
        slope = alpha[1] * decay * 0.5 / r
        row[X0] += slope
        row[PREVIOUS_X0] -= slope
    return row


def _corrector(sigmas: np.ndarray, i: int, order: int) -> np.ndarray:
    # coefficients [6] of the corrected latents at sigmas[i]; `order` is the order of the corrected prediction
    alpha, s = alpha_s(sigmas[i - 1 : i + 1])
    h = log_ratio(sigmas[i - 1], sigmas[i])
    decay = sigmas[i] / sigmas[i - 1] - 1
    row = np.zeros(6)
    row[ANCHOR] = s[1] / s[0]
    row[PREVIOUS_X0] = -alpha[1] * decay
    if order == 1:
        weight_now, weight_before = 0.5, 0.0
    else:
        # the two conditions of Eq. 5: R rho = phi / B2, solved by hand
        r = -log_ratio(sigmas[i - 2], sigmas[i - 1]) / h
        phi_2 = decay / -h - 1
        phi_3 = phi_2 / -h - 0.5
        rho_before = (phi_2 - 2 * phi_3) / decay / (1 - r)
        weight_now = phi_2 / decay - rho_before
        weight_before = rho_before / r
    row[X0] = -alpha[1] * decay * weight_now
    row[X0_BEFORE_THAT] = -alpha[1] * decay * weight_before
    row[PREVIOUS_X0] += alpha[1] * decay * (weight_now + weight_before)
    return row
