"""diffusers' pipelines of other kinds on the models of one."""

from tests.support.oracle.sampler import make_scheduler

_PARTS = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet")


def of_kind(pipe, kind: str, scheduler: str, **more):
    """Return `StableDiffusionXL<kind>Pipeline` with a pipeline's models, a sampler by our name, and `more` parts."""
    import diffusers

    parts = {name: getattr(pipe, name) for name in _PARTS}
    made = getattr(diffusers, f"StableDiffusionXL{kind}Pipeline")(
        **parts, scheduler=make_scheduler(scheduler, pipe.scheduler.config), **more
    )
    made.set_progress_bar_config(disable=True)
    return made
