"""Small random SDXL checkpoints in every published form, for tests: seconds to make, same keys and layout as the real.

The small UNet has SDXL's blocks and names (`down_blocks.2.attentions.1`, `up_blocks.0.attentions.1`, 11 attention
modules) at widths 32/64/64; both text encoders are 32 wide, so that cross-attention sees 64 channels.
"""

from functools import lru_cache

import torch

WORDS = ("a", "in", "of", "style", "cat", "dog", "house", "fish", "neon", "oil", "painting")
MAX_TOKENS = 77


def small_unet_config(widths=(32, 64, 64), head_width=16, depth=(1, 1, 2), cross_dim=64, pooled_dim=32, **changes):
    """A UNet2DConditionModel config (a dict of constructor arguments) with SDXL's layout."""
    config = {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": tuple(widths),
        "layers_per_block": 2,
        "transformer_layers_per_block": tuple(depth),
        "attention_head_dim": tuple(width // head_width for width in widths),
        "cross_attention_dim": cross_dim,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": pooled_dim + 6 * 8,
        "norm_num_groups": 32,
    }
    return config | changes


def sdxl_unet_config():
    """The published config of SDXL base 1.0's UNet (2,567,463,684 parameters)."""
    return small_unet_config(
        widths=(320, 640, 1280),
        head_width=64,
        depth=(1, 2, 10),
        cross_dim=2048,
        pooled_dim=1280,
        sample_size=128,
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def small_vae_config(**changes):
    """An AutoencoderKL config: 4 latent channels, 4 pixels per latent."""
    config = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (32, 32, 64),
        "layers_per_block": 1,
        "latent_channels": 4,
        "sample_size": 64,
        "scaling_factor": 0.13025,
        "force_upcast": True,
    }
    return config | changes


def small_tokenizer(pad_token="<|endoftext|>", words=WORDS, max_tokens=MAX_TOKENS):
    """A CLIPTokenizer: bytes ("!" is 0), then `words` as whole tokens, then start and end (the highest id)."""
    from transformers import CLIPTokenizer

    alphabet = _byte_alphabet()
    vocab = {token: index for index, token in enumerate(alphabet + [letter + "</w>" for letter in alphabet])}
    merges = []
    for word in words:
        suffix = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            merges.append((letter, suffix))
            suffix = letter + suffix
            vocab.setdefault(suffix, len(vocab))
    vocab["<|startoftext|>"] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    merges = list(dict.fromkeys(merges))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens, pad_token=pad_token)


def small_text_encoders(seed=0, width=32, layers=2, heads=2):
    """(CLIPTextModel with quick GELU, CLIPTextModelWithProjection with GELU), as in SDXL."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shared = {
        "vocab_size": len(small_tokenizer()),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": MAX_TOKENS,
        "projection_dim": width,
        # the published configs say 2, which transformers reads as "the highest id ends the prompt"
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    first = CLIPTextModel(CLIPTextConfig(hidden_act="quick_gelu", **shared))
    second = CLIPTextModelWithProjection(CLIPTextConfig(hidden_act="gelu", **shared))
    return tuple(_randomised(encoder, seed + 1 + i).eval() for i, encoder in enumerate((first, second)))


def small_pipeline(seed=0, unet_config=None, vae_config=None, text_width=32, text_heads=2, unet=None):
    """A random StableDiffusionXLPipeline; fp32, CPU, a new one at each call, equal for equal seeds."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    first, second = small_text_encoders(seed, text_width, heads=text_heads)
    if unet is None:
        unet = _randomised(UNet2DConditionModel(**(unet_config or small_unet_config())), seed + 4)
    vae = AutoencoderKL(**(vae_config or small_vae_config()))
    pipeline = StableDiffusionXLPipeline(
        vae=_randomised(vae, seed + 3).eval(),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=small_tokenizer(),
        tokenizer_2=small_tokenizer(pad_token="!"),
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def small_tiny_vae(seed=0):
    """A random AutoencoderTiny, 4 pixels per latent."""
    from diffusers import AutoencoderTiny

    vae = AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    )
    return _randomised(vae, seed).eval()


def _randomised(module, seed):
    """Give every parameter a seeded random value: default init leaves zeros that would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.05 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                fan_in = parameter[0].numel()
                parameter.copy_(noise * (0.2 if "embedding" in name else fan_in**-0.5))
    return module


@lru_cache(maxsize=1)
def _byte_alphabet():
    """The 256 printable stand-ins of byte-level BPE, in CLIP's order ("!" is 0)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(hidden))]
