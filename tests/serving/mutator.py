"""Bodies of requests with mistakes in them: the same for the same seed."""

import json
import random

NUMBERS = (0, -1, 1, 3, 1001, 2**31, 2**64, -(2**63), 1e308, 0.5, -0.0, 99999)
TEXTS = (
    "",
    "0",
    "neon",
    "../x",
    "\0",
    "\ud800",
    "a" * 3000,
    "é" * 80,
    "(((:1.5)",
    "<lora:x:9>",
    "true",
    "1x1",
    "{}",
    "%s%n",
)
FIELDS = (
    "prompt",
    "model",
    "n",
    "size",
    "quality",
    "output_format",
    "output_compression",
    "response_format",
    "stream",
    "partial_images",
    "background",
    "moderation",
    "style",
    "user",
    "safety_identifier",
    "stylefast",
    "seed",
    "mask",
    "guidance",
    "loras",
    "scheduler",
    "image",
    "method",
    "styles",
    "width",
    "input_fidelity",
    "deadline",
    "sampler_name",
    "override_settings",
    "cfg_scale",
    "negative_prompt",
    "guidance_interval",
    "clip_skip",
    "prompt_syntax",
    "spacing",
)
# what fits, so that mistakes are met behind the first check too; none of it makes a long work
_SOUND = {
    "prompt": "a fish",
    "size": "32x32",
    "n": 1,
    "stream": False,
    "seed": 7,
    "output_format": "jpeg",
    "quality": "low",
}


def value(draw, depth=0):
    """Return any JSON value."""
    kind = draw.randrange(8 if depth < 3 else 6)
    if kind == 0:
        return draw.choice(NUMBERS)
    if kind == 1:
        return draw.choice(TEXTS)
    if kind == 2:
        return draw.choice((None, True, False))
    if kind == 3:
        return draw.choice((draw.random(), draw.randrange(10)))
    if kind in (4, 5):
        return draw.choice(("StyleAligned", "InstantStyle", "euler", "ddim", "lcm", "a1111", "low", "png", "64x64"))
    if kind == 6:
        return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {
        draw.choice((*FIELDS, *TEXTS, "kind", "scale", "upload")): value(draw, depth + 1)
        for _ in range(draw.randrange(4))
    }


def body(draw):
    """Return the text of a body."""
    found = {name: sound for name, sound in _SOUND.items() if name == "prompt" or draw.random() < 0.5}
    own = {"steps": 1}
    for _ in range(draw.randrange(4)):
        place = own if draw.random() < 0.4 else found
        place[draw.choice(FIELDS)] = value(draw)
    if draw.random() < 0.3:
        own["style"] = value(draw)
    found.setdefault("stylefast", own)
    text = json.dumps(found, ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    if draw.random() < 0.35:  # bytes instead of values
        content = bytearray(text)
        for _ in range(draw.randrange(1, 4)):
            at = draw.randrange(len(content) + 1)
            piece = bytes(draw.randrange(256) for _ in range(draw.randrange(4)))
            content[at : at + draw.randrange(6)] = draw.choice((piece, b'"', b"{", b"]", b",", b"9" * 40, b"\\u0000"))
        text = bytes(content)
    return text


def form(draw, picture):
    """Return the bytes of a form, whose boundary is "x"."""
    parts = []
    for _ in range(draw.randrange(1, 6)):
        name = draw.choice(
            (*FIELDS, "image[]", "stylefast[seed]", "stylefast[loras][]", "stylefast[[", "stylefast[a][b][]")
        )
        text = json.dumps(value(draw)).encode()
        parts.append(f'Content-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + text)
    parts.append(b'Content-Disposition: form-data; name="prompt"\r\n\r\na fish')
    parts.append(b'Content-Disposition: form-data; name="stylefast"\r\n\r\n{"steps": 1}')
    content = bytearray(picture)
    if draw.random() < 0.7:
        for _ in range(draw.randrange(1, 5)):
            content[draw.randrange(len(content))] = draw.randrange(256)
    parts.append(b'Content-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + bytes(content))
    draw.shuffle(parts)
    text = b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + b"--x--\r\n"
    return text[: draw.randrange(len(text))] if draw.random() < 0.1 else text


def bodies(seed, count, picture):
    """Yield (route, headers, body) of requests with mistakes."""
    draw = random.Random(seed)
    for _ in range(count):
        if draw.random() < 0.25:
            yield "/v1/images/edits", {"content-type": "multipart/form-data; boundary=x"}, form(draw, picture)
        else:
            route = draw.choice(
                ("/v1/images/generations", "/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img")
            )
            yield route, {"content-type": "application/json"}, body(draw)
