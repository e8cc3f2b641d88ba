"""Style banks of some kilobytes with random content, for tests of what holds, writes and reads them."""

import torch

from stylefast.styles.bank import BankInfo, BankWriter, LayerFeatures, ReferenceFeatures, StyleBank
from stylefast.styles.bank_size import BankShapes

# odd token counts, unlike layers, and norms of unlike groups
SHAPES = BankShapes(
    layers=((15, 2, 3), (6, 1, 5), (15, 2, 3)), groups=(4, 2), norm_elements=(30, 12), latents=(4, 5, 3)
)


def small_info(**changes) -> BankInfo:
    """The description of a bank of 2 steps, both halves of guidance and 2 references that fits SHAPES."""
    fields = {
        "format": 1,
        "model": "small",
        "fingerprint": "0123456789abcdef",
        "store": "kv",
        "dtype": "float32",
        "scheduler": "euler",
        "schedule": "feedc0de" * 8,
        "steps": 2,
        "size": (24, 40),
        "guidance": 5.0,
        "guidance_rescale": 0.0,
        "branches": ("null", "full"),
        "negative_prompt": "",
        "prompt": "a fox, watercolor",
        "seed": 7,
        "noise": "generated",
        "references": 2,
        "layers": (0, 1),
        "styles": "",
        "created": "2031-05-06T07:08:09Z",
        "stylefast": "0.1.0",
    } | changes
    if fields["store"] == "latents":
        fields["layers"] = ()
    return BankInfo(**fields)


def random_features(shapes: BankShapes = SHAPES, seed: int = 0, spread: float = 3.0) -> ReferenceFeatures:
    """What one reference might offer at one step in one branch."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator) * spread

    layers = {}
    for i, (tokens, heads, d) in enumerate(shapes.layers):
        # channels of unlike size, as in a real model
        sizes = torch.logspace(-3, 1, heads * d)
        hidden, k, v = (draw(tokens, heads * d) * sizes for _ in range(3))
        layers[i] = LayerFeatures(
            hidden, k.view(tokens, heads, d), v.view(tokens, heads, d), draw(3, heads, d), draw(3, heads, d).abs()
        )
    return ReferenceFeatures(
        layers,
        tuple(draw(groups) for groups in shapes.groups),
        tuple(draw(groups).abs() for groups in shapes.groups),
        shapes.norm_elements,
    )


def places(info: BankInfo) -> list[tuple[int, str, int]]:
    """Every (step, branch, reference) of a bank of features."""
    return [(s, b, r) for s in range(info.steps) for b in info.branches for r in range(info.references)]


def random_latents(info: BankInfo, shapes: BankShapes = SHAPES, seed: int = 0) -> dict[tuple[int, int], torch.Tensor]:
    """(step, reference) -> latents, for the steps that a bank of this kind holds."""
    generator = torch.Generator().manual_seed(1000 + seed)
    first = 0 if info.store == "latents" else info.steps
    return {
        (step, reference): torch.randn(shapes.latents, generator=generator)
        for step in range(first, info.steps + 1)
        for reference in range(info.references)
    }


def fill(writer: BankWriter, seed: int = 0) -> BankWriter:
    """Put everything that the bank awaits."""
    info, shapes = writer.info, writer.shapes
    if info.store != "latents":
        for i, place in enumerate(places(info)):
            writer.put(*place, random_features(shapes, seed + i))
    for place, latents in random_latents(info, shapes, seed).items():
        writer.put_latents(*place, latents)
    return writer


def small_bank(path=None, seed: int = 0, shapes: BankShapes = SHAPES, **changes) -> StyleBank:
    """A whole bank, in memory or in the file `path`."""
    with BankWriter(small_info(**changes), shapes, path) as writer:
        return fill(writer, seed).finish()
