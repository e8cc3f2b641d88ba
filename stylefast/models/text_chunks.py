"""Division of a prompt's tokens into chunks that fill a text encoder's window, and the arithmetic of weights.

docs/prompts.md states both. Chunks are divided between words, and never inside a learned placeholder.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stylefast.errors import PromptError

# of a prompt: keys and values of each take 25 MB in fp16 SDXL, in every page of a batch
MAX_CHUNKS = 16
COMMA, FULL_STOP = ",</w>", ".</w>"
_PHRASE_ENDS = (FULL_STOP, COMMA, ";</w>", ":</w>")
# A1111's default: a chunk ends at a comma among the last of its tokens
_BACKTRACK = 20
# compel's smallest weight: a part of weight 0 outweighs all others
_LEAST = 1e-5


class Word(NamedTuple):
    """Tokens that no chunk border divides."""

    ids: tuple[int, ...]  # negative ids are learned vectors
    weight: float = 1.0
    run: int = 0  # number of the run of one weight that it belongs to
    mark: str = ""  # its last token
    placeholder: bool = False


class Chunk(NamedTuple):
    """Content of one window, without the begin and end tokens."""

    words: tuple[Word, ...] = ()

    @property
    def ids(self) -> list[int]:
        """Return the token ids."""
        return [token for word in self.words for token in word.ids]

    @property
    def weights(self) -> list[float]:
        """Return the weight of each token."""
        return [word.weight for word in self.words for _ in word.ids]

    @property
    def runs(self) -> list[int]:
        """Return the run of each token."""
        return [word.run for word in self.words for _ in word.ids]


def divide(sections: Sequence[Sequence[Word]], room: int, syntax: str, most: int = MAX_CHUNKS) -> list[Chunk]:
    """Return the chunks, at least one, of up to `room` tokens; each section begins a new one.

    No word has more than `room` tokens. Raises PromptError for more than `most` chunks.
    """
    of_section = {"a1111": _at_commas, "compel": _at_sentences}.get(syntax, _greedily)
    chunks = [Chunk(tuple(words)) for section in sections for words in of_section(section, room)]
    if len(chunks) > most:
        tokens = sum(len(word.ids) for section in sections for word in section)
        raise PromptError(
            f"the prompt has {tokens} tokens in {len(chunks)} chunks; at most {most} chunks of {room} tokens are "
            "allowed; shorten it, or load the engine with a larger max_text_chunks"
        )
    return chunks or [Chunk()]


def _greedily(words: Sequence[Word], room: int, backtrack: int = 0) -> list[list[Word]]:
    chunks: list[list[Word]] = []
    current: list[Word] = []
    length = 0
    for word in words:
        if length + len(word.ids) > room:
            kept = _comma(current, room, backtrack) if _moves(word, length, room) else len(current)
            chunks.append(current[:kept])
            current = current[kept:]
            length = sum(len(one.ids) for one in current)
            if length + len(word.ids) > room:
                chunks.append(current)
                current, length = [], 0
        current.append(word)
        length += len(word.ids)
    return [*chunks, current]


def _at_commas(words: Sequence[Word], room: int) -> list[list[Word]]:
    return _greedily(words, room, _BACKTRACK)


def _moves(word: Word, length: int, room: int) -> bool:
    """Return whether a word that does not fit takes those after the last comma with it, as in A1111."""
    comma_is_next = word.mark == COMMA and length + len(word.ids) == room + 1
    return not comma_is_next and (not word.placeholder or length == room)


def _comma(words: Sequence[Word], room: int, backtrack: int) -> int:
    """Return how many words stay: those up to a comma among the last `backtrack` tokens of a window, else all."""
    position, kept = 0, len(words)
    for number, word in enumerate(words):
        position += len(word.ids)
        if word.mark == COMMA and room - position < backtrack:
            kept = number + 1
    return kept


def _at_sentences(words: Sequence[Word], room: int) -> list[list[Word]]:
    """Divide as compel: after the last full stop that fits, else after the last mark, else after the last word."""
    chunks: list[list[Word]] = []
    rest, left = list(words), sum(len(word.ids) for word in words)
    while left > room:
        length = fitting = 0
        for word in rest:
            length += len(word.ids)
            if length > room:
                break
            fitting += 1
        ends = [
            [number for number, word in enumerate(rest[:fitting]) if word.mark in marks]
            for marks in ((FULL_STOP,), _PHRASE_ENDS)
        ]
        kept = next((found[-1] + 1 for found in ends if found), fitting)
        chunks.append(rest[:kept])
        left -= sum(len(word.ids) for word in rest[:kept])
        rest = rest[kept:]
    return [*chunks, rest]


# weights


def emphasised(states: Tensor, weights: Tensor) -> Tensor:
    """Return a chunk's states of one encoder times the weights of its tokens, with their mean restored, as in A1111.

    states: [tokens, width]. weights: [tokens]. The mean is over all numbers. Raises PromptError if none is left.
    """
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    scaled = wide * weights.to(wide)[:, None]
    ratio = wide.mean() / scaled.mean()
    if not bool(ratio.isfinite()):
        raise PromptError("the weights of the prompt cancel, so that their mean can't be restored; change one of them")
    return (scaled * ratio).to(states.dtype)


def moved(states: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """Return a chunk's states [tokens, width], moved away from those of an empty chunk by weights, as in compel."""
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    base, factors = empty.to(wide), weights.to(wide)[:, None]
    return torch.where(factors == 1, wide, base + (wide - base) * factors)


def blended(states: Tensor, lowered: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Return the mean of states and of those that lack a part of weight w < 1, weighted by tan((1 - w) pi / 2).

    lowered: (weight of the part, states without it) for each part, as in compel.
    """
    total, found = 1.0, states
    for weight, without in lowered:
        share = math.tan((1 - max(weight, _LEAST)) * math.pi / 2)
        total, found = total + share, found + share * without
    return found / total
