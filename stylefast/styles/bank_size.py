"""Tensors and sizes of style banks, computed from a UNet's config alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from stylefast.errors import StyleError
from stylefast.models.layout import AttentionLayout, UNetShape
from stylefast.values import quoted

STORES = ("kv", "hidden", "latents")
DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn")


class LayerShape(NamedTuple):
    """Shape of one self-attention layer at one picture size."""

    tokens: int
    heads: int
    d: int

    @property
    def channels(self) -> int:
        return self.heads * self.d


class TensorSpec(NamedTuple):
    """Type and shape of a tensor, which may not exist yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class BankShapes:
    """Shapes of all features of a reference at one picture size, whether or not a bank stores them."""

    layers: tuple[LayerShape, ...]  # every self-attention layer of the UNet, registry order
    groups: tuple[int, ...]  # groups of every group norm, module order
    norm_elements: tuple[int, ...]  # elements in one group's statistics
    latents: tuple[int, int, int]  # (channels, height, width)

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(LayerShape(*layer) for layer in self.layers))
        for name in ("groups", "norm_elements", "latents"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        numbers = [n for layer in self.layers for n in layer] + [*self.groups, *self.norm_elements, *self.latents]
        if not all(type(n) is int and n >= 1 for n in numbers):
            raise StyleError(f"a style bank's shapes must be whole numbers of at least 1: {self}")
        if len(self.groups) != len(self.norm_elements) or len(self.latents) != 3 or not self.layers:
            raise StyleError(
                f"a style bank's shapes need layers ({len(self.layers)} given), as many norm_elements "
                f"({len(self.norm_elements)}) as groups ({len(self.groups)}) and latents of (channels, height, width), "
                f"not {self.latents}"
            )

    @classmethod
    def from_config(cls, config: Mapping, size: tuple[int, int], pixels_per_latent: int = 8) -> "BankShapes":
        """Compute the shapes for a UNet config in diffusers format and a picture `size` (width, height) in pixels.

        Raises StyleError for a size that is not a multiple of `pixels_per_latent`.
        """
        width, height = size
        if min(size) < pixels_per_latent or width % pixels_per_latent or height % pixels_per_latent:
            raise StyleError(
                f"size is {width}x{height}; both sides must be multiples of {pixels_per_latent}, the pixels per latent"
            )
        latents = (config["out_channels"], height // pixels_per_latent, width // pixels_per_latent)
        layout = AttentionLayout.from_config(config)
        areas = _areas(latents[1:], len(config["block_out_channels"]))
        layers = tuple(
            LayerShape(areas[layout.feature_maps[layer.level]], layer.heads, layer.channels // layer.heads)
            for layer in layout.layers
        )
        groups = config["norm_num_groups"]
        elements = tuple(width // groups * areas[level] for width, level in _norms(config))
        return cls(layers, (groups,) * len(elements), elements, latents)


def bank_tensors(
    shapes: BankShapes,
    *,
    steps: int,
    branches: int,
    references: int,
    store: str,
    dtype: str,
    layers: Sequence[int],
) -> dict[str, TensorSpec]:
    """Return name -> type and shape of every tensor of a bank; per layer and norm [steps, branches, references, ...].

    Raises StyleError for an unknown store or type, or a layer that the UNet does not have.
    """
    if store not in STORES:
        raise StyleError(f"store is {quoted(store)}; choose one of {', '.join(STORES)}")
    if dtype not in DTYPES:
        raise StyleError(f"the type of a style bank is {quoted(dtype)}; it must be one of {', '.join(DTYPES)}")
    kept, exact, each = getattr(torch, dtype), torch.float32, (steps, branches, references)
    if store == "latents":
        return {"latents": TensorSpec(exact, (steps + 1, references, *shapes.latents))}
    beyond = [layer for layer in layers if not 0 <= layer < len(shapes.layers)]
    if beyond:
        raise StyleError(
            f"self-attention layer {beyond[0]} does not exist; the model has 0 to {len(shapes.layers) - 1}"
        )
    tensors = {}
    for layer in layers:
        shape = shapes.layers[layer]
        heads = (shape.heads, shape.d)
        # keys and values are adjacent, so that one reference's page of a layer is contiguous
        inner = (2, shape.tokens, *heads) if store == "kv" else (shape.tokens, shape.channels)
        tensors[f"{store}.{layer}"] = TensorSpec(kept, (*each, *inner))
        if kept == torch.float8_e4m3fn:
            inner = (2, *heads) if store == "kv" else (shape.channels,)
            tensors[f"scale.{layer}"] = TensorSpec(exact, (*each, *inner))
        for name in ("mean", "variance"):
            tensors[f"{name}.{layer}"] = TensorSpec(exact, (*each, 3, *heads))
    for i, groups in enumerate(shapes.groups):
        for name in ("norm_mean", "norm_variance"):
            tensors[f"{name}.{i}"] = TensorSpec(exact, (*each, groups))
    tensors["latents"] = TensorSpec(exact, (1, references, *shapes.latents))
    return tensors


def bank_bytes(
    unet_config: Mapping,
    size: tuple[int, int],
    steps: int,
    branches: int = 2,
    references: int = 1,
    store: str = "kv",
    dtype: str = "float16",
    layers: Sequence[int] | None = None,
    pixels_per_latent: int = 8,
) -> int:
    """Return the bytes of all tensors of a bank, statistics included, without the file's header.

    `size` is (width, height) in pixels, `layers` the stored self-attention layers (None: all). Latents are always
    float32, so a bank of latents ignores `dtype`, `branches` and `layers`.
    """
    shapes = BankShapes.from_config(unet_config, size, pixels_per_latent)
    return _bytes(shapes, steps, branches, references, store, dtype, layers)


def page_bytes(
    unet_config: Mapping,
    size: tuple[int, int],
    store: str = "kv",
    dtype: str = "float16",
    layers: Sequence[int] | None = None,
    pixels_per_latent: int = 8,
) -> int:
    """Return the bytes of one page: all data of one reference at one step in one branch, over all stored layers.

    Raises StyleError for a bank of latents, which has no pages because its reference is run again.
    """
    if store == "latents":
        raise StyleError(
            "a bank of latents has no pages, because its reference runs with its readers; use kv or hidden"
        )
    shapes = BankShapes.from_config(unet_config, size, pixels_per_latent)
    final_latents = math.prod(shapes.latents) * torch.float32.itemsize
    return _bytes(shapes, 1, 1, 1, store, dtype, layers) - final_latents


def _bytes(shapes: BankShapes, steps, branches, references, store, dtype, layers) -> int:
    layers = range(len(shapes.layers)) if layers is None else layers
    tensors = bank_tensors(
        shapes, steps=steps, branches=branches, references=references, store=store, dtype=dtype, layers=layers
    )
    return sum(spec.nbytes for spec in tensors.values())


def _areas(size: tuple[int, int], levels: int) -> list[int]:
    """Count the pixels of the feature maps, finest first; strided convolutions round odd sides up."""
    areas = []
    for _ in range(levels):
        areas.append(size[0] * size[1])
        size = (math.ceil(size[0] / 2), math.ceil(size[1] / 2))
    return areas


def _norms(config: Mapping) -> list[tuple[int, int]]:
    """Return (channels, level) of the UNet's group norms in module order: a block's resnets before its attentions."""
    shape = UNetShape.from_config(config)
    last, first = len(shape.down) - 1, shape.down[0].channels
    norms, skips, width = [], [first], first
    for level, block in enumerate(shape.down):
        out = block.channels
        for _ in range(block.resnets):
            norms += [(width, level), (out, level)]
            width = out
        norms += [(out, level)] * len(block.depths)
        skips += [out] * (block.resnets + (level < last))
    if shape.mid is not None:
        norms += [(width, last)] * (2 * shape.mid.resnets + len(shape.mid.depths))
    for position, block in enumerate(shape.up):
        level, out = last - position, block.channels
        for _ in range(block.resnets):
            norms += [(width + skips.pop(), level), (out, level)]
            width = out
        norms += [(out, level)] * len(block.depths)
    return [*norms, (first, 0)]
