"""Models to measure: the embedded one, and SDXL's layout at half and full width with random weights.

Speed does not depend on the weights as long as activations stay of order one, so matrices are drawn with a deviation of
1 / sqrt(inputs). Engine and published form use the same values.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.runtime.published import Published
from stylefast import Engine
from stylefast.models.checkpoint import TINY, load_components

SEED = 20231204
HEAD_WIDTH = 64


@dataclass(frozen=True)
class Model:
    """One model in both forms; `size` is (width, height) in pixels."""

    name: str
    engine: Engine
    published: Published
    size: tuple[int, int]


def tiny_model(device: str = "cpu", **engine_options) -> Model:
    """Load the embedded model at its own size, with its adapter; fp32."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    parts = load_components("tiny", dtype=torch.float32, device=device)
    unet = UNet2DConditionModel(**{name: value for name, value in parts.unet_config.items() if name[0] != "_"})
    unet.load_state_dict(parts.unet_state, assign=True)
    scheduler = EulerDiscreteScheduler.from_config(parts.scheduler_config)
    pipeline = _pipeline(unet.eval(), parts.vae, parts.text_encoders, parts.tokenizers, scheduler)
    engine = Engine.from_pretrained("tiny", device=device, dtype="float32", **engine_options)
    return Model("tiny", engine, Published(pipeline), engine.native_size)


def random_model(
    name: str,
    unet: Mapping,
    text_widths: tuple[int, int],
    vae: Mapping,
    device: str,
    dtype: torch.dtype,
    **engine_options,
) -> Model:
    """Make a model of SDXL's layout at the native size of `unet`, a config of `unet_config`; weights are shared."""
    pipeline = random_pipeline(unet, text_widths, vae, device, dtype)
    engine = Engine.from_pipeline(pipeline, **engine_options)
    return Model(name, engine, Published(pipeline), engine.native_size)


def half_width_model(side: int = 32) -> Model:
    """Make a model with half of SDXL's widths and full depth, fp32 on the CPU: 0.65e9 parameters.

    side: height and width of the latents.
    """
    vae = vae_config((32, 32, 32, 32), 1)
    return random_model("half-width SDXL", half_width_config(side), (512, 512), vae, "cpu", torch.float32)


def sdxl_model(device: str = "cuda", **engine_options) -> Model:
    """Make SDXL's UNet and VAE at 1024x1024 in bf16; the text encoders have its widths and two layers each."""
    vae = vae_config((128, 256, 512, 512), 2)
    return random_model("SDXL", sdxl_config(), (768, 1280), vae, device, torch.bfloat16, **engine_options)


def half_width_config(side: int) -> dict:
    """Return `sdxl_config` with every width halved."""
    return unet_config((160, 320, 640), cross_dim=1024, pooled_dim=512, time_dim=128, side=side)


def sdxl_config() -> dict:
    """Return the config of SDXL base's own UNet."""
    return unet_config((320, 640, 1280), cross_dim=2048, pooled_dim=1280, time_dim=256, side=128)


def unet_config(
    widths: tuple[int, int, int],
    *,
    cross_dim: int,
    pooled_dim: int,
    time_dim: int,
    side: int,
    depth: tuple[int, int, int] = (1, 2, 10),
) -> dict:
    """Return arguments of diffusers' UNet2DConditionModel for SDXL's layout.

    The first width has no attention; the others must be divisible by the head width 64.
    """
    return {
        "sample_size": side,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": widths,
        "transformer_layers_per_block": depth,
        "attention_head_dim": tuple(max(1, width // HEAD_WIDTH) for width in widths),  # in diffusers: number of heads
        "cross_attention_dim": cross_dim,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_dim,
        "projection_class_embeddings_input_dim": pooled_dim + 6 * time_dim,
    }


def vae_config(widths: tuple[int, ...], layers: int) -> dict:
    """Return arguments of diffusers' AutoencoderKL; a latent covers 2 ** (len(widths) - 1) pixels along a side."""
    return {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "scaling_factor": 0.13025,
    }


def random_pipeline(unet: Mapping, text_widths: tuple[int, int], vae: Mapping, device: str, dtype: torch.dtype):
    """Make a diffusers StableDiffusionXLPipeline with the embedded model's tokenizers."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizers = [CLIPTokenizer.from_pretrained(TINY / part) for part in ("tokenizer", "tokenizer_2")]
    texts = [
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=width // HEAD_WIDTH,
            projection_dim=width,
            max_position_embeddings=77,
            eos_token_id=tokenizer.eos_token_id,
            hidden_act=act,
        )
        for tokenizer, width, act in zip(tokenizers, text_widths, ("quick_gelu", "gelu"), strict=True)
    ]
    # UNet and VAE are created on the meta device and filled in place: at full size, going through fp32 would take
    # minutes. Text encoders have their own buffers, so they are created normally
    with torch.device("meta"):
        bare = [UNet2DConditionModel(**unet), AutoencoderKL(**vae)]
    # the base class's `to`: diffusers' own prints warnings that matter only for trained weights
    made = [torch.nn.Module.to(module, dtype).to_empty(device=device) for module in bare]
    made += [CLIPTextModel(texts[0]).to(device, dtype), CLIPTextModelWithProjection(texts[1]).to(device, dtype)]
    for seed, module in enumerate(made, SEED):
        randomise(module.eval().requires_grad_(False), seed)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    return _pipeline(made[0], made[1], made[2:], tokenizers, scheduler)


def _pipeline(unet, vae, text_encoders, tokenizers, scheduler):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline(
        vae, *text_encoders, *tokenizers, unet, scheduler, force_zeros_for_empty_prompt=True, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Fill every parameter with seeded values: gains 1, biases small, matrices scaled by their number of inputs."""
    parameters = dict(module.named_parameters())
    generator = torch.Generator(next(iter(parameters.values())).device).manual_seed(seed)
    with torch.no_grad():
        for name, values in parameters.items():
            if values.ndim == 1:
                gain = "norm" in name and name.endswith("weight")
                values.fill_(1.0) if gain else values.normal_(0.0, 0.02, generator=generator)
            elif "embedding" in name and values.ndim == 2 and "linear" not in name:
                values.normal_(0.0, 0.2, generator=generator)
            else:
                values.normal_(0.0, values[0].numel() ** -0.5, generator=generator)
