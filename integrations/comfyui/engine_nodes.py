"""Nodes with an engine in ComfyUI's own process. stylefast is imported when one of them runs."""

from typing import Any
from weakref import WeakValueDictionary

import torch

from . import images as pictures
from .client_nodes import CATEGORY, PROMPT, SETTINGS
from .host import Bar, check_interrupted

# engines that some node's result still holds, so that two nodes with the same fields share one
_ENGINES: "WeakValueDictionary[tuple[str, ...], Any]" = WeakValueDictionary()
STRENGTH = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05})


def _stylefast() -> Any:
    try:
        import stylefast
    except ImportError as error:
        raise RuntimeError(
            f"stylefast is missing in ComfyUI's environment ({error}); pip install stylefast, or use the server's nodes"
        ) from error
    return stylefast


def _with(others: Any, style: Any) -> list[Any]:
    return [*(others or ()), style]


class Engine:
    """An engine with a model."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    DESCRIPTION = "Loads a model into ComfyUI's process. It has memory of its own, beside ComfyUI's models."
    RETURN_TYPES, RETURN_NAMES = ("STYLEFAST_ENGINE",), ("engine",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the fields."""
        model = ("STRING", {"default": "tiny", "tooltip": "tiny, a diffusers folder, a .safetensors file, or a hub id"})
        adapter = (
            "STRING",
            {"default": "", "tooltip": "an IP-Adapter's file, for InstantStyle; empty: the model's own"},
        )
        device = (["auto", "cuda", "cpu"], {"default": "auto"})
        dtype = (["auto", "float16", "bfloat16", "float32"], {"default": "auto"})
        return {"required": {"model": model, "adapter": adapter, "device": device, "dtype": dtype}}

    def load(self, model: str, adapter: str, device: str, dtype: str) -> tuple[Any]:
        """Return the engine."""
        given = {"adapter": adapter.strip() or "auto", "device": device, "dtype": dtype}
        key = (model.strip(), *given.values())
        if (engine := _ENGINES.get(key)) is None:
            options = {name: value for name, value in given.items() if value != "auto"}
            # ComfyUI runs nodes in inference mode, whose tensors no other thread could change
            with torch.inference_mode(False):
                engine = _ENGINES[key] = _stylefast().Engine.from_pretrained(key[0], **options)
        return (engine,)


class InstantStyle:
    """The style of pictures through an IP-Adapter."""

    CATEGORY, FUNCTION = CATEGORY, "make"
    DESCRIPTION = "InstantStyle: the style of one picture or several, through the model's IP-Adapter."
    RETURN_TYPES, RETURN_NAMES = ("STYLEFAST_STYLES",), ("styles",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the fields."""
        blocks = (["style", "layout", "style+layout", "all"], {"default": "style", "tooltip": "where it acts"})
        required = {"images": ("IMAGE",), "scale": STRENGTH, "blocks": blocks}
        return {"required": required, "optional": {"others": ("STYLEFAST_STYLES",)}}

    def make(self, images: torch.Tensor, scale: float, blocks: str, others: Any = None) -> tuple[list[Any]]:
        """Return the style after the others."""
        style = _stylefast().InstantStyle(pictures.to_pil(images), scale=scale, blocks=blocks)
        return (_with(others, style),)


class AlignedStyle:
    """The style of pictures through shared self-attention."""

    CATEGORY, FUNCTION = CATEGORY, "make"
    DESCRIPTION = "StyleAligned: the style of a picture, or of one that is generated from a prompt."
    RETURN_TYPES, RETURN_NAMES = ("STYLEFAST_STYLES",), ("styles",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the fields."""
        prompt = ("STRING", {"default": "", "tooltip": "what the reference shows; without pictures it is drawn"})
        optional = {"images": ("IMAGE",), "others": ("STYLEFAST_STYLES",)}
        return {"required": {"prompt": prompt, "scale": STRENGTH}, "optional": optional}

    def make(
        self, prompt: str, scale: float, images: torch.Tensor | None = None, others: Any = None
    ) -> tuple[list[Any]]:
        """Return the style after the others."""
        if images is None and not prompt.strip():
            raise ValueError("StyleAligned needs pictures, or a prompt from which its reference is drawn")
        reference = None if images is None else pictures.to_pil(images)
        style = _stylefast().StyleAligned(reference, prompt=prompt.strip() or None, scale=scale)
        return (_with(others, style),)


class Draw:
    """Pictures from a prompt, in any number of styles."""

    CATEGORY, FUNCTION = CATEGORY, "draw"
    DESCRIPTION = "Draws pictures with an engine in this process."
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the fields."""
        required = {"engine": ("STYLEFAST_ENGINE",), "prompt": PROMPT, **SETTINGS}
        return {"required": required, "optional": {"styles": ("STYLEFAST_STYLES",)}}

    def draw(
        self, engine: Any, prompt: str, width: int, height: int, count: int, styles: Any = None, **settings: Any
    ) -> tuple[torch.Tensor]:
        """Return the pictures."""
        if bool(width) != bool(height):
            raise ValueError(f"the size is {width} x {height}; give both, or 0 for both")
        bar = Bar()

        def advance(step: int, steps: int, latents: torch.Tensor) -> None:
            check_interrupted()
            bar.show(step, steps)

        size = (width, height) if width else None
        with torch.inference_mode(False):
            result = engine.generate([prompt] * count, styles, size=size, callback=advance, **settings)
        return (pictures.from_pil(result.images),)
