"""Warnings about valid requests that will disappoint.

They name unknown words, styles with nothing to align with, and guidance that a distilled model was not made for.
"""

import difflib
import logging
import re
from collections.abc import Collection, Iterable, Sequence

from stylefast.models.prompt_syntax import parse
from stylefast.runtime.plan.instructions import instructions, texts_of, warn_of_instructions
from stylefast.runtime.plan.request import Request
from stylefast.sampling.few_step import guidance_warning
from stylefast.values import quoted

logger = logging.getLogger(__name__)

# words of letters, and standalone numbers; the 1.0 of a weight is not a word
_WORD = re.compile(r"[^\W\d_]+|(?<!\S)\d+(?!\S)")
# other programs' instructions without words for the text encoders
_WORDLESS = ("a tag", "an embedding", "an option", "a wildcard", "a keyword")
_SHOWN = 12  # max words in a warning


class Notices:
    """Warnings, once per call, about requests that the model `name` can't serve well.

    known_words: all words that the model's text encoders were trained on, in lower case; None: any text, as for SDXL.
    """

    def __init__(self, name: str, known_words: Collection[str] | None):
        self._name, self._known = name, tuple(known_words or ())
        self._said: set[str] = set()

    def __call__(self, requests: Sequence[Request], baking: bool = False) -> None:
        """Check the requests of one call; `baking`: skip the prompt, a placeholder for those of a bank's readers."""
        warn_of_instructions(requests)
        for request in requests:
            for warning in warnings_of(request):
                if request.scheduler not in self._said:  # pictures name it each time
                    self._said.add(request.scheduler)
                    logger.warning("%s (shown once)", warning)
        unknown = self._unknown_words([text for request in requests for text in _texts(request)[baking:]])
        if unknown:
            known, rest = ", ".join(self._known[:_SHOWN]), len(self._known) - _SHOWN
            logger.warning(
                "the model %s does not know %s %s, which will have no meaning; it knows %s%s",
                self._name,
                "the word" if len(unknown) == 1 else "the words",
                self._listed(unknown),
                known,
                f" and {rest} more words" if rest > 0 else "",
            )
        lonely = [] if baking else alone(requests)
        if lonely:
            logger.warning(
                "%s: %s() has neither reference nor prompt, and no other picture of this call carries the same "
                "object, so the picture has nothing to align with and is generated without the style; give it a "
                "reference or a prompt, or several prompts to one style",
                "; ".join(f"request {i}" for i in lonely),
                type(requests[lonely[0]].reader).__name__,
            )

    def _unknown_words(self, texts: Iterable[str]) -> list[str]:
        """Return the words that the model was never trained on, in order, each once."""
        if not self._known:
            return []
        words: dict[str, None] = {}
        for text in texts:
            for written, (kind, _) in instructions(text).items():
                if kind in _WORDLESS:  # already reported
                    text = text.replace(written, " ")
            words |= dict.fromkeys(word for word in _WORD.findall(text.lower()) if word not in self._known)
        return list(words)

    def _listed(self, words: list[str]) -> str:
        shown = [word[:40] for word in words[:_SHOWN]]
        near = [difflib.get_close_matches(word, self._known, n=1, cutoff=0.7) for word in shown]
        listed = [
            f"{quoted(word)} ({close[0]}?)" if close else repr(word) for word, close in zip(shown, near, strict=True)
        ]
        return ", ".join(listed) + (f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else "")


def warnings_of(request: Request) -> list[str]:
    """Return the warnings on one request that go into its picture's metadata: settings that contradict one another."""
    warning = guidance_warning(request.scheduler, request.guidance)
    return [] if warning is None else [warning]


def alone(requests: Sequence[Request]) -> list[int]:
    """Return the indices of requests that are alone with a style that takes the first picture as reference."""
    groups: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        style = request.reader
        if style is not None and style.reads.of_call:
            groups.setdefault(id(style), []).append(i)
    return [members[0] for members in groups.values() if len(members) == 1]


def _texts(request: Request) -> list[str]:
    """Return the texts that the text encoders read, the prompt first, without learned tokens' placeholders."""
    slots = [slot for style in request.styles for slot in style.placeholders]
    read = []
    for text in texts_of(request):
        if request.prompt_syntax != "plain":
            sections = parse(text, request.prompt_syntax, slots)
            text = " ".join(run.text for section in sections for run in section)
        for slot in slots:
            text = text.replace(slot, " ")
        read.append(text)
    return read
