"""Published sampler settings of few-step distilled models."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from stylefast import values
from stylefast.errors import InvalidRequest
from stylefast.sampling.edm import check_edm, is_edm
from stylefast.sampling.noise_levels import SDXL_SCHEDULER
from stylefast.sampling.schedule import KARRAS_SCHEDULERS, SCHEDULER_NAMES, SCHEDULERS, Schedule, make_schedule
from stylefast.sampling.spacing import EXPONENTIAL, KARRAS


@dataclass(frozen=True)
class FewStepPreset:
    """Sampler settings of a distilled model. None leaves a setting to the model's config or the sampler.

    Args:
        steps: step counts it was trained for or published with.
        guidance: 1 (off), since guidance is distilled in.
        most_guidance: above it, pictures get hard contrasts and burnt colours; requests get a warning. 1 for models
            published with guidance off.
        The other arguments are those of `make_schedule`.
    """

    scheduler: str
    steps: tuple[int, ...]
    spacing: str | None = None
    prediction_type: str | None = None
    timesteps: tuple[int, ...] | None = None
    eta: float | None = None
    guidance: float = 1.0
    most_guidance: float = 1.0

    def schedule(self, steps: int, config: Mapping = SDXL_SCHEDULER, start: int = 0) -> Schedule:
        """Return the schedule of `steps` steps for a scheduler config in diffusers format.

        Raises InvalidRequest for a count outside `self.steps`.
        """
        if steps not in self.steps:
            raise InvalidRequest(
                f"models of this kind need {', '.join(map(str, self.steps))} steps, not {values.quoted(steps)}; use "
                f"one of these counts, or name the sampler itself, {values.quoted(self.scheduler)}"
            )
        return make_schedule(
            self.scheduler,
            steps,
            config,
            spacing=self.spacing,
            prediction_type=self.prediction_type,
            timesteps=self.timesteps,
            eta=self.eta,
            start=start,
        )


FEW_STEP_PRESETS: Mapping[str, FewStepPreset] = MappingProxyType(
    {
        "sdxl_turbo": FewStepPreset("euler_ancestral", (1, 2, 3, 4), spacing="trailing"),
        # one UNet or LoRA per step count
        "sdxl_lightning": FewStepPreset("euler", (2, 4, 8), spacing="trailing"),
        "sdxl_lightning_1step": FewStepPreset("euler", (1,), spacing="trailing", prediction_type="sample"),
        # LCM-LoRA is published with guidance from 1 to 2; its users take up to 2.5, for TCD too
        "lcm": FewStepPreset("lcm", (2, 3, 4, 5, 6, 7, 8), most_guidance=2.5),
        # one LoRA per step count
        "hyper_sd": FewStepPreset("ddim", (2, 4, 8), spacing="trailing"),
        # the one-step LoRA works for all step counts; a lower eta keeps more detail at higher counts
        "hyper_sd_unified": FewStepPreset("tcd", (1, 2, 3, 4, 5, 6, 7, 8), eta=1.0),
        "hyper_sd_1step_unet": FewStepPreset("lcm", (1,), timesteps=(800,)),
        "tcd": FewStepPreset("tcd", (4, 5, 6, 7, 8), eta=0.3, most_guidance=2.5),
        # DMD2 (arXiv 2405.14867) as demo/text_to_image_sdxl.py and README.md of github.com/tianweiy/DMD2 sample it:
        # jump to x0, then add noise of the next timestep. LCM does the same, since its boundary condition changes x0 by
        # less than 1e-7 at these timesteps; UNet, or LoRA at full strength
        "dmd2": FewStepPreset("lcm", (4,), timesteps=(999, 749, 499, 249)),
        "dmd2_1step": FewStepPreset("lcm", (1,), timesteps=(399,)),
    }
)


def guidance_warning(scheduler: str, guidance: float) -> str | None:
    """Return what to tell a user whose guidance the preset (or lcm, tcd) was not made for; None if it fits."""
    preset = FEW_STEP_PRESETS.get(scheduler)
    if preset is None or guidance <= preset.most_guidance:
        return None
    more = f", or at most {preset.most_guidance:g}" if preset.most_guidance > preset.guidance else ""
    return (
        f"scheduler {values.quoted(scheduler)} is for models distilled to guidance {preset.guidance:g}; guidance "
        f"{guidance:g} doubles the work of each step and burns the colours, unless the model is an edition made for "
        f"it: use {preset.guidance:g}{more}"
    )


def named_schedule(
    name: str, steps: int, config: Mapping = SDXL_SCHEDULER, spacing: str | None = None, start: int = 0
) -> Schedule:
    """Return the schedule of a sampler or preset by name; lcm and tcd, which are both, accept any number of steps.

    start: the step that sampling begins with.

    Raises InvalidRequest for an unknown name, or a step count or spacing the sampler doesn't support.
    """
    base = values.text("scheduler", name).removesuffix(f"_{KARRAS}").removesuffix(f"_{EXPONENTIAL}")
    if base not in SCHEDULERS and name not in FEW_STEP_PRESETS:
        meant = values.did_you_mean(name, (*SCHEDULER_NAMES, *FEW_STEP_PRESETS))
        raise InvalidRequest(
            f"scheduler is {values.quoted(name)}; choose one of {', '.join(SCHEDULERS)}, one of "
            f"{', '.join(KARRAS_SCHEDULERS)} with the suffix '_{KARRAS}' or '_{EXPONENTIAL}', or for few-step "
            f"models {', '.join(FEW_STEP_PRESETS)}{meant}"
        )
    if base in SCHEDULERS:
        return make_schedule(name, steps, config, spacing=spacing, start=start)
    if is_edm(config):
        check_edm(name, config)
    if spacing is not None:
        raise InvalidRequest(
            f"scheduler {values.quoted(name)} has its own spacing; leave spacing={values.quoted(spacing)} out"
        )
    return FEW_STEP_PRESETS[name].schedule(steps, config, start)
