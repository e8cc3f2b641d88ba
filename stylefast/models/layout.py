"""Where the attention layers of an SDXL-shaped UNet sit, computed from its config alone.

Two orders matter and are easy to confuse:

- **modules** (11 in SDXL: `down_blocks.1.attentions.0` ... `up_blocks.1.attentions.2`) are listed in execution order
  (down, mid, up): the order in which users of block weights count them;
- **layers** (70 in SDXL, one per transformer block, each with one self- and one cross-attention) are listed in the
  order of diffusers' `attn_processors` (down, up, mid): the order of IP-Adapter's keys and of `only_self_level`.
"""

from dataclasses import dataclass
from functools import cached_property

STYLE_MODULE = "up_blocks.0.attentions.1"
LAYOUT_MODULE = "down_blocks.2.attentions.1"


@dataclass(frozen=True)
class AttentionLayer:
    """One transformer block: a self-attention (`attn1`) and a cross-attention (`attn2`)."""

    name: str  # e.g. "up_blocks.0.attentions.1.transformer_blocks.3"
    module: str  # e.g. "up_blocks.0.attentions.1"
    module_index: int  # place of the module in execution order
    level: int  # 0: the finest feature map that carries attention, 1: the next, ...
    channels: int
    heads: int


@dataclass(frozen=True)
class AttentionLayout:
    """All attention of one UNet; `layers` in registry order, `modules` in execution order."""

    layers: tuple[AttentionLayer, ...]
    modules: tuple[str, ...]
    # where a picture's style enters; SDXL's unless the model says otherwise
    style_modules: tuple[str, ...] = (STYLE_MODULE,)

    @classmethod
    def from_config(cls, config) -> "AttentionLayout":
        """Read a UNet config (a mapping in diffusers' format). Raises KeyError for a config that is no UNet's."""
        blocks = len(config["block_out_channels"])
        channels = tuple(config["block_out_channels"])
        depth = _per_block(config["transformer_layers_per_block"], blocks)
        heads = _per_block(config.get("num_attention_heads") or config["attention_head_dim"], blocks)
        resnets = _per_block(config["layers_per_block"], blocks)
        attending = [i for i, kind in enumerate(config["down_block_types"]) if "CrossAttn" in kind]

        # (module name, block index counted from the finest feature map, transformer depth)
        down = [
            (f"down_blocks.{i}.attentions.{a}", i, depth[i]) for i in attending for a in range(resnets[i])
        ]
        mid = [("mid_block.attentions.0", blocks - 1, depth[-1])]
        up = []
        for position, kind in enumerate(config["up_block_types"]):
            i = blocks - 1 - position
            if "CrossAttn" in kind:
                up += [(f"up_blocks.{position}.attentions.{a}", i, depth[i]) for a in range(resnets[i] + 1)]

        modules = tuple(name for name, _, _ in down + mid + up)
        layers = tuple(
            AttentionLayer(f"{name}.transformer_blocks.{t}", name, modules.index(name), i - attending[0], channels[i],
                           heads[i])
            for name, i, count in down + up + mid
            for t in range(count)
        )
        return cls(layers, modules)

    @cached_property
    def levels(self) -> int:
        """Number of distinct feature-map sizes that carry attention (2 in SDXL)."""
        return 1 + max(layer.level for layer in self.layers)

    def at_level(self, level: int) -> list[int]:
        """The layers of an attention level, in registry order: how tensors hold them that pack a level's layers."""
        return [i for i, layer in enumerate(self.layers) if layer.level == level]

    @cached_property
    def layer_index(self) -> dict[str, int]:
        """Name of a transformer block -> its place in registry order."""
        return {layer.name: i for i, layer in enumerate(self.layers)}

    def ip_adapter_key(self, layer: int) -> int:
        """The number that IP-Adapter files give to layer `layer`: odd, because self-attention is counted too."""
        return 2 * layer + 1


def _per_block(value, blocks: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * blocks
