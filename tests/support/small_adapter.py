"""Adapters and image encoders with the key layout of the published files, at any width, filled with random numbers."""

import torch
from PIL import Image

from stylefast.models.layout import AttentionLayout
from tests.support.small_sdxl import small_unet_config

CROSS_DIM = 64  # of `small_unet_config`


def small_layout() -> AttentionLayout:
    """SDXL's arrangement of blocks, narrow: 11 attention modules, two levels of feature maps."""
    return AttentionLayout.from_config(small_unet_config())


def layer_weights(layout: AttentionLayout, cross_dim: int = CROSS_DIM, seed: int = 0) -> dict[str, torch.Tensor]:
    """`{k}.to_k_ip.weight` and `{k}.to_v_ip.weight` of every layer, k odd."""
    draw = torch.Generator().manual_seed(seed)
    return {
        f"{layout.ip_adapter_key(i)}.to_{which}_ip.weight": torch.randn(layer.channels, cross_dim, generator=draw)
        / cross_dim**0.5
        for i, layer in enumerate(layout.layers)
        for which in "kv"
    }


def global_adapter(
    layout: AttentionLayout, cross_dim: int = CROSS_DIM, embed_dim: int = 48, tokens: int = 4, seed: int = 0
) -> dict[str, dict[str, torch.Tensor]]:
    """ip-adapter_sdxl's layout, nested as in a .bin; ip-adapter_sdxl_vit-h's is the same with another `embed_dim`."""
    draw = torch.Generator().manual_seed(seed + 1)
    rows = tokens * cross_dim
    return {
        "image_proj": {
            "proj.weight": torch.randn(rows, embed_dim, generator=draw) / embed_dim**0.5,
            "proj.bias": torch.randn(rows, generator=draw),
            "norm.weight": 1 + 0.1 * torch.randn(cross_dim, generator=draw),
            "norm.bias": 0.1 * torch.randn(cross_dim, generator=draw),
        },
        "ip_adapter": layer_weights(layout, cross_dim, seed),
    }


def plus_adapter(
    layout: AttentionLayout,
    cross_dim: int = CROSS_DIM,
    embed_dim: int = 40,
    width: int = 32,
    heads: int = 2,
    tokens: int = 16,
    seed: int = 0,
) -> dict[str, dict[str, torch.Tensor]]:
    """ip-adapter-plus_sdxl_vit-h's layout, nested as in a .bin; `embed_dim` is the encoder's hidden size."""
    draw = torch.Generator().manual_seed(seed + 2)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=draw) / columns**0.5

    def norm(name: str, size: int) -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": 1 + 0.1 * torch.randn(size, generator=draw),
            f"{name}.bias": 0.1 * torch.randn(size, generator=draw),
        }

    inner = 64 * heads
    projector = {
        "latents": torch.randn(1, tokens, width, generator=draw),
        "proj_in.weight": matrix(width, embed_dim),
        "proj_in.bias": torch.randn(width, generator=draw),
        "proj_out.weight": matrix(cross_dim, width),
        "proj_out.bias": torch.randn(cross_dim, generator=draw),
        **norm("norm_out", cross_dim),
    }
    for i in range(4):
        projector |= norm(f"layers.{i}.0.norm1", width) | norm(f"layers.{i}.0.norm2", width)
        projector |= {
            f"layers.{i}.0.to_q.weight": matrix(inner, width),
            f"layers.{i}.0.to_kv.weight": matrix(2 * inner, width),
            f"layers.{i}.0.to_out.weight": matrix(width, inner),
            **norm(f"layers.{i}.1.0", width),
            f"layers.{i}.1.1.weight": matrix(4 * width, width),
            f"layers.{i}.1.3.weight": matrix(width, 4 * width),
        }
    return {"image_proj": projector, "ip_adapter": layer_weights(layout, cross_dim, seed)}


def save_adapter(state: dict[str, dict[str, torch.Tensor]], path) -> None:
    """Write a nested state dict as the published `.safetensors` (flat keys), or pickled (nested)."""
    if not str(path).endswith(".safetensors"):
        torch.save(state, path)
        return
    from safetensors.torch import save_file

    save_file({f"{part}.{key}": tensor for part, inner in state.items() for key, tensor in inner.items()}, path)


def small_vision_model(seed: int = 0, projection_dim: int = 48, hidden_size: int = 40, image_size: int = 32):
    """A random CLIPVisionModelWithProjection, patches of 8 pixels."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = CLIPVisionConfig(
            hidden_size=hidden_size,
            intermediate_size=64,
            projection_dim=projection_dim,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=8,
        )
        return CLIPVisionModelWithProjection(config).eval()


def small_picture(seed: int = 0, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth random picture, (width, height) = `size`."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (5, 6, 3), generator=draw, dtype=torch.uint8).numpy()
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
