"""What the rows of a batch are conditioned on: pages of text and image keys and values, and masks.

Every distinct prompt (of a branch, of a noise stage) and every distinct image segment is a page; the row table picks
pages by number, and going to another noise stage is another number. Pages outlive the request that had them made, so
that the next one with the same prompt or the same style object finds them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from stylefast.errors import StyleError
from stylefast.models.conditioning import ImageKV
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.masks import load_mask, mask_vectors
from stylefast.models.text import Prompt, TextEncoder
from stylefast.models.unet import UNet
from stylefast.runtime.key_values import KeyValuePages
from stylefast.runtime.trajectory import NULL, Trajectory
from stylefast.styles.dream_styler import (
    DreamStyler,
    negative_prompts,
    placed_styles,
    pooled_policy_of,
    prompts_per_step,
)
from stylefast.styles.instant_style import InstantStyle

CONDITIONAL_BRANCHES = ("full", "style")  # branches that see the style's picture; the others see the negative tokens


@dataclass(frozen=True)
class ImageSegment:
    """One image segment of a row: where its tokens are, where it acts and how strongly."""

    page: int
    mask: int  # -1: everywhere
    strength: np.ndarray  # [modules] float32
    style: InstantStyle  # knows the steps at which the segment acts


@dataclass
class Conditions:
    """Who of some trajectories reads which pages; to be given back to the store that made it."""

    latent_size: tuple[int, int]  # (height, width)
    text_pages: dict[tuple[Trajectory, str], np.ndarray] = field(default_factory=dict)  # [steps] int64
    image_segments: dict[tuple[Trajectory, str], list[ImageSegment]] = field(default_factory=dict)
    held_text: list[int] = field(default_factory=list)
    held_images: list[int] = field(default_factory=list)
    held_masks: dict[tuple[InstantStyle, int], int] = field(default_factory=dict)  # of a style's segments


class MaskTable:
    """Masks of one latent size, per attention level [masks, tokens], in places that are handed out and taken back."""

    def __init__(self, sizes: Sequence[tuple[int, int]], device: torch.device):
        self.sizes, self.generation, self._free = list(sizes), 0, []
        self.levels = tuple(torch.zeros(0, h * w, device=device) for h, w in sizes)

    def add(self, vectors: Sequence[torch.Tensor]) -> int:
        """Store a mask, per level [tokens]; its number."""
        if not self._free:
            before = len(self.levels[0])
            count = max(4, 2 * before)
            self.levels = tuple(torch.cat([x, x.new_zeros(count - before, x.shape[1])]) for x in self.levels)
            self._free, self.generation = list(range(count - 1, before - 1, -1)), self.generation + 1
        place = self._free.pop()
        for level, vector in zip(self.levels, vectors, strict=True):
            level[place] = vector.to(level)
        return place

    def release(self, places: Sequence[int]) -> None:
        """Take masks back."""
        self._free += places


class ConditionStore:
    """All pages of one model, for requests to share.

    `adapters` is the engine's own dictionary, so that adapters which are loaded later are found. `revision` is asked
    for before anything is looked up: pages made under another value (other LoRAs, say) are made again.
    """

    def __init__(
        self, unet: UNet, text_encoder: TextEncoder, adapters: Mapping[str, tuple[IPAdapter, ImageEncoder]],
        train_timesteps: int, revision=lambda: None,
    ):  # fmt: skip
        self.unet, self.text_encoder, self.adapters = unet, text_encoder, adapters
        self._train_timesteps, self._revision = train_timesteps, revision
        pooled = text_encoder.encoders[1].text_projection.weight.shape[0]
        self.text = KeyValuePages(unet.layout, text_encoder.max_tokens, pooled, unet.device, unet.dtype)
        self.images: KeyValuePages | None = None
        self.masks: dict[tuple[int, int], MaskTable] = {}

    @property
    def image_kv(self) -> ImageKV | None:
        """Image keys and values as the UNet reads them; None as long as no request had a picture."""
        return None if self.images is None else ImageKV(self.images.layers, self.images.lengths)

    @property
    def generation(self) -> tuple:
        """Changes when any buffer is replaced by another."""
        images = -1 if self.images is None else self.images.generation
        return (self.text.generation, images, *(m.generation for m in self.masks.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of all pages and masks."""
        masks = sum(x.numel() * x.element_size() for table in self.masks.values() for x in table.levels)
        return self.text.nbytes + (self.images.nbytes if self.images is not None else 0) + masks

    @torch.inference_mode()
    def encode(self, trajectories: Sequence[Trajectory], latent_size: tuple[int, int]) -> Conditions:
        """Encode all that `trajectories` need and does not exist yet; `latent_size` is (height, width).

        Raises PromptError, StyleError, AdapterError or ImageError for what can't be encoded, and holds no pages then.
        """
        conditions = Conditions(latent_size)
        try:
            self._encode_text(trajectories, conditions)
            for t in trajectories:
                for branch in t.branches:
                    conditions.image_segments[t, branch] = self._segments(t, branch, conditions)
        except BaseException:
            self.release(conditions)
            raise
        return conditions

    def check(self, t: Trajectory) -> int:
        """Raise what `encode` would raise for one trajectory, without running an encoder.

        Returns the number of image segments that its rows have at most.
        """
        placed, negative = placed_styles(t.request.styles_of(DreamStyler), t.prompt, t.request.negative_prompt)
        pooled_policy_of(placed)
        pooled_policy_of(negative)
        per_branch = _branch_prompts(t, placed, negative, self._train_timesteps, say=False)
        self.text_encoder.check(list({id(p): p for per_step in per_branch.values() for p in per_step}.values()))
        segments = dict.fromkeys(t.branches, 0)
        for style in t.request.styles_of(InstantStyle):
            adapter, encoder = self._adapter(style)
            style.check_adapter(adapter, self.text_encoder.encoders[1].text_projection.weight.shape[0])
            if style.image_embeds is None:
                adapter.check_encoder(encoder)
            for i, segment in enumerate(style.segments):
                strengths = style.strengths(self.unet.layout, NULL in t.branches, i)
                if isinstance(segment.mask, torch.Tensor):
                    load_mask(segment.mask, (t.size[1], t.size[0]))
                for branch in t.branches:
                    parts = strengths[:1] if branch in CONDITIONAL_BRANCHES else strengths[1:]
                    segments[branch] += sum(bool(part.any()) for part in parts)
        return max(segments.values(), default=0)

    def release(self, conditions: Conditions) -> None:
        """Give back all pages of `conditions`; a second time does nothing."""
        self.text.release(conditions.held_text)
        if conditions.held_images:
            self.images.release(conditions.held_images)
        if conditions.held_masks:
            self.masks[conditions.latent_size].release(list(conditions.held_masks.values()))
        conditions.held_text, conditions.held_images, conditions.held_masks = [], [], {}

    def _encode_text(self, trajectories: Sequence[Trajectory], conditions: Conditions) -> None:
        revision = self._revision()
        wanted: dict[tuple[Trajectory, str], list[tuple]] = {}  # keys per step
        prompts: dict[tuple, tuple[Prompt, str, int]] = {}
        for t in trajectories:
            placed, negative = placed_styles(t.request.styles_of(DreamStyler), t.prompt, t.request.negative_prompt)
            policy, null_policy = pooled_policy_of(placed), pooled_policy_of(negative)
            for branch, per_step in _branch_prompts(t, placed, negative, self._train_timesteps).items():
                # the null branch skips no layers, as in diffusers
                pooling, skip = (null_policy, 0) if branch == NULL else (policy, t.request.clip_skip)
                # one Prompt object serves many steps
                distinct = {id(prompt): prompt for prompt in per_step}
                keys = {place: (revision, pooling, skip, prompt.identity()) for place, prompt in distinct.items()}
                for place, prompt in distinct.items():
                    prompts.setdefault(keys[place], (prompt, pooling, skip))
                wanted[t, branch] = [keys[id(prompt)] for prompt in per_step]

        pages = {key: self.text.find(key) for key in prompts}
        conditions.held_text += [page for page in pages.values() if page is not None]
        missing = [key for key, page in pages.items() if page is None]
        if missing:
            texts, poolings, skips = zip(*(prompts[key] for key in missing), strict=True)
            states = self.text_encoder.encode(texts, poolings, skips)
            hidden = torch.stack([state.hidden for state in states]).to(self.unet.device, self.unet.dtype)
            pooled = torch.stack([state.pooled for state in states])
            made = self.text.add(missing, self.unet.project_text(hidden), pooled)
            conditions.held_text += made
            pages |= dict(zip(missing, made, strict=True))
        for row, row_keys in wanted.items():
            conditions.text_pages[row] = np.array([pages[key] for key in row_keys], dtype=np.int64)

    def _segments(self, t: Trajectory, branch: str, conditions: Conditions) -> list[ImageSegment]:
        """The image segments of one row; those of strength 0 in every module are left out."""
        found = []
        for style in t.request.styles_of(InstantStyle):
            image_pages, negative = self._image_pages(style, conditions)
            masks = [self._mask(style, i, t.size, conditions) for i in range(len(style.segments))]
            guided = NULL in t.branches
            for i, (page, mask) in enumerate(zip(image_pages, masks, strict=True)):
                strengths = style.strengths(self.unet.layout, guided, i)
                if branch in CONDITIONAL_BRANCHES:
                    entries = [(page, strengths.conditional)]
                else:
                    entries = [(page, strengths.unconditional_image), (negative, strengths.unconditional_negative)]
                found += [ImageSegment(p, mask, strength.float().numpy(), style) for p, strength in entries
                          if bool(strength.any())]  # fmt: skip
        return found

    def _image_pages(self, style: InstantStyle, conditions: Conditions) -> tuple[list[int], int]:
        """Pages of a style's segments and of its negative tokens."""
        adapter, encoder = self._adapter(style)
        # the style object itself is the key, and thereby stays alive as long as its pages
        keys = [(adapter, style, i) for i in range(len(style.segments))]
        keys.append((adapter, style if style.own_negative else None, -1))
        pages = [None if self.images is None else self.images.find(key) for key in keys]
        conditions.held_images += [page for page in pages if page is not None]
        if None in pages:
            content = None
            if isinstance(style.content, str):
                content = self.text_encoder.encode([Prompt(style.content)])[0].pooled
            tokens = style.tokens(adapter, encoder, content)
            for i, one in enumerate([*tokens.image, tokens.negative]):
                if pages[i] is None:
                    pages[i] = self._add_image(keys[i], adapter, one)
                    conditions.held_images.append(pages[i])
        return pages[:-1], pages[-1]

    @torch.inference_mode()
    def make_image_pages(self, tokens: int) -> None:
        """Make room for pictures of so many tokens, if there is none."""
        if self.images is None:
            self.images = KeyValuePages(self.unet.layout, tokens, 0, self.unet.device, self.unet.dtype)

    def _add_image(self, key, adapter: IPAdapter, tokens: torch.Tensor) -> int:
        self.make_image_pages(len(tokens))
        return self.images.add([key], adapter.key_values(tokens[None]))[0]

    def _adapter(self, style: InstantStyle) -> tuple[IPAdapter, ImageEncoder]:
        if not self.adapters:
            raise StyleError(
                "InstantStyle needs an IP-Adapter and this engine has none; pass adapter='ip-adapter_sdxl.safetensors' "
                "and its image encoder to Engine.from_pretrained, or call engine.load_adapter"
            )
        if style.adapter is None:
            if len(self.adapters) > 1:
                names = ", ".join(self.adapters)
                raise StyleError(f"this engine has several adapters ({names}); name one: adapter=...")
            return next(iter(self.adapters.values()))
        if style.adapter not in self.adapters:
            raise StyleError(f"adapter {style.adapter!r} is not loaded; loaded are {', '.join(self.adapters)}")
        return self.adapters[style.adapter]

    def _mask(self, style: InstantStyle, segment: int, size: tuple[int, int], conditions: Conditions) -> int:
        mask, latent_size = style.segments[segment].mask, conditions.latent_size
        if mask is None:
            return -1
        if (style, segment) not in conditions.held_masks:
            if latent_size not in self.masks:
                self.masks[latent_size] = MaskTable(self.unet.attention_sizes(*latent_size), self.unet.device)
            table = self.masks[latent_size]
            vectors = mask_vectors(load_mask(mask, (size[1], size[0])), table.sizes)
            conditions.held_masks[style, segment] = table.add(vectors)
        return conditions.held_masks[style, segment]


def _branch_prompts(
    t: Trajectory, placed: list[DreamStyler], negative: list[DreamStyler], train_timesteps: int, say: bool = True
) -> dict[str, list[Prompt]]:
    """Branch -> one Prompt per step, for the branches that the trajectory has rows in."""
    steps = t.schedule.steps
    timesteps = t.schedule.timesteps.clamp(0, train_timesteps)
    text_branches = [branch for branch in t.branches if branch != NULL]
    if placed and t.prompt:
        per_branch = prompts_per_step(placed, t.prompt, timesteps, text_branches, train_timesteps, say=say)
    else:
        # without a learned style, a reference's rows for its readers' branches all see the reference's prompt
        per_branch = dict.fromkeys(text_branches, [Prompt(t.prompt)] * steps)
    if NULL in t.branches:
        null = negative_prompts(negative, t.request.negative_prompt, timesteps, train_timesteps, say=say)
        per_branch = {NULL: null, **per_branch}
    return per_branch
