"""InstantStyle: an image prompt limited to the attention modules that carry style rather than content.

Wang et al., "InstantStyle: Free Lunch towards Style-Preserving in Text-to-Image Generation", 2024. The method is
IP-Adapter with one strength per attention module, and, optionally, a content text that is subtracted from the image
embedding.
"""

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import NoneType
from typing import Any, ClassVar, NamedTuple

import torch

from stylefast import values
from stylefast.errors import AdapterError, StyleError
from stylefast.models.image_encoder import CROPS, ImageEncoder
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.layout import LAYOUT_MODULE, STYLE_MODULE, AttentionLayout
from stylefast.models.pictures import PictureSource, check_sources
from stylefast.models.row_table import KeyValue
from stylefast.styles.clean_style import CleanStyle, damped, weighted
from stylefast.styles.image_embeds import read_image_embeds, split_image_embeds
from stylefast.styles.style import ImageStyle, checked_weights, read_settings


class Strengths(NamedTuple):
    """Weights of the image branch per attention module `[M]`, in execution order.

    A conditional row has one segment, the image tokens. An unconditional row has two: the image tokens and the
    adapter's negative tokens. Modules skip segments of weight zero.
    """

    conditional: torch.Tensor
    unconditional_image: torch.Tensor
    unconditional_negative: torch.Tensor


class Segment(NamedTuple):
    """Pictures whose tokens share one softmax, their mask (None: everywhere) and their strength."""

    pictures: tuple[PictureSource, ...]  # empty if embeddings replace them
    mask: PictureSource | torch.Tensor | None
    scale: float


class StyleTokens(NamedTuple):
    """Image tokens per segment `[pictures * t, cross_dim]`, and the unconditional rows' tokens `[t, cross_dim]`."""

    image: tuple[torch.Tensor, ...]
    negative: torch.Tensor


@dataclass(frozen=True, eq=False)
class InstantStyle(ImageStyle):
    """The style of one or several pictures, through an IP-Adapter.

    Args:
        image: a picture or a list; without masks, a list acts like an average (one softmax over all tokens).
        blocks: where it acts. A preset ("style", "layout", "style+layout", "all", or a name from `PRESETS`); a
            dictionary in diffusers format, `{"down": {"block_2": [0.0, 1.0]}, "mid": 0.5, "up": 1.0}`, with 0 for
            blocks not named; or a list of substrings of layer names, `["up_blocks.0.attentions.1"]`.
        scale: strength, multiplied with the blocks' weights; with masks, optionally one per picture.
        content, content_scale: what the picture shows, in words, subtracted from its embedding:
            `e_image - content_scale * e_text`. Needs a global adapter whose encoder shares the space of the model's
            second text encoder; an embedding `[dim]` may be given in place of words for other encoders.
        mask: where it acts in the picture, white being active; one per image (None: everywhere). Each picture then
            has its own softmax.
        window: (start, end) as fractions of the steps; step i of n is inside if start <= i / n < end.
        adapter: name or path, for engines with several; None: the only one.
        crop: how pictures become square: "center", "squash" or "pad".
        negative_image: a picture to steer away from, instead of the adapter's "no picture".
        style_boost, composition_boost: for the presets ending in "precise", the absolute strength of the image in the
            unconditional row, so that guidance steers away from it: in the layout module ("style transfer precise"),
            or outside of it ("composition precise", a tenth of it outside the style module).
        composition_scale: strength in the layout module for the presets that name composition (None: `scale`).
        image_embeds: the image encoder's output, instead of `image`: a tensor `[pictures, width]` (plus adapters:
            `[pictures, patches, width]`), or the result of diffusers' `prepare_ip_adapter_image_embeds`, with or
            without the embeddings of "no picture"; or a file of either.
        weights: of several pictures without masks, relative to each other: `(3, 1)` gives the first three times the
            effect of the second; None: all have the same.
        clean: a `CleanStyle`, which damps what carries content rather than style; None: nothing.

    Raises StyleError at construction for values out of range.

    Examples:
        >>> style = sf.InstantStyle(engine.references()["woodcut"], blocks="style", scale=0.7)
        >>> result = engine.generate("a fish", style, steps=2)
        >>> both = [style, sf.StyleAligned(prompt="a star in neon style")]
        >>> len(engine.generate(["a fish", "a cat"], both, steps=2).images)
        2
    """

    image: PictureSource | list[PictureSource] | tuple[PictureSource, ...] | None = None
    blocks: str | Mapping | Sequence[str] = "style"
    scale: float | list[float] | tuple[float, ...] = 1.0
    content: str | torch.Tensor | None = None
    content_scale: float = 0.5
    mask: PictureSource | torch.Tensor | Sequence | None = None
    window: tuple[float, float] = (0.0, 1.0)
    adapter: str | None = None
    crop: str = "center"
    negative_image: PictureSource | None = None
    style_boost: float = 1.0
    composition_boost: float = 0.0
    composition_scale: float | None = None
    image_embeds: torch.Tensor | str | os.PathLike | None = None
    weights: Sequence[float] | None = None
    clean: CleanStyle | None = None
    embeds_source: str | None = field(init=False, default=None)
    option: ClassVar[str] = "instant"
    picture_fields: ClassVar[tuple[str, ...]] = ("image", "negative_image")
    mask_fields: ClassVar[tuple[str, ...]] = ("mask",)

    def __post_init__(self):
        checked = {
            "scale": _checked_scale(self.scale),
            "crop": values.one_of("crop", self.crop, CROPS, error=StyleError),
            "window": values.fractions("window", self.window, error=StyleError),
            "blocks": _checked_blocks(self.blocks),
        }
        for name in ("content_scale", "style_boost", "composition_boost"):
            checked[name] = _strength(name, getattr(self, name))
        if self.composition_scale is not None:
            checked["composition_scale"] = _strength("composition_scale", self.composition_scale)
        if self.adapter is not None:
            checked["adapter"] = values.text(
                "adapter", self.adapter, longest=values.NAME_BYTES, empty=False, error=StyleError
            )
        if self.content is not None:
            checked["content"] = _checked_content(self.content)
        if self.image_embeds is not None:
            if self.image is not None:
                raise StyleError("both image and image_embeds are given; give one of them")
            if self.crop != "center" and self.negative_image is None:
                raise StyleError(
                    f"crop={values.quoted(self.crop)} has no effect on image_embeds, whose pictures were cropped "
                    "when they were encoded; leave it out"
                )
            checked["image_embeds"], checked["embeds_source"] = read_image_embeds(self.image_embeds)
        elif self.image is None or values.entries(self.image) == []:
            raise StyleError("InstantStyle needs at least one picture; pass image= or image_embeds=")
        else:
            checked["image"] = check_sources("image", self.image)
        if self.mask is not None:
            checked["mask"] = check_sources("mask", self.mask, (torch.Tensor, NoneType))
        if self.negative_image is not None:
            several = values.entries(self.negative_image)
            if several is not None:
                raise StyleError(f"negative_image is a list of {len(several)}; give one picture")
            checked["negative_image"] = check_sources("negative_image", self.negative_image)
        if self.weights is not None:
            checked["weights"] = checked_weights(self.weights)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        self._check_counts()
        self._check_clean()

    def _check_clean(self) -> None:
        if self.clean is None:
            return
        if not isinstance(self.clean, CleanStyle):
            raise StyleError(f"clean is {values.quoted(self.clean)}; give a CleanStyle, or None")
        if self.needs_guidance:
            raise StyleError(
                f"blocks={values.quoted(self.blocks)} steers away from the whole picture, which does not go together "
                "with clean"
            )
        if self.clean.negative and self.negative_image is not None:
            raise StyleError(
                "negative_image and clean both say what the unconditional branch sees; leave one out, or give "
                "CleanStyle(negative=0)"
            )

    def _check_counts(self, embedded: int | None = None) -> None:
        # the number of pictures in embeddings is known only together with the adapter
        count = len(self.pictures) if self.image_embeds is None else embedded or len(self.masks) or 1
        if self.masks and len(self.masks) != count:
            raise StyleError(f"{len(self.masks)} masks for {count} pictures; give one for each, or none")
        scales = len(self.scale) if isinstance(self.scale, tuple) else 1
        if scales != 1 and (not self.masks or scales != count):
            raise StyleError(
                f"{scales} scales for {count} pictures and {len(self.masks)} masks; one scale per "
                "picture needs one mask per picture, since unmasked pictures share a softmax (weights= weights those)"
            )
        if self.weights is None:
            return
        if self.masks:
            raise StyleError("weights has no effect on pictures with masks; give each its own scale=")
        if (self.image_embeds is None or embedded) and len(self.weights) != count:
            raise StyleError(f"{len(self.weights)} weights for {count} pictures; give one for each, or none")

    @property
    def pictures(self) -> tuple[PictureSource, ...]:
        """Return the pictures as a tuple; empty if embeddings replace them."""
        if self.image is None:
            return ()
        return tuple(self.image) if isinstance(self.image, (list, tuple)) else (self.image,)

    @property
    def masks(self) -> tuple:
        """Return one mask per picture, or an empty tuple."""
        if self.mask is None:
            return ()
        return tuple(self.mask) if isinstance(self.mask, (list, tuple)) else (self.mask,)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Return all pictures as one segment or, with masks, one segment per picture."""
        scales = tuple(self.scale) if isinstance(self.scale, (list, tuple)) else (self.scale,)
        if not self.masks:
            return (Segment(self.pictures, None, float(scales[0])),)
        if len(scales) == 1:
            scales *= len(self.masks)
        pictures = [(picture,) for picture in self.pictures] or [()] * len(self.masks)
        return tuple(Segment(p, m, float(s)) for p, m, s in zip(pictures, self.masks, scales, strict=True))

    @property
    def own_negative(self) -> bool:
        """Return whether the style may replace the adapter's "no picture" in unconditional rows."""
        return self.negative_image is not None or self.image_embeds is not None

    @property
    def needs_guidance(self) -> bool:
        """Return whether the preset acts through the unconditional row, so that it needs guidance."""
        return isinstance(self.blocks, str) and _spelled(self.blocks) in _PRECISE

    def strengths(self, layout: AttentionLayout, guided: bool, segment: int = 0) -> Strengths:
        """Return the weights of segment `segment` per attention module of `layout`.

        Plain presets weight the unconditional row's negative tokens like the conditional row's image. In the modules
        where "precise" presets swap the roles, the conditional row gets no image, and the unconditional row gets the
        image instead of the negative tokens. `guided` is false without an unconditional row (guidance <= 1).
        Raises StyleError if the preset needs one, or if the model lacks the modules that `blocks` names.
        """
        if self.needs_guidance and not guided:
            raise StyleError(
                f"blocks={values.quoted(self.blocks)} works through the unconditional branch; it needs guidance > 1 "
                "(use 'style' or 'layout' without guidance)"
            )
        scale = self.segments[segment].scale
        conditional, swapped = self._weights(layout, scale)
        zeros = torch.zeros_like(conditional)
        if not guided:
            return Strengths(conditional, zeros, zeros.clone())
        return Strengths(conditional, swapped, conditional.clone())

    def _weights(self, layout: AttentionLayout, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights of the usual modules, and of those with swapped roles; no module has both."""
        modules = layout.modules
        usual, swapped = torch.zeros(len(modules)), torch.zeros(len(modules))
        if isinstance(self.blocks, Mapping):
            return scale * torch.tensor(_from_dictionary(self.blocks, modules)), swapped
        if not isinstance(self.blocks, str):
            return scale * torch.tensor(_from_substrings(self.blocks, layout)), swapped

        preset = _spelled(self.blocks)
        composition = scale if self.composition_scale is None else self.composition_scale
        if preset in _WITHOUT_MODULES:
            return scale * torch.tensor(_WITHOUT_MODULES[preset](modules)), swapped
        # a smaller model of the family may lack one module and still support presets that need only the other
        style = composed = None
        if preset not in ("composition", "strong style transfer", "strong style and composition"):
            style = [_find(module, modules, preset) for module in layout.style_modules]
        if preset != "style transfer":
            composed = _find(LAYOUT_MODULE, modules, preset)
        if preset == "strong style transfer":
            usual[:] = scale
            usual[composed] = 0.0
        elif preset == "strong style and composition":
            usual[:] = scale
            usual[composed] = composition
        elif preset == "composition precise":
            swapped[:] = 0.1 * self.composition_boost
            swapped[style], swapped[composed] = self.composition_boost, 0.0
            usual[composed] = composition
        else:
            if preset != "composition":
                usual[style] = scale
            if preset in ("composition", "style and composition"):
                usual[composed] = composition
            if preset == "style transfer precise":
                swapped[composed] = self.style_boost
        return usual, swapped

    # for the engine, see `Style` and `ImageStyle`

    def variants(self, steps: int) -> Sequence[Hashable]:
        """Return what `clean` does to the pictures' tokens in each step."""
        if self.clean is None or not self.clean.strength:
            return (None,) * steps
        return tuple(self.clean.at(step / steps) for step in range(steps))

    @property
    def unconditional(self) -> Hashable:
        """Return what `clean` does to the tokens that unconditional rows see instead of "no picture"."""
        return None if self.clean is None else self.clean.unconditional

    def vary(
        self, layers: Sequence[KeyValue | None], segment: int, variants: Sequence[Any], each: int
    ) -> list[list[KeyValue | None]]:
        """Return keys and values of all layers, cleaned as each variant says, and weighted."""
        cleaned = iter(damped(layers, [variant for variant in variants if variant is not None], each))
        found = [list(layers) if variant is None else next(cleaned) for variant in variants]
        if self.weights is None:
            return found
        relative = torch.tensor(self.weights, dtype=torch.float64) * len(self.weights) / sum(self.weights)
        return [weighted(one, relative, each) for one in found]

    @property
    def needs_encoder(self) -> bool:
        """Return whether pictures go through the adapter's image encoder."""
        return self.image_embeds is None

    @property
    def content_text(self) -> str | None:
        """Return the words whose text embedding `tokens` takes."""
        return self.content if isinstance(self.content, str) else None

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Return the words that are subtracted, if any."""
        return [("the style's content", self.content)] if isinstance(self.content, str) else []

    def write_field(self, name: str, value: Any, store: Any) -> Any:
        """Return a field's value for a record; embeddings by their file, if they came from one."""
        if name == "image_embeds":
            return store.tensor(value, self.embeds_source)
        if name == "clean":
            return asdict(value)
        return super().write_field(name, value, store)

    @classmethod
    def read_field(cls, name: str, value: Any, sources: Any) -> Any:
        """Return a field's value from a record; embeddings by file, or written out."""
        if name == "image_embeds":
            return sources.image_embeds(value)
        if name == "content" and isinstance(value, Mapping):
            return sources.tensor(value)
        if name == "clean":
            return read_settings(name, value, CleanStyle)
        return super().read_field(name, value, sources)

    def check_adapter(self, adapter: IPAdapter, text_dim: int) -> None:
        """Raise AdapterError or StyleError if the style doesn't fit the adapter, before anything is encoded.

        `text_dim`: width of the text embedding of `content`.
        """
        if self.content is not None and adapter.kind != "global":
            raise AdapterError(
                f"content={values.quoted(self.content)} can't be subtracted from a plus adapter's patch features; use "
                "a global adapter (ip-adapter_sdxl), or leave content None"
            )
        if self.content is not None:
            shape = tuple(self.content.shape) if isinstance(self.content, torch.Tensor) else (text_dim,)
            _check_space(shape, adapter.embed_dim)
        if isinstance(self.image_embeds, torch.Tensor):
            features, negative = split_image_embeds(self.image_embeds, adapter)
            adapter.check_features(features)
            self._check_counts(len(features))
            if negative is not None and self.negative_image is not None:
                raise StyleError(
                    "negative_image is given, but image_embeds already contains its embedding; leave one of them out"
                )

    def tokens(self, adapter: IPAdapter, encoder: ImageEncoder, content: torch.Tensor | None = None) -> StyleTokens:
        """Encode the pictures.

        `content`: the embedding `[dim]` of the words in `self.content`, the pooled state of the model's second text
        encoder; required if `self.content` is text. Raises AdapterError or StyleError as `check_adapter` does.
        """
        embedding = self.content if isinstance(self.content, torch.Tensor) else content
        if isinstance(self.content, str) and embedding is None:
            raise StyleError(f"content={values.quoted(self.content)} needs its text embedding; pass content=[dim]")
        self.check_adapter(adapter, 0 if embedding is None else embedding.shape[-1])
        negative = None
        if isinstance(self.image_embeds, torch.Tensor):
            features, negative = split_image_embeds(self.image_embeds, adapter)
        else:
            features = adapter.features(encoder, self.pictures, self.crop)
        if self.content is not None and embedding is not None:
            features = subtract_content(features, embedding, self.content_scale)
        tokens = adapter.tokens(features)
        image = tuple(tokens.unbind(0)) if self.masks else (tokens.flatten(0, 1),)
        if negative is not None:
            return StyleTokens(image, adapter.tokens(negative).flatten(0, 1))
        if self.negative_image is None:
            return StyleTokens(image, adapter.negative_tokens(encoder))
        return StyleTokens(image, adapter.tokens(adapter.features(encoder, [self.negative_image], self.crop))[0])


def subtract_content(image_embeds: torch.Tensor, text_embeds: torch.Tensor, scale: float) -> torch.Tensor:
    """Return `e_image - scale * e_text`; neither side is normalised.

    `image_embeds` `[n, dim]` are the image encoder's projected embeddings, `text_embeds` `[dim]` or `[1, dim]` the
    projected end-of-text state of a text tower in the same space. Raises AdapterError if the shapes don't fit.
    """
    if image_embeds.ndim != 2:
        raise AdapterError(
            f"content can be subtracted from embeddings [n, dim], not from features {list(image_embeds.shape)}; plus "
            "adapters read patch features: use a global adapter, or leave content None"
        )
    _check_space(tuple(text_embeds.shape), image_embeds.shape[1])
    return image_embeds - scale * text_embeds.reshape(1, -1).to(image_embeds)


def _check_space(shape: tuple[int, ...], width: int) -> None:
    if shape not in ((width,), (1, width)):
        raise AdapterError(
            f"the content's text embedding is {list(shape)}, the image embedding {width} wide: they are not in the "
            "same space. ip-adapter_sdxl (ViT-bigG) matches SDXL's second text encoder; for ViT-H pass content= an "
            "embedding [1024] of the ViT-H text tower"
        )


def _ramp(value: Callable[[float], float]) -> Callable[[Sequence[str]], list[float]]:
    """Return a preset with the weights 0.05 + 0.95 * `value`(t), t being a module's position in [0, 1)."""
    return lambda modules: [0.05 + 0.95 * value(t / len(modules)) for t in range(len(modules))]


def _weakened(*prefixes: str) -> Callable[[Sequence[str]], list[float]]:
    return lambda modules: [0.2 if module.startswith(prefixes) else 1.0 for module in modules]


_WITHOUT_MODULES = {
    "all": lambda modules: [1.0] * len(modules),
    "ease in": _ramp(lambda t: 1 - t),
    "ease out": _ramp(lambda t: t),
    "ease in out": _ramp(lambda t: 1 - abs(2 * t - 1)),
    "reverse in out": _ramp(lambda t: abs(2 * t - 1)),
    "weak input": _weakened("down"),
    "weak middle": _weakened("mid"),
    "weak output": _weakened("up"),
    "strong middle": _weakened("down", "up"),
}
_PRECISE = ("style transfer precise", "composition precise")
PRESETS = (
    "style transfer",
    "composition",
    "style and composition",
    "strong style transfer",
    "strong style and composition",
    *_PRECISE,
    *_WITHOUT_MODULES,
)
_ALIASES = {
    "style": "style transfer",
    "layout": "composition",
    "composition transfer": "composition",
    "style+layout": "style and composition",
    "layout+style": "style and composition",
    "style layout": "style and composition",
    "style+composition": "style and composition",
    "strong": "strong style transfer",
    "style strong": "strong style transfer",
    "precise": "style transfer precise",
    "style precise": "style transfer precise",
    "layout precise": "composition precise",
    "linear": "all",
    "full": "all",
}


def _spelled(name: str) -> str:
    """Return the name in `PRESETS` for a user's spelling, or the normalised spelling itself."""
    words = " ".join(name.lower().replace("_", " ").replace("-", " ").split()).replace(" + ", "+")
    return _ALIASES.get(words, words)


def _find(module: str, modules: Sequence[str], preset: str) -> int:
    if module not in modules:
        raise StyleError(
            f"blocks={values.quoted(preset)} needs the module {module}, which this model lacks; name blocks explicitly"
        )
    return modules.index(module)


def _from_substrings(substrings: Sequence[str], layout: AttentionLayout) -> list[float]:
    names: dict[str, list[bool]] = {module: [] for module in layout.modules}
    for layer in layout.layers:
        names[layer.module].append(any(s in f"{layer.name}.attn2.processor" for s in substrings))
    for module, hits in names.items():
        if any(hits) and not all(hits):
            raise StyleError(
                f"blocks={values.quoted(list(substrings))} names {sum(hits)} of the {len(hits)} layers of {module}; "
                "strengths are per module, so name the module"
            )
    weights = [float(all(names[module])) for module in layout.modules]
    if not any(weights):
        raise StyleError(
            f"blocks={values.quoted(list(substrings))} matches no attention module; choose one of "
            f"{', '.join(layout.modules)}"
        )
    return weights


def _from_dictionary(blocks: Mapping, modules: Sequence[str]) -> list[float]:
    groups: dict[str, list[int]] = {}
    for index, module in enumerate(modules):
        part, _, rest = module.partition("_block")
        groups.setdefault("mid" if part == "mid" else f"{part}.block_{rest.split('.')[1]}", []).append(index)
    weights = [0.0] * len(modules)
    for part, value in blocks.items():
        if isinstance(value, Mapping):
            named = {f"{part}.{block}": inner for block, inner in value.items()}
        elif part == "mid":
            named = {"mid": value}
        else:
            named = {group: value for group in groups if group.startswith(f"{part}.")}
        for group, inner in named.items():
            if group not in groups:
                raise StyleError(
                    f"blocks names {values.shown(group)}, which has no attention in this model; choose one of "
                    f"{', '.join(groups)}"
                )
            places = groups[group]
            given = list(inner) if isinstance(inner, (list, tuple)) else [inner]
            given = given * len(places) if len(given) == 1 else given
            if len(given) != len(places):
                raise StyleError(f"blocks gives {len(given)} weights for {group}, which has {len(places)} modules")
            for place, weight in zip(places, given, strict=True):
                weights[place] = float(weight)
    return weights


def _strength(name: str, value) -> float:
    return values.real_number(name, value, -values.MAX_STRENGTH, values.MAX_STRENGTH, error=StyleError)


def _checked_scale(scale) -> float | tuple[float, ...]:
    several = values.entries(scale)
    if several is None:
        return _strength("scale", scale)
    return tuple(_strength(f"scale[{i}]", one) for i, one in enumerate(several))


def _checked_content(content) -> str | torch.Tensor:
    if not isinstance(content, torch.Tensor):
        words = values.prompt("content", content, error=StyleError)
        if not words.strip():
            raise StyleError("content is empty; say what the picture shows, or leave it None")
        return words
    values.dense_tensor("content", content, error=StyleError)
    whole = content.ndim in (1, 2) and content.numel() and content.is_floating_point()
    if not whole or not torch.isfinite(content.float()).all():  # fp8 has no isfinite
        raise StyleError(f"content is {values.quoted(content)}; an embedding has the shape [dim] and finite values")
    return content


def _checked_blocks(blocks) -> str | dict | tuple[str, ...]:
    if isinstance(blocks, str):
        blocks = str.__str__(blocks)
        if _spelled(blocks) not in PRESETS:
            raise StyleError(
                f"blocks={values.quoted(blocks)} is not a preset; choose one of {', '.join(map(repr, PRESETS))}; "
                "layer names go in a list, as in "
                f"[{values.quoted(STYLE_MODULE)}]{values.did_you_mean(blocks, (*PRESETS, *_ALIASES))}"
            )
        return blocks
    if isinstance(blocks, Mapping):
        blocks = values.mapping("blocks", blocks, error=StyleError)
        unknown = [part for part in blocks if not isinstance(part, str) or part not in ("down", "mid", "up")]
        if unknown or not blocks:
            raise StyleError(
                f"blocks has the parts {values.quoted(list(blocks))}; the parts are 'down', 'mid' and 'up'"
            )
        return {part: _checked_part(part, value) for part, value in blocks.items()}
    several = values.entries(blocks)
    if several is not None:
        names = [str.__str__(one) for one in several if isinstance(one, str)]
        if not names or len(names) < len(several) or not all(name.strip() for name in names):
            raise StyleError(f"blocks={values.quoted(blocks)} is not a list of substrings of layer names")
        return tuple(names)
    raise StyleError(f"blocks is a preset, a dictionary or a list of layer names, not {type(blocks).__name__}")


def _checked_part(part: str, value) -> float | tuple | dict:
    if isinstance(value, Mapping):
        named = values.mapping(f"blocks of {part}", value, error=StyleError)
        for block in named:
            values.text(f"a block of {part}", block, longest=values.QUOTED, error=StyleError)
        return {block: _checked_weights(f"{part} {block}", inner) for block, inner in named.items()}
    return _checked_weights(part, value)


def _checked_weights(name: str, value) -> float | tuple[float, ...]:
    several = values.entries(value)
    if several is None:
        return _strength(f"the weight of {name}", value)
    if not several:
        raise StyleError(f"the weight of {name} is an empty list; give one per module")
    return tuple(_strength(f"the weight of {name}", weight) for weight in several)
