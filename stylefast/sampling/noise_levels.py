"""Noise levels of the training timesteps.

Notation as in DDIM (Song et al. 2021): a latent at timestep t is `sqrt(abar_t) z0 + sqrt(1 - abar_t) noise`, and
`sigma_t = sqrt((1 - abar_t) / abar_t)` is its noise level in the variance-exploding form (Karras et al. 2022).

Everything here is plain IEEE arithmetic in a fixed order, so results are bit-identical on every machine and a schedule
digest saved on one machine matches on another.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from stylefast.errors import InvalidRequest
from stylefast.values import quoted

# defaults for keys missing from a config: the values SDXL was trained and published with
SDXL_SCHEDULER: Mapping = MappingProxyType(
    {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "final_sigmas_type": "zero",
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "rescale_betas_zero_snr": False,
        "sigma_min": None,
        "sigma_max": None,
        "lower_order_final": True,
        "euler_at_final": False,
        "disable_corrector": (),
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
    }
)


def alphas_cumprod(config: Mapping) -> np.ndarray:
    """Return abar_t of every training timestep, [num_train_timesteps] float64.

    Betas and their product are rounded to float32, because models were trained at those levels; later arithmetic is
    float64. With `rescale_betas_zero_snr` the last entry is exactly 0 (Lin et al. 2024, Alg. 1).

    Raises InvalidRequest for an unknown `beta_schedule`.
    """
    config = {**SDXL_SCHEDULER, **config}
    betas = _betas(config)
    if config["rescale_betas_zero_snr"]:
        betas = _zero_terminal_snr(betas)
    return _product(betas).astype(np.float64)


def training_sigmas(config: Mapping, dtype: type = np.float64) -> np.ndarray:
    """Return sigma_t of every training timestep, [num_train_timesteps], ascending, computed in `dtype`.

    The pure-noise end of a zero-SNR schedule is set to abar = 2**-24, since its sigma would be infinite.
    """
    abar = alphas_cumprod(config).astype(dtype)
    if abar[-1] == 0.0:
        abar[-1] = 2.0**-24
    return np.sqrt((1 - abar) / abar)


def _betas(config: Mapping) -> np.ndarray:
    # [num_train_timesteps] float32
    if config["trained_betas"] is not None:
        return np.asarray(config["trained_betas"], dtype=np.float32)
    schedule, start, end = config["beta_schedule"], config["beta_start"], config["beta_end"]
    count = config["num_train_timesteps"]
    if schedule == "linear":
        return _line(start, end, count)
    if schedule == "scaled_linear":
        return _line(start**0.5, end**0.5, count) ** 2
    if schedule == "squaredcos_cap_v2":
        # Nichol and Dhariwal 2021, Eq. 17
        level = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        return np.array([min(1 - level[i + 1] / level[i], 0.999) for i in range(count)], dtype=np.float32)
    raise InvalidRequest(
        f"beta_schedule {quoted(schedule)} is unknown; choose linear, scaled_linear or squaredcos_cap_v2, "
        "or give trained_betas"
    )


def _line(start: float, end: float, count: int) -> np.ndarray:
    # same bits as torch.linspace in float32: computed from both ends to the middle, each value rounded once
    first, last, steps = np.float32(start), np.float32(end), np.arange(count)
    step = np.float64((last - first) / np.float32(max(count - 1, 1)))
    rising, falling = np.float64(first) + step * steps, np.float64(last) - step * (count - 1 - steps)
    return np.where(steps < count // 2, rising, falling).astype(np.float32)


def _product(betas: np.ndarray) -> np.ndarray:
    # [num_train_timesteps] float32; the running product is float64, as in torch.cumprod
    return np.cumprod((1 - betas).astype(np.float64)).astype(np.float32)


def _zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    # shift and stretch sqrt(abar) so that it keeps its first value and ends at 0
    root = np.sqrt(_product(betas))
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    abar = root**2
    return 1 - np.append(abar[:1], abar[1:] / abar[:-1])
