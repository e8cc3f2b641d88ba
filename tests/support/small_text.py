"""Builders of small text encoders and tokenizers with SDXL's conventions, for tests of several areas."""

import json
import tempfile
from pathlib import Path

import torch

WORDS = ("a", "an", "in", "the", "style", "of", "painting", "cat", "dog", "house", "red", "on")


def byte_characters() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [b for b in range(256) if b not in plain]
    return [chr(b) for b in plain] + [chr(256 + k) for k in range(len(moved))]


def small_tokenizer(max_tokens: int, pad_token: str = "<|endoftext|>"):
    """A CLIP tokenizer whose `!` has id 0 and whose end token has the largest id, as in SDXL's."""
    from transformers import CLIPTokenizer

    characters = byte_characters()
    vocabulary = characters + [c + "</w>" for c in characters]
    merges = []
    for word in WORDS:
        tail = word[-1] + "</w>"
        for character in reversed(word[:-1]):
            if f"{character} {tail}" not in merges:
                merges.append(f"{character} {tail}")
            tail = character + tail
            if tail not in vocabulary:
                vocabulary.append(tail)
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({token: k for k, token in enumerate(vocabulary)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=max_tokens, pad_token=pad_token)


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
    tokenizers = small_tokenizer(max_tokens), small_tokenizer(max_tokens, "!")
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
