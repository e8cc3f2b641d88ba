"""A1111's parameters text ("infotext"): prompt, negative prompt and settings of a picture as three pieces of text.

    a fish, <lora:watercolor:0.8>
    Negative prompt: blurry
    Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 1024x1024, Clip skip: 2

Many programs write and read it, as stable-diffusion-webui's modules/infotext_utils.py does. Whatever `read` does not
take is listed by name in `Parameters.not_taken`. Noise and numerics differ between programs, so a picture made from
such text resembles the original, but has other pixels.
"""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from stylefast import values
from stylefast.errors import InvalidRequest, PromptError
from stylefast.models.prompt_syntax import parse
from stylefast.sampling.few_step import FEW_STEP_PRESETS
from stylefast.sampling.guidance import MAX_GUIDANCE
from stylefast.sampling.schedule import KARRAS_SCHEDULERS, MAX_STEPS, SCHEDULER_NAMES
from stylefast.sampling.spacing import EXPONENTIAL, KARRAS

MAX_TEXT = 200_000  # characters
MAX_KEYS = 1000
MAX_LORAS = 100
NEGATIVE = "Negative prompt:"

_SAMPLERS = {
    "ddim": "DDIM",
    "euler": "Euler",
    "euler_ancestral": "Euler a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_3m": "DPM++ 3M",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "unipc": "UniPC",
    "lcm": "LCM",
    "tcd": "TCD",
}
_SPREADS = {f"_{KARRAS}": " Karras", f"_{EXPONENTIAL}": " Exponential"}
# A1111's schedule types -> our spacing. Uniform and Normal are k-diffusion's even timesteps from the last to the first;
# Simple and SGM Uniform begin at the last timestep and end above the first
_SPACINGS = {"Uniform": "linspace", "Normal": "linspace", "SGM Uniform": "trailing", "Simple": "trailing"}
_SPACINGS |= {"SGMUniform": "trailing", "DDIM": "leading"}
_WRITTEN_SPACINGS = {"linspace": "Uniform", "trailing": "SGM Uniform", "leading": "DDIM"}
# what A1111 takes for "Automatic" since version 1.9
_AUTOMATIC = {"dpmpp_2m": KARRAS, "dpmpp_sde": KARRAS, "dpmpp_2m_sde": EXPONENTIAL, "dpmpp_3m_sde": EXPONENTIAL}
_AUTOMATIC_NAME = "Automatic"
_OWN_SAMPLER = "Or name one yourself, e.g. --scheduler euler"
# samplers with timesteps of their own in A1111 too
_OWN_SPACING = ("lcm", "tcd", "dpmpp_sde")
# SDXL's own layer, the second to last, is A1111's 2; its encoders never use their last layer
_CLIP_SKIP, _NO_SKIP = 2, ("1", "2")
# for SDXL's second encoder; A1111 has no such field
_SECOND = {"prompt_2": "Prompt 2", "negative_prompt_2": "Negative prompt 2"}
_TAKEN = ("Steps", "Sampler", "Schedule type", "CFG scale", "Seed", "Size", "Clip skip", "Lora hashes")
_TAKEN += tuple(_SECOND.values())
_NUMBERS = {"steps": "Steps", "guidance": "CFG scale", "seed": "Seed", "size": "Size", "clip_skip": "Clip skip"}
_VARIATION = {"variation_seed": "Variation seed", "variation_strength": "Variation seed strength"}
_TAKEN += tuple(_VARIATION.values())
_NUMBERS |= _VARIATION

# EXIF's own folder, and UserComment in it, which begins with the name of its encoding
_EXIF, _COMMENT, _UNICODE = 0x8769, 0x9286, b"UNICODE\0"
_KEY = re.compile(r"\s*(\w[\w \-/]{0,99}):[ \t]*")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_WHOLE = re.compile(r"\+?\d{1,20}")
_REAL = re.compile(r"[+-]?(?:\d{1,20}(?:\.\d{0,30})?|\.\d{1,30})(?:[eE][+-]?\d{1,4})?")
_SIZE = re.compile(r"(\d{1,6})\s*[xX×]\s*(\d{1,6})")
_TAG = re.compile(r"<(lora|lyco|hypernet)\s*:([^<>\n]{0,2000})>", re.IGNORECASE)
# a tag takes the blanks before it along; from their first one on, else a long row would be read once for each
_TAG_AND_BLANKS = re.compile(rf"(?:(?<![ \t])[ \t]+)?{_TAG.pattern}", re.IGNORECASE)
# what makes keywords and tags, up to the place for a backslash
_MEANING = re.compile(r"\bA(?=ND\b)|\bBR(?=EAK\b)|(?i:<\s*[lh](?=(?:ora|yco|bw|ypernet)\s*:))")
_BRACKETS = re.compile(r"[()\[\]\\]")


@dataclass(frozen=True)
class LoraTag:
    """A LoRA of a prompt, `<lora:name:weight>` or `<lora:name:text weight:weight>`.

    `text_weight`: that of the text encoders, None if it is `weight` too. `hash`: the first digits of A1111's hash of
    its file, "" if unknown.
    """

    name: str
    weight: float = 1.0
    hash: str = ""
    text_weight: float | None = None

    @property
    def strengths(self) -> float | tuple[float, float]:
        """Return the weights as a request takes them."""
        return self.weight if self.text_weight is None else (self.weight, self.text_weight)


@dataclass(frozen=True)
class Parameters:
    """Settings of a parameters text; None for what the text does not say.

    Attributes:
        prompt, negative_prompt: in A1111's syntax, without the tags of LoRAs.
        prompt_2, negative_prompt_2: those for text encoder 2, which stylefast alone writes.
        steps, guidance, seed, size, variation_seed, variation_strength: as in `Request`.
        scheduler, spacing: A1111's sampler and schedule type under our names.
        clip_skip: as `Request` counts it; of stylefast's own text, since A1111 skips no layers of SDXL's encoders.
        loras: from the prompt's tags, in order.
        not_taken: name -> value of everything else in the text.
    """

    prompt: str
    negative_prompt: str = ""
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    steps: int | None = None
    scheduler: str | None = None
    spacing: str | None = None
    guidance: float | None = None
    seed: int | None = None
    size: tuple[int, int] | None = None
    clip_skip: int | None = None
    variation_seed: int | None = None
    variation_strength: float | None = None
    loras: tuple[LoraTag, ...] = ()
    not_taken: Mapping[str, str] = field(default_factory=dict)


def read(text: str, without: Collection[str] = ()) -> Parameters:
    """Return the settings of a parameters text from an untrusted source.

    without: names of settings, as in `Parameters`, that are not wanted: they are neither read nor checked. The prompt's
    LoRAs belong to it.

    Raises PromptError for a prompt that is missing or too long, and InvalidRequest, with the name of the setting, for
    other text that is too long, numbers out of range, unknown samplers and schedule types, and settings or LoRAs that
    are there twice.
    """
    text = values.text("the parameters text", text, longest=MAX_TEXT).replace("\r\n", "\n").replace("\r", "\n")
    prompt, negative, line, rest = _parts(text)
    settings = _settings(line)
    hashes = _hashes(settings.get("Lora hashes", ""))
    not_taken = {key: value for key, value in settings.items() if key not in _TAKEN}
    if rest:
        not_taken["the text after the settings"] = rest
    if "prompt" in without:
        prompt, hashes = "", {}
    if "negative_prompt" in without:
        negative = ""
    prompt, loras, other = _without_tags(prompt, hashes)
    not_taken |= other
    negative, unused, other = _without_tags(negative, {})
    not_taken |= {f"{name} in the negative prompt": value for name, value in other.items()}
    # A1111 reads them in the prompt alone
    not_taken |= {f"<lora:{lora.name}> in the negative prompt": f"{lora.weight:g}" for lora in unused}
    known = {lora.name for lora in loras}
    not_taken |= {f"Lora hashes of {name}": value for name, value in hashes.items() if name not in known}
    prompt = values.prompt("the prompt of the parameters text", prompt)
    if not prompt.strip() and "prompt" not in without:
        raise PromptError("the parameters text has no prompt; say what the picture shows")
    titles = {title: name for name, title in (*_NUMBERS.items(), *_SECOND.items()) if name in without}
    settings = {title: value for title, value in settings.items() if title not in titles}
    scheduler, spacing = (None, None) if "scheduler" in without else _scheduler(settings)
    clip_skip = _clip_skip(settings) if _is_ours(settings) or settings.get("Clip skip") in _NO_SKIP else None
    if clip_skip is None and "Clip skip" in settings:
        not_taken["Clip skip"] = settings["Clip skip"]
    alone = _VARIATION["variation_seed"] if _VARIATION["variation_strength"] not in settings else None
    if alone in settings:  # which varies nothing
        not_taken[alone] = settings.pop(alone)
    if "Schedule type" in settings and scheduler in (*_OWN_SPACING, *FEW_STEP_PRESETS):
        not_taken["Schedule type"] = settings["Schedule type"]
    return Parameters(
        prompt=prompt,
        negative_prompt=values.prompt("the negative prompt of the parameters text", negative),
        **{name: values.prompt(title, settings[title]) for name, title in _SECOND.items() if title in settings},
        steps=_whole(settings, "Steps", 1, MAX_STEPS),
        scheduler=scheduler,
        spacing=spacing,
        guidance=_real(settings, "CFG scale", 0, MAX_GUIDANCE),
        seed=_whole(settings, "Seed", 0, values.MAX_SEED),
        size=_size(settings),
        clip_skip=clip_skip,
        variation_seed=_whole(settings, _VARIATION["variation_seed"], 0, values.MAX_SEED),
        variation_strength=_real(settings, _VARIATION["variation_strength"], 0, 1),
        loras=loras,
        not_taken=not_taken,
    )


def write(metadata: Mapping[str, Any]) -> str:
    """Return the parameters text of a picture's metadata (`record.metadata`, with its size as "size").

    LoRAs become tags behind the prompt, with the hashes by which A1111 finds their files, which are read once for this;
    a file that has gone or changed since gets none. A prompt in plain syntax has its brackets escaped, so that A1111
    reads them as they are, and one in compel's has its weights in A1111's brackets. What A1111 has no words for, styles
    above all, is in our own record alone; so is where a prompt ends that has a line of its own beginning with
    "Negative prompt:".
    """
    request = metadata["call"]["requests"][metadata["index"]]
    tags, others, hashes = [], [], {}
    own, merged = request.get("loras") or {}, metadata.get("loras") or {}
    for name, scale in [*own.items(), *merged.items()]:
        unet, text = scale if isinstance(scale, (list, tuple)) else (scale, scale)
        weights = f"{unet:g}" if unet == text else f"{text:g}:{unet:g}"
        in_a_tag = name.isprintable() and name == name.strip() and not {*"<>:"} & {*name}
        # a tag names a LoRA once
        fits = in_a_tag and not (name in own and scale is merged.get(name))
        (tags if fits else others).append(f"<lora:{name}:{weights}>" if fits else f"{name}: {weights}")
        file = metadata.get("lora_files", {}).get(name) if name in own else None
        if fits and file and "," not in name:
            hashes[name] = _lora_hash(file["path"], file["sha256"])
    syntax = request.get("prompt_syntax", "plain")
    settings = {
        "Steps": request["steps"],
        "Sampler": sampler_name(request["scheduler"]),
        "Schedule type": _schedule_type(request),
        "CFG scale": request["guidance"],
        "Seed": request["seed"],
        "Size": "x".join(map(str, metadata["size"])),
        **{title: _in_a1111(request[name], syntax) for name, title in _SECOND.items() if request.get(name) is not None},
        "Model hash": metadata["fingerprint"][:10],
        "Model": metadata["model"],
        "Clip skip": request["clip_skip"] + _CLIP_SKIP if request.get("clip_skip") else None,
        **{title: request[name] for name, title in _VARIATION.items() if request.get("variation_strength")},
        "Denoising strength": request["strength"] if request.get("image") else None,
        **{f"ControlNet {i}": _control_words(control) for i, control in enumerate(request.get("control") or ())},
        "Lora hashes": ", ".join(f"{name}: {found}" for name, found in hashes.items() if found) or None,
        "Loras": ", ".join(others) or None,
        "Version": f"stylefast {metadata['stylefast']}",
    }
    prompt, negative = (_in_a1111(request[name], syntax) for name in ("prompt", "negative_prompt"))
    lines = [" ".join([prompt, *tags])]
    if negative:
        lines.append(f"{NEGATIVE} {negative}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None))
    return "\n".join(lines)


def _control_words(control: Mapping[str, Any]) -> str:
    """Return a control picture's settings in the words of A1111's ControlNet extension, which had no preprocessor."""
    start, end = control.get("window", (0, 1))
    words = {
        "Module": "none",
        "Model": control.get("network"),
        "Weight": f"{control.get('weight', 1):g}",
        "Resize Mode": "Crop and Resize",
        "Guidance Start": f"{start:g}",
        "Guidance End": f"{end:g}",
        "Control Mode": "ControlNet is more important" if control.get("guess_mode") else "Balanced",
        "Control Type": control.get("mode"),
    }
    return ", ".join(f"{name}: {value}" for name, value in words.items() if value is not None)


def sampler_name(scheduler: str) -> str:
    """Return a scheduler's name in the A1111 form; for a few-step preset, the name of its sampler."""
    name = FEW_STEP_PRESETS[scheduler].scheduler if scheduler in FEW_STEP_PRESETS else scheduler
    ending = next((ending for ending in _SPREADS if name.endswith(ending)), "")
    base = name.removesuffix(ending)
    return _SAMPLERS.get(base, base) + _SPREADS.get(ending, "")


def scheduler_of(sampler: str, kind: str | None = None) -> tuple[str | None, str | None]:
    """Return our names of A1111's sampler and schedule type: scheduler and spacing; None leaves it to the model.

    Raises InvalidRequest for names that are unknown.
    """
    return _scheduler({"Sampler": sampler} if kind is None else {"Sampler": sampler, "Schedule type": kind})


def take_tags(prompt: str) -> tuple[str, dict[str, tuple[float, float]]]:
    """Return a prompt without its `<lora:name:weight>` tags, and the LoRAs' strengths by name.

    Raises InvalidRequest for damaged tags, and for those of hypernetworks.
    """
    text, loras, other = _without_tags(prompt, {})
    if other:
        raise InvalidRequest(f"hypernetworks are not supported; remove {values.quoted(next(iter(other)))}")
    both = {lora.name: (lora.weight, lora.weight if lora.text_weight is None else lora.text_weight) for lora in loras}
    return text, both


def text_of(picture: Any) -> str | None:
    """Return the parameters text inside an opened PIL picture, None if it has none.

    It is PNG's text "parameters", or the EXIF comment of JPEG, WebP and others. Raises InvalidRequest for damaged EXIF.
    """
    text = picture.info.get("parameters")
    if isinstance(text, str):
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, on entries that it skips
            comment = picture.getexif().get_ifd(_EXIF).get(_COMMENT)
    except Exception as error:  # Pillow raises errors of many types for damaged EXIF
        raise InvalidRequest(f"the picture's EXIF data is damaged ({values.quoted(str(error))})") from error
    if isinstance(comment, str):
        return comment
    return _comment_text(bytes(comment)) if isinstance(comment, (bytes, tuple)) and comment else None


def exif_comment(text: str) -> bytes:
    """Return a text as the value of EXIF's UserComment, in UTF-16 as A1111 writes it."""
    return _UNICODE + text.encode("utf-16-be", "replace")


def exif_of(text: str) -> bytes:
    """Return EXIF data with a text as its comment, for Pillow's `save(exif=)`."""
    from PIL import Image

    exif = Image.Exif()
    exif.get_ifd(_EXIF)[_COMMENT] = exif_comment(text)
    return exif.tobytes()


# reading


def _comment_text(comment: bytes) -> str | None:
    kind, content = comment[:8], comment[8:]
    if kind == _UNICODE:
        if content[:2] in (b"\xfe\xff", b"\xff\xfe"):
            return content.decode("utf-16", "replace")
        # EXIF takes the byte order from its file, A1111 always writes big-endian: ask the zeros of the Latin letters
        little = content[1::2].count(0) > content[::2].count(0)
        return content.decode("utf-16-le" if little else "utf-16-be", "replace")
    if kind in (b"ASCII\0\0\0", bytes(8)):
        return content.decode("utf-8", "replace").rstrip("\0")
    # without the eight bytes that name its encoding, though EXIF demands them
    return comment.decode("utf-8", "replace").rstrip("\0") if comment.isascii() else None


def _parts(text: str) -> tuple[str, str, str, str]:
    """Split a text into prompt, negative prompt, line of settings, and what follows it."""
    lines = [line.strip() for line in text.strip().split("\n")]
    # the last one, since a prompt may have such a line too; some tools write more behind it
    last = next((i for i in range(len(lines) - 1, -1, -1) if re.match(r"Steps:\s*\d", lines[i])), None)
    if last is None and _looks_like_settings(lines[-1]):
        last = len(lines) - 1
    before, settings, rest = (lines, "", "") if last is None else (lines[:last], lines[last], lines[last + 1 :])
    start = next((i for i, line in enumerate(before) if line.startswith(NEGATIVE)), len(before))
    negative = [line.removeprefix(NEGATIVE).strip() for line in before[start:]]
    return "\n".join(before[:start]).strip(), "\n".join(negative).strip(), settings, "\n".join(rest).strip()


def _looks_like_settings(line: str) -> bool:
    # A1111's own rule is three pairs of name and value
    pairs = sum(_KEY.match(piece) is not None for piece in line.split(",")[:MAX_KEYS])
    return pairs >= 3 and any(f"{key}:" in line for key in _TAKEN)


def _settings(line: str) -> dict[str, str]:
    """Return name -> value of `Name: value, Name: "quoted, value", Name: [json]`. Raises InvalidRequest."""
    found: dict[str, list[str]] = {}
    place, name = 0, "text without a name"
    while place < len(line):
        match = _KEY.match(line, place)
        if match is None:
            # a comma inside the value before it
            end = _comma(line, place)
            if piece := line[place:end].strip():
                found.setdefault(name, []).append(piece)
        else:
            name, (value, end) = match[1].strip(), _value(line, match.end())
            if name in found and name in _TAKEN:
                raise InvalidRequest(
                    f"the parameters text says {name} twice, {values.quoted(', '.join(found[name]))} and "
                    f"{values.quoted(value)}; keep one"
                )
            found.setdefault(name, []).append(value)
            if len(found) > MAX_KEYS:
                raise InvalidRequest(f"the parameters text has more than {MAX_KEYS} settings; cut it down")
        place = end + 1
    return {name: ", ".join(pieces) for name, pieces in found.items()}


def _value(line: str, start: int) -> tuple[str, int]:
    """Return the value that begins at `start`, and the place of the comma behind it."""
    if match := _QUOTED.match(line, start):
        end = _comma(line, match.end())
        if not line[match.end() : end].strip():
            try:
                return str(json.loads(match[0])).encode("utf-8", "replace").decode(), end
            except ValueError:  # not as JSON quotes
                return match[0], end
    elif line[start : start + 1] in ("[", "{"):
        try:
            _, end = json.JSONDecoder().raw_decode(line, start)
            return line[start:end], _comma(line, end)
        except (ValueError, RecursionError):
            pass
    end = _comma(line, start)
    return line[start:end].strip(), end


def _comma(line: str, start: int) -> int:
    end = line.find(",", start)
    return len(line) if end < 0 else end


def _without_tags(prompt: str, hashes: Mapping[str, str]) -> tuple[str, tuple[LoraTag, ...], dict[str, str]]:
    """Return a prompt without its tags, the LoRAs, and tags of other kinds with their text. Raises InvalidRequest."""
    loras: dict[str, LoraTag] = {}
    other: dict[str, str] = {}
    for match in _TAG.finditer(prompt):
        name, *arguments = [piece.strip() for piece in match[2].split(":")]
        if match[1].lower() == "hypernet":
            other[f"<hypernet:{name}>"] = ":".join(arguments)
            continue
        if not name or name in loras:
            raise InvalidRequest(
                f"the prompt has the LoRA {values.quoted(name)} twice, or without a name, as "
                f"{values.quoted(match[0])}; name each LoRA once, in a prompt of your own: --from PICTURE "
                '"a fish" --lora FILE:0.8'
            )
        unet, text = _weights(match[0], name, arguments)
        loras[name] = LoraTag(name, unet, hashes.get(name, ""), None if text == unet else text)
        if len(loras) > MAX_LORAS:
            raise InvalidRequest(f"the prompt has more than {MAX_LORAS} LoRAs; use fewer")
    text = _TAG_AND_BLANKS.sub("", prompt)
    return (text if text == prompt else text.strip(" \t")), tuple(loras.values()), other


def _weights(tag: str, name: str, arguments: Iterable[str]) -> tuple[float, float]:
    """Return a tag's weights for the UNet and for the text encoders.

    Its arguments are the text encoders' weight, by default 1, and the UNet's, by default the same; or te= and unet=.
    """
    numbers: dict[str, float] = {}
    places = iter(("te", "unet"))
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.strip() if equals else next(places, "")
        if key not in ("te", "unet") or key in numbers:
            raise InvalidRequest(
                f"{values.quoted(tag)} sets more than the LoRA's weight ({values.quoted(argument)}); write "
                f"{values.quoted(f'<lora:{name}:1>')}, or give a prompt of your own in place of a picture's"
            )
        numbers[key] = _number(f"the weight in {values.quoted(tag)}", value if equals else argument)
    text = numbers.get("te", 1.0)
    what, limits = f"the weight in {values.quoted(tag)}", (-values.MAX_STRENGTH, values.MAX_STRENGTH)
    return values.real_number(what, numbers.get("unet", text), *limits), values.real_number(what, text, *limits)


def _hashes(text: str) -> dict[str, str]:
    pairs = (piece.rpartition(":") for piece in text.split(",") if piece.strip())
    return {name.strip(): value.strip() for name, _, value in pairs if name.strip()}


def _scheduler(settings: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Return our names of the sampler and of its spacing. Raises InvalidRequest for names that are unknown."""
    kind = settings.get("Schedule type")
    if "Sampler" not in settings:
        if kind is not None:
            raise InvalidRequest(f"the parameters text has the schedule type {values.quoted(kind)} without a sampler")
        return None, None
    base, spread = _sampler(settings["Sampler"])
    if base in FEW_STEP_PRESETS and base not in _SAMPLERS:
        return base, None
    spacing = None
    types = {name.casefold(): name for name in (_AUTOMATIC_NAME, "Karras", "Exponential", *_SPACINGS)}
    if kind is None:
        # A1111 leaves the type out where it is uniform, and our own text where it is the model's
        own = base == "ddim" or _is_ours(settings)
        spacing = None if own else "linspace"
    elif kind.casefold() not in types:
        raise InvalidRequest(
            f"Schedule type is {values.quoted(kind)}; the supported ones are {', '.join(types.values())}"
            f"{values.did_you_mean(kind, types.values())}. {_OWN_SAMPLER}"
        )
    else:
        named = types[kind.casefold()]
        asked = _AUTOMATIC.get(base) if named == _AUTOMATIC_NAME else named.lower() if named not in _SPACINGS else None
        if spread is not None and asked != spread and named != _AUTOMATIC_NAME:
            raise InvalidRequest(
                f"Schedule type {values.quoted(kind)} contradicts the sampler {values.quoted(settings['Sampler'])}; "
                f"drop one of the two. {_OWN_SAMPLER}"
            )
        spread = spread or asked
        spacing = _SPACINGS.get(named, None if base == "ddim" else "linspace")
    if spread is not None and base not in KARRAS_SCHEDULERS:
        raise InvalidRequest(
            f"{sampler_name(base)} has no {spread.capitalize()} form; samplers that have one: "
            f"{', '.join(map(sampler_name, KARRAS_SCHEDULERS))}. {_OWN_SAMPLER}"
        )
    return (base if spread is None else f"{base}_{spread}"), (None if base in _OWN_SPACING else spacing)


def _sampler(name: str) -> tuple[str, str | None]:
    """Return our name of a sampler, and "karras" or "exponential" if its name ends so. Raises InvalidRequest."""
    wanted = " ".join(name.split()).casefold()
    known: dict[str, tuple[str, str | None]] = {theirs.casefold(): (ours, None) for ours, theirs in _SAMPLERS.items()}
    for ours in KARRAS_SCHEDULERS:
        for ending, shown in _SPREADS.items():
            known[f"{_SAMPLERS[ours]}{shown}".casefold()] = ours, ending[1:]
    for ours in (*SCHEDULER_NAMES, *FEW_STEP_PRESETS):
        ending = next((ending for ending in _SPREADS if ours.endswith(ending)), "")
        known[ours] = ours.removesuffix(ending), ending[1:] or None
    if wanted not in known:
        raise InvalidRequest(
            f"Sampler is {values.quoted(name)}; the supported ones are {', '.join(_SAMPLERS.values())}, most of them "
            f"with Karras or Exponential too{values.did_you_mean(name, _SAMPLERS.values())}. {_OWN_SAMPLER}"
        )
    return known[wanted]


def _number(name: str, text: str) -> float:
    if not _REAL.fullmatch(text.strip()) or not math.isfinite(float(text)):
        raise InvalidRequest(f"{name} is {values.quoted(text)}; it must be a number")
    return float(text)


def _real(settings: Mapping[str, str], name: str, low: float, high: float) -> float | None:
    return None if name not in settings else values.real_number(name, _number(name, settings[name]), low, high)


def _whole(settings: Mapping[str, str], name: str, low: int, high: int) -> int | None:
    if name not in settings:
        return None
    text = settings[name]
    return values.whole_number(name, int(text) if _WHOLE.fullmatch(text) else text, low, high)


def _size(settings: Mapping[str, str]) -> tuple[int, int] | None:
    if "Size" not in settings:
        return None
    match = _SIZE.fullmatch(settings["Size"])
    if match is None:
        raise InvalidRequest(f"Size is {values.quoted(settings['Size'])}; it must be WIDTHxHEIGHT in pixels")
    return int(match[1]), int(match[2])


def _is_ours(settings: Mapping[str, str]) -> bool:
    """Return whether stylefast wrote the settings."""
    return settings.get("Version", "").startswith("stylefast")


def _clip_skip(settings: Mapping[str, str]) -> int | None:
    found = _whole(settings, "Clip skip", 1, 99)
    return None if found is None else max(found - _CLIP_SKIP, 0)


# writing


@lru_cache(maxsize=256)
def _lora_hash(path: str, digest: str) -> str:
    """Return A1111's short hash of a LoRA: 12 digits of the SHA-256 of what follows the file's header.

    It is "" if the file at `path` can't be read, or does not have that SHA-256.
    """
    whole, tensors = hashlib.sha256(), hashlib.sha256()
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            whole.update(start + file.read(int.from_bytes(start, "little")))
            while block := file.read(1 << 20):
                whole.update(block)
                tensors.update(block)
    except (OSError, OverflowError, MemoryError):
        return ""
    return tensors.hexdigest()[:12] if whole.hexdigest() == digest else ""


def _schedule_type(request: Mapping[str, Any]) -> str | None:
    """Return A1111's name for the spacing; None beside noise levels that A1111 names in its place."""
    scheduler = request["scheduler"]
    if scheduler.endswith(tuple(_SPREADS)):
        return None
    return _WRITTEN_SPACINGS.get(request.get("spacing") or _preset_spacing(scheduler) or "")


def _preset_spacing(scheduler: str) -> str | None:
    preset = FEW_STEP_PRESETS.get(scheduler)
    return None if preset is None or preset.scheduler in _OWN_SPACING else preset.spacing


def _in_a1111(text: str, syntax: str) -> str:
    if syntax == "a1111":
        return text
    [runs] = parse(text, syntax)
    parts = [(_literal(run.text), run.weight) for run in runs]
    # compel's runs are words without the spaces between them
    return " ".join(part if weight == 1 else f"({part}:{_decimal(weight)})" for part, weight in parts)


def _decimal(number: float) -> str:
    """Return a number without an exponent, which A1111's weights don't know."""
    return f"{number:.9f}".rstrip("0").rstrip(".")


def _literal(text: str) -> str:
    """Return a text in A1111's syntax that is read as the text itself; a backslash before a letter disappears there."""
    text = _BRACKETS.sub(lambda match: f"\\{match[0]}", text)
    return _MEANING.sub(lambda match: f"{match[0]}\\", text)


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n\r"]|^[\[{]', text) else text
