"""The requests of the measurements: all three methods and none, in several sizes, step counts and strengths."""

import random
from typing import Any

# a style of the embedded model by its name (pictures for InstantStyle, learned vectors for DreamStyler), or in full
ALIGNED = {"kind": "StyleAligned", "prompt": "a star in neon style", "seed": 1}
STYLES: dict[str, str | dict[str, Any] | None] = {
    "none": None,
    "InstantStyle, neon": "neon",
    "InstantStyle, woodcut": "woodcut",
    "DreamStyler, chalk": "chalk",
    "StyleAligned": ALIGNED,
}
PROMPTS = ("a fish", "a cat", "a house")
SIZES = ("64x64", "64x64", "96x64")
COUNTS = (4, 8, 12, 20)
GUIDANCES = (1.0, 4.0, 7.5)


def body(style: str, prompt: str, size: str, steps: int, guidance: float, seed: int) -> dict[str, Any]:
    """Return the body of a request that streams one preview; `style` is a name in `STYLES`."""
    own: dict[str, Any] = {"steps": steps, "seed": seed, "guidance": guidance}
    if STYLES[style] is not None:
        own["style"] = STYLES[style]
    return {"prompt": prompt, "size": size, "stream": True, "partial_images": 1, "stylefast": own}


def mixed(seed: int) -> dict[str, Any]:
    """Return one request of the mix."""
    draw = random.Random(seed)
    return body(
        draw.choice(list(STYLES)),
        draw.choice(PROMPTS),
        draw.choice(SIZES),
        draw.choice(COUNTS),
        draw.choice(GUIDANCES),
        seed,
    )
