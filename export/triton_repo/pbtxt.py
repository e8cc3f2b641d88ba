"""Protobuf's text format, limited to what Triton's `config.pbtxt` uses.

A message is a dictionary: field -> a string, a number, a boolean, an `Enum`, another message, or a list of these for a
repeated field. Maps are repeated messages of `key` and `value`, as in protobuf. The reader returns a list for a field
that occurs more than once or in brackets; it does not know which fields a config may have.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from stylefast.errors import ModelFormatError

_TOKEN = re.compile(
    r"""(?P<space>(?:\s|\#[^\n]*)+)
    |(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<number>-?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)(?![\w.])
    |(?P<word>[A-Za-z_]\w*)
    |(?P<mark>[{}\[\]:,;<>])""",
    re.VERBOSE,
)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "'": "'", "\\": "\\"}
_DEEPEST = 64


class Enum(str):
    """A value written without quotes, such as TYPE_FP32."""

    __slots__ = ()


def write_text(message: Mapping[str, Any]) -> str:
    """Return a message as text, one field per line. Empty lists are omitted, because the format can't express them."""
    return "".join(f"{line}\n" for line in _lines(message))


def read_text(text: str) -> dict[str, Any]:
    """Parse a text into its message. Raises ModelFormatError with the line of the problem."""
    tokens = _Tokens(text)
    message = _read_message(tokens, None, 0)
    return message


def as_list(value: Any) -> list:
    """Return the value of a repeated field as a list, whether it occurs never, once or more often."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _lines(message: Mapping[str, Any]) -> Iterator[str]:
    for name, value in message.items():
        if isinstance(value, list | tuple):
            if value and not isinstance(value[0], Mapping):
                yield f"{name}: [ {', '.join(map(_scalar, value))} ]"
                continue
            for one in value:
                yield from _field(name, one)
        else:
            yield from _field(name, value)


def _field(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield f"{name} {{"
        yield from (f"  {line}" for line in _lines(value))
        yield "}"
    else:
        yield f"{name}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum) or not isinstance(value, str):
        return str(value)
    # octal bytes keep the file ASCII, independent of encodings
    return '"' + "".join(_escaped(byte) for byte in value.encode()) + '"'


def _escaped(byte: int) -> str:
    if byte in b'"\\':
        return f"\\{chr(byte)}"
    return chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}"


class _Tokens:
    """Tokens of a text, with one token of lookahead."""

    def __init__(self, text: str):
        self._text, self._place = text, 0
        self.kind, self.text = "", ""
        self.step()

    def step(self) -> None:
        """Go to the next token; `kind` is empty at the end."""
        while True:
            if self._place >= len(self._text):
                self.kind, self.text = "", ""
                return
            found = _TOKEN.match(self._text, self._place)
            if found is None:
                raise self.wrong(f"{self._text[self._place]!r} is no part of the text format")
            self._place = found.end()
            if found.lastgroup != "space":
                self.kind, self.text = found.lastgroup, found.group()
                return

    def take(self, mark: str) -> bool:
        """Consume a mark if it is next; return whether it was."""
        here = self.kind == "mark" and self.text == mark
        if here:
            self.step()
        return here

    def wrong(self, what: str) -> ModelFormatError:
        line = self._text.count("\n", 0, self._place) + 1
        return ModelFormatError(f"config.pbtxt, line {line}: {what}")


def _read_message(tokens: _Tokens, end: str | None, depth: int) -> dict[str, Any]:
    if depth > _DEEPEST:
        raise tokens.wrong(f"messages are nested more than {_DEEPEST} deep")
    message: dict[str, Any] = {}
    while not (tokens.take(end) if end else not tokens.kind):
        if tokens.kind != "word":
            raise tokens.wrong(f"{tokens.text or 'the end'!r} stands where a field's name or {end or 'the end'} must")
        name = tokens.text
        tokens.step()
        colon = tokens.take(":")
        value = _read_value(tokens, colon, depth)
        if name in message:
            before = message[name] if isinstance(message[name], list) else [message[name]]
            value = [*before, *(value if isinstance(value, list) else [value])]
        message[name] = value
        _ = tokens.take(",") or tokens.take(";")
    return message


def _read_value(tokens: _Tokens, colon: bool, depth: int) -> Any:
    if tokens.take("{"):
        return _read_message(tokens, "}", depth + 1)
    if tokens.take("<"):
        return _read_message(tokens, ">", depth + 1)
    if tokens.take("["):
        values: list[Any] = []
        while not tokens.take("]"):
            values.append(_read_value(tokens, colon, depth))
            if not tokens.take(",") and not (tokens.kind == "mark" and tokens.text == "]"):
                raise tokens.wrong(f"{tokens.text or 'the end'!r} stands where , or ] must")
        return values
    if not colon:
        raise tokens.wrong(f"{tokens.text or 'the end'!r} stands where : or {{ must")
    kind, text = tokens.kind, tokens.text
    if kind not in ("string", "number", "word"):
        raise tokens.wrong(f"{text or 'the end'!r} stands where a value must")
    tokens.step()
    if kind == "number":
        return float(text) if set(text) & set(".eE") else int(text)
    if kind == "word":
        return {"true": True, "false": False}.get(text, Enum(text))
    pieces = [text]
    while tokens.kind == "string":  # adjacent strings are concatenated
        pieces.append(tokens.text)
        tokens.step()
    return "".join(map(_unquoted, pieces))


def _unquoted(text: str) -> str:
    def byte(found: re.Match) -> str:
        code = found.group(1)
        return chr(int(code, 8) % 256) if code[0] in "01234567" else _ESCAPES.get(code, code)

    # unescaped text may contain any character; escapes are bytes of UTF-8
    latin = text[1:-1].encode().decode("latin-1")
    return re.sub(r"\\([0-7]{1,3}|.)", byte, latin).encode("latin-1").decode(errors="replace")


__all__ = ["Enum", "as_list", "read_text", "write_text"]
