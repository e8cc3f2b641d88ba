"""Builders of small text encoders and tokenizers with SDXL's conventions, for tests of several areas."""

import torch

from tests.support import small_sdxl

WORDS = ("a", "an", "in", "the", "style", "of", "painting", "cat", "dog", "house", "red", "on")


def small_encoder(tokenizer, width: int, projection: int | None = None, seed: int = 0, eos_token_id: int = 2):
    """A random CLIP text model; with `projection` it is one with a text projection, as SDXL's second."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=projection or width,
        hidden_act="gelu" if projection else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    with torch.no_grad():
        # CLIP's own initialisation is so small that wrong tokens would hide within the tolerance
        model.get_input_embeddings().weight.normal_(std=0.5)
    return model


def small_text_parts(max_tokens: int = 77, widths: tuple[int, int] = (32, 48), eos_token_id: int = 2):
    """((tokenizer 1, tokenizer 2), (encoder 1, encoder 2)), padded with the end token and with `!`, as SDXL's."""
    tokenizers = tuple(small_sdxl.small_tokenizer(pad, WORDS, max_tokens) for pad in ("<|endoftext|>", "!"))
    encoders = (
        small_encoder(tokenizers[0], widths[0], seed=1, eos_token_id=eos_token_id),
        small_encoder(tokenizers[1], widths[1], projection=40, seed=2, eos_token_id=eos_token_id),
    )
    return tokenizers, encoders


def small_pipeline(tokenizers, encoders, force_zeros: bool = True):
    """Stock diffusers around the encoders, good for `encode_prompt` and `load_textual_inversion`."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=None,
        text_encoder=encoders[0],
        text_encoder_2=encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=None,
        scheduler=EulerDiscreteScheduler(),
        force_zeros_for_empty_prompt=force_zeros,
    )
