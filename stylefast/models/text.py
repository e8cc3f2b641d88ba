"""Encoding of prompts by SDXL's two text encoders, with learned vectors inserted at call time.

A placeholder is written `<name>` in the text; its vectors are in `Prompt.vectors`. Neither tokenizers nor embedding
tables grow: each call runs the encoders with a small table of just the rows it needs, so any number of styles and noise
stages share one batched call and nothing has to be unloaded afterwards.
"""

import logging
import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from stylefast.errors import InvalidRequest, ModelFormatError, PromptError, StyleError
from stylefast.models.lora_factors import Factors
from stylefast.models.row_loras import add_products

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

logger = logging.getLogger(__name__)

# LoRAs: for each its factors by module name of encoder 1 and of encoder 2, and its strength
TextLoras = Sequence[tuple[tuple[Mapping[str, Factors], ...], float]]

POOLED_POLICIES = ("eos", "first_added_token")
# `eos_token_id` of configs in which the highest id of a prompt marks its end
_HIGHEST_ID_ENDS = 2

# functional_call swaps the module's embedding table during the call, and two engines may share one encoder
_encoder_lock = threading.Lock()
# transformers' Rust tokenizers raise if called concurrently
_tokenizer_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class TextStates:
    """The UNet's text conditioning for one prompt."""

    hidden: Tensor  # [tokens, cross_dim]: second-to-last (or earlier) states of both encoders, concatenated
    pooled: Tensor  # [pooled_dim]: projected state of encoder 2 at the end of the text


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text and the vectors of its placeholders.

    `text` None is the null prompt, zeros in models trained that way. `vectors` maps a placeholder's name to its rows
    for encoder 1 and encoder 2, `[n, width 1]` and `[n, width 2]`; `<name>` in the text then means n tokens. Names that
    do not occur in the text are ignored; `<other>` without vectors is ordinary text.
    """

    text: str | None
    vectors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self):
        if self.text is not None and not isinstance(self.text, str):
            raise PromptError(f"a prompt must be a string or None, not {type(self.text).__name__}")
        for name, pair in self.vectors.items():
            shapes = [tuple(rows.shape) for rows in pair]
            if len(shapes) != 2 or any(len(s) != 2 or s[0] == 0 for s in shapes) or shapes[0][0] != shapes[1][0]:
                raise StyleError(
                    f"the vectors of <{name}> have the shapes {shapes}; give two tensors [n, width], one per text "
                    "encoder, with the same n"
                )

    def placeholders(self) -> list[str]:
        """Return the names with vectors that occur in the text, in order of first occurrence."""
        text = self.text or ""
        return sorted((name for name in self.vectors if f"<{name}>" in text), key=lambda name: text.index(f"<{name}>"))

    def identity(self) -> tuple:
        """Return a key that is equal for prompts with equal encodings; trainable vectors compare by object."""
        parts = []
        for name in self.placeholders():
            for rows in self.vectors[name]:
                content = id(rows) if rows.requires_grad else rows.detach().float().cpu().numpy().tobytes()
                parts.append((name, tuple(rows.shape), content))
        return self.text, *parts


@dataclass(frozen=True)
class _Sequence:
    """Padded token ids of one prompt; a negative id -1 - r means row r of the call's learned vectors."""

    ids: list[int]
    end: int  # index of the first end-of-text token
    added: int  # index of the last vector of the first placeholder; `end` if there is none
    cut: str  # words that did not fit

    def position(self, policy: str) -> int:
        """Return the position at which the prompt is pooled under a policy."""
        return self.end if policy == "eos" else self.added


class TextRunner(Protocol):
    """Runner of the text encoders: PyTorch (`TorchText`) or exported graphs.

    most_skipped: the largest supported number of layers to skip before the second-to-last. takes_loras: whether it
    applies LoRAs.
    """

    most_skipped: int
    takes_loras: bool

    def __call__(
        self,
        index: int,
        ids: Sequence[Sequence[int]],
        rows: Sequence[Tensor],
        ends: Sequence[tuple[int, int]],
        skips: Sequence[int],
        loras: TextLoras = (),
    ) -> tuple[Tensor, list[Tensor]]:
        """Run encoder `index` (0 or 1) on token ids [prompts][tokens]; an id -1 - r means the vector `rows[r]`.

        Returns the second-to-last states [prompts, tokens, width], or those `skips` [prompts] layers earlier, and from
        encoder 2 the projected last state [pooled_dim] at each (prompt, position) of `ends`; every prompt has at least
        one. `loras` apply to all of the prompts.
        """
        ...


class TextEncoder:
    """Both text encoders of an SDXL-shaped model with their tokenizers.

    `force_zeros`: the null prompt is zeros (SDXL base) instead of the encoding of the empty text. `runner` runs the
    encoders and may be replaced.
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

        Text beyond `max_tokens` is cut with one logged warning per call. Raises PromptError if a placeholder is beyond
        it, StyleError if vectors do not fit the encoders, InvalidRequest if `clip_skip` is too large.
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
            sequences = self._tokenized(batch)
            wanted = [
                None if place is None else (place, sequences[1][0][place].position(policy))
                for place, policy in zip(places, policies, strict=True)
            ]
            states = self._run(sequences, [pair for pair in wanted if pair is not None], batch_skips, loras)
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

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise the errors that `encode` would raise for `prompts`, without running an encoder."""
        self._check(list(prompts), ["eos"] * len(prompts), ())
        for prompt in prompts:
            # only placeholders beyond the window raise
            for index, tokenizer in enumerate(self.tokenizers if prompt.placeholders() else ()):
                self._tokenize(prompt, tokenizer, index, [])

    def _check(self, prompts: list[Prompt], policies: list[str], known_names: Collection[str]) -> None:
        if len(policies) != len(prompts):
            raise PromptError(
                f"{len(policies)} pooled policies for {len(prompts)} prompts; give one for all or one each"
            )
        for policy in policies:
            if policy not in POOLED_POLICIES:
                raise PromptError(f"pooled policy {policy!r} is unknown; choose one of {', '.join(POOLED_POLICIES)}")
        widths = self.widths
        for prompt in prompts:
            for name in known_names:
                if name not in prompt.vectors and f"<{name}>" in (prompt.text or ""):
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

    def _tokenized(self, batch: list[Prompt]) -> list[tuple[list[_Sequence], list[Tensor]]]:
        """Return, per encoder, the prompts' sequences and their learned vectors; log words that were cut."""
        found, cut = [], {}
        for index, tokenizer in enumerate(self.tokenizers):
            rows: list[Tensor] = []
            sequences = [self._tokenize(prompt, tokenizer, index, rows) for prompt in batch]
            cut.update({place: s.cut for place, s in enumerate(sequences) if s.cut and place not in cut})
            found.append((sequences, rows))
        if cut:
            words = "; ".join(repr(text) for text in cut.values())
            logger.warning(
                "the text encoders read only %d tokens; cut from the end of %d prompt(s): %s",
                self.max_tokens,
                len(cut),
                words,
            )
        return found

    def _run(
        self,
        tokens: list[tuple[list[_Sequence], list[Tensor]]],
        wanted: Sequence[tuple[int, int]],
        skips: Sequence[int],
        loras: TextLoras,
    ) -> dict[tuple[int, int] | None, TextStates]:
        """Return the states of each (prompt, position) of `wanted`."""
        ends = list(dict.fromkeys(wanted))
        if not ends:
            return {}
        hidden, pooled = [], []
        for index, (sequences, rows) in enumerate(tokens):
            states, pooled = self.runner(index, [s.ids for s in sequences], rows, ends, skips, loras)
            hidden.append(states)
        states = torch.cat([h.to(hidden[1].device) for h in hidden], dim=-1).to(hidden[1].dtype)
        return {end: TextStates(states[end[0]], state) for end, state in zip(ends, pooled, strict=True)}

    def _tokenize(self, prompt: Prompt, tokenizer, index: int, rows: list[Tensor]) -> _Sequence:
        names = prompt.placeholders()
        # pieces at odd indices are placeholders; without any, the text is one piece
        slots = "|".join(re.escape(f"<{name}>") for name in names)
        text = prompt.text or ""
        pieces = re.split(f"({slots})", text) if names else [text]
        content: list[int] = []
        spans: list[tuple[str, int]] = []
        for number, piece in enumerate(pieces):
            if number % 2:
                name = piece[1:-1]
                vectors = prompt.vectors[name][index]
                content += [-1 - len(rows) - k for k in range(len(vectors))]
                rows.extend(vectors.unbind())
                spans.append((name, len(content)))
            elif piece:
                with _tokenizer_lock:
                    ids = tokenizer(piece, add_special_tokens=False, verbose=False).input_ids
                content += _with_further(ids, self._further[index])

        # the start and end tokens take one position each
        room = self.max_tokens - 2
        for name, last in spans:
            if last > room:
                raise PromptError(
                    f"the style token <{name}> reaches position {last} of the prompt, but the text encoders read only "
                    f"{room} tokens between start and end; shorten the text before it by {last - room} tokens "
                    "or move the style token forward"
                )
        cut = tokenizer.decode([token for token in content[room:] if token >= 0]).strip()
        ids = [tokenizer.bos_token_id, *content[:room], tokenizer.eos_token_id]
        # as in transformers, an end token typed into the text ends it for the pooling; under the published configs
        # transformers uses the highest id as end, and tokens added to the tokenizer have higher ids
        legacy = self.encoders[index].config.eos_token_id == _HIGHEST_ID_ENDS
        end = ids.index(max(ids) if legacy else tokenizer.eos_token_id)
        ids += [tokenizer.pad_token_id] * (self.max_tokens - len(ids))
        return _Sequence(ids, end, spans[0][1] if spans else end, cut)


class TorchText:
    """`TextRunner` that calls both text encoders as PyTorch modules."""

    takes_loras = True

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
            given = (torch.tensor(known, device=table.device),)  # [prompts, tokens]
            outputs = functional_call(
                encoder, {self._table_names[index]: compact}, given, {"output_hidden_states": True}
            )
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
