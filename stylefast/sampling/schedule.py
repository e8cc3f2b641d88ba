"""Schedules: precomputed sampler tables that the step loop reads row by row."""

import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from stylefast import values
from stylefast.errors import InvalidRequest
from stylefast.sampling import consistency, dpm_solvers, solvers
from stylefast.sampling.edm import check_edm, is_edm
from stylefast.sampling.noise_levels import SDXL_SCHEDULER
from stylefast.sampling.spacing import (
    EXPONENTIAL,
    KARRAS,
    SPACINGS,
    check_timesteps,
    euler_levels,
    multistep_levels,
)
from stylefast.sampling.tables import NOISE, PREDICTION_TYPES, Tables
from stylefast.sampling.unipc import unipc

SCHEDULERS = (
    "ddim",
    "euler",
    "euler_ancestral",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_3m",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "unipc",
    "lcm",
    "tcd",
)
# samplers that accept the suffixes "_karras" and "_exponential"
KARRAS_SCHEDULERS = ("euler", "dpmpp_2m", "unipc", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_3m_sde", "dpmpp_sde")
# samplers that accept explicit timesteps
TIMESTEP_SCHEDULERS = ("euler", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_3m_sde", "dpmpp_sde", "lcm", "tcd")
# every name that `make_schedule` accepts
SCHEDULER_NAMES = (*SCHEDULERS, *(f"{name}_{ending}" for ending in (KARRAS, EXPONENTIAL) for name in KARRAS_SCHEDULERS))
MAX_STEPS = 1000

_DEFAULT_ETA = {"ddim": 0.0, "tcd": 0.3}
# samplers with a fixed timestep layout -> the spacings they accept
_OWN_SPACING = {"dpmpp_sde": ("linspace",), "lcm": (), "tcd": ()}
# (order, SDE)
_MULTISTEP = {"dpmpp_2m": (2, False), "dpmpp_2m_sde": (2, True), "dpmpp_3m": (3, False), "dpmpp_3m_sde": (3, True)}
# samplers whose steps depend on those before
_REMEMBERING = ("unipc", "dpmpp_sde", *_MULTISTEP)

_DPMPP_UNSUPPORTED = ("thresholding", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")
# config settings that would change these samplers and that the tables don't implement
_UNSUPPORTED = {
    "ddim": ("clip_sample", "thresholding"),
    "lcm": ("clip_sample", "thresholding"),
    "tcd": (),
    "euler": ("use_beta_sigmas",),
    "euler_ancestral": (),
    "dpmpp_sde": _DPMPP_UNSUPPORTED,
    "unipc": ("thresholding", "use_beta_sigmas", "use_flow_sigmas"),
    **dict.fromkeys(_MULTISTEP, _DPMPP_UNSUPPORTED),
}


@dataclass(frozen=True, eq=False)
class Schedule:
    """Coefficients of every step; all tensors float32 on the CPU.

    Step i: the model receives `latents * input_scale[i]` at `timesteps[i]`; `x0 = denoised[i] @ (latents, output)`;
    `(latents, anchor) = update[i] @ (latents, anchor, x0, x0 of step i - 1, x0 of step i - 2, noise)`.
    Sampling starts at `init_noise_scale * noise`, with anchor and history zero. For LCM, x0 is the value of the
    consistency function, boundary condition included.

    `make_schedule` returns shared objects: don't modify them.
    """

    name: str
    timesteps: torch.Tensor  # [steps]: the UNet's time input; may be fractional
    input_scale: torch.Tensor  # [steps]
    denoised: torch.Tensor  # [steps, 2]
    update: torch.Tensor  # [steps, 2, 6]
    forward: torch.Tensor  # [steps + 1, 2]: a clean z0 noised to the level before step i is forward[i] @ (z0, noise)
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
                raise InvalidRequest(
                    f"{self.name}: {field} contains values that are not finite; use other steps or another spacing"
                )

    @property
    def steps(self) -> int:
        """Return the number of UNet evaluations."""
        return len(self.timesteps)

    @property
    def uses_noise(self) -> bool:
        """Return whether any step adds fresh noise."""
        return bool(self.update[:, :, NOISE].any())


def make_schedule(
    name: str,
    steps: int,
    config: Mapping = SDXL_SCHEDULER,
    *,
    spacing: str | None = None,
    karras: bool | None = None,
    exponential: bool | None = None,
    eta: float | None = None,
    prediction_type: str | None = None,
    timesteps: Sequence[int] | None = None,
    start: int = 0,
) -> Schedule:
    """Build the schedule of `steps` steps of the sampler `name`; equal arguments return the same Schedule object.

    Args:
        name: one of SCHEDULERS; those in KARRAS_SCHEDULERS also with the suffix "_karras" or "_exponential".
        steps: number of UNet evaluations, for dpmpp_sde too.
        config: a scheduler config in diffusers format. It determines the noise levels, the timesteps and the prediction
            type; the name alone determines the sampler, so `solver_order`, `algorithm_type` and similar keys are
            ignored. Missing keys default to SDXL's values. EDM configs (`edm.EDM_CLASSES`) support EDM_SCHEDULERS only.
        spacing: "leading", "linspace" or "trailing", overrides the config's.
        karras, exponential: Karras noise levels, or levels even in log sigma; None: the name's suffix or the config.
        eta: the share of fresh noise, in [0, 1], of ddim (default 0) and tcd (its gamma, default 0.3).
        prediction_type: "epsilon", "v_prediction" or "sample", overrides the config's.
        timesteps: `steps` explicit timesteps, descending whole numbers; for TIMESTEP_SCHEDULERS.
        start: the step that sampling begins with, at a picture with noise; see `first_step`.

    Raises InvalidRequest for an unknown name, steps outside 1..1000, or a setting the sampler doesn't support.

    Examples:
        >>> from stylefast.sampling import make_schedule
        >>> schedule = make_schedule("dpmpp_2m_karras", 20)
        >>> schedule.steps, schedule.uses_noise
        (20, False)
        >>> make_schedule("lcm", 2, timesteps=[999, 499]).timesteps
        tensor([999., 499.])
    """
    base, suffix = _split(name)
    config = {**SDXL_SCHEDULER, **config}
    if prediction_type is not None:
        config["prediction_type"] = prediction_type
    if spacing is not None:
        config["timestep_spacing"] = spacing
    if is_edm(config):
        _check_edm_arguments(base, spacing, timesteps, config)
        # keys that EDM schedulers ignore
        config |= {"use_karras_sigmas": False, "use_exponential_sigmas": False, "timestep_spacing": "leading"}
    steps = _check(base, steps, config)
    levels = _levels(name, base, suffix, {KARRAS: karras, EXPONENTIAL: exponential}, config)
    eta = _eta(base, eta)
    given = None if timesteps is None else _given(base, steps, levels, spacing, timesteps, config)
    if base in _OWN_SPACING and spacing not in (None, *_OWN_SPACING[base]):
        raise InvalidRequest(
            f"{base} chooses its own timesteps, so spacing={values.quoted(spacing)} would have no effect; leave it "
            "out, or give the timesteps"
        )

    if base not in _REMEMBERING:
        start = 0  # makes no difference
    try:
        frozen = _frozen(config)
    except TypeError:
        # an unhashable value can't be a cache key
        return _lay_out.__wrapped__(base, steps, levels, eta, given, config, start)
    return _lay_out(base, steps, levels, eta, given, frozen, start)


def first_step(steps: int, strength: float) -> int:
    """Return the step with which sampling begins that starts from a picture, as in diffusers.

    strength: share of the steps that run, in [0, 1], rounded down to whole steps.

    Examples:
        >>> from stylefast.sampling import first_step
        >>> first_step(30, 0.6)
        12
    """
    return steps - int(steps * strength)


def schedule_digest(schedule: Schedule) -> str:
    """Return 16 hexadecimal digits of SHA-256 over the schedule's name and the bytes of every table."""
    digest = hashlib.sha256(schedule.name.encode())
    tables = (schedule.timesteps, schedule.input_scale, schedule.denoised, schedule.update, schedule.forward)
    for table in tables:
        # "<f4": the same bytes on every machine
        digest.update(np.ascontiguousarray(table.numpy(), dtype="<f4").tobytes())
    digest.update(np.array(schedule.init_noise_scale, dtype="<f4").tobytes())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=256)
def _lay_out(
    base: str, steps: int, levels: str | None, eta: float, given: tuple[int, ...] | None, config, start: int
) -> Schedule:
    # config: a mapping, or its items
    *columns, init_noise_scale = _tables(
        base, steps, levels, eta, None if given is None else np.array(given, dtype=np.int64), dict(config), start
    )
    return Schedule(
        base if levels is None else f"{base}_{levels}",
        *(torch.from_numpy(column.astype(np.float32)) for column in columns),
        init_noise_scale=init_noise_scale,
    )


def _tables(
    base: str, steps: int, levels: str | None, eta: float, given: np.ndarray | None, config: dict, start: int
) -> Tables:
    if base == "ddim":
        return solvers.ddim(config, steps, eta)
    if base == "euler":
        return solvers.euler(config, *euler_levels(config, steps, levels, given))
    if base == "euler_ancestral":
        config["final_sigmas_type"] = "zero"
        return solvers.euler_ancestral(config, *euler_levels(config, steps, levels, given))
    if base in ("lcm", "tcd"):
        timesteps = given if given is not None else consistency.distilled_timesteps(base, config, steps)
        return consistency.lcm(config, timesteps) if base == "lcm" else consistency.tcd(config, timesteps, eta)
    if base == "unipc":
        return unipc(config, *multistep_levels(config, steps, levels, given, round_karras=True), start)
    if base == "dpmpp_sde":
        config["timestep_spacing"] = "linspace"
        return dpm_solvers.dpmpp_sde(config, *multistep_levels(config, steps, levels, given, round_karras=True), start)
    order, sde = _MULTISTEP[base]
    # the cosine schedule's last timesteps are so noisy that rounding would merge them
    whole = config["beta_schedule"] != "squaredcos_cap_v2"
    visited = multistep_levels(config, steps, levels, given, round_karras=whole)
    return dpm_solvers.dpmpp_multistep(config, *visited, order=order, sde=sde, start=start)


def _frozen(value) -> Hashable:
    # hashable copy that is equal for equal content (a mapping becomes its items); raises TypeError if there is none
    if isinstance(value, Mapping):
        return frozenset((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, (np.ndarray, torch.Tensor)):
        value = value.tolist()
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _split(name: str) -> tuple[str, str | None]:
    base, suffix = name, None
    for levels in (KARRAS, EXPONENTIAL):
        if isinstance(name, str) and name.endswith("_" + levels):
            base, suffix = name.removesuffix("_" + levels), levels
    if not isinstance(base, str) or base not in SCHEDULERS:
        raise InvalidRequest(
            f"scheduler {values.quoted(name)} is unknown; choose one of {', '.join(SCHEDULERS)}, or one of "
            f"{', '.join(KARRAS_SCHEDULERS)} with the suffix '_{KARRAS}' or "
            f"'_{EXPONENTIAL}'{values.did_you_mean(name, SCHEDULER_NAMES)}"
        )
    return base, suffix


def _levels(name: str, base: str, suffix: str | None, arguments: dict, config: Mapping) -> str | None:
    if suffix is not None and arguments[suffix] is False:
        raise InvalidRequest(f"scheduler {values.quoted(name)} contradicts {suffix}=False; drop one of the two")
    wanted = {levels for levels, on in arguments.items() if on or levels == suffix}
    if base not in KARRAS_SCHEDULERS:
        if wanted:
            form = "Karras" if KARRAS in wanted else "exponential"
            raise InvalidRequest(f"{base} has no {form} form; samplers that have one: {', '.join(KARRAS_SCHEDULERS)}")
        return None
    if not wanted:
        wanted = {levels for levels, on in arguments.items() if on is None and config[f"use_{levels}_sigmas"]}
    if len(wanted) > 1:
        raise InvalidRequest(
            f"{values.quoted(name)} can't have Karras and exponential noise levels at once; drop one of the two"
        )
    return next(iter(wanted), None)


def _eta(base: str, eta: float | None) -> float:
    if eta is None:
        return _DEFAULT_ETA.get(base, 0.0)
    eta = values.real_number("eta", eta, 0, 1)
    if eta and base not in _DEFAULT_ETA:
        raise InvalidRequest(f"eta={eta} is an argument of ddim and tcd, not of {base}; leave it out")
    return eta


def _given(
    base: str, steps: int, levels: str | None, spacing: str | None, timesteps: Sequence[int], config: Mapping
) -> tuple[int, ...]:
    if base not in TIMESTEP_SCHEDULERS:
        raise InvalidRequest(
            f"{base} does not accept explicit timesteps; samplers that do: {', '.join(TIMESTEP_SCHEDULERS)}"
        )
    if levels is not None:
        raise InvalidRequest(f"explicit timesteps contradict {levels} noise levels; drop one of the two")
    if spacing is not None:
        raise InvalidRequest(f"explicit timesteps contradict spacing={values.quoted(spacing)}; drop one of the two")
    return tuple(check_timesteps(timesteps, steps, config["num_train_timesteps"]).tolist())


def _check_edm_arguments(base: str, spacing: str | None, timesteps: Sequence[int] | None, config: Mapping) -> None:
    check_edm(base, config)
    for name, value in (("spacing", spacing), ("timesteps", timesteps)):
        if value is not None:
            raise InvalidRequest(
                f"{name}={values.quoted(value)} refers to training timesteps, which a model of {config['_class_name']} "
                "does not have; leave it out"
            )


def _check(base: str, steps: int, config: Mapping) -> int:
    """Return the steps as a plain int. Raises InvalidRequest if base or config don't support them."""
    limit = min(MAX_STEPS, config["num_train_timesteps"])
    steps = values.whole_number("steps", steps, 1, limit)
    if config["timestep_spacing"] not in SPACINGS:
        raise InvalidRequest(
            f"timestep spacing {values.quoted(config['timestep_spacing'])} is unknown; choose one of "
            f"{', '.join(SPACINGS)}"
        )
    if config["prediction_type"] not in PREDICTION_TYPES:
        raise InvalidRequest(
            f"prediction_type {values.quoted(config['prediction_type'])} is unknown; choose one of "
            f"{', '.join(PREDICTION_TYPES)}"
        )
    for key in _UNSUPPORTED[base]:
        if config.get(key):
            raise InvalidRequest(
                f"{base} with {key}={values.quoted(config[key])} is not supported; set it to False in the config"
            )
    if base == "euler" and config.get("interpolation_type", "linear") != "linear":
        raise InvalidRequest(
            f"interpolation_type {values.quoted(config['interpolation_type'])} is not supported; use 'linear'"
        )
    if base == "euler" and config.get("timestep_type", "discrete") != "discrete":
        raise InvalidRequest(f"timestep_type {values.quoted(config['timestep_type'])} is not supported; use 'discrete'")
    if base.startswith("dpmpp") and (config.get("lambda_min_clipped") or -math.inf) > -math.inf:
        raise InvalidRequest(
            f"{base} with lambda_min_clipped={config['lambda_min_clipped']} is not supported; leave it out"
        )
    return steps
