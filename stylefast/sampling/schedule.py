"""A sampler with its steps laid out: tables that the step loop reads row by row."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from stylefast.errors import InvalidRequest
from stylefast.sampling import solvers
from stylefast.sampling.noise_levels import PREDICTION_TYPES, SDXL_SCHEDULER, SPACINGS

SCHEDULERS = ("ddim", "euler", "euler_ancestral", "dpmpp_2m", "unipc", "lcm")
KARRAS_SCHEDULERS = ("euler", "dpmpp_2m", "unipc")
MAX_STEPS = 1000

_KARRAS_SUFFIX = "_karras"

# settings that would change the samplers named here and that the tables don't hold
_UNSUPPORTED = {
    "ddim": ("clip_sample", "thresholding"),
    "lcm": ("clip_sample", "thresholding"),
    "euler": ("use_exponential_sigmas", "use_beta_sigmas"),
    "euler_ancestral": (),
    "dpmpp_2m": ("thresholding", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas"),
    "unipc": ("thresholding", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas"),
}


@dataclass(frozen=True, eq=False)
class Schedule:
    """Coefficients of every step; all tensors float32 on the CPU.

    Step i: the model sees `latents * input_scale[i]` at `timesteps[i]`; `x0 = denoised[i] @ (latents, output)`;
    `(latents, anchor) = update[i] @ (latents, anchor, x0, x0 of step i - 1, x0 of step i - 2, noise)`.
    Sampling starts at `init_noise_scale * noise`, with anchor and history zero. For LCM, x0 is the consistency
    function's value, boundary condition included.
    """

    name: str
    timesteps: torch.Tensor  # [steps]: what the UNet is told; fractions occur
    input_scale: torch.Tensor  # [steps]
    denoised: torch.Tensor  # [steps, 2]
    update: torch.Tensor  # [steps, 2, 6]
    forward: torch.Tensor  # [steps + 1, 2]: a clean z0 as held before step i is forward[i] @ (z0, noise)
    init_noise_scale: float

    def __post_init__(self):
        steps = self.steps
        shapes = {
            "timesteps": (steps,),
            "input_scale": (steps,),
            "denoised": (steps, 2),
            "update": (steps, 2, 6),
            "forward": (steps + 1, 2),
        }
        for field, shape in shapes.items():
            table = getattr(self, field)
            if tuple(table.shape) != shape or table.dtype != torch.float32:
                raise InvalidRequest(
                    f"a schedule's {field} must be float32 of shape {shape}, not {table.dtype} {tuple(table.shape)}"
                )
            if not bool(torch.isfinite(table).all()):
                raise InvalidRequest(f"{self.name}: {field} is not finite everywhere; take other steps or spacing")

    @property
    def steps(self) -> int:
        """How often the UNet is evaluated."""
        return len(self.timesteps)

    @property
    def uses_noise(self) -> bool:
        """Whether any step adds fresh noise."""
        return bool(self.update[:, :, solvers.NOISE].any())


def make_schedule(
    name: str,
    steps: int,
    config: Mapping = SDXL_SCHEDULER,
    *,
    spacing: str | None = None,
    karras: bool | None = None,
    eta: float = 0.0,
) -> Schedule:
    """Lay out `steps` steps of the sampler `name`.

    name: one of SCHEDULERS; those in KARRAS_SCHEDULERS also with the suffix "_karras".
    config: a scheduler config in diffusers' format. It decides the noise levels, the timesteps and what the model
        predicts; the name alone decides the sampler, so `solver_order`, `algorithm_type` and their like are not
        read. Keys that are missing have SDXL's values.
    spacing: "leading", "linspace" or "trailing", instead of the config's.
    karras: Karras noise levels; None: as the name's suffix or the config says.
    eta: DDIM's share of fresh noise, in [0, 1].

    Raises InvalidRequest for an unknown name, steps outside 1..1000, or a setting this sampler does not have.
    """
    base, config = _base_name(name), {**SDXL_SCHEDULER, **config}
    _check(base, steps, config, eta)
    if spacing is not None:
        config["timestep_spacing"] = spacing
    if config["timestep_spacing"] not in SPACINGS:
        raise InvalidRequest(
            f"timestep spacing {config['timestep_spacing']!r} is unknown; choose one of {', '.join(SPACINGS)}"
        )
    use_karras = _karras(name, base, karras, config)

    if base == "ddim":
        tables = solvers.ddim(config, steps, eta)
    elif base == "euler":
        tables = solvers.euler(config, steps, use_karras)
    elif base == "euler_ancestral":
        tables = solvers.euler_ancestral(config, steps)
    elif base == "dpmpp_2m":
        tables = solvers.dpmpp_2m(config, steps, use_karras)
    elif base == "unipc":
        tables = solvers.unipc(config, steps, use_karras)
    else:
        tables = solvers.lcm(config, steps)
    *columns, init_noise_scale = tables
    return Schedule(
        base + _KARRAS_SUFFIX if use_karras else base,
        *(torch.from_numpy(column.astype(np.float32)) for column in columns),
        init_noise_scale=init_noise_scale,
    )


def _base_name(name: str) -> str:
    base = name.removesuffix(_KARRAS_SUFFIX) if isinstance(name, str) else name
    if base not in SCHEDULERS:
        raise InvalidRequest(
            f"scheduler {name!r} is unknown; choose one of {', '.join(SCHEDULERS)}, "
            f"or with {_KARRAS_SUFFIX!r} behind it one of {', '.join(KARRAS_SCHEDULERS)}"
        )
    return base


def _karras(name: str, base: str, karras: bool | None, config: Mapping) -> bool:
    suffix = name.endswith(_KARRAS_SUFFIX)
    if suffix and karras is False:
        raise InvalidRequest(f"scheduler {name!r} contradicts karras=False; drop one of the two")
    wanted = suffix or bool(karras)
    if base not in KARRAS_SCHEDULERS:
        if wanted:
            raise InvalidRequest(f"{base} has no Karras form; those that have: {', '.join(KARRAS_SCHEDULERS)}")
        return False
    return wanted or (karras is None and bool(config["use_karras_sigmas"]))


def _check(base: str, steps: int, config: Mapping, eta: float) -> None:
    limit = min(MAX_STEPS, config["num_train_timesteps"])
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= limit:
        raise InvalidRequest(f"steps must be a whole number from 1 to {limit}, not {steps!r}")
    if not 0.0 <= eta <= 1.0:
        raise InvalidRequest(f"eta must lie in [0, 1], not {eta}")
    if eta and base != "ddim":
        raise InvalidRequest(f"eta={eta} is an argument of ddim; {base} has none, leave it at 0")
    if config["prediction_type"] not in PREDICTION_TYPES:
        raise InvalidRequest(
            f"prediction_type {config['prediction_type']!r} is unknown; choose one of {', '.join(PREDICTION_TYPES)}"
        )
    for key in _UNSUPPORTED[base]:
        if config.get(key):
            raise InvalidRequest(f"{base} with {key}={config[key]!r} is not supported; set it to False in the config")
    if base == "euler" and config.get("interpolation_type", "linear") != "linear":
        raise InvalidRequest(f"interpolation_type {config['interpolation_type']!r} is not supported; use 'linear'")
    if base == "euler" and config.get("timestep_type", "discrete") != "discrete":
        raise InvalidRequest(f"timestep_type {config['timestep_type']!r} is not supported; use 'discrete'")
    if base == "dpmpp_2m" and (config.get("lambda_min_clipped") or -math.inf) > -math.inf:
        raise InvalidRequest(
            f"dpmpp_2m with lambda_min_clipped={config['lambda_min_clipped']} is not supported; leave it out"
        )
