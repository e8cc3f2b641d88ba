"""Encoding of prompts by SDXL's two text encoders, with learned vectors inserted at call time.

A placeholder is written `<name>` in the text; its vectors are in `Prompt.vectors`. Neither tokenizers nor embedding
tables grow: each call runs the encoders with a small table of just the rows it needs, so any number of styles and noise
stages share one batched call and nothing has to be unloaded afterwards.

Long text is encoded in chunks that fill the encoders' window, with the weights of `models/prompt_syntax.py`.
"""

import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from stylefast import values
from stylefast.errors import ExportError, InvalidRequest, ModelFormatError, PromptError, StyleError
from stylefast.models.lora_factors import Factors
from stylefast.models.prompt_syntax import SYNTAXES, parse
from stylefast.models.row_loras import add_products
from stylefast.models.text_chunks import MAX_CHUNKS, Chunk, Word, blended, divide, emphasised, moved

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

# LoRAs: for each its factors by module name of encoder 1 and of encoder 2, and its strength
TextLoras = Sequence[tuple[tuple[Mapping[str, Factors], ...], float]]

POOLED_POLICIES = ("eos", "first_added_token")
# `eos_token_id` of configs in which the highest id of a prompt marks its end
_HIGHEST_ID_ENDS = 2
# how CLIP's tokenizers mark the last token of a word
_WORD_END = "</w>"

# functional_call swaps the module's embedding table during the call, and two engines may share one encoder
_encoder_lock = threading.Lock()
# transformers' Rust tokenizers raise if called concurrently
_tokenizer_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class TextStates:
    """The UNet's text conditioning for one prompt."""

    # [window * chunks, cross_dim]: second-to-last (or earlier) states of both encoders, concatenated
    hidden: Tensor
    pooled: Tensor  # [pooled_dim]: projected state of encoder 2 at the end of the first chunk


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text and the vectors of its placeholders.

    `text` None is the null prompt, zeros in models trained that way. `vectors` maps a placeholder's name to its rows
    for encoder 1 and encoder 2, `[n, width 1]` and `[n, width 2]`; `<name>` in the text then means n tokens. Names that
    do not occur in the text are ignored; `<other>` without vectors is ordinary text. `text_2` is the text for encoder
    2, None: the same. `syntax` of both is one of `prompt_syntax.SYNTAXES`.
    """

    text: str | None
    vectors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    text_2: str | None = None
    syntax: str = "plain"

    def __post_init__(self):
        for text in (self.text, self.text_2):
            if text is not None and not isinstance(text, str):
                raise PromptError(f"a prompt must be a string or None, not {type(text).__name__}")
        if self.text is None and self.text_2 is not None:
            raise PromptError("the null prompt has no text, so it can't have one for text encoder 2; give both")
        values.one_of("a prompt's syntax", self.syntax, SYNTAXES, error=PromptError)
        for name, pair in self.vectors.items():
            shapes = [tuple(rows.shape) for rows in pair]
            if len(shapes) != 2 or any(len(s) != 2 or s[0] == 0 for s in shapes) or shapes[0][0] != shapes[1][0]:
                raise StyleError(
                    f"the vectors of <{name}> have the shapes {shapes}; give two tensors [n, width], one per text "
                    "encoder, with the same n"
                )

    @property
    def both(self) -> tuple[str, str]:
        """Return the texts for encoder 1 and encoder 2."""
        first = self.text or ""
        return first, first if self.text_2 is None else self.text_2

    def placeholders(self) -> list[str]:
        """Return the names with vectors that occur in the texts, in order of first occurrence."""
        text = " ".join(self.both)
        return sorted((name for name in self.vectors if f"<{name}>" in text), key=lambda name: text.index(f"<{name}>"))

    def identity(self) -> tuple:
        """Return a key that is equal for prompts with equal encodings; trainable vectors compare by object."""
        parts = []
        for name in self.placeholders():
            for rows in self.vectors[name]:
                content = id(rows) if rows.requires_grad else rows.detach().float().cpu().numpy().tobytes()
                parts.append((name, tuple(rows.shape), content))
        return self.text, self.text_2, self.syntax, *parts


class _Window(NamedTuple):
    """Padded token ids of one chunk; a negative id -1 - r means row r of the call's learned vectors."""

    ids: tuple[int, ...]
    end: int  # index of the first end-of-text token
    added: int  # index of the last vector of the first placeholder; `end` if there is none

    def position(self, policy: str) -> int:
        """Return the position at which the prompt is pooled under a policy."""
        return self.end if policy == "eos" else self.added


class _Masked(NamedTuple):
    """A chunk that is encoded once more, without the tokens of a part of weight below 1."""

    prompt: int
    chunk: int
    run: int
    mask: tuple[bool, ...]  # tokens that are seen


class TextRunner(Protocol):
    """Runner of the text encoders: PyTorch (`TorchText`) or exported graphs.

    most_skipped: the largest supported number of layers to skip before the second-to-last. takes_loras: whether it
    applies LoRAs. takes_masks: whether it takes `seen`.
    """

    most_skipped: int
    takes_loras: bool
    takes_masks: bool

    def __call__(
        self,
        index: int,
        ids: Sequence[Sequence[int]],
        rows: Sequence[Tensor],
        ends: Sequence[tuple[int, int]],
        skips: Sequence[int],
        loras: TextLoras = (),
        seen: Sequence[Sequence[bool]] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """Run encoder `index` (0 or 1) on token ids [windows][tokens]; an id -1 - r means the vector `rows[r]`.

        Returns the second-to-last states [windows, tokens, width], or those `skips` [windows] layers earlier, and from
        encoder 2 the projected last state [pooled_dim] at each (window, position) of `ends`; every window has at least
        one. `loras` apply to all of them. `seen` [windows][tokens]: tokens that others attend to; None: all.
        """
        ...


class TextEncoder:
    """Both text encoders of an SDXL-shaped model with their tokenizers.

    `force_zeros`: the null prompt is zeros (SDXL base) instead of the encoding of the empty text. `runner` runs the
    encoders and may be replaced; `max_chunks` is the number of chunks that a prompt may have.
    Raises ModelFormatError if the parts don't fit together.
    """

    def __init__(
        self, tokenizers: Sequence, encoders: "tuple[CLIPTextModel, CLIPTextModelWithProjection]", force_zeros: bool
    ):
        if len(tokenizers) != 2 or len(encoders) != 2:
            raise ModelFormatError(
                f"SDXL needs two tokenizers and two text encoders; got {len(tokenizers)} and {len(encoders)}"
            )
        if not hasattr(encoders[1], "text_projection"):
            raise ModelFormatError(
                f"text encoder 2 is a {type(encoders[1]).__name__} without a text projection; "
                "SDXL needs a CLIPTextModelWithProjection there"
            )
        self.tokenizers = tuple(tokenizers)
        self.encoders = (encoders[0], encoders[1])
        self.force_zeros = bool(force_zeros)
        ends = encoders[1].config.eos_token_id, tokenizers[1].eos_token_id
        if ends[0] not in (_HIGHEST_ID_ENDS, ends[1]):
            raise ModelFormatError(
                f"text encoder 2 takes the token {ends[0]} for the end of a prompt (eos_token_id), but its "
                f"tokenizer writes {ends[1]} there; they don't belong together"
            )
        lengths = [
            min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
            for tokenizer, encoder in zip(tokenizers, encoders, strict=True)
        ]
        if lengths[0] != lengths[1]:
            raise ModelFormatError(
                f"the text encoders read {lengths[0]} and {lengths[1]} tokens; their states are concatenated, so "
                "both lengths must be equal"
            )
        self.max_tokens: int = lengths[0]
        self.max_chunks = MAX_CHUNKS
        self.runner: TextRunner = TorchText(self.encoders)
        self._further = tuple(
            _further_vectors(tokenizer, len(token_table(encoder)))
            for tokenizer, encoder in zip(tokenizers, encoders, strict=True)
        )

    @property
    def widths(self) -> tuple[int, int]:
        """Return the widths of the token embeddings of encoder 1 and encoder 2: (768, 1280) for SDXL."""
        first, second = self.encoders
        return token_table(first).shape[1], token_table(second).shape[1]

    def encode(
        self,
        prompts: Sequence[Prompt],
        pooled_policy: Sequence[str] | str = "eos",
        clip_skip: Sequence[int] | int = 0,
        *,
        known_names: Collection[str] = (),
        loras: TextLoras = (),
    ) -> list[TextStates]:
        """Encode prompts in one batched call per encoder; equal prompts are encoded once and share their tensors.

        `pooled_policy`, one for all or one per prompt: "eos" pools at the first end-of-text token; "first_added_token"
        pools as diffusers does for added tokens under SDXL's configs (`eos_token_id` 2): at the first placeholder,
        on its last vector. Prompts without placeholders pool at the end of the text either way.
        `clip_skip`, one for all or one per prompt: number of layers to skip before SDXL's second-to-last, counted as in
        diffusers' SDXL pipelines; the pooled state is always the last layer's.
        `loras`: those of all prompts, and their strengths.
        `known_names`: existing styles, for which a `<name>` without vectors is an error instead of ordinary text.
        Gradients flow to vectors that require them, never to the encoders.

        Text beyond a window of `max_tokens` is encoded in further chunks, so `hidden` has `max_tokens` for each; the
        pooled state is the first chunk's. Raises PromptError for a placeholder of more vectors than fit into one, too
        many chunks, and syntax that is refused; StyleError if vectors do not fit the encoders; InvalidRequest if
        `clip_skip` is too large; ExportError for weights that exported encoders can't apply.
        """
        prompts = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
        policies = [pooled_policy] * len(prompts) if isinstance(pooled_policy, str) else list(pooled_policy)
        self._check(prompts, policies, known_names)
        skips = [clip_skip] * len(prompts) if isinstance(clip_skip, int) else list(clip_skip)
        for skip in {*skips}:
            self.check_clip_skip(skip)

        distinct: dict[tuple, int] = {}
        batch: list[Prompt] = []
        batch_skips: list[int] = []
        places: list[int | None] = []
        for prompt, skip in zip(prompts, skips, strict=True):
            if prompt.text is None and self.force_zeros:
                places.append(None)
                continue
            prompt = Prompt("") if prompt.text is None else prompt
            key = (skip, prompt.identity())
            if key not in distinct:
                distinct[key] = len(batch)
                batch.append(prompt)
                batch_skips.append(skip)
            places.append(distinct[key])

        learning = any(rows.requires_grad for p in batch for name in p.placeholders() for rows in p.vectors[name])
        with torch.set_grad_enabled(torch.is_grad_enabled() and learning):
            rows: tuple[list[Tensor], list[Tensor]] = [], []
            chunks = [self._chunks(prompt, rows) for prompt in batch]
            ends = [self._window(found[1][0], 1) for found in chunks]
            wanted = [
                None if place is None else (place, ends[place].position(policy))
                for place, policy in zip(places, policies, strict=True)
            ]
            pooled_at = list(dict.fromkeys(pair for pair in wanted if pair is not None))
            states: dict[tuple[int, int] | None, TextStates] = {}
            if batch:
                hidden, pooled = [], []
                for index in range(2):
                    of_index = [found[index] for found in chunks]
                    found, pooled = self._run(index, batch, of_index, rows[index], pooled_at, batch_skips, loras)
                    hidden.append(found)
                device, dtype = hidden[1][0].device, hidden[1][0].dtype
                both = [torch.cat([a.to(device), b], dim=-1).to(dtype) for a, b in zip(*hidden, strict=True)]
                states |= {end: TextStates(both[end[0]], x) for end, x in zip(pooled_at, pooled, strict=True)}
            if None in wanted:
                states[None] = self._zeros()
        return [states[pair] for pair in wanted]

    def check_clip_skip(self, skip: int) -> None:
        """Raise InvalidRequest if the encoders can't skip that many layers before the second-to-last."""
        most = self.runner.most_skipped
        if skip > most:
            raise InvalidRequest(
                f"clip_skip is {skip}, but this engine's text encoders can skip only {most} layers before the "
                "second-to-last"
                + (
                    ""
                    if most
                    else ", because they are exported graphs; load the model with backend='torch', or leave it at 0"
                )
            )

    def check(self, prompts: Sequence[Prompt]) -> int:
        """Raise the errors that `encode` would raise for `prompts`, without running an encoder.

        Returns the most tokens that one of them has.
        """
        self._check(list(prompts), ["eos"] * len(prompts), ())
        most = 1
        for prompt in prompts:
            chunks = self._chunks(prompt, ([], []))
            most = max(most, len(chunks[0]))
            if _masks(prompt, chunks[0]) or _masks(prompt, chunks[1]):
                self._check_masks()
        return most * self.max_tokens

    def _check_masks(self) -> None:
        if not self.runner.takes_masks:
            raise ExportError(
                "the prompt has weights below 1 in compel's syntax, for which the text encoders run with masks; "
                "exported text encoders have no input for them: load the model with backend='torch' or 'compile', or "
                "use prompt_syntax='a1111'"
            )

    def _check(self, prompts: list[Prompt], policies: list[str], known_names: Collection[str]) -> None:
        if len(policies) != len(prompts):
            raise PromptError(
                f"{len(policies)} pooled policies for {len(prompts)} prompts; give one for all or one each"
            )
        for policy in policies:
            if policy not in POOLED_POLICIES:
                raise PromptError(
                    f"pooled policy {values.quoted(policy)} is unknown; choose one of {', '.join(POOLED_POLICIES)}"
                )
        widths = self.widths
        for prompt in prompts:
            for name in known_names:
                if name not in prompt.vectors and any(f"<{name}>" in text for text in prompt.both):
                    raise PromptError(
                        f"the prompt names <{name}>, but that style is not part of this request; add it to the "
                        "styles of the request or remove the token from the text"
                    )
            for name in prompt.placeholders():
                found = tuple(rows.shape[1] for rows in prompt.vectors[name])
                if found != widths:
                    raise StyleError(
                        f"the vectors of <{name}> are {found[0]} and {found[1]} wide, the text encoders of this model "
                        f"{widths[0]} and {widths[1]}; use an embedding made for this model"
                    )

    def _zeros(self) -> TextStates:
        weight = self.encoders[1].text_projection.weight
        hidden = torch.zeros(
            self.max_tokens, sum(e.config.hidden_size for e in self.encoders), dtype=weight.dtype, device=weight.device
        )
        return TextStates(hidden, torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device))

    def _run(
        self,
        index: int,
        prompts: Sequence[Prompt],
        chunks: Sequence[Sequence[Chunk]],
        rows: Sequence[Tensor],
        ends: Sequence[tuple[int, int]],
        skips: Sequence[int],
        loras: TextLoras,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return encoder `index`'s states of each prompt [tokens, width], and pooled ones at (prompt, position)."""
        # window i is prompt i's first; further ones that are equal share theirs
        windows = [self._window(of_prompt[0], index).ids for of_prompt in chunks]
        window_skips, places = list(skips), {}

        def place_of(chunk: Chunk, skip: int) -> int:
            key = self._window(chunk, index).ids, skip
            if key not in places:
                places[key] = len(windows)
                windows.append(key[0])
                window_skips.append(skip)
            return places[key]

        found: list[list[int]] = []
        empty: dict[int, int] = {}  # by prompt, in compel's syntax
        masked: list[_Masked] = []
        for i, (prompt, of_prompt) in enumerate(zip(prompts, chunks, strict=True)):
            found.append([i, *(place_of(chunk, skips[i]) for chunk in of_prompt[1:])])
            if prompt.syntax == "compel" and _weighted(of_prompt):
                empty[i] = place_of(Chunk(), skips[i])
                masked += [_Masked(i, *part) for part in _masks(prompt, of_prompt)]
        others = [(place, 0) for place in range(len(prompts), len(windows))]
        states, pooled = self.runner(index, windows, rows, [*ends, *others], window_skips, loras)
        without: dict[tuple[int, int, int], Tensor] = {}
        if masked:
            self._check_masks()
            ids = [windows[found[one.prompt][one.chunk]] for one in masked]
            seen = [self._padded([*one.mask], True) for one in masked]
            again = self.runner(index, ids, rows, [], [skips[one.prompt] for one in masked], loras, seen)[0]
            without = {one[:3]: state for one, state in zip(masked, again, strict=True)}

        made = []
        for i, (prompt, of_prompt) in enumerate(zip(prompts, chunks, strict=True)):
            parts = [states[place] for place in found[i]]
            if prompt.syntax != "plain" and _weighted(of_prompt):
                base = states[empty[i]] if i in empty else None
                parts = self._with_weights(of_prompt, parts, base, {k[1:]: x for k, x in without.items() if k[0] == i})
            made.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        return made, pooled[: len(ends)]

    def _with_weights(
        self,
        chunks: Sequence[Chunk],
        states: Sequence[Tensor],
        empty: Tensor | None,
        without: Mapping[tuple[int, int], Tensor],
    ) -> list[Tensor]:
        """Apply weights to the states of a prompt's chunks; `empty`: those of an empty chunk, None for A1111's weights.

        without: (chunk, run) -> states of the chunk that lack a run of weight below 1.
        """
        weights = [torch.tensor(self._padded(chunk.weights, 1.0), dtype=torch.float64) for chunk in chunks]
        if empty is None:
            pairs = zip(states, weights, strict=True)
            return [state if bool((w == 1).all()) else emphasised(state, w) for state, w in pairs]
        wide = [moved(state, empty, w) for state, w in zip(states, weights, strict=True)]
        lowered = {word.run: word.weight for chunk in chunks for word in chunk.words if word.weight < 1}
        return [
            blended(
                state,
                [
                    (weight, moved(without[i, run], empty, weights[i]) if (i, run) in without else state)
                    for run, weight in lowered.items()
                ],
            ).to(states[0].dtype)
            for i, state in enumerate(wide)
        ]

    def _padded(self, content: list, filler) -> list:
        """Return a list for a window's tokens from one for those between begin and end."""
        return [filler, *content, *[filler] * (self.max_tokens - 1 - len(content))]

    def _window(self, chunk: Chunk, index: int) -> _Window:
        tokenizer = self.tokenizers[index]
        ids = [tokenizer.bos_token_id, *chunk.ids, tokenizer.eos_token_id]
        # as in transformers, an end token typed into the text ends it for the pooling; under the published configs
        # transformers uses the highest id as end, and tokens added to the tokenizer have higher ids
        legacy = self.encoders[index].config.eos_token_id == _HIGHEST_ID_ENDS
        end = ids.index(max(ids) if legacy else tokenizer.eos_token_id)
        added, length = end, 0
        for word in chunk.words:
            length += len(word.ids)
            if word.placeholder:
                added = length
                break
        ids += [tokenizer.pad_token_id] * (self.max_tokens - len(ids))
        return _Window(tuple(ids), end, added)

    def _chunks(self, prompt: Prompt, rows: tuple[list[Tensor], list[Tensor]]) -> tuple[list[Chunk], list[Chunk]]:
        """Return the chunks of a prompt for each encoder, equally many; add its learned vectors to `rows`."""
        room = self.max_tokens - 2  # the begin and end tokens take one position each
        slots = [f"<{name}>" for name in prompt.placeholders()]
        found = []
        for index, text in enumerate(prompt.both):
            sections, number = [], 0
            for section in parse(text, prompt.syntax, slots):
                words: list[Word] = []
                for run in section:
                    words += [
                        word._replace(weight=run.weight, run=number)
                        for word in self._words(run.text, prompt, slots, index, rows[index])
                    ]
                    number += 1
                sections.append(words)
            found.append(divide(sections, room, prompt.syntax, self.max_chunks))
        most = max(map(len, found))
        first, second = (chunks + [Chunk()] * (most - len(chunks)) for chunks in found)
        return first, second

    def _words(self, text: str, prompt: Prompt, slots: list[str], index: int, rows: list[Tensor]) -> list[Word]:
        """Return the tokens of a run's text as words, and a learned placeholder as one."""
        room, words = self.max_tokens - 2, []
        # pieces at odd indices are placeholders; without any, the text is one piece
        pieces = re.split(f"({'|'.join(map(re.escape, slots))})", text) if slots else [text]
        for number, piece in enumerate(pieces):
            if number % 2:
                vectors = prompt.vectors[piece[1:-1]][index]
                if len(vectors) > room:
                    raise PromptError(
                        f"the style token {piece} has {len(vectors)} vectors, but the text encoders read only {room} "
                        "tokens between begin and end; learn the style with fewer"
                    )
                words.append(Word(tuple(-1 - len(rows) - k for k in range(len(vectors))), placeholder=True))
                rows.extend(vectors.unbind())
            elif piece:
                words += _words_of(self.tokenizers[index], piece, self._further[index], room)
        return words


def _weighted(chunks: Sequence[Chunk]) -> bool:
    return any(word.weight != 1 for chunk in chunks for word in chunk.words)


def _masks(prompt: Prompt, chunks: Sequence[Chunk]) -> list[tuple[int, int, tuple[bool, ...]]]:
    """Return (chunk, run, whether each token is seen) for the parts of weight below 1 in compel's syntax."""
    if prompt.syntax != "compel":
        return []
    return [
        (i, run, tuple(other != run for other in chunk.runs))
        for i, chunk in enumerate(chunks)
        for run in dict.fromkeys(word.run for word in chunk.words if word.weight < 1)
    ]


def _words_of(tokenizer, text: str, further: Mapping[int, list[int]], room: int) -> list[Word]:
    """Return the words of a text, from the tokenizer's marks of their ends; longer ones in parts of `room` tokens."""
    with _tokenizer_lock:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        ids = _with_further(ids, further)
        tokens = tokenizer.convert_ids_to_tokens(ids)
        added = tokenizer.added_tokens_encoder
    words: list[Word] = []
    current: list[int] = []
    rest = 0  # of the vectors of an added token
    for number, (token, name) in enumerate(zip(ids, tokens, strict=True)):
        current.append(token)
        rest = rest - 1 if rest else len(further.get(token, ()))
        if not rest and (name.endswith(_WORD_END) or name in added) or number == len(ids) - 1:
            parts = [Word(tuple(current[i : i + room])) for i in range(0, len(current), room)]
            words += [*parts[:-1], parts[-1]._replace(mark=name)]
            current = []
    return words


class TorchText:
    """`TextRunner` that calls both text encoders as PyTorch modules."""

    takes_loras = True
    takes_masks = True

    def __init__(self, encoders: "Sequence[CLIPTextModel | CLIPTextModelWithProjection]"):
        self._encoders = tuple(encoders)
        self._table_names = tuple(_table_name(encoder) for encoder in encoders)
        # the first hidden states are the embeddings, not a layer's output
        self.most_skipped = min(encoder.config.num_hidden_layers for encoder in encoders) - 1

    def __call__(
        self,
        index: int,
        ids: Sequence[Sequence[int]],
        rows: Sequence[Tensor],
        ends: Sequence[tuple[int, int]],
        skips: Sequence[int],
        loras: TextLoras = (),
        seen: Sequence[Sequence[bool]] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        encoder = self._encoders[index]
        used = sorted({token for sequence in ids for token in sequence if token >= 0})
        renamed = {token: place for place, token in enumerate(used)}
        known = [[renamed[token] if token >= 0 else len(used) - 1 - token for token in sequence] for sequence in ids]
        with _encoder_lock, _adding(encoder, [(factors[index], scale) for factors, scale in loras]):
            table = token_table(encoder).detach()
            compact = table[torch.tensor(used, device=table.device)]
            if rows:
                compact = torch.cat([compact, torch.stack([row.to(compact) for row in rows])])
            given = (torch.tensor(known, device=table.device),)  # [windows, tokens]
            options: dict = {"output_hidden_states": True}
            if seen is not None:
                options["attention_mask"] = torch.tensor(seen, dtype=torch.int64, device=table.device)
            outputs = functional_call(encoder, {self._table_names[index]: compact}, given, options)
            project = getattr(encoder, "text_projection", None)
            last = outputs.last_hidden_state  # [prompts, tokens, width]
            pooled = [] if project is None else [project(last[prompt, position]) for prompt, position in ends]
        states = outputs.hidden_states
        if not any(skips):
            return states[-2], pooled
        return torch.stack([states[-2 - skip][prompt] for prompt, skip in enumerate(skips)]), pooled


@contextmanager
def _adding(encoder: torch.nn.Module, loras: Sequence[tuple[Mapping[str, Factors], float]]) -> Iterator[None]:
    """Let the encoder's layers add what LoRAs, factors by module name, add to their outputs."""
    by_layer: dict[str, list[tuple[Tensor, Tensor, float]]] = {}
    for factors, scale in loras:
        for name, (down, up) in factors.items():
            by_layer.setdefault(name, []).append((down[0], up, scale))

    def hook(products, layer, inputs, output):
        return add_products(output, inputs[0], products)

    hooks = []
    try:
        for name, products in by_layer.items():
            hooks.append(encoder.get_submodule(name).register_forward_hook(partial(hook, products)))
        yield
    finally:
        for handle in hooks:
            handle.remove()


def _further_vectors(tokenizer, rows: int) -> dict[int, list[int]]:
    """Return id of each added token that means several vectors -> ids of the vectors after the first.

    diffusers stores the vectors of one embedding as the tokens `<name>`, `<name>_1`, `<name>_2`, ..., and `<name>` in a
    prompt means all of them. Raises ModelFormatError for tokens beyond the encoder's table of `rows` embeddings.
    """
    added = dict(tokenizer.added_tokens_encoder)
    beyond = sorted(token for token, place in added.items() if place >= rows)
    if beyond:
        raise ModelFormatError(
            f"the tokenizer has added tokens ({', '.join(beyond)[:200]}) beyond the {rows} embeddings of its text "
            "encoder; use the text encoder that was saved with it"
        )
    further = {}
    for token, place in added.items():
        chain = []
        while f"{token}_{len(chain) + 1}" in added:
            chain.append(added[f"{token}_{len(chain) + 1}"])
        if chain:
            further[place] = chain
    return further


def _with_further(ids: Sequence[int], further: Mapping[int, list[int]]) -> list[int]:
    """Insert an embedding's further token ids after its first, unless the text already contains them."""
    found = []
    for place, token in enumerate(ids):
        found.append(token)
        chain = further.get(token, [])
        if chain and list(ids[place + 1 : place + 1 + len(chain)]) != chain:
            found += chain
    return found


def token_table(encoder: "CLIPTextModel | CLIPTextModelWithProjection") -> Tensor:
    """Return the embeddings of a text encoder's tokens, [vocabulary, width]."""
    embeddings = encoder.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Embedding)
    return embeddings.weight


def _table_name(encoder: "CLIPTextModel | CLIPTextModelWithProjection") -> str:
    with _encoder_lock:
        table = token_table(encoder)
        return next(name for name, parameter in encoder.named_parameters() if parameter is table)
