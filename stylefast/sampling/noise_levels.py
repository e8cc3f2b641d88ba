"""How much noise there is at which timestep: the training noise schedule, and the timesteps a sampler visits.

Notation as in DDIM (Song et al. 2021): a latent at timestep t is `sqrt(abar_t) z0 + sqrt(1 - abar_t) noise`, and
`sigma_t = sqrt((1 - abar_t) / abar_t)` is its noise level in the variance-exploding form (Karras et al. 2022).
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch

from stylefast.errors import InvalidRequest

# what a key means when a config does not carry it: the values SDXL was trained and is published with
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

SPACINGS = ("leading", "linspace", "trailing")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def alphas_cumprod(config: Mapping) -> np.ndarray:
    """abar_t of every training timestep, [num_train_timesteps] float64.

    Betas and their product are taken in float32, because models were trained at those rounded levels; everything
    computed from them is float64. With `rescale_betas_zero_snr` the last entry is exactly 0 (Lin et al. 2024, Alg. 1).

    Raises InvalidRequest for an unknown `beta_schedule`.
    """
    config = {**SDXL_SCHEDULER, **config}
    betas = _betas(config)
    if config["rescale_betas_zero_snr"]:
        betas = _zero_terminal_snr(betas)
    return torch.cumprod(1.0 - betas, dim=0).numpy().astype(np.float64)


def training_sigmas(config: Mapping) -> np.ndarray:
    """sigma_t of every training timestep, [num_train_timesteps] float64, ascending.

    The pure-noise end of a zero-SNR schedule is held at abar = 2**-24, since its sigma would be infinite.
    """
    abar = alphas_cumprod(config)
    if abar[-1] == 0.0:
        abar[-1] = 2.0**-24
    return np.sqrt((1.0 - abar) / abar)


def spaced_timesteps(config: Mapping, steps: int, *, open_end: bool, fractional: bool = False) -> np.ndarray:
    """Descending timesteps of a sampler, [steps] float64 (Lin et al. 2024, Table 2).

    open_end: divide the axis into steps + 1 and leave the last out (multistep solvers), instead of visiting it.
    fractional: keep fractions that "linspace" yields, instead of rounding.

    Raises InvalidRequest for an unknown spacing, or where timesteps would leave the training range.
    """
    total, spacing = config["num_train_timesteps"], config["timestep_spacing"]
    points = steps + 1 if open_end else steps
    if spacing == "linspace":
        timesteps = np.linspace(0, total - 1, points)[::-1][:steps]
        timesteps = timesteps if fractional else timesteps.round()
    elif spacing == "leading":
        timesteps = np.arange(points)[::-1][:steps] * float(total // points) + config["steps_offset"]
    elif spacing == "trailing":
        # for some counts the quotient rounds down and a further point, -1, would slip in: hence the slice
        timesteps = np.arange(total, 0, -total / steps)[:steps].round() - 1
    else:
        raise InvalidRequest(f"timestep spacing {spacing!r} is unknown; choose one of {', '.join(SPACINGS)}")
    if timesteps[0] > total - 1:
        raise InvalidRequest(
            f"{steps} steps with {spacing!r} spacing and steps_offset {config['steps_offset']} start at timestep "
            f"{timesteps[0]:g}, beyond the last trained one, {total - 1}; take fewer steps or spacing='trailing'"
        )
    return timesteps


def karras_sigmas(config: Mapping, first: float, last: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Noise levels spaced by Karras et al. 2022, Eq. 5, from `first` down to `last`: [steps] float64.

    `sigma_max` and `sigma_min` of the config take precedence over `first` and `last`.
    """
    high = config["sigma_max"] if config["sigma_max"] is not None else first
    low = config["sigma_min"] if config["sigma_min"] is not None else last
    ramp = np.linspace(0.0, 1.0, steps)
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def timesteps_of(sigmas: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """The fractional timesteps at which noise levels `sigmas` were trained, linear in log sigma; same shape."""
    return np.interp(np.log(sigmas), np.log(trained), np.arange(len(trained)))


def _betas(config: Mapping) -> torch.Tensor:
    # [num_train_timesteps] float32
    if config["trained_betas"] is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float32)
    schedule, start, end = config["beta_schedule"], config["beta_start"], config["beta_end"]
    count = config["num_train_timesteps"]
    if schedule == "linear":
        return torch.linspace(start, end, count, dtype=torch.float32)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
    if schedule == "squaredcos_cap_v2":
        # Nichol and Dhariwal 2021, Eq. 17
        level = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
        return torch.tensor([min(1 - level[i + 1] / level[i], 0.999) for i in range(count)], dtype=torch.float32)
    raise InvalidRequest(
        f"beta_schedule {schedule!r} is unknown; choose linear, scaled_linear or squaredcos_cap_v2, "
        "or give trained_betas"
    )


def _zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    # shift and stretch sqrt(abar) so that it keeps its first value and ends at 0
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    abar = root**2
    return 1.0 - torch.cat([abar[:1], abar[1:] / abar[:-1]])
