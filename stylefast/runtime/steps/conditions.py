"""Conditions of a batch's rows: pages of text and image keys and values, and masks.

Cross-attention's keys and values don't change between steps, nor between requests with equal prompts. So they are
computed once and kept in pages of buffers with fixed addresses (captured graphs and compiled regions read them by page
number). Every distinct prompt (per branch and noise stage) and every distinct image segment is a page; the row table
selects pages by number, so changing the noise stage changes the number. Pages outlive the request that created them, so
that later requests with the same prompt or style object reuse them, and are dropped when they are unused and the room
is needed. All layers of an attention level share one buffer, as exported graphs require.
"""

import itertools
from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch

from stylefast.errors import StyleError
from stylefast.models.control_net import ControlNet
from stylefast.models.image_encoder import ImageEncoder
from stylefast.models.ip_adapter import IPAdapter
from stylefast.models.layout import AttentionLayout
from stylefast.models.masks import MaskTable, load_mask, mask_vectors
from stylefast.models.pictures import PictureSource
from stylefast.models.repaint import fit_picture
from stylefast.models.row_loras import LoraFactors, LoraProducts
from stylefast.models.row_table import ImageKV, KeyValue
from stylefast.models.t2i_adapter import T2IAdapter
from stylefast.models.text import Prompt, TextEncoder, TextLoras
from stylefast.models.unet import Encoder, UNet
from stylefast.runtime.loras import Lora, LoraPool, Loras, LoraUse
from stylefast.runtime.plan.control import Control
from stylefast.runtime.plan.sample import Sample
from stylefast.sampling.guidance import NULL
from stylefast.slots import LruDict, Slots
from stylefast.styles.style import ImageStyle, Texts, asking, by_kind
from stylefast.values import listed, quoted

CONDITIONAL_BRANCHES = ("full", "style")  # branches that see the style's picture; the others see the negative tokens


@dataclass(frozen=True)
class ImageSegment:
    """One image segment of a row: its tokens, where it acts and how strongly."""

    pages: np.ndarray  # [steps] int64
    mask: int  # -1: everywhere
    strength: np.ndarray  # [modules] float32
    style: ImageStyle  # determines the steps at which the segment acts


@dataclass(frozen=True, eq=False)
class ControlUse:
    """A control picture of a row, as its network reads it."""

    control: Control
    network: ControlNet | T2IAdapter
    picture: tuple[torch.Tensor, ...]  # [channels, h, w], embedded
    pages: "KeyValuePages | None"  # of text for the network; None: it does not attend
    text_page: np.ndarray  # [steps] int64
    numbers: tuple[int, ...] = ()  # of the types of all pictures that a union reads for this row

    @property
    def together(self) -> bool:
        """Return whether a union reads several pictures, so that their weights are in them."""
        return len(self.numbers) > 1


@dataclass
class Conditions:
    """The pages that each of some samples reads; must be released to the store that made it."""

    latent_size: tuple[int, int]  # (height, width)
    text_pages: dict[tuple[Sample, str], np.ndarray] = field(default_factory=dict)  # [steps] int64
    image_segments: dict[tuple[Sample, str], list[ImageSegment]] = field(default_factory=dict)
    held_text: list[int] = field(default_factory=list)
    held_images: list[int] = field(default_factory=list)
    held_masks: dict[tuple[ImageStyle, int], int] = field(default_factory=dict)  # of a style's segments
    held_loras: dict[Lora, int] = field(default_factory=dict)  # places in the pool
    controls: dict[tuple[Sample, str], list[ControlUse]] = field(default_factory=dict)
    held_control_text: list[tuple["KeyValuePages", list[int]]] = field(default_factory=list)
    bank_loras: dict[int, LoraProducts] = field(default_factory=dict)  # by id of the banks that store hidden states


@dataclass
class Encoded:
    """Inputs made for some samples and held; release them to the store once the conditions are gathered."""

    held_text: list[int] = field(default_factory=list)
    held_images: list[int] = field(default_factory=list)
    masks: dict[tuple[ImageStyle, int], tuple[torch.Tensor, ...]] = field(default_factory=dict)  # of segments
    held_control_text: list[tuple["KeyValuePages", list[int]]] = field(default_factory=list)
    loras: dict[Lora, LoraFactors] = field(default_factory=dict)
    # of those that were not on the device: the same, with the UNet's factors there
    brought: dict[Lora, LoraFactors] = field(default_factory=dict)

    def products(self, used: Sequence[LoraUse]) -> LoraProducts:
        """Return what LoRAs add to layers of the UNet outside the steps."""
        return LoraProducts(tuple((self.loras[use.lora], use.unet) for use in used if use.unet))


# yields encoder calls, receives their results, and returns the pages
Encoding = Generator[Callable[[], Any], Any, Encoded]
# likewise, and adds its results to an `Encoded`
Making = Generator[Callable[[], Any], Any, None]
# prompts per call of the text encoders
_PROMPTS = 8
FIRST_PAGES = 8
# unused pages kept for the next request with the same prompt or picture
IDLE_PAGES = 64


class KeyValuePages:
    """Pages of keys and values of all cross-attention layers, each with one row of `extra` numbers.

    `by_level[level]` is [layers of the level, 2, pages, tokens, heads, d], layers in registry order; `layers[i]` its
    contiguous views (k, v) [pages, tokens, heads, d]; `lengths` [pages] int64 the tokens in use; `extra` [pages,
    width]. All are replaced when the buffers grow, and `generation` increases. `uneven`: whether pages of unequal
    lengths have ever been stored.
    """

    def __init__(self, layout: AttentionLayout, tokens: int, extra: int, device: torch.device, dtype: torch.dtype):
        self._layout, self._device, self._dtype = layout, device, dtype
        self.tokens, self.generation, self.uneven = tokens, 0, False
        self._least = tokens  # the buffers are never shorter
        # called with the bytes of larger buffers before they are made; raises OutOfMemory
        self.check_room: Callable[[int], None] = lambda nbytes: None
        self._lengths = np.zeros(0, dtype=np.int64)  # `lengths` on the host
        self._keys: dict[int, Hashable] = {}
        self._page_of: dict[Hashable, int] = {}
        self._users: dict[int, int] = {}
        self._idle: LruDict[int, None] = LruDict()
        self._slots = Slots()
        self.by_level: tuple[torch.Tensor, ...] = ()
        self.layers: tuple[KeyValue, ...] = ()
        self.lengths = torch.zeros(0, dtype=torch.int64, device=device)
        self.extra = torch.zeros(0, extra, device=device, dtype=dtype)
        self._resize(FIRST_PAGES, tokens)

    def __len__(self) -> int:
        """Return the number of pages that fit."""
        return len(self.lengths)

    @property
    def used(self) -> int:
        """Count the pages in use."""
        return len(self._users)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all buffers."""
        buffers = [self.lengths, self.extra, *self.by_level]
        return sum(x.numel() * x.element_size() for x in buffers)

    def nbytes_with(self, tokens: int) -> int:
        """Return the bytes of keys and values if one page had `tokens` tokens."""
        return self._nbytes(len(self), max(tokens, self.tokens))

    def shrink(self) -> bool:
        """Make the buffers as short, and as few, as the pages in use allow; return whether they were longer or more.

        Unused pages that then have no room are forgotten. No step may be running.
        """
        longest = max([self._least, *(int(self._lengths[page]) for page in self._users)])
        count = max([FIRST_PAGES, *(page + 1 for page in self._users)])
        if longest >= self.tokens and count >= len(self):
            return False
        for page in [page for page in self._idle if page >= count or self._lengths[page] > longest]:
            self._forget(page)
        self._resize(min(count, len(self)), longest)
        return True

    def find(self, key: Hashable) -> int | None:
        """Return the page of a key and add one user to it; None if the key is unknown."""
        page = self._page_of.get(key)
        if page is not None:
            self._idle.pop(page, None)
            self._users[page] = self._users.get(page, 0) + 1
        return page

    def add(
        self, keys: Sequence[Hashable], layers: Sequence[KeyValue | None], extra: torch.Tensor | None = None
    ) -> list[int]:
        """Store new pages, each with one user.

        layers: per layer (k, v) [n, tokens, heads, d], or None for layers that read zeros; extra: [n, width].
        Returns the n page numbers.
        """
        tokens = next(pair for pair in layers if pair is not None)[0].shape[1]
        if tokens != self.tokens:
            self.uneven = True  # longer ones leave those before them shorter than the buffers
        if tokens > self.tokens:
            self._resize(len(self), tokens)
        pages: list[int] = []
        try:
            for _ in keys:
                pages.append(self._take())
            index = torch.tensor(pages, device=self._device)
            for (k, v), pair in zip(self.layers, layers, strict=True):
                for buffer, values in zip((k, v), pair or (0, 0), strict=True):
                    buffer[index, :tokens] = values.to(buffer) if isinstance(values, torch.Tensor) else values
            self.lengths[index] = self._lengths[pages] = tokens
            if extra is not None:
                self.extra[index] = extra.to(self.extra)
        except BaseException:
            self._slots.release(pages)
            raise
        for key, page in zip(keys, pages, strict=True):
            self._keys[page], self._page_of[key], self._users[page] = key, page, 1
        return pages

    def any_shorter(self, pages: np.ndarray) -> bool:
        """Return whether one of these pages has fewer tokens than the buffers. Does not wait for the device."""
        return self.uneven and bool((self._lengths[pages] < self.tokens).any())

    def release(self, pages: Sequence[int]) -> None:
        """Remove one user from each page."""
        for page in pages:
            self._users[page] -= 1
            if self._users[page] == 0:
                del self._users[page]
                self._idle[page] = None
        for page in self._idle.beyond(IDLE_PAGES):
            self._forget(page)

    def _forget(self, page: int) -> None:
        del self._idle[page]
        del self._page_of[self._keys.pop(page)]
        self._slots.release([page])

    def _take(self) -> int:
        oldest = self._idle.oldest
        if not self._slots.free and oldest is not None:
            self._forget(oldest)
        if not self._slots.free:
            self._resize(2 * len(self), self.tokens)
        return self._slots.take(1)[0]

    def _nbytes(self, pages: int, tokens: int) -> int:
        numbers = sum(2 * layer.channels for layer in self._layout.layers)
        return numbers * pages * tokens * self._dtype.itemsize

    def _resize(self, pages: int, tokens: int) -> None:
        if self.by_level and (pages > len(self) or tokens > self.tokens):
            self.check_room(self._nbytes(pages, tokens))
        before, kept, levels = min(len(self), pages), min(tokens, self.tokens), []
        layers: dict[int, KeyValue] = {}
        for level in range(self._layout.levels):
            members = self._layout.at_level(level)
            one = self._layout.layers[members[0]]
            shape = (len(members), 2, pages, tokens, one.heads, one.channels // one.heads)
            buffer = torch.zeros(shape, device=self._device, dtype=self._dtype)
            if before:
                buffer[:, :, :before, :kept] = self.by_level[level][:, :, :before, :kept]
            levels.append(buffer)
            for place, i in enumerate(members):
                layers[i] = (buffer[place, 0], buffer[place, 1])
        lengths = self.lengths.new_ones(pages)
        extra = self.extra.new_zeros(pages, self.extra.shape[1])
        host = np.ones(pages, dtype=np.int64)
        # free pages, whose lengths operations read too, may have been longer
        host[:before] = np.minimum(self._lengths[:before], tokens)
        lengths[:before], extra[:before] = self.lengths[:before].clamp(max=tokens), self.extra[:before]
        self.by_level, self.tokens = tuple(levels), tokens
        self.layers = tuple(layers[i] for i in range(len(layers)))
        self.lengths, self._lengths, self.extra = lengths, host, extra
        self._slots.grow(pages)
        self._slots.shrink(pages)
        self.generation += 1


class ConditionStore:
    """All pages of one model, shared between requests.

    `adapters` is the engine's own dictionary, so adapters loaded later are found. `revision` is called before every
    lookup: pages made under another value (for example with other LoRAs) are made again.
    """

    def __init__(
        self,
        unet: UNet,
        text_encoder: TextEncoder,
        adapters: Mapping[str, tuple[IPAdapter, ImageEncoder]],
        train_timesteps: int,
        loras: Loras,
        revision: Callable[[], object] = lambda: None,
        lora_memory: int | None = None,
    ):
        self.unet, self.text_encoder, self.adapters = unet, text_encoder, adapters
        self._train_timesteps, self._revision, self._loras = train_timesteps, revision, loras
        self.loras = LoraPool(unet, lora_memory)
        loras.on_remove = lambda lora: self.loras.forget([lora])
        pooled = text_encoder.encoders[1].text_projection.weight.shape[0]
        self.text = KeyValuePages(unet.layout, text_encoder.max_tokens, pooled, unet.device, unet.dtype)
        self.images: KeyValuePages | None = None
        self.masks: dict[tuple[int, int], MaskTable] = {}
        # of text, for ControlNets that attend
        self.control_text: WeakKeyDictionary[ControlNet, KeyValuePages] = WeakKeyDictionary()
        # control -> (network, size, whether a union reads others with it) -> embedded picture
        self._control_pictures: WeakKeyDictionary[Control, dict] = WeakKeyDictionary()

    @property
    def image_kv(self) -> ImageKV | None:
        """Return image keys and values in the form that the UNet reads; None until a request has a picture."""
        return None if self.images is None else ImageKV(self.images.layers, self.images.lengths)

    @property
    def generation(self) -> tuple:
        """Return a value that changes when any buffer is replaced."""
        images = -1 if self.images is None else self.images.generation
        return (self.text.generation, self.loras.generation, images, *(m.generation for m in self.masks.values()))

    @property
    def nbytes(self) -> int:
        """Return the bytes of all pages, masks and control pictures."""
        masks = sum(x.numel() * x.element_size() for table in self.masks.values() for x in table.levels)
        pages = [self.text, *list(self.control_text.values()), *([] if self.images is None else [self.images])]
        embedded = [maps for found in list(self._control_pictures.values()) for maps in list(found.values())]
        controls = sum(x.nbytes for maps in embedded for x in maps)
        return sum(one.nbytes for one in pages) + masks + controls + self.loras.nbytes

    def encoding(self, samples: Sequence[Sample], latent_size: tuple[int, int]) -> Encoding:
        """Make all inputs that `samples`, of one size, still need; `latent_size`: (height, width).

        A generator, so that slow work does not block other requests: it yields calls of encoders and file readers,
        which touch nothing here and may run alongside steps, receives their results, and keeps them. Raises
        PromptError, StyleError, AdapterError or ImageError for inputs that can't be encoded, and then holds no pages.
        """
        made = Encoded()
        try:
            used = list(dict.fromkeys(use.lora for sample in samples for use in sample.loras))
            if used:
                made.loras = yield lambda: {lora: self._loras.factors(lora) for lora in used}
                of_unet = {use.lora for sample in samples for use in sample.loras if use.unet}
                for lora in self.loras.absent([lora for lora in used if lora in of_unet]):
                    down, up = yield partial(self.loras.copies, made.loras[lora])
                    made.brought[lora] = replace(made.loras[lora], down=down, up=up)
            yield from self._encode_texts(samples, made)
            yield from self._encode_controls(samples, made)
            pictured = dict.fromkeys(
                (s, self._content(s, sample), sample.schedule.steps) for sample in samples for s in _pictured(sample)
            )
            for style, content, steps in pictured:
                yield from self._encode_pictures(style, content, steps, made)
                yield from self._read_masks(style, samples[0].size, latent_size, made)
        except BaseException:
            self.drop(made)
            raise
        return made

    def drop(self, made: Encoded) -> None:
        """Release the pages of `made`; a second call does nothing."""
        self.text.release(made.held_text)
        if self.images is not None:
            self.images.release(made.held_images)
        for pages, held in made.held_control_text:
            pages.release(held)
        made.held_text, made.held_images, made.brought, made.held_control_text = [], [], {}, []

    @torch.inference_mode()
    def gather(self, samples: Sequence[Sample], latent_size: tuple[int, int], made: Encoded) -> Conditions:
        """Look up the pages that each of `samples` reads; all were encoded, and `made` still holds them.

        Raises StyleError for strengths that a style can't have here, and then holds no pages.
        """
        conditions = Conditions(latent_size)
        try:
            used = list(dict.fromkeys(use.lora for sample in samples for use in sample.loras if use.unet))
            places = self.loras.hold([(lora, made.brought.get(lora, made.loras[lora])) for lora in used])
            conditions.held_loras = dict(zip(used, places, strict=True))
            for sample in samples:
                if sample.bank is not None and sample.bank.info.store == "hidden":
                    conditions.bank_loras[sample.bank.id] = made.products(sample.loras)
                for branch, keys in self._text_keys(sample).items():
                    found = {key: self.text.find(key) for key in dict.fromkeys(key for key, _ in keys)}
                    held = {key: page for key, page in found.items() if page is not None}
                    conditions.held_text += held.values()
                    conditions.text_pages[sample, branch] = np.array([held[key] for key, _ in keys], dtype=np.int64)
                self._control_uses(sample, conditions)
                for branch in sample.branches:
                    conditions.image_segments[sample, branch] = self._segments(sample, branch, conditions, made)
        except BaseException:
            self.release(conditions)
            raise
        return conditions

    def check(self, sample: Sample) -> tuple[int, int]:
        """Raise the errors that `encoding` would raise for one sample, without running an encoder.

        Returns the largest numbers of image segments and of text tokens in any of its rows.
        """
        texts = self._texts(sample, say=False, check=True)
        prompts = {id(p): p for per_step in texts.per_step.values() for p in per_step}
        tokens = self.text_encoder.check(list(prompts.values()))
        segments = dict.fromkeys(sample.branches, 0)
        for style in _pictured(sample):
            adapter, encoder = self._adapter(style)
            style.check_adapter(adapter, self.text_encoder.encoders[1].text_projection.weight.shape[0])
            if style.needs_encoder:
                adapter.check_encoder(encoder)
            for i, segment in enumerate(style.segments):
                strengths = self._strengths(style, NULL in sample.branches, i)
                if isinstance(segment.mask, torch.Tensor):
                    load_mask(segment.mask, (sample.size[1], sample.size[0]))
                for branch in sample.branches:
                    parts = strengths[:1] if branch in CONDITIONAL_BRANCHES else strengths[1:]
                    segments[branch] += sum(bool(part.any()) for part in parts)
        return max(segments.values(), default=0), tokens

    def release(self, conditions: Conditions) -> None:
        """Release all pages of `conditions`; a second call does nothing."""
        self.text.release(conditions.held_text)
        if self.images is not None:
            self.images.release(conditions.held_images)
        if conditions.held_masks:
            self.masks[conditions.latent_size].release(list(conditions.held_masks.values()))
        self.loras.release(list(conditions.held_loras))
        for pages, held in conditions.held_control_text:
            pages.release(held)
        conditions.held_control_text = []
        conditions.held_text, conditions.held_images, conditions.held_masks = [], [], {}
        conditions.held_loras = {}

    def _encode_texts(self, samples: Sequence[Sample], made: Encoded, network: ControlNet | None = None) -> Making:
        """Encode the prompts that samples still need, for the UNet or a ControlNet."""
        store, held = self.text, made.held_text
        if network is not None:
            store, held = self._control_pages(network), []
            made.held_control_text.append((store, held))
        prompts: dict[tuple, Prompt] = {}
        used: dict[tuple, tuple[LoraUse, ...]] = {}
        for sample in samples:
            for keys in self._text_keys(sample).values():
                prompts |= dict(keys)
                used |= {key: sample.loras for key, _ in keys}
        missing = []
        for key in prompts:
            page = store.find(key)
            if page is None:
                missing.append(key)
            else:
                held.append(page)
        # one call for prompts under the same LoRAs
        missing.sort(key=lambda key: key[-1])
        together = [list(found) for _, found in itertools.groupby(missing, key=lambda key: key[-1])]
        for keys in [found[i : i + _PROMPTS] for found in together for i in range(0, len(found), _PROMPTS)]:
            poolings, skips = [key[1] for key in keys], [key[2] for key in keys]
            of_text = [(made.loras[use.lora].text, use.text) for use in used[keys[0]] if use.text]
            of_unet = made.products(used[keys[0]] if network is None else ())
            given = [prompts[key] for key in keys], poolings, skips, of_text, of_unet
            states = yield partial(self._text_states, *given, network or self.unet)
            for places, layers, pooled in states:
                # another request may have added some of them meanwhile
                found = [store.find(keys[place]) for place in places]
                held += [page for page in found if page is not None]
                absent = [i for i, page in enumerate(found) if page is None]
                if absent:
                    with torch.inference_mode():
                        layers = [None if pair is None else tuple(x[absent] for x in pair) for pair in layers]
                        extra = pooled[absent] if network is None else None
                        held += store.add([keys[places[i]] for i in absent], layers, extra)

    def _control_pages(self, network: ControlNet) -> KeyValuePages:
        """Return the pages of text of a network that attends."""
        if network not in self.control_text:
            pages = KeyValuePages(network.layout, self.text_encoder.max_tokens, 0, network.device, network.dtype)
            pages.check_room = self.text.check_room
            self.control_text[network] = pages
        return self.control_text[network]

    def _encode_controls(self, samples: Sequence[Sample], made: Encoded) -> Making:
        """Embed the control pictures that samples still need, and encode their prompts for the networks."""
        networks: dict[ControlNet | T2IAdapter, list[Sample]] = {}
        for sample in samples:
            for control, network, numbers in _read_by_networks(sample):
                networks.setdefault(network, []).append(sample)
                embedded, key = self._control_pictures.setdefault(control, {}), (network, sample.size, len(numbers) > 1)
                if key not in embedded:
                    embedded[key] = yield partial(_embed_control, control, *key)
        for network, users in networks.items():
            if isinstance(network, ControlNet) and network.attends:
                yield from self._encode_texts(list(dict.fromkeys(users)), made, network)

    def _control_uses(self, sample: Sample, conditions: Conditions) -> None:
        """Look up what the networks of a sample read."""
        for control, network, numbers in _read_by_networks(sample):
            picture = self._control_pictures[control][network, sample.size, len(numbers) > 1]
            for branch, keys in self._text_keys(sample).items():
                pages, places = None, np.zeros(len(keys), dtype=np.int64)
                if isinstance(network, ControlNet) and network.attends:
                    pages = self._control_pages(network)
                    found = {key: pages.find(key) for key in dict.fromkeys(key for key, _ in keys)}
                    held = {key: page for key, page in found.items() if page is not None}
                    conditions.held_control_text.append((pages, list(held.values())))
                    places = np.array([held[key] for key, _ in keys], dtype=np.int64)
                use = ControlUse(control, network, picture, pages, places, numbers)
                conditions.controls.setdefault((sample, branch), []).append(use)

    def _texts(self, sample: Sample, say: bool = True, check: bool = False) -> Texts:
        """Return the prompts of the branches in which a sample has rows. Raises PromptError or StyleError."""
        # without a style of its own, a reference uses its own prompt in all of its readers' branches
        timesteps = sample.schedule.timesteps.clamp(0, self._train_timesteps)
        trained, branches = self._train_timesteps, sample.branches
        texts = Texts.of(sample.request, sample.prompt, timesteps, trained, branches, say, sample.first)
        for kind, styles in by_kind(sample.request.styles).items():
            with asking(kind, "write_prompts"):
                if check:
                    kind.check_texts(styles, texts)
                kind.write_prompts(styles, texts)
            texts.check(kind)
        return texts

    def _text_keys(self, sample: Sample) -> dict[str, list[tuple[tuple, Prompt]]]:
        """Map branch -> per step, the page's key and the prompt that makes it."""
        revision, loras = self._revision(), tuple(use.key for use in sample.loras)
        texts, found = self._texts(sample), {}
        for branch, per_step in texts.per_step.items():
            # the null branch skips no layers, as in diffusers
            pooling, skip = texts.pooling[branch], 0 if branch == NULL else sample.request.clip_skip
            # one Prompt object covers many steps
            start = (revision, pooling, skip)
            distinct = {id(prompt): ((*start, prompt.identity(), loras), prompt) for prompt in per_step}
            found[branch] = [distinct[id(prompt)] for prompt in per_step]
        return found

    @torch.inference_mode()
    def _text_states(
        self,
        prompts: Sequence[Prompt],
        poolings: Sequence[str],
        skips: Sequence[int],
        of_text: TextLoras,
        of_unet: LoraProducts,
        reader: Encoder,
    ) -> list[tuple]:
        """Return keys and values per layer of the `reader`, and pooled states, of prompts under the same LoRAs.

        reader: the UNet or a ControlNet. One entry (places in `prompts`, keys and values, pooled) for those of each
        number of tokens.
        """
        states = self.text_encoder.encode(prompts, poolings, skips, loras=of_text)
        by_length: dict[int, list[int]] = {}
        for place, state in enumerate(states):
            by_length.setdefault(len(state.hidden), []).append(place)
        made = []
        for places in by_length.values():
            hidden = torch.stack([states[i].hidden for i in places]).to(reader.device, reader.dtype)
            keys_values = reader.project_text(hidden, of_unet if of_unet.used else None)
            made.append((places, keys_values, torch.stack([states[i].pooled for i in places])))
        return made

    def _content(self, style: ImageStyle, sample: Sample) -> "_Content | None":
        """Return how a style's content is encoded, as its request's prompts are; None without words."""
        if style.content_text is None:
            return None
        return _Content(sample.request.prompt_syntax, self._revision(), tuple(use for use in sample.loras if use.text))

    def _encode_pictures(self, style: ImageStyle, content: "_Content | None", steps: int, made: Encoded) -> Making:
        adapter, encoder = self._adapter(style)
        keys = _image_keys(style, content, adapter, steps)
        pages = [self._image_page(key) for key in keys]
        made.held_images += [page for page in pages if page is not None]
        if None not in pages:
            return
        loras = [] if content is None else [(made.loras[use.lora].text, use.text) for use in content.loras]
        missing = [key for key, page in zip(keys, pages, strict=True) if page is None]
        projected = yield partial(self._image_states, style, content, loras, adapter, encoder, missing)
        for key, layers in zip(missing, projected, strict=True):
            images = self.make_image_pages(_tokens_of(layers))
            page = images.find(key)
            with torch.inference_mode():
                made.held_images.append(images.add([key], layers)[0] if page is None else page)

    @torch.inference_mode()
    def _image_states(
        self,
        style: ImageStyle,
        content: "_Content | None",
        loras: TextLoras,
        adapter: IPAdapter,
        encoder: ImageEncoder,
        keys: Sequence["_ImageKey"],
    ) -> list[list[KeyValue | None]]:
        """Return the keys and values per layer that each of a style's `keys` stands for."""
        embedding = None
        if content is not None and style.content_text is not None:
            prompt = Prompt(style.content_text, syntax=content.syntax)
            embedding = self.text_encoder.encode([prompt], loras=loras)[0].pooled
        found = style.tokens(adapter, encoder, embedding)
        if len(found.image) != len(style.segments):
            raise StyleError(
                f"the style {type(style).__name__} gives tokens of {len(found.image)} pictures for "
                f"{len(style.segments)} segments"
            )
        made: dict[_ImageKey, list[KeyValue | None]] = {}
        for segment in dict.fromkeys(key.segment for key in keys):
            same = [key for key in keys if key.segment == segment]
            if segment == _NEGATIVE:
                made[same[0]] = list(adapter.key_values(found.negative[None]))
                continue
            layers = adapter.key_values(found.image[segment][None])
            varied = style.vary(layers, segment, [key.variant for key in same], adapter.token_count)
            made |= zip(same, varied, strict=True)
        return [made[key] for key in keys]

    def _read_masks(
        self, style: ImageStyle, size: tuple[int, int], latent_size: tuple[int, int], made: Encoded
    ) -> Making:
        for i, segment in enumerate(style.segments):
            if segment.mask is not None:
                levels = self._mask_table(latent_size).sizes
                made.masks[style, i] = yield partial(_read_mask, segment.mask, (size[1], size[0]), levels)

    def _segments(self, sample: Sample, branch: str, conditions: Conditions, made: Encoded) -> list[ImageSegment]:
        """Return the image segments of one row, without those of strength 0 in every module."""
        found = []
        for style in _pictured(sample):
            steps = sample.schedule.steps
            keys = _image_keys(style, self._content(style, sample), self._adapter(style)[0], steps)
            pages = {(key.segment, key.variant): self._image_page(key) for key in keys}
            conditions.held_images += [page for page in pages.values() if page is not None]
            if None in pages.values():
                raise StyleError("the style's adapter was reloaded while the request joined; send the request again")
            variants, unconditional, guided = style.variants(steps), style.unconditional, NULL in sample.branches
            for i in range(len(style.segments)):
                mask, strengths = self._mask(style, i, conditions, made), self._strengths(style, guided, i)
                of_step = [(i, variant) for variant in variants]
                without = (_NEGATIVE, None) if unconditional is None else (i, unconditional)
                if branch in CONDITIONAL_BRANCHES:
                    entries = [(of_step, strengths.conditional)]
                else:
                    entries = [
                        (of_step, strengths.unconditional_image),
                        ([without] * steps, strengths.unconditional_negative),
                    ]
                found += [
                    ImageSegment(
                        np.array([pages[key] for key in read], dtype=np.int64), mask, strength.float().numpy(), style
                    )
                    for read, strength in entries
                    if bool(strength.any())
                ]
        return found

    def _strengths(self, style: ImageStyle, guided: bool, segment: int) -> Any:
        with asking(type(style), "strengths"):
            found, modules = style.strengths(self.unet.layout, guided, segment), len(self.unet.layout.modules)
            if any(tuple(part.shape) != (modules,) for part in found):
                shapes = ", ".join(str(list(part.shape)) for part in found)
                raise StyleError(
                    f"the style {type(style).__name__} gives strengths of the shapes {shapes}; the model has {modules} "
                    f"attention modules, so each must be [{modules}]"
                )
        return found

    @torch.inference_mode()
    def make_image_pages(self, tokens: int) -> KeyValuePages:
        """Return the pages of pictures; if none exist yet, allocate some for pictures of `tokens` tokens."""
        if self.images is None:
            self.images = KeyValuePages(self.unet.layout, tokens, 0, self.unet.device, self.unet.dtype)
        return self.images

    def _image_page(self, key: tuple) -> int | None:
        return None if self.images is None else self.images.find(key)

    def _adapter(self, style: ImageStyle) -> tuple[IPAdapter, ImageEncoder]:
        wanted = style.adapter
        if not self.adapters:
            raise StyleError(
                f"{type(style).__name__} needs an IP-Adapter, but this engine has none; pass "
                "adapter='ip-adapter_sdxl.safetensors' and its image encoder to Engine.from_pretrained, or call "
                "engine.load_adapter"
            )
        if wanted is None:
            if len(self.adapters) > 1:
                names = listed(self.adapters)
                raise StyleError(f"this engine has several adapters ({names}); name one: adapter=...")
            return next(iter(self.adapters.values()))
        if wanted not in self.adapters:
            raise StyleError(f"adapter {quoted(wanted)} is not loaded; loaded adapters: {listed(self.adapters)}")
        return self.adapters[wanted]

    def _mask_table(self, latent_size: tuple[int, int]) -> MaskTable:
        if latent_size not in self.masks:
            self.masks[latent_size] = MaskTable(self.unet.attention_sizes(*latent_size), self.unet.device)
        return self.masks[latent_size]

    def _mask(self, style: ImageStyle, segment: int, conditions: Conditions, made: Encoded) -> int:
        if style.segments[segment].mask is None:
            return -1
        if (style, segment) not in conditions.held_masks:
            table = self._mask_table(conditions.latent_size)
            conditions.held_masks[style, segment] = table.add(made.masks[style, segment])
        return conditions.held_masks[style, segment]


class _Content(NamedTuple):
    """Settings, besides the encoder, with which the words of a style's content are encoded."""

    syntax: str
    revision: Any  # of the encoder's weights
    loras: tuple[LoraUse, ...]

    @property
    def key(self) -> tuple:
        """Return what is equal for equal effects."""
        return self.syntax, self.revision, tuple((use.lora.digest, use.text) for use in self.loras)


def _read_by_networks(sample: Sample) -> list[tuple[Control, ControlNet | T2IAdapter, tuple[int, ...]]]:
    """List control pictures, their networks, and the types of all that a union reads at once; () for other networks."""
    pairs = list(zip(sample.controls, sample.networks, strict=True))
    numbers: dict[ControlNet | T2IAdapter, list[int]] = {}
    for control, network in pairs:
        numbers.setdefault(network, []).append(network.mode_number(control.mode))
    return [(one, network, () if network.union is None else tuple(numbers[network])) for one, network in pairs]


def _embed_control(
    control: Control, network: ControlNet | T2IAdapter, size: tuple[int, int], together: bool
) -> tuple[torch.Tensor, ...]:
    """Return a control picture, fitted to (width, height), as a network reads it, alone or together with others."""
    pixels = fit_picture(control.image, size).float() / 255
    if isinstance(network, T2IAdapter) or network.union is None:
        return network.embed_picture(pixels)
    return network.embed_picture(pixels, control.mode, control.weight if together else None)


def _read_mask(
    mask: PictureSource | torch.Tensor, size: tuple[int, int], levels: Sequence[tuple[int, int]]
) -> tuple[torch.Tensor, ...]:
    """Return the weights of a mask for a picture of (height, width), per attention level."""
    return mask_vectors(load_mask(mask, size), levels)


_NEGATIVE = -1  # stands for a segment: the tokens of unconditional rows


class _ImageKey(NamedTuple):
    """What determines the keys and values of a page of images."""

    adapter: IPAdapter
    style: ImageStyle | None  # which the key keeps alive as long as its pages; None: the adapter's own tokens
    words: tuple | None
    segment: int
    variant: Hashable  # of the style


def _image_keys(style: ImageStyle, content: _Content | None, adapter: IPAdapter, steps: int) -> list[_ImageKey]:
    """Return the page keys of a style's segments in their variants, and of what unconditional rows see."""
    words, variants = None if content is None else content.key, list(dict.fromkeys(style.variants(steps)))
    segments = range(len(style.segments))
    if style.unconditional is not None:
        variants = list(dict.fromkeys([*variants, style.unconditional]))
    keys = [_ImageKey(adapter, style, words, i, variant) for i in segments for variant in variants]
    if style.unconditional is not None:
        return keys
    own = style.own_negative
    return [*keys, _ImageKey(adapter, style if own else None, words if own else None, _NEGATIVE, None)]


def _tokens_of(layers: Sequence[KeyValue | None]) -> int:
    return next(pair for pair in layers if pair is not None)[0].shape[1]


def _pictured(sample: Sample) -> list[ImageStyle]:
    """Return the styles of a sample that have pictures as prompts."""
    return sample.request.styles_of(ImageStyle)
