"""A1111's routes below /sdapi/v1, for the clients that speak them: Open WebUI, SillyTavern, LibreChat and others.

A field that would change the picture and that this service does not have is refused by its name; one with its idle
value, which clients send with every request, is accepted.
"""

import base64
import json
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request

from stylefast import values
from stylefast.serving import fields, media
from stylefast.serving.fields import Wanted
from stylefast.serving.messages import Made
from stylefast.serving.replies import ApiError
from stylefast.serving.starts import mask_of_white, stretched
from stylefast.serving.tickets import Ticket

if TYPE_CHECKING:
    from stylefast.serving.app import Service

router = APIRouter(prefix="/sdapi/v1")

MOST_PICTURES = 16
MOST_TEXT = 32_000  # characters, as in OpenAI's routes
# fields that change the picture: name -> (default, least, most), or its default alone
_NUMBERS = {
    "seed": (-1, -1, values.MAX_SEED),
    "steps": (50, 1, 1000),
    "width": (512, 16, 8192),
    "height": (512, 16, 8192),
    "batch_size": (1, 1, MOST_PICTURES),
    "n_iter": (1, 1, MOST_PICTURES),
    "clip_skip": (2, 1, 12),
    "subseed": (-1, -1, values.MAX_SEED),
}
_TEXTS = {"prompt": "", "negative_prompt": "", "sampler_name": None, "sampler_index": None, "scheduler": None}
# what a client keeps in the body for itself, a password among it
_FOR_ITSELF = ("url", "auth")
# accepted with any value, since they concern files of their server or nothing at all
_NO_MATTER = (
    "do_not_save_samples",
    "do_not_save_grid",
    "save_images",
    "send_images",
    "override_settings_restore_afterwards",
    "force_task_id",
    "comments",
    "disable_extra_networks",
    "seed_resize_from_h",
    "seed_resize_from_w",
    "hr_scale",
    "hr_upscaler",
    "hr_second_pass_steps",
    "hr_resize_x",
    "hr_resize_y",
    "hr_checkpoint_name",
    "hr_sampler_name",
    "hr_scheduler",
    "hr_prompt",
    "hr_negative_prompt",
    "firstphase_width",
    "firstphase_height",
    "denoising_strength",  # of the second pass
    "refiner_switch_at",
    "s_min_uncond",
    "s_tmin",
    "s_tmax",
    "s_noise",
    # SillyTavern's, of the second pass and of the way to the server
    "hr_additional_modules",
    "hr_cfg",
    *_FOR_ITSELF,
)
# accepted with these values alone
_IDLE = {
    "enable_hr": (False, None),
    "restore_faces": (False, None),
    "tiling": (False, None),
    "s_churn": (0, 0.0, None),
    "script_name": (None, ""),
    "script_args": ([], None),
    "refiner_checkpoint": (None, ""),
    "infotext": (None, ""),
    "distilled_cfg_scale": (None, 3.5),
}
_CHECKPOINT, _CLIP_LAYERS = "sd_model_checkpoint", "CLIP_stop_at_last_layers"
_SCRIPTS = "alwayson_scripts"
_MODULE = "ip-adapter"  # how the names of ControlNet's modules begin that take a picture's style
# of a unit of ControlNet: what is read, and what does not matter to such a module
_UNIT = ("enabled", "module", "weight", "image", "input_image", "guidance_start", "guidance_end", "control_mode")
# the extension's names for the types of a union's pictures, in the order of their numbers
_TYPES = ("openpose", "depth", "soft edge", "hard edge", "normal map", "segmentation", "tile", "inpaint")
_UNIT_REST = (
    "model",
    "resize_mode",
    "low_vram",
    "lowvram",
    "processor_res",
    "threshold_a",
    "threshold_b",
    "pixel_perfect",
    "save_detected_map",
    "hr_option",
)
_BALANCED = (0, "Balanced", None)
_STRETCHED, _CROPPED = (0, "Just Resize"), (1, "Crop and Resize", None)  # a unit's resize_mode
# blanks in front are taken from their first one on, else a long row of them would be read once for each
_STYLE_TAG = re.compile(r"(?:(?<![ \t])[ \t]+)?<style:([^<>:\n]{1,200})(?::([^<>:\n]{0,20}))?>")
MOST_STRENGTH = 2.0

_SCHEMA = {
    "type": "object",
    "properties": {
        **{
            name: {"type": ["integer", "null"], "minimum": least, "maximum": most, "default": default}
            for name, (default, least, most) in _NUMBERS.items()
        },
        **{name: {"type": ["string", "null"], "default": default} for name, default in _TEXTS.items()},
        **dict.fromkeys(("cfg_scale", "eta", "subseed_strength"), {"type": ["number", "null"]}),
        "styles": {"type": ["array", "null"], "items": {"type": "string"}},
        **dict.fromkeys(("override_settings", _SCRIPTS), {"type": ["object", "null"]}),
        **{name: {} for name in _NO_MATTER},
        **{name: {"enum": list(idle)} for name, idle in _IDLE.items()},
    },
    "additionalProperties": False,
}


# of img2img alone
_BEGUN_FIELDS = {
    "init_images": {"type": "array", "items": {"type": "string", "contentEncoding": "base64"}, "maxItems": 1},
    "mask": {"type": ["string", "null"], "contentEncoding": "base64"},
    "denoising_strength": {"type": ["number", "null"], "default": 0.75},
    "resize_mode": {"type": ["integer", "null"], "enum": [0, 1, None]},
    "inpainting_mask_invert": {"type": ["integer", "null"], "enum": [0, 1, None]},
    **dict.fromkeys(("mask_blur", "mask_blur_x", "mask_blur_y"), {"type": ["number", "null"]}),
    **dict.fromkeys(("include_init_images", "inpaint_full_res"), {"type": ["boolean", "null"]}),
    "inpaint_full_res_padding": {},
}
_BEGUN_IDLE = {
    "inpainting_fill": (0, 1, None),  # what is repainted begins with the picture, with noise at full strength
    "initial_noise_multiplier": (None, 1, 1.0),
    "latent_mask": (None,),
    "image_cfg_scale": (None, 1.5),
}
_BEGUN = (*_BEGUN_FIELDS, *_BEGUN_IDLE)
MOST_BLUR = 64.0
_BEGUN_SCHEMA = {
    **_SCHEMA,
    "properties": {
        **_SCHEMA["properties"],
        **_BEGUN_FIELDS,
        **{name: {"enum": list(idle)} for name, idle in _BEGUN_IDLE.items()},
    },
    "required": ["init_images"],
}


@router.post(
    "/txt2img",
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _SCHEMA}}}},
)
async def txt2img(request: Request) -> dict[str, Any]:
    """Draw pictures, in A1111's words."""
    from stylefast.serving.app import json_body

    body = fields.read_json(await json_body(request))
    return await _drawn(request, body, _wanted(body, request.app.state.service, request.state.owner))


@router.post(
    "/img2img",
    openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": _BEGUN_SCHEMA}}}},
)
async def img2img(request: Request) -> dict[str, Any]:
    """Draw pictures that begin with a picture, whole or within a mask, in A1111's words."""
    from stylefast.serving.app import json_body

    service = request.app.state.service
    body = fields.read_json(await json_body(request))
    given = {name: body[name] for name in _BEGUN if name in body}
    rest = {name: value for name, value in body.items() if name not in _BEGUN}
    wanted = _wanted(rest, service, request.state.owner, "img2img")
    await service.encode(partial(_begin, wanted, given))
    reply = await _drawn(request, rest, wanted)
    if given.get("include_init_images"):
        reply |= {"init_images": given["init_images"], "mask": given.get("mask")}
    return reply


async def _drawn(request: Request, body: Mapping[str, Any], wanted: Wanted) -> dict[str, Any]:
    """Return the reply with the pictures that are wanted."""
    from stylefast.serving.app import Asker, submit, while_connected

    service = request.app.state.service
    await service.check_request(request.state.owner, wanted.call["requests"], wanted.uploads)
    ticket = submit(request, service, wanted, tongue="a1111")
    with Asker(service, ticket, wanted.stay):
        made = await service.checked(ticket, wanted, await while_connected(request, wanted, ticket))
        encode = partial(media.encoded, form="png", quality=100, provenance=service.provenance)
        contents = [
            await service.encode(partial(encode, one.pixels.image(), record=one.record, parameters=one.parameters))
            for one in made
        ]
        info = _info(wanted, made)
    images = [base64.b64encode(content).decode("ascii") for content in contents]
    parameters = {name: value for name, value in body.items() if name not in _FOR_ITSELF}
    return {"images": images, "parameters": parameters, "info": json.dumps(info)}


def _begin(wanted: Wanted, given: Mapping[str, Any]) -> None:
    """Let pictures begin with another: add what the fields of img2img alone say. Raises ApiError."""
    for name, value in given.items():
        _check_idle(name, value, _BEGUN_IDLE)
    images = given.get("init_images")
    if not isinstance(images, list) or len(images) != 1:
        many = f"has {len(images)} pictures" if isinstance(images, list) else "is no list"
        message = f"init_images {many}; send one, and a request for each further one"
        raise ApiError(400, message, param="init_images", code="invalid_request")
    strength = _real("denoising_strength", given.get("denoising_strength"), 0.75)
    picture, mask = media.upload_in_text(images[0], "init_images"), None
    if given.get("mask") is not None:
        blurs = [_real(name, given.get(name), 4.0) or 0.0 for name in ("mask_blur", "mask_blur_x", "mask_blur_y")]
        blur = blurs[0] if given.get("mask_blur") is not None else max(blurs[1:])
        inverted = bool(_whole("inpainting_mask_invert", given.get("inpainting_mask_invert"), 0, 0, 1))
        mask = mask_of_white(media.upload_in_text(given["mask"], "mask"), inverted, min(max(blur, 0.0), MOST_BLUR))
        if given.get("inpaint_full_res", True):
            wanted.warnings.append("inpaint_full_res does nothing: the whole picture is drawn, at the size asked for")
    if _whole("resize_mode", given.get("resize_mode"), 0, 0, 1) == 0:
        width, height = wanted.call["requests"][0]["size"]
        if picture.width * height != picture.height * width:
            picture = stretched(picture, (width, height))
            mask = None if mask is None else stretched(mask, (width, height))
    number = len(wanted.uploads)
    begun: dict[str, Any] = {"image": {"upload": number}, "strength": strength}
    wanted.uploads.append(picture)
    if mask is not None:
        begun["mask"] = {"upload": number + 1}
        wanted.uploads.append(mask)
    for request in wanted.call["requests"]:
        request.update(begun)


@router.get("/progress")
async def progress(request: Request) -> dict[str, Any]:
    """Tell how far the caller's requests are."""
    mine = _mine(request)
    running = [ticket for ticket in mine if ticket.steps] or mine
    share, eta, step, steps = 0.0, 0.0, 0, 0
    if running:
        ticket = running[0]
        share, step, steps = ticket.shown()["progress"], ticket.step, ticket.steps
        spent = time.monotonic() - (ticket.started or time.monotonic())
        eta = spent * (1 - share) / share if share else 0.0
    state = {
        "skipped": False,
        "interrupted": False,
        "stopping_generation": False,
        "job": running[0].id if running else "",
        "job_count": len(mine),
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "job_no": 0,
        "sampling_step": step,
        "sampling_steps": steps,
    }
    return {"progress": share, "eta_relative": eta, "state": state, "current_image": None, "textinfo": None}


@router.post("/interrupt")
@router.post("/skip")
async def interrupt(request: Request) -> dict[str, Any]:
    """Cancel the caller's requests that came this way."""
    for ticket in _mine(request):
        request.app.state.service.dispatcher.cancel(ticket)
    return {}


@router.get("/options")
async def options(request: Request) -> dict[str, Any]:
    """Tell the settings that clients ask for."""
    return _options(request.app.state.service, request.state.owner)


def _options(service: "Service", owner: str) -> dict[str, Any]:
    return {
        _CHECKPOINT: service.chosen.get(owner, service.served.model),
        "sd_checkpoint_hash": service.facts["fingerprint"],
        _CLIP_LAYERS: 2,
        "sd_vae": "Automatic",
        "samples_format": "png",
        "live_previews_enable": False,
    }


@router.post("/options")
async def set_options(request: Request) -> dict[str, Any]:
    """Choose a style by the model's name, for this key's requests from now on; nothing else can be set."""
    from stylefast.serving.app import json_body

    service, owner = request.app.state.service, request.state.owner
    name, _ = _overrides(fields.read_json(await json_body(request)), service, owner, "")
    if name is not None:
        service.chosen[owner] = name
    return {}


@router.get("/samplers")
async def samplers(request: Request) -> list[dict[str, Any]]:
    """List the samplers."""
    found = request.app.state.service.facts["samplers"]
    return [{"name": theirs, "aliases": [ours], "options": {}} for theirs, ours in found.items()]


@router.get("/schedulers")
async def schedulers() -> list[dict[str, Any]]:
    """List the schedule types."""
    names = ("Automatic", "Uniform", "Karras", "Exponential", "SGM Uniform", "Normal", "Simple")
    return [{"name": name.lower().replace(" ", "_"), "label": name, "aliases": None} for name in names]


@router.get("/sd-models")
async def models(request: Request) -> list[dict[str, Any]]:
    """List the model, and each of its styles as a model of its own."""
    service = request.app.state.service
    served, digest = service.served, service.facts["fingerprint"]
    names = [served.model, *(f"{served.model}/{style}" for style in served.styles)]
    return [
        {"title": name, "model_name": name, "hash": digest[:10], "sha256": None, "filename": name, "config": None}
        for name in names
    ]


@router.get("/loras")
async def loras(request: Request) -> list[dict[str, Any]]:
    """List the LoRAs."""
    names = request.app.state.service.facts["loras"]
    return [{"name": name, "alias": name, "path": name, "metadata": {}} for name in names]


@router.get("/prompt-styles")
async def prompt_styles(request: Request) -> list[dict[str, Any]]:
    """List the registered styles, which requests name in `styles`."""
    return [{"name": name, "prompt": "", "negative_prompt": ""} for name in request.app.state.service.served.styles]


@router.get("/upscalers")
@router.get("/latent-upscale-modes")
@router.get("/sd-vae")
@router.get("/hypernetworks")
@router.get("/embeddings")
async def nothing(request: Request) -> Any:
    """Tell that there are none."""
    return {"loaded": {}, "skipped": {}} if request.url.path.endswith("embeddings") else []


def _mine(request: Request) -> list[Ticket]:
    """Return the caller's requests that came this way and are not over, the oldest first."""
    register = request.app.state.service.register
    return [one for one in register.of(request.state.owner) if one.tongue == "a1111" and not one.over]


def _wanted(body: Mapping[str, Any], service: "Service", owner: str, route: str = "txt2img") -> Wanted:
    """Return what a body asks for. Raises ApiError."""
    served = service.served
    known = (*_NUMBERS, *_TEXTS, *_NO_MATTER, *_IDLE, "eta", "cfg_scale", "subseed_strength")
    known += ("styles", "override_settings", _SCRIPTS)
    for name, value in body.items():
        if name not in known:
            near = values.did_you_mean(name, known)
            raise ApiError(
                400, f"{values.quoted(name)} is no field of {route}{near}", param=name[:80], code="unknown_parameter"
            )
        _check_idle(name, value, _IDLE)
    number = {name: _whole(name, body.get(name), *limits) for name, limits in _NUMBERS.items()}
    text = {name: _text(name, body.get(name), default) for name, default in _TEXTS.items()}
    count = number["batch_size"] * number["n_iter"]
    if count > MOST_PICTURES:
        raise ApiError(400, f"batch_size times n_iter is {count}; at most {MOST_PICTURES} are allowed", param="n_iter")
    model, clip_layers = _overrides(body.get("override_settings") or {}, service, owner, "override_settings.")
    _, style = fields.model_and_style(model or service.chosen.get(owner), served)
    styles = [style] if style else []
    given = body.get("styles") or []
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise ApiError(400, "styles must be a list of names", param="styles", code="invalid_request")
    prompt, tags = _style_tags(text["prompt"] or "")
    strengths = [1.0] * len([*styles, *given]) + [strength for _, strength in tags]
    for name in [*given, *(name for name, _ in tags)]:
        styles.append(fields.known_style("styles", name, served))
    defaults = served.defaults_of(styles)
    if "steps" in defaults and body.get("steps") is None:
        number["steps"] = defaults["steps"]
    if "size" in defaults and body.get("width") is body.get("height") is None:
        number["width"], number["height"] = defaults["size"]
    size = number["width"], number["height"]
    pictured, controls, uploads = _of_scripts(body.get(_SCRIPTS) or {}, served, size)
    styles, strengths = styles + pictured, strengths + [1.0] * len(pictured)
    fields.check_count("styles", styles)
    schedule_type = text["scheduler"]
    theirs = {ours: theirs for theirs, ours in service.facts["samplers"].items()}
    sampler = text["sampler_name"] or text["sampler_index"] or theirs.get(defaults.get("scheduler"), "Euler")
    _check_eta(_real("eta", body.get("eta"), None), sampler)
    request = {
        "prompt": prompt,
        "negative_prompt": text["negative_prompt"],
        "prompt_syntax": "a1111",
        "steps": number["steps"],
        "guidance": _real("cfg_scale", body.get("cfg_scale"), defaults.get("guidance", 7.0)),
        "size": [number["width"], number["height"]],
        "clip_skip": max((clip_layers or number["clip_skip"]) - 2, 0),
        "style": styles,
        "control": controls,
        "variation_strength": _real("subseed_strength", body.get("subseed_strength"), 0.0),
        "a1111": {
            "sampler": sampler,
            "schedule_type": schedule_type and schedule_type.replace("_", " "),
            "strengths": strengths,
        },
    }
    if request["variation_strength"]:
        request["variation_seed"] = number["subseed"]
    seed = number["seed"]
    return Wanted(
        call={"requests": [{**request, "seed": seed if seed < 0 else seed + i} for i in range(count)]},
        uploads=uploads,
        model=served.model,
        form="png",
        compression=100,
        quality="",
        size=f"{number['width']}x{number['height']}",
        stream=False,
        partial_images=0,
    )


def _check_idle(name: str, value: Any, idle: Mapping[str, Sequence[Any]]) -> None:
    """Raise ApiError for a field of what this server does not have, unless its value leaves the picture as it is."""
    if name in idle and value not in idle[name]:
        raise ApiError(
            400,
            f"{name} is {values.quoted(value)}, and this server does not have it; leave it out",
            param=name,
            code="unsupported_parameter",
        )


def _overrides(given: Any, service: "Service", owner: str, prefix: str) -> tuple[str | None, int | None]:
    """Return the model's name and the text encoders' layer, None for what is not given. Raises ApiError."""
    if not isinstance(given, dict):
        raise ApiError(400, "override_settings must be an object", param="override_settings", code="invalid_request")
    model, layers, options = None, None, _options(service, owner)
    for name, value in given.items():
        if name == _CHECKPOINT:
            model = value if isinstance(value, str) else ""
            fields.model_and_style(model, service.served)
        elif name == _CLIP_LAYERS and prefix:
            layers = _whole(prefix + name, value, 1, 1, 12)
        elif name not in options or value != options[name]:  # clients send back all that they were told
            raise ApiError(
                400,
                f"{values.quoted(name)} can't be set here; there is {_CHECKPOINT}"
                + (f" and {_CLIP_LAYERS}" if prefix else ""),
                param=f"{prefix}{name}"[:80],
                code="unsupported_parameter",
            )
    return model, layers


def _of_scripts(
    given: Any, served: fields.Served, size: tuple[int, int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[media.Upload]]:
    """Return the styles of ControlNet's units with an IP-Adapter, the controls of the others, and their pictures.

    Raises ApiError for units that can't be done.
    """
    styles: list[dict[str, Any]] = []
    controls: list[dict[str, Any]] = []
    uploads: list[media.Upload] = []
    for name, script in given.items() if isinstance(given, dict) else [("", None)]:
        units = script.get("args") if isinstance(script, dict) else None
        if not isinstance(units, list) or (units and name.lower() != "controlnet"):
            raise ApiError(
                400,
                f"{_SCRIPTS} has {values.quoted(name)}, and this server has no such script; leave it out",
                param=_SCRIPTS,
                code="unsupported_parameter",
            )
        wanted = [unit for unit in units if isinstance(unit, dict) and unit.get("enabled", True)]
        if len(wanted) > fields.MOST_UPLOADS:
            raise ApiError(
                400,
                f"controlnet has {len(wanted)} units; at most {fields.MOST_UPLOADS} are allowed",
                param=_SCRIPTS,
                code="invalid_request",
            )
        for unit in wanted:
            picture = _unit_picture(unit)
            if str(unit.get("module") or "none").lower() == "none":
                controls.append(_unit_control(unit, len(uploads), served))
                if unit.get("resize_mode") in _STRETCHED and picture.width * size[1] != picture.height * size[0]:
                    picture = stretched(picture, size)
            else:
                styles.append(_unit_style(unit, len(uploads), served))
            uploads.append(picture)
    return styles, controls, uploads


def _unit_picture(unit: Mapping[str, Any]) -> media.Upload:
    picture = unit.get("image") or unit.get("input_image")
    picture = picture.get("image") if isinstance(picture, dict) and not picture.get("mask") else picture
    return media.upload_in_text(picture, _SCRIPTS)


def _unit_control(unit: Mapping[str, Any], number: int, served: fields.Served) -> dict[str, Any]:
    """Return the control picture of a unit without a preprocessor. Raises ApiError."""
    odd = [name for name in unit if name not in (*_UNIT, *_UNIT_REST, "union_control_type")]
    if odd or unit.get("control_mode") not in _BALANCED or unit.get("resize_mode") not in (*_STRETCHED, *_CROPPED):
        what = odd[0] if odd else "control_mode" if unit.get("control_mode") not in _BALANCED else "resize_mode"
        raise ApiError(
            400,
            f"a unit of controlnet has the {values.shown(what)} {values.quoted(unit.get(what))}; balanced units that "
            "are resized or cropped are taken",
            param=_SCRIPTS,
            code="unsupported_parameter",
        )
    model = unit.get("model")
    name = re.sub(r" \[[0-9a-f]+\]$", "", model) if isinstance(model, str) else None
    if name not in served.controls:
        raise ApiError(
            400,
            f"a unit of controlnet has the model {values.quoted(model)}; there are {values.listed(served.controls)}",
            param=_SCRIPTS,
            code="model_not_found",
        )
    window = [_real(part, unit.get(part), usual) for part, usual in (("guidance_start", 0.0), ("guidance_end", 1.0))]
    return {
        "image": {"upload": number},
        "network": name,
        "weight": _real("weight", unit.get("weight"), 1.0),
        "window": window,
        "mode": _unit_type(unit.get("union_control_type")),
    }


def _unit_type(given: Any) -> int | None:
    """Return the number of the type that a unit says its picture has. Raises ApiError."""
    kind = str(given or "unknown").lower()
    if kind not in (*_TYPES, "unknown"):
        raise ApiError(
            400,
            f"a unit of controlnet has the union_control_type {values.quoted(given)}; it must be one of "
            f"{values.listed(_TYPES)}",
            param=_SCRIPTS,
            code="invalid_request",
        )
    return _TYPES.index(kind) if kind in _TYPES else None


def _unit_style(unit: Mapping[str, Any], number: int, served: fields.Served) -> dict[str, Any]:
    odd = [name for name in unit if name not in (*_UNIT, *_UNIT_REST)]
    module = unit.get("module")
    fits = isinstance(module, str) and module.lower().startswith(_MODULE) and served.adapters
    if odd or not fits or unit.get("control_mode") not in _BALANCED:
        what = odd[0] if odd else "control_mode" if fits else "module"
        raise ApiError(
            400,
            f"a unit of controlnet has the {values.shown(what)} {values.quoted(unit.get(what))}; modules that begin "
            f"with {_MODULE} are taken, with a model that has an IP-Adapter, and balanced; and the module none",
            param=_SCRIPTS,
            code="unsupported_parameter",
        )
    window = [_real(name, unit.get(name), usual) for name, usual in (("guidance_start", 0.0), ("guidance_end", 1.0))]
    return {
        "kind": "InstantStyle",
        "image": {"upload": number},
        "scale": _real("weight", unit.get("weight"), 1.0),
        "window": window,
    }


def _style_tags(prompt: str) -> tuple[str, list[tuple[str, float]]]:
    """Return a prompt without `<style:name>` and `<style:name:strength>`, and both. Raises ApiError."""
    found = []
    for name, text in _STYLE_TAG.findall(prompt):
        strength = float(text) if re.fullmatch(r"\d{0,3}\.?\d{1,6}", text) else 1.0 if not text else -1.0
        if not 0 <= strength <= MOST_STRENGTH:
            raise ApiError(
                400,
                f"<style:{values.shown(name)}> has the strength {values.quoted(text)}; it must be a number from 0 to "
                f"{MOST_STRENGTH:g}",
                param="prompt",
                code="invalid_request",
            )
        found.append((name, strength))
    return _STYLE_TAG.sub("", prompt).strip() if found else prompt, found


def _whole(name: str, value: Any, default: int, least: int, most: int) -> int:
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ApiError(
            400,
            f"{name} is {values.quoted(value)}; it must be a whole number from {least} to {most}",
            param=name,
            code="invalid_request",
        )
    return value


def _check_eta(eta: float | None, sampler: str) -> None:
    """Accept an eta that leaves the sampler as it is; clients send 1 with every request. Raises ApiError."""
    own = 0.0 if sampler == "DDIM" else 1.0
    matters = sampler == "DDIM" or sampler.endswith((" a", " a Karras")) or "SDE" in sampler
    if eta is not None and matters and eta != own:
        raise ApiError(
            400,
            f"eta is {eta:g}, and {values.quoted(sampler)} has {own:g} here; leave it out",
            param="eta",
            code="unsupported_parameter",
        )


def _real(name: str, value: Any, default: float | None) -> float | None:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ApiError(
            400, f"{name} is {values.quoted(value)}; it must be a number", param=name, code="invalid_request"
        )
    return float(value)


def _text(name: str, value: Any, default: str | None) -> str | None:
    if value is None:
        return default
    if not isinstance(value, str):
        raise ApiError(400, f"{name} is {values.quoted(value)}; it must be text", param=name, code="invalid_request")
    if len(value) > MOST_TEXT:
        raise ApiError(
            400,
            f"{name} has {len(value)} characters; at most {MOST_TEXT} are allowed",
            param=name,
            code="invalid_request",
        )
    return value


def _info(wanted: Wanted, pictures: Sequence[Made]) -> dict[str, Any]:
    """Return what clients read besides the pictures."""
    first, seeds = wanted.call["requests"][0], [made.seed for made in pictures]
    width, height = first["size"]
    return {
        "prompt": first["prompt"],
        "all_prompts": [first["prompt"]] * len(seeds),
        "negative_prompt": first["negative_prompt"],
        "all_negative_prompts": [first["negative_prompt"]] * len(seeds),
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": first.get("variation_seed", -1),
        "all_subseeds": [first.get("variation_seed", -1)] * len(seeds),
        "subseed_strength": first["variation_strength"],
        "width": width,
        "height": height,
        "sampler_name": first["a1111"]["sampler"],
        "cfg_scale": first["guidance"],
        "steps": first["steps"],
        "batch_size": len(seeds),
        "sd_model_name": wanted.model,
        "clip_skip": first["clip_skip"] + 2,
        "infotexts": [made.parameters or "" for made in pictures],
        "warnings": [*wanted.warnings, *dict.fromkeys(warning for made in pictures for warning in made.warnings)],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
    }
