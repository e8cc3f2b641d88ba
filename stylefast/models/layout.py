"""Layout of the attention layers of an SDXL-shaped UNet, computed from its config alone.

`UNetShape` is the only reader of a config's blocks; all code that counts blocks or layers uses it.

Two orders matter and are easy to confuse:

- **modules** (11 in SDXL: `down_blocks.1.attentions.0` ... `up_blocks.1.attentions.2`) are listed in execution order
  (down, mid, up): the order of users' block weights;
- **layers** (70 in SDXL, one per transformer block, each with one self- and one cross-attention) are listed in the
  order of diffusers' `attn_processors` (down, up, mid): the order of IP-Adapter's keys and of `only_self_level`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from stylefast import values
from stylefast.errors import ModelFormatError, StyleError

STYLE_MODULE = "up_blocks.0.attentions.1"
LAYOUT_MODULE = "down_blocks.2.attentions.1"

_MID_CROSS, _MID_PLAIN = "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"
_MOST_BLOCKS, _MOST_LAYERS, _MOST_CHANNELS = 16, 512, 2**20


@dataclass(frozen=True)
class BlockShape:
    """One down, middle or up block of a UNet."""

    channels: int
    heads: int
    resnets: int
    # transformer blocks of the attention after each resnet (in the middle block: after the first); empty if the block
    # does not attend; 0 means an attention of just two projections
    depths: tuple[int, ...]


@dataclass(frozen=True)
class UNetShape:
    """The blocks of an SDXL-shaped UNet, which differ among SDXL (70 layers), SSD-1B, Vega and Koala.

    `down` and `up` are in execution order. `mid` has two resnets with an attention between them, only one resnet
    (SSD-1B, Vega), or is missing (Koala-700M).
    """

    down: tuple[BlockShape, ...]
    mid: BlockShape | None
    up: tuple[BlockShape, ...]

    @classmethod
    def from_config(cls, config: Mapping) -> "UNetShape":
        """Read a UNet config in diffusers format.

        Raises ModelFormatError for values of the wrong type, numbers out of range, and unknown kinds of blocks.
        """
        channels = _integers(config, "block_out_channels", None, _MOST_CHANNELS)
        blocks = len(channels)
        if not 1 <= blocks <= _MOST_BLOCKS:
            raise ModelFormatError(f"block_out_channels has {blocks} entries; a UNet has 1 to {_MOST_BLOCKS} blocks")
        heads_key = "num_attention_heads" if config.get("num_attention_heads") is not None else "attention_head_dim"
        heads = _integers(config, heads_key, blocks, _MOST_CHANNELS)
        resnets = _integers(config, "layers_per_block", blocks, _MOST_LAYERS)
        attends = [
            _kinds(
                config,
                f"{way}_block_types",
                blocks,
                {f"{way.capitalize()}Block2D": False, f"CrossAttn{way.capitalize()}Block2D": True},
            )
            for way in ("down", "up")
        ]
        key, back = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
        given = config.get(key, 1)
        per_block = list(given) if isinstance(given, (list, tuple)) else [given] * blocks
        backwards = config.get(back)
        if backwards is None:
            if any(isinstance(depth, (list, tuple)) for depth in per_block):
                raise ModelFormatError(
                    f"{key} is {values.quoted(given)}; with a depth for each layer, {back} is needed too"
                )
            backwards = per_block[::-1]
        if not isinstance(backwards, (list, tuple)) or len(per_block) != blocks or len(backwards) != blocks:
            raise ModelFormatError(
                f"{key} is {values.quoted(given)} and {back} {values.quoted(config.get(back))}; {blocks} entries are "
                "needed"
            )

        def block(i: int, count: int, attending: bool, name: str, value) -> BlockShape:
            if attending and channels[i] % heads[i]:
                raise ModelFormatError(f"{heads[i]} attention heads ({heads_key}) do not divide {channels[i]} channels")
            return BlockShape(channels[i], heads[i], count, _depths(name, value, count) if attending else ())

        down = tuple(block(i, resnets[i], attends[0][i], key, per_block[i]) for i in range(blocks))
        up = tuple(
            block(i, resnets[i] + 1, attends[1][place], back, backwards[place])
            for place, i in enumerate(reversed(range(blocks)))
        )
        kind = config.get("mid_block_type", _MID_CROSS)
        if kind not in (_MID_CROSS, _MID_PLAIN, None):
            raise ModelFormatError(
                f"mid_block_type is {values.quoted(kind)}; this UNet's middle is {values.quoted(_MID_CROSS)}, "
                f"{values.quoted(_MID_PLAIN)} or null"
            )
        mid = None
        if kind is not None:
            # of a list, the middle block's single attention uses the first entry
            attending = kind == _MID_CROSS
            depths = block(blocks - 1, 1, attending, key, per_block[-1]).depths
            mid = BlockShape(channels[-1], heads[-1], 1 + attending, depths)
        return cls(down, mid, up)

    @property
    def layers(self) -> int:
        """Count all resnets and transformer blocks."""
        blocks = [*self.down, *self.up, *([self.mid] if self.mid else [])]
        return sum(block.resnets + sum(block.depths) for block in blocks)


@dataclass(frozen=True)
class AttentionLayer:
    """One transformer block: a self-attention (`attn1`) and a cross-attention (`attn2`)."""

    name: str  # e.g. "up_blocks.0.attentions.1.transformer_blocks.3"
    module: str  # e.g. "up_blocks.0.attentions.1"
    module_index: int  # position of the module in execution order
    level: int  # 0: the finest feature map with attention, 1: the next, ...
    channels: int
    heads: int


@dataclass(frozen=True)
class AttentionLayout:
    """All attention layers of one UNet; `layers` in registry order, `modules` in execution order."""

    layers: tuple[AttentionLayer, ...]
    modules: tuple[str, ...]
    # modules that carry style; SDXL's unless the model names others
    style_modules: tuple[str, ...] = (STYLE_MODULE,)
    # number of halvings of each attention level's feature map
    feature_maps: tuple[int, ...] = (1, 2)

    @classmethod
    def from_config(cls, config: Mapping, encoder: bool = False) -> "AttentionLayout":
        """Read a UNet config in diffusers format; encoder: only the down and middle blocks.

        Raises ModelFormatError if it is invalid, or a whole UNet without attention.
        """
        shape = UNetShape.from_config(config)
        last = len(shape.down) - 1
        # (module name, block counted from the finest feature map, shape of the block, transformer depth)
        down = [
            (f"down_blocks.{i}.attentions.{a}", i, block, depth)
            for i, block in enumerate(shape.down)
            for a, depth in enumerate(block.depths)
        ]
        middle = () if shape.mid is None else (shape.mid,)
        mid = [("mid_block.attentions.0", last, block, depth) for block in middle for depth in block.depths]
        up = [
            (f"up_blocks.{i}.attentions.{a}", last - i, block, depth)
            for i, block in enumerate(() if encoder else shape.up)
            for a, depth in enumerate(block.depths)
        ]

        # styles can't act on an attention without transformer blocks
        modules = tuple(name for name, _, _, depth in down + mid + up if depth)
        feature_maps = tuple(sorted({i for _, i, _, depth in down + mid + up if depth}))
        layers = tuple(
            AttentionLayer(
                f"{name}.transformer_blocks.{t}",
                name,
                modules.index(name),
                feature_maps.index(i),
                block.channels,
                block.heads,
            )
            for name, i, block, depth in down + up + mid
            for t in range(depth)
        )
        if not layers and not encoder:
            raise ModelFormatError("the UNet's config has no attention; an SDXL model attends to its prompt")
        return cls(layers, modules, feature_maps=feature_maps)

    @cached_property
    def levels(self) -> int:
        """Return the number of distinct feature-map sizes with attention (2 in SDXL)."""
        return len(self.feature_maps)

    def at_level(self, level: int) -> list[int]:
        """Return an attention level's layers in registry order, the order of tensors that pack a level's layers."""
        return [i for i, layer in enumerate(self.layers) if layer.level == level]

    @cached_property
    def layer_index(self) -> dict[str, int]:
        """Return name of a transformer block -> its index in registry order."""
        return {layer.name: i for i, layer in enumerate(self.layers)}

    def matching(self, layers: str | Sequence[str]) -> tuple[bool, ...]:
        """Return which layers are meant by "all", or by parts of their names. Raises StyleError if none is."""
        chosen = layers if isinstance(layers, str) else tuple(layers)
        return _matching(chosen, tuple(layer.name for layer in self.layers), self.modules)

    def ip_adapter_key(self, layer: int) -> int:
        """Return the number of layer `layer` in IP-Adapter files: odd, because they count self-attention too."""
        return 2 * layer + 1


@lru_cache(maxsize=64)
def _matching(layers: str | tuple[str, ...], names: tuple[str, ...], modules: tuple[str, ...]) -> tuple[bool, ...]:
    if layers == "all":
        return (True,) * len(names)
    patterns = [layers] if isinstance(layers, str) else list(layers)
    chosen = tuple(any(pattern in f"{name}." for pattern in patterns) for name in names)
    if not any(chosen):
        raise StyleError(
            f"layers={values.quoted(layers)} matches no self-attention layer; modules are {', '.join(modules)}"
            f"{values.did_you_mean(patterns[0], {name.split('.')[0] for name in names} | {*modules})}"
        )
    return chosen


def checked_layers(layers: object) -> str | tuple[str, ...]:
    """Return "all", or parts of layer names, for `AttentionLayout.matching`. Raises StyleError."""
    if isinstance(layers, str):
        return values.text("layers", layers, empty=False, error=StyleError)
    several = values.entries(layers)
    if not several:
        raise StyleError(f"layers is {values.quoted(layers)}; it must be 'all', or substrings of layer names")
    return tuple(values.text(f"layers[{i}]", one, empty=False, error=StyleError) for i, one in enumerate(several))


def check_architecture(config: Mapping) -> None:
    """Raise ModelFormatError for settings of a UNet's config that `UNet` does not implement."""
    demands = {
        "addition_embed_type": ("text_time",),
        "use_linear_projection": (True,),
        "act_fn": ("silu", None),
        "class_embed_type": (None,),
        "encoder_hid_dim_type": (None, "ip_image_proj"),
        "resnet_time_scale_shift": ("default", None),
        "time_cond_proj_dim": (None,),
        "dual_cross_attention": (False, None),
        "attention_type": ("default", None),
    }
    for key, allowed in demands.items():
        if config.get(key) not in allowed:
            raise ModelFormatError(
                f"the UNet's config has {key}={values.quoted(config.get(key))}; SDXL's architecture needs "
                f"{values.quoted(allowed[0])}. Give an SDXL checkpoint (base, or a fine-tune of it)."
            )


def _integers(config: Mapping, key: str, count: int | None, most: int) -> tuple[int, ...]:
    """Return a number for each block; a single number applies to all. Raises ModelFormatError."""
    value = config.get(key)
    many = value if isinstance(value, (list, tuple)) else [value] * (count or 1)
    numbers = [n for n in many if isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= most]
    if count not in (None, len(many)) or len(numbers) < len(many):
        raise ModelFormatError(
            f"{key} is {values.quoted(value)}; it must be whole numbers from 1 to {most}, one for each block"
        )
    return tuple(numbers)


def _kinds(config: Mapping, key: str, count: int, known: Mapping[str, bool]) -> list[bool]:
    """Return whether each block attends. Raises ModelFormatError for unknown blocks."""
    kinds = config.get(key)
    if not isinstance(kinds, (list, tuple)) or len(kinds) != count or any(str(kind) not in known for kind in kinds):
        raise ModelFormatError(f"{key} is {values.quoted(kinds)}; it must list {count} blocks of {' or '.join(known)}")
    return [known[kind] for kind in kinds]


def _depths(key: str, value, count: int) -> tuple[int, ...]:
    """Return the transformer depths of a block's `count` attentions, from one number for all or one each.

    Raises ModelFormatError.
    """
    many = list(value) if isinstance(value, (list, tuple)) else [value] * count
    # entries beyond the block's layers are ignored, as in diffusers; the weights must fit either way
    many = many[:count]
    sound = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _MOST_LAYERS for n in many)
    if len(many) < count or not sound:
        raise ModelFormatError(
            f"{key} has {values.quoted(value)} for a block of {count} attentions; it needs a whole number from 0 to "
            f"{_MOST_LAYERS}, or one for each"
        )
    return tuple(many)
