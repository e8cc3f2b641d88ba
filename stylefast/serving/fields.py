"""Fields of OpenAI's image routes, and the call of the engine that they ask for.

Every field of the published contract is known here: done, or refused by its name. Fields that OpenAI does not have,
such as steps and seed, may stand beside the others or inside "stylefast", which takes whatever a request file takes.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stylefast.errors import InvalidRequest
from stylefast.serving.media import Upload, upload_in_text
from stylefast.serving.replies import ApiError
from stylefast.serving.starts import size_near
from stylefast.values import did_you_mean, load_json, quoted

# OpenAI's names for how much work to spend: steps
QUALITIES = {"low": 4, "medium": 12, "high": 20, "xhigh": 30, "max": 50}
# old names, which clients still send
_OLD_QUALITIES = {"standard": "medium", "hd": "high"}
_OLD_MODELS = "dall-e-"
FIDELITIES = {"low": 0.5, "high": 1.0}  # strengths of pictures that are style references
PLAIN_FIDELITY = 0.8
MOST_PICTURES, MOST_UPLOADS, MOST_PARTIAL, MOST_STYLES = 10, 16, 3, 16
MOST_MARKS = 500_000  # commas and opening brackets in JSON, those in texts included
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")
_KEY, _DEEPEST = re.compile(r"\[([^\[\]]*)\]"), 8
_HALF = re.compile(rb"\\u[dD][89A-Fa-f]")  # of a character, which needs another half behind or before it
_LONGEST_SCHEME = 100  # characters before an address's colon
_UNIT = 8  # sides of the engine's pictures
# of a request in a request file, which "stylefast" may have; prompt and size have fields of their own
REQUEST_FIELDS = (
    "negative_prompt",
    "style",
    "steps",
    "guidance",
    "seed",
    "scheduler",
    "guidance_rescale",
    "guidance_interval",
    "spacing",
    "clip_skip",
    "loras",
    "prompt_2",
    "negative_prompt_2",
    "prompt_syntax",
    "strength",
    "upscale",
    "upscale_strength",
    "upscale_mode",
    "variation_seed",
    "variation_strength",
    "control",
    "window",
    "window_stride",
    "wrap",
)
_TEXTS = ("negative_prompt", "prompt_2", "negative_prompt_2", "scheduler", "spacing", "prompt_syntax", "method")
_TEXTS += ("upscale_mode",)
_OWN_FIELDS = (*REQUEST_FIELDS, "method", "deadline", "on_disconnect")
# names that other servers use for fields of a request
_ALIASES = {"num_inference_steps": "steps", "guidance_scale": "guidance"}


class Generation(BaseModel):
    """Body of POST /v1/images/generations, in JSON."""

    model_config = ConfigDict(extra="allow", title="ImageGeneration")

    prompt: str = Field(max_length=32_000, description="What the picture shows.")
    model: str | None = Field(None, description="A model, or a model and a style: tiny, tiny/neon.")
    n: int | None = Field(1, ge=1, le=MOST_PICTURES, description="Number of pictures.")
    size: str | None = Field("auto", description="auto, or WIDTHxHEIGHT in pixels, each divisible by 8.")
    quality: str | None = Field(
        "auto", description="Steps: low 4, medium 12, high 20, xhigh 30, max 50; auto is medium."
    )
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: int | None = Field(100, ge=0, le=100, description="Quality of JPEG and WebP.")
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="b64_json, or url; left out, it is url for models called dall-e-2 and dall-e-3, as of old."
    )
    stream: bool | None = False
    partial_images: int | None = Field(0, ge=0, le=MOST_PARTIAL, description="Previews in a stream.")
    background: Literal["opaque", "auto"] | None = "auto"
    moderation: Literal["low", "auto"] | None = "auto"
    style: str | None = Field(None, description='A registered style; "vivid" and "natural" do nothing.')
    user: str | None = None
    safety_identifier: str | None = None
    stylefast: dict[str, Any] | None = Field(
        None, description="Whatever a request file takes: style, steps, guidance, seed, scheduler, loras, ..."
    )


class Edit(Generation):
    """Fields of POST /v1/images/edits, multipart/form-data.

    Its pictures are style references; with a mask or a strength, the first is what the picture begins with.
    """

    model_config = ConfigDict(extra="allow", title="ImageEdit")

    input_fidelity: Literal["low", "high"] | None = Field(None, description="Strength of the style references.")


# pictures of an edit in JSON, as base64
_ENCODED = {"type": "string", "contentEncoding": "base64", "minLength": 1}
PICTURE_IN_JSON = {
    "anyOf": [_ENCODED, {"type": "object", "required": ["b64_json"], "properties": {"b64_json": _ENCODED}}]
}
IN_JSON = {
    "anyOf": [PICTURE_IN_JSON, {"type": "array", "items": PICTURE_IN_JSON, "minItems": 1, "maxItems": MOST_UPLOADS}]
}

# of the contract, but not of this service: field -> what to say
_REFUSED = {
    "svg": "pictures are PNG, JPEG or WebP",
    "complexity": "there is no such setting here; use quality",
    "frame_count": "pictures are PNG, JPEG or WebP, without frames",
    "frame_duration_ms": "pictures are PNG, JPEG or WebP, without frames",
    "markup": "drawing on pictures is not supported; send a mask of what to change",
}


@dataclass
class Wanted:
    """Content of a request, checked as far as that is possible without the engine."""

    call: dict[str, Any]
    uploads: list[Upload]
    model: str  # echoed
    form: str
    compression: int
    quality: str
    size: str
    stream: bool
    partial_images: int
    safety_identifier: str | None = None
    deadline: float | None = None
    linked: bool = False  # whether the reply has addresses in place of pictures
    stay: bool = False  # whether to go on when the client is gone
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Served:
    """Model, styles and limits that requests are checked against."""

    model: str
    styles: Sequence[str]
    native_size: tuple[int, int]
    any_model: bool = False
    adapters: Sequence[str] = ()
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # settings that a style brings, by its name
    faults: Mapping[str, str] = field(default_factory=dict)  # of registered styles that can't be used
    controls: Sequence[str] = ()  # names of control networks

    def defaults_of(self, styles: Sequence[Any]) -> dict[str, Any]:
        """Return the settings that the named ones among styles bring; later ones count."""
        found: dict[str, Any] = {}
        for style in styles:
            if isinstance(style, str):
                found |= self.defaults.get(style, {})
        return found


def read_json(body: bytes) -> dict[str, Any]:
    """Return the object in a JSON body. Raises ApiError."""
    if sum(body.count(mark) for mark in b",[{") > MOST_MARKS:  # each becomes an object of its own
        raise ApiError(400, f"the body has more than {MOST_MARKS} commas and brackets", code="invalid_json")
    try:
        # how large it may be has been checked on its way in
        found = load_json(body.decode("utf-8"), "the body", kind=dict, largest=len(body))
        if _HALF.search(body):
            json.dumps(found, ensure_ascii=False).encode("utf-8")
        return found
    except UnicodeEncodeError:
        message = "the body contains half of a character, a lone surrogate; the text was cut inside an emoji"
        raise ApiError(400, message, code="invalid_request") from None
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8", code="invalid_json") from None
    except InvalidRequest as error:
        raise ApiError(400, str(error), code="invalid_json") from None


def from_form(pairs: Sequence[tuple[str, str]], nested: Sequence[str] = ("stylefast",)) -> dict[str, Any]:
    """Return the fields of a form as a JSON body would have them; `nested`: those that are objects.

    `stylefast[style]=neon` and repeated `stylefast[loras][]=...` are nested fields; so is an object as JSON text, which
    some clients send. Raises ApiError.
    """
    found: dict[str, Any] = {}
    for name, text in pairs:
        top, mark, rest = name.partition("[")
        path = _KEY.findall(mark + rest)
        if mark + rest != "".join(f"[{key}]" for key in path) or len(path) > _DEEPEST or (path and top not in nested):
            raise ApiError(400, f"{quoted(name)} is no field of this route", param=name[:80], code="unknown_parameter")
        if not path:
            value = _nested(top, text) if top in nested and text not in ("true", "false") else text
        else:
            value = text if path[0] in _TEXTS else _typed(text)
        if not _put(found, [top, *path], value):
            raise ApiError(400, f"{quoted(name)} contradicts another field", param=name[:80], code="invalid_request")
    return found


def _put(place: Any, path: Sequence[str], value: Any) -> bool:
    """Put a value where a form's field says; an empty last key appends to a list. Return whether there was a place."""
    for key, following in zip(path, [*path[1:], None], strict=True):
        if isinstance(place, list):
            if key or following is not None:
                return False
            place.append(value)
        elif key == "" or (following is None and key in place):
            return False
        elif following is None:
            place[key] = value
        else:
            place = place.setdefault(key, [] if following == "" else {})
            if not isinstance(place, list if following == "" else dict):
                return False
    return True


def _nested(name: str, text: str) -> Any:
    try:
        return load_json(text, name, kind=dict)
    except InvalidRequest as error:
        raise ApiError(400, str(error), param=name, code="invalid_request") from None


def _typed(text: str) -> Any:
    """Return the number, truth or null that a form's text spells, else the text."""
    if re.fullmatch(r"-?\d{1,20}(\.\d{1,20})?([eE]-?\d{1,3})?|true|false|null", text):
        return json.loads(text)
    return text


def wanted(
    body: Mapping[str, Any],
    served: Served,
    images: Sequence[Upload] = (),
    edit: bool = False,
    mask: Upload | None = None,
) -> Wanted:
    """Return what a body asks for. Raises ApiError, with the field's name, for what is refused.

    images, mask: sent along; with a mask, white where the first picture is to change, or a strength, that is what the
    result begins with, and the others are style references.
    """
    body = {name: value for name, value in body.items() if value is not None}
    for name, why in _REFUSED.items():
        if name in body:
            raise ApiError(400, f"{name}: {why}", param=name, code="unsupported_parameter")
    if body.get("background") == "transparent":
        raise ApiError(
            400,
            "background: pictures are opaque; leave it out, or give 'opaque'",
            param="background",
            code="unsupported_parameter",
        )
    fields = _validated(Edit if edit else Generation, body)
    own = _own(fields, edit)
    warnings: list[str] = []
    model, style = model_and_style(fields.model, served)
    styles: list[Any] = [] if style is None else [style]
    if fields.style in ("vivid", "natural"):
        warnings.append(f"style {quoted(fields.style)} does nothing here; name a registered style instead")
    elif fields.style is not None:
        styles.append(known_style("style", fields.style, served))
    if "style" in own:
        given = own.pop("style")
        given = given if isinstance(given, list) else [] if given is None else [given]
        styles += [known_style("stylefast.style", one, served) if isinstance(one, str) else one for one in given]
    begun: dict[str, Any] = {}
    if mask is not None:
        begun = {"image": {"upload": 0}, "mask": {"upload": len(images)}, "strength": own.pop("strength", 1.0)}
    elif "strength" in own:
        if not images:
            message = "strength says how much of a picture changes; send one to /v1/images/edits"
            raise ApiError(400, message, param="stylefast.strength", code="no_image")
        begun = {"image": {"upload": 0}, "strength": own.pop("strength")}
    references = range(1 if begun else 0, len(images))
    if references:
        styles.append(_reference(own.pop("method", None), fields, references, served))
    if "method" in own:
        raise ApiError(
            400, "stylefast.method says how pictures are used; send some", param="stylefast.method", code="no_image"
        )
    check_count("style", styles)
    uploads = [*images, *([] if mask is None else [mask])]
    if own.get("control") is not None:
        own["control"] = _controls(own["control"], uploads)
    quality, steps = _quality(fields.quality)
    size = _size(fields.size)
    n, seed = fields.n or 1, own.pop("seed", -1)
    seed = -1 if seed is None else seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ApiError(400, f"seed is {quoted(seed)}; it must be a whole number", param="seed", code="invalid_request")
    if fields.stream and n > 1:
        raise ApiError(
            400, "a stream has one picture; send n=1, or several requests", param="n", code="unsupported_parameter"
        )
    if fields.stream and fields.response_format == "url":
        raise ApiError(
            400,
            "response_format: a stream has pictures in base64; leave it out, or stream",
            param="response_format",
            code="unsupported_parameter",
        )
    if fields.partial_images and not fields.stream:
        warnings.append("partial_images does nothing without stream")
    deadline, stay = own.pop("deadline", None), own.pop("on_disconnect", "cancel")
    asked = {} if steps is None else {"steps": steps}
    defaults = _fitting(served.defaults_of(styles), own)
    if "size" in defaults:
        width, height = defaults.pop("size")
        size = size or (width, height)
    if begun and size is None:
        size = size_near(images[0], served.native_size)
    request: dict[str, Any] = {"prompt": fields.prompt, **defaults, **asked, **own, **begun, "style": styles}
    if size is not None:
        request["size"] = list(size)
    requests = [{**request, "seed": seed if seed < 0 else seed + i} for i in range(n)]
    width, height = size or served.native_size
    return Wanted(
        call={"requests": requests},
        uploads=uploads,
        model=model,
        form=fields.output_format or "png",
        compression=100 if fields.output_compression is None else fields.output_compression,
        quality=quality,
        size=f"{width}x{height}",
        stream=bool(fields.stream),
        partial_images=(fields.partial_images or 0) if fields.stream else 0,
        safety_identifier=fields.safety_identifier or fields.user,
        linked=(fields.response_format or _usual_format(fields)) == "url",
        deadline=_deadline(deadline),
        stay=_stay(stay),
        warnings=warnings,
    )


def _controls(given: Any, uploads: list[Upload]) -> list[Any]:
    """Return the control pictures of a request file, with those in base64 added to the uploads. Raises ApiError."""
    param, found = "stylefast.control", []
    many = given if isinstance(given, list) else [given]
    if len(many) > MOST_UPLOADS:
        message = f"control has {len(many)} pictures; at most {MOST_UPLOADS} are allowed"
        raise ApiError(400, message, param=param, code="invalid_request")
    for one in many:
        if not isinstance(one, dict) or "image" not in one:
            message = 'control is {"image": a picture in base64, "network": its name}, or a list of these'
            raise ApiError(400, message, param=param, code="invalid_request")
        entry = dict(one)
        for name in ("image", "reference"):
            if isinstance(entry.get(name), str) and not (name == "reference" and entry[name] in ("none", "same")):
                uploads.append(upload_in_text(entry[name], f"{param}.{name}"))
                entry[name] = {"upload": len(uploads) - 1}
        found.append(entry)
    return found


def _fitting(defaults: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that styles bring, without those for a sampler other than the request's own."""
    theirs = own.get("scheduler")
    if theirs is None or theirs == defaults.get("scheduler"):
        return defaults
    of_sampler = ("scheduler", "steps", "guidance", "guidance_rescale", "spacing")
    return {name: value for name, value in defaults.items() if name not in of_sampler}


def _validated(kind: type[Generation], body: Mapping[str, Any]) -> Any:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = ".".join(map(str, first["loc"]))
        given = "" if first["type"] == "missing" else f" (it is {quoted(first['input'])})"
        raise ApiError(
            400, f"{param}: {first['msg'].lower()}{given}", param=param or None, code="invalid_request"
        ) from None


def _own(fields: Generation, edit: bool) -> dict[str, Any]:
    """Return the fields of a request that stand beside OpenAI's or inside "stylefast", which counts."""
    beside, inside = _in_our_names(fields.model_extra or {}), _in_our_names(fields.stylefast or {})
    known = [name for name in _OWN_FIELDS if name != "style"]
    for name in beside:
        if name not in known:
            near = did_you_mean(name, [*type(fields).model_fields, *known])
            raise ApiError(
                400, f"{quoted(name)} is no field of this route{near}", param=name[:80], code="unknown_parameter"
            )
    for name in inside:
        if name not in _OWN_FIELDS:
            near = did_you_mean(name, _OWN_FIELDS)
            raise ApiError(
                400,
                f"{quoted(name)} is no field of stylefast{near}; it takes {', '.join(_OWN_FIELDS)}",
                param=f"stylefast.{name}"[:80],
                code="unknown_parameter",
            )
    # of a form, everything is text
    typed = {
        name: _typed(value) if isinstance(value, str) and name not in _TEXTS else value
        for name, value in beside.items()
    }
    return typed | inside


def _in_our_names(given: Mapping[str, Any]) -> dict[str, Any]:
    for theirs, ours in _ALIASES.items():
        if theirs in given and ours in given:
            message = f"{theirs} and {ours} mean the same; give one of them"
            raise ApiError(400, message, param=theirs, code="invalid_request")
    return {_ALIASES.get(name, name): value for name, value in given.items()}


def model_and_style(name: str | None, served: Served) -> tuple[str, str | None]:
    """Return the model that is named, and the style in its name, if any. Raises ApiError."""
    if name is None or name == served.model:
        return served.model, None
    if name.startswith((f"{served.model}/", f"{served.model}:")):
        style = name[len(served.model) + 1 :]
        if style in served.styles:
            return name, style
        if style in served.faults:
            raise _damaged("model", style, served)
    if served.any_model:
        return served.model, None
    names = [served.model, *(f"{served.model}/{style}" for style in served.styles)]
    near = _nearest(name, names)
    raise ApiError(
        404,
        f"the model {quoted(name)} does not exist; there are {', '.join(near)}",
        param="model",
        code="model_not_found",
    )


def _nearest(name: str, names: Sequence[str]) -> list[str]:
    from difflib import get_close_matches

    return (get_close_matches(name[:200], names, 5, 0.0) or list(names))[:5]


def known_style(param: str, name: str, served: Served) -> str:
    """Return the name of a registered style. Raises ApiError."""
    if name in served.faults:
        raise _damaged(param, name, served)
    if name not in served.styles:
        near = ", ".join(_nearest(name, served.styles)) or "none"
        raise ApiError(
            400,
            f"{param} is {quoted(name)}; there are {near}, and more by /v1/styles",
            param=param,
            code="style_not_found",
        )
    return name


def check_count(param: str, styles: Sequence[Any]) -> None:
    """Raise ApiError for a request with too many styles, each of which costs time with every step."""
    if len(styles) > MOST_STYLES:
        raise ApiError(
            400,
            f"the request has {len(styles)} styles; at most {MOST_STYLES} are allowed",
            param=param,
            code="invalid_request",
        )


def methods(served: Served) -> list[str]:
    """Return the names of the ways to use a picture as a style reference; the first is used unless a request says."""
    return ["instant", "aligned"] if served.adapters else ["aligned"]


def _damaged(param: str, name: str, served: Served) -> ApiError:
    message = f"the style {quoted(name)} can't be used: {served.faults[name]}"
    return ApiError(400, message, param=param, code="style_damaged")


def _reference(method: Any, fields: Any, numbers: Sequence[int], served: Served) -> dict[str, Any]:
    """Return the style whose references are the pictures sent along, all with equal weights."""
    method = method or methods(served)[0]
    uploads = [{"upload": i} for i in numbers]
    strength = FIDELITIES.get(fields.input_fidelity, PLAIN_FIDELITY)
    if method == "instant" and served.adapters:
        return {"kind": "InstantStyle", "image": uploads, "scale": strength}
    if method == "aligned":
        return {"kind": "StyleAligned", "reference": uploads if len(uploads) > 1 else uploads[0], "scale": strength}
    known = "aligned and instant" if served.adapters else "aligned, since the model has no IP-Adapter"
    raise ApiError(
        400,
        f"stylefast.method is {quoted(method)}; there are {known}",
        param="stylefast.method",
        code="invalid_request",
    )


def _usual_format(fields: Generation) -> str:
    """Return how pictures are sent if a request does not say; clients that name the old models expect addresses."""
    return "url" if (fields.model or "").startswith(_OLD_MODELS) and not fields.stream else "b64_json"


def _quality(name: str | None) -> tuple[str, int | None]:
    """Return the quality that is echoed, and its steps; None leaves them to the sampler's preset, if there is one."""
    name = "auto" if name is None else name
    shown = "medium" if name == "auto" else _OLD_QUALITIES.get(name, name)
    if shown not in QUALITIES:
        raise ApiError(
            400,
            f"quality is {quoted(name)}; there are {', '.join(QUALITIES)} and auto",
            param="quality",
            code="invalid_request",
        )
    return shown, None if name == "auto" else QUALITIES[shown]


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None or text == "auto":
        return None
    match = _SIZE.fullmatch(text)
    sides = (0, 0) if match is None else (int(match[1]), int(match[2]))
    if match is None or not all(side and side % _UNIT == 0 for side in sides):
        raise ApiError(
            400,
            f"size is {quoted(text)}; it must be auto, or WIDTHxHEIGHT with sides divisible by {_UNIT}",
            param="size",
            code="invalid_request",
        )
    return sides


def _deadline(seconds: Any) -> float | None:
    if seconds is None:
        return None
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 < seconds <= 86_400:
        raise ApiError(
            400,
            f"stylefast.deadline is {quoted(seconds)}; it must be seconds, above 0 and at most a day",
            param="stylefast.deadline",
            code="invalid_request",
        )
    return float(seconds)


def _stay(what: Any) -> bool:
    if what not in ("cancel", "continue"):
        raise ApiError(
            400,
            f"stylefast.on_disconnect is {quoted(what)}; it must be cancel or continue",
            param="stylefast.on_disconnect",
            code="invalid_request",
        )
    return what == "continue"


def content_of(entry: Any, param: str) -> Upload | str:
    """Return a picture given in JSON, or the address of one. Raises ApiError.

    A picture is base64 or a data URL, an address anything else with a colon; either may stand in an object, as
    "b64_json", "image_url" or "url".
    """
    if isinstance(entry, Mapping):
        if len(entry) != 1 or not {*entry} <= {"b64_json", "image_url", "url"}:
            raise ApiError(
                400,
                f"{param} has {quoted(sorted(map(str, entry)))}; a picture is one of b64_json, image_url and url",
                param=param,
                code="unsupported_parameter",
            )
        (kind,) = entry
        inside: Any = entry[kind]
        if kind == "image_url" and isinstance(inside, Mapping):  # as in messages of a chat
            inside = inside.get("url")
        if kind != "b64_json" and not isinstance(inside, str):
            raise ApiError(400, f"{param}.{kind} must be an address", param=param, code="invalid_image")
        if kind != "b64_json" and not inside.startswith("data:"):
            return inside
        return upload_in_text(inside, param)
    # base64 has no colon
    if isinstance(entry, str) and ":" in entry[:_LONGEST_SCHEME] and not entry.startswith("data:"):
        return entry
    return upload_in_text(entry, param)
