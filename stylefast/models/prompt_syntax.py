"""Prompts with weights: texts in the syntaxes of A1111 and compel, as runs of one weight.

Nothing here knows tokens or models. docs/prompts.md defines both.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from stylefast.errors import PromptError
from stylefast.values import quoted

SYNTAXES = ("plain", "a1111", "compel")
# beyond it, states are far outside of what a model was trained with
MAX_WEIGHT = 10.0
MAX_DEPTH = 32
# compel runs the encoders once more for each of them
MAX_LOWERED = 64
_ROUND, _SQUARE = 1.1, 1 / 1.1
_PLUS, _MINUS = 1.1, 0.9


class Run(NamedTuple):
    """Consecutive text of one weight."""

    text: str
    weight: float


def parse(text: str, syntax: str = "plain", placeholders: Sequence[str] = ()) -> list[list[Run]]:
    """Return the runs of a prompt, in sections that `BREAK` separates: one, except in "a1111".

    syntax: of `SYNTAXES`; "plain" is the text as it is. placeholders: parts such as `<name>` that are never read as
    syntax. Neighbouring runs of a section have different weights.
    Raises PromptError, with the position, for weights that are not finite or beyond `MAX_WEIGHT`, brackets nested
    deeper than `MAX_DEPTH`, and other programs' instructions that are not supported.

    Examples:
        >>> from stylefast.models.prompt_syntax import parse
        >>> [[tuple(run) for run in section] for section in parse("a (red:1.3) cat BREAK (blurry)", "a1111")]
        [[('a ', 1.0), ('red', 1.3), (' cat', 1.0)], [('blurry', 1.1)]]
        >>> [tuple(run) for run in parse("a red++ cat", "compel")[0]]
        [('a', 1.0), ('red', 1.2100000000000002), ('cat', 1.0)]
    """
    if syntax == "plain":
        return [[Run(text, 1.0)]]
    if syntax not in SYNTAXES:
        raise PromptError(f"prompt_syntax is {quoted(syntax)}; choose one of {', '.join(SYNTAXES)}")
    atoms = "|".join(re.escape(name) for name in sorted(placeholders, key=len, reverse=True)) or r"(?!)"
    return _A1111(text, atoms).sections() if syntax == "a1111" else [_Compel(text, atoms).runs()]


def check(name: str, text: str, syntax: str, placeholders: Sequence[str] = ()) -> None:
    """Raise the errors of `parse`, and PromptError for a text, called `name`, of brackets or keywords alone."""
    if syntax == "plain":
        return
    runs = [run for section in parse(text, syntax, placeholders) for run in section]
    if text.strip() and not any(run.text.strip() for run in runs):
        raise PromptError(f"{name} {quoted(text)} has no words, only brackets or keywords; write what they act on")


def _checked(weight: float, place: int, written: str) -> float:
    """Return a weight, or raise PromptError if it is beyond the limits."""
    if abs(weight) <= MAX_WEIGHT:  # false for NaN
        return weight
    raise PromptError(
        f"the weight of {quoted(written)} at position {place} of the prompt comes to {weight:g}; weights must be "
        f"finite, from {-MAX_WEIGHT:g} to {MAX_WEIGHT:g}, nested ones multiplied; use a smaller one, or escape the "
        "bracket: \\("
    )


def _refuse(what: str, way: str, place: int, written: str) -> None:
    raise PromptError(f"{quoted(written)} at position {place} of the prompt is {what}, which is not supported; {way}")


def _refuse_depth(place: int) -> None:
    raise PromptError(
        f"the bracket at position {place} of the prompt is nested deeper than {MAX_DEPTH}; remove some, or escape "
        "them: \\("
    )


_NUMBER = r"[-+]?(?:\d++(?:\.\d*+)?|\.\d++)"
_DIGITS = re.compile(rf"\s*{_NUMBER}\s*")
# what someone may have meant as a number
_NEARLY = re.compile(r"\s*[-+]?(?:nan|inf|infinity|[\d.][\d.,_]*(?:e[-+]?\d+)?%?)\s*", re.IGNORECASE)
_EXTRA_NETWORK = r"<\s*+(?:lora|lyco|hypernet|lbw)\s*+:"
_BREAK = re.compile(r"\bBREAK\b")
_AND = re.compile(r"\bAND\b")


class _A1111:
    """A1111's emphasis. Round and square brackets are counted apart, so that they may overlap as they do there."""

    def __init__(self, text: str, atoms: str):
        self._text = text
        self._tokens = re.compile(
            rf"(?P<atom>{atoms})|(?P<network>{_EXTRA_NETWORK})|\\(?P<escaped>[()\[\]\\|]?)"
            rf"|:\s*+(?P<weight>{_NUMBER})\s*\)|(?P<bracket>[()\[\]])|(?P<bar>\|)"
            rf"|(?:(?!{atoms}|{_EXTRA_NETWORK})[^\\()\[\]:|])+|.",
            re.IGNORECASE | re.DOTALL,
        )
        # pieces of text, their weights, and where they are; None: BREAK
        self._texts: list[str | None] = []
        self._weights: list[float] = []
        self._places: list[int] = []
        self._round: list[tuple[int, int]] = []  # (position, first piece) of open brackets
        self._square: list[tuple[int, int]] = []
        self._barred: set[int] = set()  # positions of square brackets with a | directly inside

    def sections(self) -> list[list[Run]]:
        for match in self._tokens.finditer(self._text):
            self._take(match)
        for opened, factor in ((self._round, _ROUND), (self._square, _SQUARE)):
            for _, first in reversed(opened):  # never closed: to the end
                self._weigh(first, factor)
        sections: list[list[Run]] = [[]]
        for text, weight, place in zip(self._texts, self._weights, self._places, strict=True):
            if text is None:
                sections.append([])
                continue
            _checked(weight, place, text)
            if sections[-1] and sections[-1][-1].weight == weight:
                sections[-1][-1] = Run(sections[-1][-1].text + text, weight)
            elif text:
                sections[-1].append(Run(text, weight))
        if len(sections) > 1 and not sections[-1]:
            sections.pop()  # nothing follows the last BREAK
        return sections

    def _take(self, match: re.Match) -> None:
        place, written = match.start(), match[0]
        if match["network"] is not None:
            end = self._text.find(">", place)
            written = self._text[place : end + 1 if end > 0 else None]
            way = "name the LoRA in the request's loras, or with --lora, and remove the tag"
            _refuse("an extra network", way, place, written)
        if match["weight"] is not None and self._round:
            self._weigh(self._round.pop()[1], float(match["weight"]))
        elif match["bracket"] is not None:
            self._bracket(written, place)
        elif match["escaped"] is not None:
            self._add(match["escaped"], place)  # a backslash before anything else disappears
        elif match["atom"] is not None:
            self._add(written, place)
        else:
            self._words(written, place, match["bar"] is not None)

    def _words(self, written: str, place: int, bar: bool) -> None:
        if bar and self._square and (not self._round or self._round[-1][0] < self._square[-1][0]):
            self._barred.add(self._square[-1][0])
        found = _AND.search(written)
        if found:
            _refuse("a composition of prompts", "write `and`, or make a picture of each", place + found.start(), "AND")
        parts = _BREAK.split(written)
        for number, part in enumerate(parts):
            if number:
                self._add(None, place)
                part = part.lstrip()
            self._add(part if number == len(parts) - 1 else part.rstrip(), place)

    def _bracket(self, bracket: str, place: int) -> None:
        opened, factor = (self._round, _ROUND) if bracket in "()" else (self._square, _SQUARE)
        if bracket in "([":
            opened.append((place, len(self._texts)))
            if len(opened) > MAX_DEPTH:
                _refuse_depth(place)
            return
        if not opened:
            self._add(bracket, place)  # closes nothing
            return
        start, first = opened.pop()
        colon = self._text.rfind(":", start, place)
        after = self._text[colon + 1 : place] if colon >= 0 else ""
        if bracket == ")" and _NEARLY.fullmatch(after):
            raise PromptError(
                f"the weight {quoted(after.strip())} at position {colon + 1} of the prompt is not a finite decimal "
                "number; write it like 1.3, or put a word after it if it is text"
            )
        timed = _DIGITS.fullmatch(after) and self._text[colon - 1] != "\\"
        if bracket == "]" and (timed or start in self._barred):
            way = "weaken words as (fish:0.8), use separate requests, or escape the brackets: \\["
            _refuse("a change or choice between steps", way, start, self._text[start : place + 1])
        self._weigh(first, factor)

    def _weigh(self, first: int, factor: float) -> None:
        for i in range(first, len(self._texts)):
            self._weights[i] *= factor

    def _add(self, text: str | None, place: int) -> None:
        self._texts.append(text)
        self._weights.append(1.0)
        self._places.append(place)


_ESCAPED = re.compile(r'\\([()",.+\-=])')
_OPERATOR = re.compile(r"(?<!\\)\.(?:and|add|blend|swap|attend)\s*\(|\b(?:use|with)Lora\s*\(")
_SIGNS = re.compile(r"\++|-+")
_DECIMAL = re.compile(r"\d+\.\d*|\.\d+|\d+")
_NO_NUMBER = re.compile(r"[-+]?(?:nan|inf|infinity)\b|[-+]+\.?\d", re.IGNORECASE)
_AFTER_NUMBER = re.compile(r"e[-+]?\d", re.IGNORECASE)
_QUOTE = re.compile(r'"((?:\\"|[^"\n])*)"')


class _Compel:
    """compel's weights: `word++`, `(phrase)++`, `(phrase)1.3` and the same with quotes."""

    def __init__(self, text: str, atoms: str):
        self._text = text
        special = r'\s().,+\-="'
        self._word = re.compile(
            rf'(?:{atoms}|\\[()",.+\-=]|[-+](?![{special}]|\Z)|-?\d+|[^{special}])++', re.IGNORECASE
        )
        self._free = re.compile(rf"(?:{atoms}|[^\s,])+,?|,", re.IGNORECASE)
        self._atoms = re.compile(atoms, re.IGNORECASE)
        self._pieces: list[tuple[str, float]] = []
        self._closing: dict[int, int] = {}  # bracket -> the one that closes it
        self._failed: set[int] = set()  # brackets whose contents don't parse

    def runs(self) -> list[Run]:
        self._match_brackets()
        operator = _OPERATOR.search(self._text)
        if operator:
            way = "use weights, or escape the full stop: \\."
            _refuse("an operator of compel", way, operator.start(), operator[0].strip())
        place, text = 0, self._text
        while place < len(text):
            if text[place].isspace():
                place += 1
                continue
            end = self._item(place, len(text), 1.0)
            if end is None:
                free = self._free.match(text, place)
                assert free is not None  # some character that is no space
                self._pieces.append((free[0], 1.0))
                end = free.end()
            place = end
        runs: list[Run] = []
        for piece, weight in self._pieces:
            piece = _ESCAPED.sub(r"\1", piece)
            if runs and runs[-1].weight == weight:
                runs[-1] = Run(f"{runs[-1].text} {piece}", weight)
            else:
                runs.append(Run(piece, weight))
        if sum(run.weight < 1 for run in runs) > MAX_LOWERED:
            raise PromptError(
                f"the prompt has more than {MAX_LOWERED} parts with weights below 1, each of which takes another run "
                "of the text encoders; join or remove some"
            )
        return runs

    def _match_brackets(self) -> None:
        opened: list[int] = []
        for match in re.finditer(rf"{self._atoms.pattern}|\\.|[()]", self._text, re.IGNORECASE | re.DOTALL):
            if match[0] == "(":
                opened.append(match.start())
            elif match[0] == ")" and opened:
                self._closing[opened.pop()] = match.start()

    def _item(self, place: int, end: int, weight: float, depth: int = 0) -> int | None:
        """Add the weighted word or group at `place`; return where it ends, or None if there is none."""
        text = self._text
        if text[place] in '("':
            group = self._group(place, end)
            if group is None:
                return None
            start, stop, after = group
            factor, after = self._weight(after, numbers=True)
            return after if self._inside(start, stop, weight * factor, place, depth + 1) else None
        word = self._word.match(text, place, end)
        if word is None:
            return None
        factor, after = self._weight(word.end(), numbers=False)
        if after == word.end() and depth == 0:
            return None  # the rest of the word is free text
        self._pieces.append((word[0], _checked(weight * factor, place, text[place:])))
        return after

    def _group(self, place: int, end: int) -> tuple[int, int, int] | None:
        """Return (start of the contents, their end, what follows) of a closed bracket or quote."""
        if self._text[place] == "(":
            closing = self._closing.get(place, end)
            return (place + 1, closing, closing + 1) if closing < end else None
        quote = _QUOTE.match(self._text, place, end)
        return (quote.start(1), quote.end(1), quote.end()) if quote else None

    def _inside(self, start: int, stop: int, weight: float, place: int, depth: int) -> bool:
        if place in self._failed:
            return False
        if depth > MAX_DEPTH:
            _refuse_depth(place)
        count, at = len(self._pieces), start
        while at < stop:
            if self._text[at].isspace():
                at += 1
            elif self._text[at] in ",.":
                self._pieces.append((self._text[at], _checked(weight, place, self._text[place:])))
                at += 1
            else:
                after = self._item(at, stop, weight, depth)
                if after is None:
                    del self._pieces[count:]
                    self._failed.add(place)
                    return False
                at = after
        return True

    def _weight(self, place: int, numbers: bool) -> tuple[float, int]:
        """Return the factor written at `place`, 1 if none is, and where it ends."""
        text = self._text
        decimal = _DECIMAL.match(text, place) if numbers else None
        wrong = numbers and (
            _NO_NUMBER.match(text, place) or (decimal is not None and _AFTER_NUMBER.match(text, decimal.end()))
        )
        if wrong:
            raise PromptError(
                f"the weight at position {place} of the prompt, {quoted(text[place : place + 20])}, is not a finite "
                "decimal number without sign; write it like 1.3 or 0.7"
            )
        if decimal is not None:
            digits = decimal[0]
            return _checked(float(digits), place, text[place:]), decimal.end()
        signs = _SIGNS.match(text, place)
        if signs is None:
            return 1.0, place
        count, base = len(signs[0]), _PLUS if signs[0][0] == "+" else _MINUS
        return _checked(base ** min(count, 1000), place, text[place:]), signs.end()
