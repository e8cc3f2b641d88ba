"""Nodes that ask a running `stylefast serve`."""

import base64
from typing import Any

import torch

from . import images as pictures
from .client import Client, ServerError

CATEGORY = "stylefast"
MOST_SEED = 2**64 - 1
PROMPT = ("STRING", {"multiline": True, "default": "a fish", "tooltip": "what the picture shows"})
# of both ways to draw
SETTINGS = {
    "negative_prompt": ("STRING", {"multiline": True, "default": "", "tooltip": "what to steer away from"}),
    "width": ("INT", {"default": 0, "min": 0, "max": 8192, "step": 8, "tooltip": "0: the model's own"}),
    "height": ("INT", {"default": 0, "min": 0, "max": 8192, "step": 8, "tooltip": "0: the model's own"}),
    "steps": ("INT", {"default": 20, "min": 1, "max": 1000}),
    "guidance": ("FLOAT", {"default": 5.0, "min": 0.0, "max": 100.0, "step": 0.1}),
    "seed": ("INT", {"default": 0, "min": 0, "max": MOST_SEED, "control_after_generate": True}),
    "count": ("INT", {"default": 1, "min": 1, "max": 10, "tooltip": "pictures, whose seeds count up"}),
}


class Server:
    """The address of a server."""

    CATEGORY, FUNCTION = CATEGORY, "make"
    DESCRIPTION = (
        "A running `stylefast serve`. Its key, if it wants one, is STYLEFAST_API_KEY in ComfyUI's environment."
    )
    RETURN_TYPES, RETURN_NAMES = ("STYLEFAST_SERVER",), ("server",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the fields."""
        return {"required": {"url": ("STRING", {"default": "http://localhost:8000"})}}

    def make(self, url: str) -> tuple[Client]:
        """Return the client."""
        return (Client(url.strip()),)


class ListStyles:
    """The names of a server's styles."""

    CATEGORY, FUNCTION = CATEGORY, "styles"
    DESCRIPTION = "The names that the server knows, one a line, for the field `style`."
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("names",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the fields."""
        return {"required": {"server": ("STYLEFAST_SERVER",)}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        """Return what equals nothing, so that the list is asked for each time."""
        return float("nan")

    def styles(self, server: Client) -> tuple[str]:
        """Return the names."""
        return ("\n".join(server.styles()),)


def _body(own: dict[str, Any], prompt: str, width: int, height: int, count: int, **settings: Any) -> dict[str, Any]:
    if bool(width) != bool(height):
        raise ServerError(f"the size is {width} x {height}; give both, or 0 for both")
    size = f"{width}x{height}" if width else "auto"
    return {"prompt": prompt, "size": size, "n": count, "output_format": "png", "stylefast": {**settings, **own}}


class Generate:
    """Pictures from a prompt, in a style that the server knows."""

    CATEGORY, FUNCTION = CATEGORY, "draw"
    DESCRIPTION = "Draws pictures in a registered style."
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the fields."""
        style = ("STRING", {"default": "", "tooltip": "a name of `List styles`; empty: none"})
        return {"required": {"server": ("STYLEFAST_SERVER",), "prompt": PROMPT, "style": style, **SETTINGS}}

    def draw(self, server: Client, style: str, **settings: Any) -> tuple[torch.Tensor]:
        """Return the pictures."""
        own = {"style": style.strip()} if style.strip() else {}
        return (pictures.from_files(server.draw("/v1/images/generations", _body(own, **settings))),)


class Edit:
    """Pictures in the style of others."""

    CATEGORY, FUNCTION = CATEGORY, "draw"
    DESCRIPTION = "Draws pictures in the style of those sent along."
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the fields."""
        method = (["auto", "instant", "aligned"], {"default": "auto", "tooltip": "how the pictures' style is taken"})
        strength = (["low", "medium", "high"], {"default": "medium"})
        own = {"server": ("STYLEFAST_SERVER",), "images": ("IMAGE",), "prompt": PROMPT}
        return {"required": {**own, "method": method, "strength": strength, **SETTINGS}}

    def draw(
        self, server: Client, images: torch.Tensor, method: str, strength: str, **settings: Any
    ) -> tuple[torch.Tensor]:
        """Return the pictures."""
        body = _body({} if method == "auto" else {"method": method}, **settings)
        body["image"] = [base64.b64encode(content).decode("ascii") for content in pictures.to_png(images)]
        if strength != "medium":
            body["input_fidelity"] = strength
        return (pictures.from_files(server.draw("/v1/images/edits", body)),)
