"""Detection of other programs' instructions in prompts, which are encoded as words here."""

import logging
import re
from collections.abc import Sequence
from functools import lru_cache

from stylefast.runtime.plan.request import Request
from stylefast.values import quoted

logger = logging.getLogger(__name__)

# escaped characters are literal in other programs too
_ESCAPED = re.compile(r"\\[\\()\[\]{}<>:|]")
_NO_NUMBER = r"\s*[-+]?(?:nan|inf(?:inity)?|[\d.]++e[-+]?\d++)\s*"
_NUMBER = r"\s*[-+]?(?:\d++(?:\.\d*+)?|\.\d++)\s*"
# (name, pattern, alternative in stylefast or "", the syntax that understands it or ""); prompts may be long, so each
# reads its text once
_INSTRUCTIONS = (
    (
        "a tag",
        re.compile(r"<\s*(?:lora|lyco|hypernet|lbw)\s*:[^<>]*>", re.IGNORECASE),
        "name LoRAs in the request's loras, or with --lora",
        "",
    ),
    ("a weight", re.compile(rf"[(\[][^()\[\]]*:(?:{_NUMBER}|{_NO_NUMBER})[)\]]", re.IGNORECASE), "", "a1111"),
    ("a weight", re.compile(rf"\S::{_NUMBER}(?=\s|,|$)"), "", ""),
    (
        "a weight",
        re.compile(r"(?:(?<![^\W\d_])[^\W\d_]{2,}+|\))(?:\+\++|--+)(?=[\s,.)]|$)|\)[-+](?=[\s,.)]|$)"),
        "",
        "compel",
    ),
    ("a weight", re.compile(rf"\)(?!\s){_NUMBER}(?=[\s,.)]|$)(?<=[\d.])"), "", "compel"),
    ("a change or choice between steps", re.compile(r"\[(?=[^\[\]|:]*+[|:])[^\[\]]*+\]"), "", ""),
    ("a choice", re.compile(r"\{(?=[^{}|]*+\|)[^{}]*+\}"), "", ""),
    ("a wildcard", re.compile(r"(?<!\w)__[\w/*-]+__(?!\w)"), "", ""),
    ("an embedding", re.compile(r"\bembedding:\S+", re.IGNORECASE), "give its file as a learned style", ""),
    ("an option", re.compile(r"(?:^|\s)--(?:ar|v|s|q|c|no|niji|seed|style|stylize|chaos)\b[^-]*"), "", ""),
    ("a keyword", re.compile(r"(?<!\S)BREAK(?!\S)"), "", "a1111"),
    ("a keyword", re.compile(r"(?<!\S)(?:ADDCOMM|ADDBASE|ADDCOL|ADDROW)(?!\S)"), "", ""),
)
# what a syntax offers for weights
_WEIGHTS = {
    "plain": 'give prompt_syntax="a1111" for weights',
    "a1111": "write weights as (x:1.3)",
    "compel": 'write weights as (x)1.3, or give prompt_syntax="a1111"',
}
# a keyword only if the prompt also has lower-case words
_AND = re.compile(r"(?<!\S)AND(?!\S)")
_BRACKETS = re.compile(r"\((?=[^()\w]*+\w)[^()]*+\)|\[(?=[^\[\]\w]*+\w)[^\[\]]*+\]")
_MOST_SHOWN = 4


def instructions(text: str, syntax: str = "plain") -> dict[str, tuple[str, str]]:
    """Find instructions of A1111, ComfyUI, InvokeAI, compel and Midjourney in a prompt that are none in its syntax.

    Returns the text found -> (its meaning elsewhere, the alternative here or "").
    """
    plain = _ESCAPED.sub(" ", text)
    found: dict[str, tuple[str, str]] = {}
    for kind, pattern, way, known in _INSTRUCTIONS:
        for match in pattern.finditer(plain) if known != syntax else ():
            written = match[0].strip()
            # skip parts of earlier matches
            if not any(written in other for other in found):
                found[written] = kind, way
    if _AND.search(plain) and re.search(r"[a-z]", plain):
        found["AND"] = "a keyword", ""
    return found


def warn_of_instructions(requests: Sequence[Request]) -> None:
    """Log one warning for each request whose texts hold instructions of another syntax, and one for plain brackets.

    Requests with the same texts, such as several pictures of one prompt, share a warning.
    """
    bracketed = False
    for syntax, texts in dict.fromkeys((request.prompt_syntax, tuple(_named_texts(request))) for request in requests):
        found: dict[str, tuple[str, str]] = {}
        holding = []
        for name, text in texts:
            held = instructions(text, syntax)
            found |= held
            holding += [f"{name} {quoted(text)}"] if held else []
            bracketed |= syntax == "plain" and _BRACKETS.search(_ESCAPED.sub(" ", text)) is not None
        if found:
            shown = ", ".join(f"{quoted(written)} ({kind})" for written, (kind, _) in list(found.items())[:_MOST_SHOWN])
            more = f" and {len(found) - _MOST_SHOWN} more" if len(found) > _MOST_SHOWN else ""
            ways = "".join(f"; {way}" for way in dict.fromkeys(way for _, way in found.values()) if way)
            logger.warning(
                "%s contain%s %s%s: other programs interpret this as instructions, but %s it is encoded as plain "
                "words; remove it, or %s%s",
                " and ".join(holding),
                "s" if len(holding) == 1 else "",
                shown,
                more,
                "here" if syntax == "plain" else f"with prompt_syntax={quoted(syntax)}",
                _WEIGHTS[syntax],
                ways,
            )
            bracketed = False
    if bracketed:
        _say_of_brackets()


@lru_cache(maxsize=1)
def _say_of_brackets() -> None:
    logger.warning(
        "brackets in prompts are encoded as they are; other programs read (x) as a weight of 1.1 and [x] as a "
        'weight of 0.9, but here they change no weights unless prompt_syntax="a1111" is given (shown once)'
    )


def texts_of(request: Request) -> list[str]:
    """List the texts that the text encoders read of a request: prompt, negative prompt, and texts of its styles."""
    return [text for _, text in _named_texts(request)]


def _named_texts(request: Request) -> list[tuple[str, str]]:
    second = ("the prompt for encoder 2", request.prompt_2), ("the negative one", request.negative_prompt_2)
    texts = [("the prompt", request.prompt), ("the negative prompt", request.negative_prompt)]
    texts += [(name, text) for name, text in second if text is not None]
    return texts + [named for style in request.styles for named in style.texts]
