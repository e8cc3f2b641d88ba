"""The small model, adapters and styles that the engine's tests share, and a literal loop for what changes by step."""

import numpy as np
import torch
from PIL import Image

from stylefast.styles.embeddings import StageEmbedding
from tests.support.oracle import generation
from tests.support.oracle.dream_styler import Encoder, stage_of
from tests.support.oracle.sampler import make_scheduler, sample
from tests.support.small_adapter import small_picture, small_vision_model
from tests.support.small_sdxl import small_pipeline, small_unet_config
from tests.support.small_unet import SMALL, sharpen

EMBED_DIM = 32  # of the image encoder and of text encoder 2, so that content can be subtracted
SIZE = (48, 32)  # (width, height) in pixels; the oracle and diffusers take (height, width)
# of the oracle's loop and of `draw`: a first step and a last one; samplers of higher order need a third
RUN = {"scheduler": "euler", "steps": 2, "size": (32, 48)}
STEPS = 3  # of requests that meet others on their way
# one module with two layers on the way down and one on the way up: enough to tell layers from modules
DEPTHS = {"depth": (1, 1, [1, 2]), "reverse_transformer_layers_per_block": [[2, 1, 1], 1, 1]}


def sharp_pipeline(seed: int = 1, prediction_type: str = "epsilon"):
    """A random SDXL pipeline with sharp attention, an image encoder, and the published scheduler config."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPImageProcessor

    # diffusers' own initialisation is calm enough for 1e-5 to survive some steps; sharpened, it hides no mistake
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(**small_unet_config(**SMALL, **DEPTHS))
    sharpen(unet.requires_grad_(False), seed)
    pipe = small_pipeline(seed, unet=unet)
    # a config that a scheduler made of its own defaults would not hand them on
    config = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    pipe.scheduler = EulerDiscreteScheduler.from_config(config | {"prediction_type": prediction_type})
    pipe.scheduler.register_to_config(clip_sample=False, set_alpha_to_one=False)
    pipe.register_modules(
        image_encoder=small_vision_model(seed, projection_dim=EMBED_DIM),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
    return pipe


def near(actual, expected, tolerance: float):
    """Equal to `tolerance` of the largest value in `expected`, where the two differ by more than rounding."""
    actual = torch.stack(list(actual)) if isinstance(actual, (list, tuple)) else actual
    expected = torch.stack(list(expected)) if isinstance(expected, (list, tuple)) else expected
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all() and torch.isfinite(expected).all()
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"off by {error:.2e} of the largest value"


def apart(actual, expected, least: float = 1e-3):
    """Every picture differs by at least `least` of the largest value."""
    actual, expected = torch.stack(list(actual)), torch.stack(list(expected))
    assert ((actual - expected).abs().amax((1, 2, 3)) / expected.abs().max()).min() > least


def psnr(found, expected, largest: float = 1.0) -> float:
    """Of one or more pictures in 0..`largest`, together, in dB."""
    error = np.mean((np.asarray(found, dtype=np.float64) - np.asarray(expected)) ** 2) / largest**2
    return float(-10 * np.log10(max(error, 1e-20)))


def half_mask() -> torch.Tensor:
    """A mask [height, width] of ones and zeros with an edge between two attention queries."""
    mask = torch.zeros(SIZE[1], SIZE[0])
    mask[:, : SIZE[0] // 2 - 3] = 1
    return mask


def embeds(pipe, *pictures: Image.Image) -> torch.Tensor:
    """Image embeddings [1, pictures, EMBED_DIM] by transformers' own processor and encoder."""
    pixels = pipe.feature_extractor(list(pictures), return_tensors="pt").pixel_values
    with torch.no_grad():
        return pipe.image_encoder(pixels).image_embeds[None]


def encode(pipe, prompts, negative: str | None = None):
    """(null, full) texts of diffusers for `prompts`."""
    return generation.encode(pipe, prompts, negative)


def guided(pipe, prompts, seeds, *, guidance: float = 5.0, negative: str | None = None, **options) -> torch.Tensor:
    """The oracle under classifier-free guidance; at `guidance` <= 1 with the full branch alone."""
    null, full = encode(pipe, prompts, negative)
    if guidance <= 1:
        options = {"null_branches": ()} | options
        branches, combine = (full,), lambda only: only
    else:
        branches, combine = (null, full), generation.classifier_free(guidance)
    return generation.generate(pipe, lambda timestep: branches, combine, seeds=seeds, **RUN | options)


def by_step(pipe, prompts, seeds, within, guidance: float = 5.0, **options) -> torch.Tensor:
    """The oracle under classifier-free guidance, every step inside the context manager `within(unet, step)`."""
    options = RUN | options
    (null, null_pooled), (full, full_pooled) = encode(pipe, prompts)
    height, width = options["size"]
    states, pooled = torch.cat([null, full]), torch.cat([null_pooled, full_pooled])
    time_ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).repeat(len(states), 1)

    def predict(latents, timestep, step):
        conditions = {"text_embeds": pooled, "time_ids": time_ids}
        with within(pipe.unet, step), torch.no_grad():
            output = pipe.unet(latents.repeat(2, 1, 1, 1), timestep, states, added_cond_kwargs=conditions).sample
        return generation.classifier_free(guidance)(*output.chunk(2))

    scheduler = make_scheduler(options["scheduler"], pipe.scheduler.config)
    shape = (4, height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    return sample(predict, scheduler, options["steps"], shape, seeds, dtype=pipe.unet.dtype)


def clean_latents(pipe, picture: Image.Image) -> torch.Tensor:
    """Latents [1, 4, h, w] of a picture of the right size: the posterior's mean, scaled."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        return pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor


def picture_noise(seed: int, size=SIZE) -> torch.Tensor:
    """The noise [1, 4, h, w] that a real reference keeps."""
    return torch.randn(1, 4, size[1] // 4, size[0] // 4, generator=torch.Generator().manual_seed(seed))


def learned(name: str = "sks", stages: int = 6, vectors: int = 1, seed: int = 0, **options) -> StageEmbedding:
    """Random vectors as large as the text encoders' own."""
    generator = torch.Generator().manual_seed(100 + seed)
    clip_l, clip_g = (0.4 * torch.randn(stages, vectors, 32, generator=generator) for _ in range(2))
    return StageEmbedding(name, clip_l, clip_g, **options)


class StageTexts:
    """What the oracle's branches read at a timestep: learned vectors as ordinary added tokens, one name a stage."""

    def __init__(self, pipe, embedding: StageEmbedding):
        self.stages, self.vectors = embedding.stages, embedding.clip_l.shape[1]
        rows = {
            self._token(stage, n): (embedding.clip_l[stage, n], embedding.clip_g[stage, n])
            for stage in range(self.stages)
            for n in range(self.vectors)
        }
        self.encoder, self.memo = Encoder(pipe, rows), {}

    def _token(self, stage: int, n: int) -> str:
        return f"<T{stage}-{n}>"

    def __call__(self, prompts, timestep: float):
        """Texts of one branch; {} in a prompt is the learned token at the stage of `timestep`."""
        stage = stage_of(timestep, self.stages)
        word = " ".join(self._token(stage, n) for n in range(self.vectors))
        return self.plain([prompt.replace("{}", word) for prompt in prompts])

    def plain(self, prompts):
        """Texts of prompts as they stand."""
        for prompt in prompts:
            if prompt not in self.memo:
                self.memo[prompt] = self.encoder(prompt)
        states, pooled = zip(*(self.memo[prompt] for prompt in prompts))
        return torch.cat(states), torch.cat(pooled)


__all__ = [
    "EMBED_DIM",
    "RUN",
    "SIZE",
    "STEPS",
    "StageTexts",
    "apart",
    "by_step",
    "clean_latents",
    "embeds",
    "encode",
    "guided",
    "half_mask",
    "learned",
    "near",
    "picture_noise",
    "psnr",
    "sharp_pipeline",
    "small_picture",
]
