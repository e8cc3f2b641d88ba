"""Nodes for ComfyUI: pictures in styles, from a running `stylefast serve` or from an engine in ComfyUI's process.

The first kind needs nothing but what ComfyUI has; the second needs stylefast in the same environment.
"""

from .client_nodes import Edit, Generate, ListStyles, Server
from .engine_nodes import AlignedStyle, Draw, Engine, InstantStyle

NODE_CLASS_MAPPINGS = {
    "StylefastServer": Server,
    "StylefastListStyles": ListStyles,
    "StylefastGenerate": Generate,
    "StylefastEdit": Edit,
    "StylefastEngine": Engine,
    "StylefastInstantStyle": InstantStyle,
    "StylefastAlignedStyle": AlignedStyle,
    "StylefastDraw": Draw,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "StylefastServer": "stylefast server",
    "StylefastListStyles": "List styles (server)",
    "StylefastGenerate": "Draw in a style (server)",
    "StylefastEdit": "Draw in the style of pictures (server)",
    "StylefastEngine": "stylefast engine",
    "StylefastInstantStyle": "InstantStyle (engine)",
    "StylefastAlignedStyle": "StyleAligned (engine)",
    "StylefastDraw": "Draw in styles (engine)",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
