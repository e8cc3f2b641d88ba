"""The embedded model, through the same code as any checkpoint, gives what diffusers makes of its files."""

import torch

import stylefast as sf
from stylefast.models.checkpoint import TINY
from tests.support.fp64 import close, measured


def test_stock_diffusers_draws_the_same_latents():
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(str(TINY), torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a fish in neon style", "a cat"]

    def theirs(pipe):
        return pipe(
            prompts,
            num_inference_steps=3,
            guidance_scale=5.0,
            height=64,
            width=64,
            output_type="latent",
            generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        ).images

    engine = sf.Engine.from_pretrained("tiny", device="cpu")
    close(engine.generate(prompts, steps=3, seed=5, output="latents").latents, measured(theirs, pipe))
