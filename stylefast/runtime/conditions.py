"""What the rows of a batch are conditioned on: text and image keys and values, computed once before the first step.

Prompts and pictures are constant over the steps, so are their keys and values. Every distinct prompt (of a branch, of
a noise stage) and every distinct image segment becomes a page; the row table picks pages by number, and going to
another noise stage is another number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from stylefast.errors import StyleError
from stylefast.models.conditioning import ImageKV
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.masks import load_mask, mask_vectors
from stylefast.models.text import Prompt, TextEncoder
from stylefast.models.unet import UNet
from stylefast.runtime.trajectory import NULL, Trajectory
from stylefast.styles.dream_styler import DreamStyler, pooled_policy_of, prompts_per_step
from stylefast.styles.instant_style import InstantStyle

CONDITIONAL_BRANCHES = ("full", "style")  # branches that see the style's picture; the others see the negative tokens


@dataclass(frozen=True)
class ImageSegment:
    """One image segment of a row: where its tokens are, where it acts and how strongly."""

    page: int
    mask: int  # -1: everywhere
    strength: torch.Tensor  # [modules]
    style: InstantStyle  # knows the steps at which the segment acts


@dataclass(frozen=True)
class Conditions:
    """All pages of a batch and who reads which."""

    text_kv: tuple  # per layer (k, v) [text pages, tokens, heads, d]
    pooled: torch.Tensor  # [text pages, pooled_dim]
    image_kv: ImageKV | None
    masks: tuple[torch.Tensor, ...]  # per attention level [masks, tokens]
    text_pages: Mapping[tuple[Trajectory, str], Sequence[int]]  # per step
    image_segments: Mapping[tuple[Trajectory, str], Sequence[ImageSegment]]


def encode_conditions(
    trajectories: Sequence[Trajectory],
    unet: UNet,
    text_encoder: TextEncoder,
    adapters: Mapping[str, tuple[IPAdapter, ImageEncoder]],
    latent_size: tuple[int, int],
    train_timesteps: int = 1000,
) -> Conditions:
    """Encode all that `trajectories` need; `latent_size` is (height, width) of the batch's latents.

    Raises PromptError, StyleError, AdapterError or ImageError for what can't be encoded.
    """
    text_kv, pooled, text_pages = _encode_text(trajectories, unet, text_encoder, train_timesteps)
    images = _ImagePages(unet, text_encoder, adapters, latent_size)
    segments = {(t, branch): images.segments(t, branch) for t in trajectories for branch in t.branches}
    return Conditions(text_kv, pooled, images.key_values(), images.mask_tables(), text_pages, segments)


def _encode_text(trajectories, unet: UNet, text_encoder: TextEncoder, train_timesteps: int):
    wanted: list[tuple[Prompt, str]] = []  # one entry per (trajectory, branch, step)
    for t in trajectories:
        learned = t.request.styles_of(DreamStyler)
        per_branch = _branch_prompts(t, learned, train_timesteps)
        policy = pooled_policy_of(learned)
        for branch in t.branches:
            wanted += [(prompt, "eos" if branch == NULL else policy) for prompt in per_branch[branch]]
    states = text_encoder.encode([prompt for prompt, _ in wanted], [policy for _, policy in wanted])

    # the encoder hands out one object per distinct prompt
    distinct = list({id(state): state for state in states}.values())
    page_of = {id(state): page for page, state in enumerate(distinct)}
    pages = iter(page_of[id(state)] for state in states)
    text_pages = {(t, b): [next(pages) for _ in range(t.schedule.steps)] for t in trajectories for b in t.branches}
    hidden = torch.stack([state.hidden for state in distinct]).to(unet.device, unet.dtype)
    pooled = torch.stack([state.pooled for state in distinct]).to(unet.device, unet.dtype)
    return unet.project_text(hidden), pooled, text_pages


def _branch_prompts(t: Trajectory, learned: list[DreamStyler], train_timesteps: int) -> dict[str, list[Prompt]]:
    """Branch -> one Prompt per step."""
    steps = t.schedule.steps
    null = [Prompt(t.request.negative_prompt or None)] * steps
    text_branches = [branch for branch in t.branches if branch != NULL]
    if learned and t.prompt:
        timesteps = t.schedule.timesteps.clamp(0, train_timesteps)
        per_branch = prompts_per_step(learned, t.prompt, timesteps, text_branches, train_timesteps)
    else:
        # without a learned style, a reference's rows for its readers' branches all see the reference's prompt
        per_branch = dict.fromkeys(text_branches, [Prompt(t.prompt)] * steps)
    return {NULL: null, **per_branch}


class _ImagePages:
    """Collects image tokens page by page while segments are handed out."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder, adapters, latent_size: tuple[int, int]):
        self.unet, self.text_encoder, self.adapters = unet, text_encoder, adapters
        self.sizes = unet.attention_sizes(*latent_size)
        self.pages: list[tuple[IPAdapter, torch.Tensor]] = []  # tokens [t, cross_dim]
        self.masks: list[tuple[torch.Tensor, ...]] = []
        self._encoded: dict[int, tuple[list[int], list[int], int]] = {}
        self._negatives: dict[int, int] = {}

    def segments(self, t: Trajectory, branch: str) -> list[ImageSegment]:
        """The image segments of one row; those of strength 0 in every module are left out."""
        found = []
        for style in t.request.styles_of(InstantStyle):
            if id(style) not in self._encoded:
                self._encoded[id(style)] = self._encode(style, t.size)
            image_pages, masks, negative = self._encoded[id(style)]
            guided = NULL in t.branches
            for i, (page, mask) in enumerate(zip(image_pages, masks, strict=True)):
                strengths = style.strengths(self.unet.layout, guided, i)
                if branch in CONDITIONAL_BRANCHES:
                    entries = [(page, strengths.conditional)]
                else:
                    entries = [(page, strengths.unconditional_image), (negative, strengths.unconditional_negative)]
                found += [ImageSegment(p, mask, strength, style) for p, strength in entries if bool(strength.any())]
        return found

    def _encode(self, style: InstantStyle, size: tuple[int, int]) -> tuple[list[int], list[int], int]:
        adapter, encoder = self._adapter(style)
        content = None
        if isinstance(style.content, str):
            content = self.text_encoder.encode([Prompt(style.content)])[0].pooled
        tokens = style.tokens(adapter, encoder, content)
        image_pages = [self._page(adapter, one) for one in tokens.image]
        if style.negative_image is not None:
            negative = self._page(adapter, tokens.negative)
        else:
            if id(adapter) not in self._negatives:
                self._negatives[id(adapter)] = self._page(adapter, tokens.negative)
            negative = self._negatives[id(adapter)]
        return image_pages, [self._mask(segment.mask, size) for segment in style.segments], negative

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

    def _page(self, adapter: IPAdapter, tokens: torch.Tensor) -> int:
        self.pages.append((adapter, tokens))
        return len(self.pages) - 1

    def _mask(self, mask, size: tuple[int, int]) -> int:
        if mask is None:
            return -1
        self.masks.append(mask_vectors(load_mask(mask, (size[1], size[0])), self.sizes))
        return len(self.masks) - 1

    def key_values(self) -> ImageKV | None:
        """Keys and values of all pages, zero-padded to the longest."""
        if not self.pages:
            return None
        lengths = [tokens.shape[0] for _, tokens in self.pages]
        per_page = [adapter.key_values(tokens[None]) for adapter, tokens in self.pages]
        layers = []
        for layer in range(len(self.unet.layout.layers)):
            sides = []
            for side in range(2):
                first = per_page[0][layer][side]
                padded = first.new_zeros(len(per_page), max(lengths), *first.shape[2:])
                for page, pairs in enumerate(per_page):
                    padded[page, : lengths[page]] = pairs[layer][side][0]
                sides.append(padded.to(self.unet.device, self.unet.dtype))
            layers.append(tuple(sides))
        return ImageKV(tuple(layers), torch.tensor(lengths, device=self.unet.device))

    def mask_tables(self) -> tuple[torch.Tensor, ...]:
        """Per attention level [masks, tokens]; empty without masks."""
        if not self.masks:
            return ()
        levels = range(len(self.sizes))
        return tuple(torch.stack([mask[level] for mask in self.masks]).to(self.unet.device) for level in levels)
