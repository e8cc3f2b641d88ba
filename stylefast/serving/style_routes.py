"""Routes of registered styles: list, create, bake, delete."""

import asyncio
import contextlib
import errno
import re
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from stylefast import values
from stylefast.errors import InvalidRequest, StyleError
from stylefast.serving import fields, media
from stylefast.serving.messages import BakeStyle, LoadStyle, Progress
from stylefast.serving.registry import Draft, ReadOnlyStyles, Registered, StyleExists, StyleRegistry, UnknownStyle, now
from stylefast.serving.replies import ApiError
from stylefast.serving.style_archive import described
from stylefast.serving.style_files import DEFAULTS, MOST_TEXT, Manifest, safe_name
from stylefast.values import quoted

if TYPE_CHECKING:
    from stylefast.serving.app import Service

router = APIRouter(prefix="/v1/styles")

MOST_BAKES = 8  # that wait or run
_CANCEL_SECONDS = 0.1  # between two tries to cancel one
STORAGE = {"store": ("kv", "hidden", "latents"), "dtype": ("auto", "fp32", "fp16", "bf16", "fp8")}
BAKE_SETTINGS = (*(name for name in DEFAULTS if name != "guidance_interval"), *STORAGE)
_NESTED = ("options", "defaults", "bake")
_FIELDS = ("name", "method", "prompt", "licence", "license", "description", *_NESTED)
_KINDS = {"instant": ("InstantStyle", "image"), "aligned": ("StyleAligned", "reference")}
_SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}


@dataclass(eq=False)
class Bake:
    """The latest bake of a style."""

    id: str
    status: str = "queued"
    step: int = 0
    steps: int = 0
    error: ApiError | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    task: "asyncio.Task[None] | None" = None
    accepted: asyncio.Event = field(default_factory=asyncio.Event)  # its settings fit, or it is over

    @property
    def over(self) -> bool:
        """Return whether it has ended."""
        return self.status not in ("queued", "in_progress")

    def report(self, progress: Progress) -> None:
        """Note steps done."""
        self.step, self.steps = progress.step, progress.steps
        self.status = "in_progress" if progress.step else "queued"
        self.accepted.set()

    def shown(self) -> dict[str, Any]:
        """Return what clients see."""
        return {
            "id": self.id,
            "status": self.status,
            "step": self.step,
            "steps": self.steps,
            "progress": 1.0 if self.status == "completed" else self.step / self.steps if self.steps else 0.0,
            "created": self.created,
            "error": None if self.error is None else self.error.body()["error"],
        }


@router.get("")
async def styles(request: Request) -> dict[str, Any]:
    """List the styles that come with the model and those that are registered, damaged ones with their fault."""
    service = request.app.state.service
    ours = service.facts["styles"]
    found = service.registered()
    shown = [_shown_of_model(service, name) for name in ours]
    return {"object": "list", "data": shown + [_shown(service, one) for one in found.values() if one.name not in ours]}


@router.get("/{name}")
async def style(request: Request, name: str) -> dict[str, Any]:
    """Describe a style, and how far its bake is."""
    service = request.app.state.service
    if name in service.facts["styles"]:
        return _shown_of_model(service, name)
    return _shown(service, _found(service, name))


_BODY = {
    "type": "object",
    "required": ["name"],
    "properties": {
        **{name: {"type": "string"} for name in ("name", "prompt", "licence", "description")},
        "method": {"enum": list(_KINDS)},
        "image": {"type": "array", "items": {"type": "string", "format": "binary"}, "maxItems": fields.MOST_UPLOADS},
        **{name: {"type": "object"} for name in _NESTED},
    },
}


@router.post(
    "",
    status_code=201,
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _BODY}}}},
)
async def create(request: Request) -> JSONResponse:
    """Register a style made of pictures, or of a prompt. Needs an admin key."""
    from stylefast.serving import app

    service, registry = _writable(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        body, files = await app.read_form(request, _NESTED)
    else:
        body, files = await app.images_in_json(service, fields.read_json(await app.json_body(request)))
    images = files["image"]
    wanted = _wanted(body, images, service)
    await service.check_request(request.state.owner, [{"prompt": body.get("prompt") or ""}], images)
    with _in_words():
        await asyncio.to_thread(registry.check_free, wanted.name)
        async with _draft(registry) as draft:
            for file, picture in zip(wanted.files, images, strict=True):
                await asyncio.to_thread(draft.add, file, picture.content)
            manifest = await asyncio.to_thread(draft.write_manifest, wanted.manifest)
            # the engine knows what a style of this kind may have, and whether it fits the model
            await service.dispatcher.errand(LoadStyle(_number("style"), wanted.name, str(draft.path)))
            found = await asyncio.to_thread(draft.publish, wanted.name, manifest)
    service.bakes.pop(found.name, None)
    if wanted.bake is not None:
        try:
            await _started(service, registry, found, wanted.bake)
        except ApiError:
            # what was asked for can't be had, so nothing is left of it
            await asyncio.to_thread(registry.remove, found.name)
            service.bakes.pop(found.name, None)
            raise
    return JSONResponse(_shown(service, found), 201, {"location": f"/v1/styles/{found.name}"})


@router.post("/{name}/bake", status_code=202)
async def bake(request: Request, name: str) -> JSONResponse:
    """Bake a style beside the pictures on their way; GET shows how far it is. Needs an admin key."""
    from stylefast.serving.app import json_body

    service, registry = _writable(request)
    content = await request.body()
    settings = _bake_settings(fields.read_json(await json_body(request)) if content else {}, service)
    found = _found(service, name, "baked")
    with _in_words():
        found.usable()
        await _started(service, registry, found, settings)
    return JSONResponse(_shown(service, found), 202)


@router.delete("/{name}")
async def delete(request: Request, name: str) -> dict[str, Any]:
    """Delete a style, and end its bake; requests that have it keep it. Needs an admin key."""
    service, registry = _writable(request)
    found = _found(service, name, "deleted")
    running = service.bakes.get(name)
    while running is not None and running.task is not None and not running.task.done():
        service.dispatcher.send_cancel(running.id)  # the engine may not have it yet
        await asyncio.wait([running.task], timeout=_CANCEL_SECONDS)
    if found.fault is None and name in service.dispatcher.named_styles():
        # those that still wait have it too; if it can't be read, they would not have got it anyway
        with contextlib.suppress(ApiError):
            await service.dispatcher.errand(LoadStyle(_number("style"), name))
    with _in_words():
        await asyncio.to_thread(registry.remove, name)
    service.bakes.pop(name, None)
    return {"id": name, "object": "style.deleted", "deleted": True}


async def end_bakes(service: "Service") -> None:
    """End all bakes, before the engine's process ends."""
    tasks = [one.task for one in service.bakes.values() if one.task is not None and not one.task.done()]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)


# what is asked for


@dataclass
class _Wanted:
    name: str
    files: list[str]
    manifest: Manifest
    bake: dict[str, Any] | None


def _wanted(body: Mapping[str, Any], images: Sequence[media.Upload], service: "Service") -> _Wanted:
    """Return what a body asks for. Raises ApiError."""
    body = {name: value for name, value in body.items() if value is not None}
    for name in body:
        if name not in _FIELDS:
            near = values.did_you_mean(name, _FIELDS)
            raise ApiError(
                400, f"{quoted(name)} is no field of this route{near}", param=name[:80], code="unknown_parameter"
            )
    try:
        name = safe_name(body.get("name"))
    except StyleError as error:
        raise ApiError(400, str(error), param="name", code="invalid_style_name") from None
    bake = _wanted_bake(body.get("bake"), service)
    # only the reference of an aligned style can be baked
    instant = images and service.facts["adapters"] and bake is None and not body.get("prompt")
    method = body.get("method", "instant" if instant else "aligned")
    if not isinstance(method, str) or method not in _KINDS:
        raise ApiError(
            400,
            f"method is {quoted(method)}; there are {' and '.join(_KINDS)}",
            param="method",
            code="invalid_request",
        )
    kind, pictures = _KINDS[method]
    prompt = _text("prompt", body.get("prompt"))
    if not images and (method == "instant" or not prompt):
        way = "send one picture or several" + ("" if method == "instant" else ", or a prompt")
        raise ApiError(400, f"image is missing; {way}", param="image", code="missing_image")
    if prompt and method == "instant":
        raise ApiError(400, "prompt: only aligned takes one", param="prompt", code="unsupported_parameter")
    entry: dict[str, Any] = {"kind": kind}
    numbers = [""] if len(images) == 1 else [f"-{i}" for i in range(1, len(images) + 1)]
    files = [f"reference{n}{_SUFFIXES[image.kind]}" for n, image in zip(numbers, images, strict=True)]
    if files:
        entry[pictures] = files if len(files) > 1 or method == "instant" else files[0]
    if prompt:
        entry["prompt"] = prompt
    for option, value in _object("options", body.get("options", {})).items():
        if option in (*entry, "type", pictures, "prompt"):
            raise ApiError(
                400, f"options.{option} is given by the other fields", param=f"options.{option}", code="invalid_request"
            )
        entry[option] = value
    defaults = _object("defaults", body.get("defaults", {}))
    _check_scheduler("defaults.scheduler", defaults, service)
    content = Manifest([entry], {}).to_json() | {
        "defaults": defaults,
        "licence": _text("licence", body.get("licence", body.get("license"))),
        "description": _text("description", body.get("description")),
        "created": now(),
    }
    try:
        manifest = Manifest.of(content)
    except StyleError as error:
        raise ApiError(400, str(error), code="invalid_style") from None
    return _Wanted(name, files, manifest, bake)


def _text(name: str, given: Any) -> str:
    try:
        return values.text(name, "" if given is None else given, longest=MOST_TEXT)
    except InvalidRequest as error:
        raise ApiError(400, str(error), param=name, code="invalid_request") from None


def _object(name: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ApiError(400, f"{name} is {quoted(given)}; it must be an object", param=name, code="invalid_request")
    return given


def _check_scheduler(param: str, settings: Mapping[str, Any], service: "Service") -> None:
    name, known = settings.get("scheduler"), service.facts["schedulers"]
    if name is not None and name not in known:
        near = values.did_you_mean(name, known)
        message = f"{param} is {quoted(name)}; there are {', '.join(known)}{near}"
        raise ApiError(400, message, param=param, code="invalid_request")


def _wanted_bake(given: Any, service: "Service") -> dict[str, Any] | None:
    """Return the settings of a bake that a body asks for: an object, or true, in a form as text."""
    if given in (None, False, "false"):
        return None
    given = True if given == "true" else given
    return _bake_settings({} if given is True else _object("bake", given), service)


def _bake_settings(given: Mapping[str, Any], service: "Service") -> dict[str, Any]:
    found = {name: value for name, value in given.items() if value is not None}
    for name in found:
        if name not in BAKE_SETTINGS:
            near = values.did_you_mean(name, BAKE_SETTINGS)
            raise ApiError(
                400,
                f"{quoted(name)} is no setting of a bake{near}; there are {', '.join(BAKE_SETTINGS)}",
                param=name[:80],
                code="unknown_parameter",
            )
    _check_scheduler("scheduler", found, service)
    for name, known in STORAGE.items():
        if name in found and found[name] not in known:
            raise ApiError(
                400,
                f"{name} is {quoted(found[name])}; there are {', '.join(known)}",
                param=name,
                code="invalid_request",
            )
    size = found.get("size")
    if isinstance(size, str):
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
        if match is None:
            raise ApiError(
                400, f"size is {quoted(size)}; it must be WIDTHxHEIGHT", param="size", code="invalid_request"
            )
        found["size"] = [int(match[1]), int(match[2])]
    return found


# work


async def _started(service: "Service", registry: StyleRegistry, found: Registered, settings: Mapping[str, Any]) -> Bake:
    """Start a bake, and return it once its settings are known to fit. Raises ApiError."""
    before = service.bakes.get(found.name)
    if before is not None and not before.over:
        raise ApiError(
            409,
            f"the style {quoted(found.name)} is being baked; wait for it, or delete the style",
            code="bake_in_progress",
            retry=False,
        )
    if sum(not one.over for one in service.bakes.values()) >= MOST_BAKES:
        raise ApiError(
            429, f"{MOST_BAKES} bakes are on their way, which is the limit; wait", code="queue_full", retry_after=60
        )
    begun = Bake(_number("bake"))
    service.bakes[found.name] = begun
    begun.task = asyncio.create_task(_baked(service, registry, found, settings, begun))
    await begun.accepted.wait()
    if begun.error is not None and begun.steps == 0:
        service.bakes.pop(found.name, None)
        raise begun.error
    return begun


async def _baked(
    service: "Service", registry: StyleRegistry, found: Registered, settings: Mapping[str, Any], begun: Bake
) -> None:
    """Bake a style into a folder of its own, and add the bank to the style once it is whole."""
    try:
        with _in_words():
            async with _draft(registry) as draft:
                path = draft.path / "new.bank"
                message = BakeStyle(begun.id, found.name, settings, str(path))
                answer = await service.dispatcher.errand(message, begun.report)
                await asyncio.to_thread(_added, registry, draft, path, found, answer)
        begun.status, begun.step = "completed", begun.steps
    except ApiError as error:
        begun.status = "cancelled" if error.code == "request_cancelled" else "failed"
        begun.error = error
    except asyncio.CancelledError:
        service.dispatcher.send_cancel(begun.id)
        begun.status = "cancelled"
    except Exception as error:
        from stylefast.serving.app import as_api_error

        begun.status, begun.error = "failed", as_api_error(error)
    finally:
        begun.accepted.set()


def _added(registry: StyleRegistry, draft: Draft, path: Path, found: Registered, answer: Mapping[str, Any]) -> None:
    registry.add_bank(found.name, draft, path, answer["style"], answer["settings"], found)


@asynccontextmanager
async def _draft(registry: StyleRegistry) -> AsyncIterator[Draft]:
    """Make a draft without holding up the event loop."""
    making = registry.draft()
    draft = await asyncio.to_thread(making.__enter__)
    try:
        yield draft
    finally:
        await asyncio.shield(asyncio.to_thread(making.__exit__, None, None, None))


def _writable(request: Request) -> "tuple[Service, StyleRegistry]":
    """Return the service and its registry. Raises ApiError for those who may not change it."""
    if not request.state.is_admin:
        raise ApiError(
            403, "this needs an admin key, one of the setting admin_keys of the server", code="admin_key_required"
        )
    service = request.app.state.service
    if service.registry is None:
        raise ApiError(
            409,
            "the server has no folder of styles; start it with --styles DIR",
            code="styles_not_configured",
            retry=False,
        )
    service.registered()  # the model must be loaded
    return service, service.registry


def _found(service: "Service", name: str, what: str = "") -> Registered:
    if what and name in service.facts["styles"]:
        raise ApiError(
            409,
            f"the style {quoted(name)} comes with the model and can't be {what}",
            code="style_of_model",
            retry=False,
        )
    found = service.registered()
    if name not in found:
        raise ApiError(404, f"no style {quoted(name)} is registered", param="name", code="not_found")
    return found[name]


@contextmanager
def _in_words() -> Iterator[None]:
    """Turn errors of the registry into ApiErrors."""
    try:
        yield
    except UnknownStyle as error:
        raise ApiError(404, str(error), param="name", code="not_found") from None
    except StyleExists as error:
        raise ApiError(409, str(error), param="name", code="style_exists", retry=False) from None
    except ReadOnlyStyles:
        message = "the folder of styles can't be written by this server"
        raise ApiError(409, message, code="styles_read_only", retry=False) from None
    except StyleError as error:
        raise ApiError(400, str(error), code="invalid_style") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ApiError(507, "the disk with the folder of styles is full", code="disk_full", retry=False) from None


def _number(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


# replies


def _shown(service: "Service", found: Registered) -> dict[str, Any]:
    about = {} if found.manifest is None else dict(described(found.name, found.manifest))
    about.pop("name", None)
    latest = service.bakes.get(found.name)
    return {
        "id": found.name,
        "object": "style",
        "model": f"{service.model}/{found.name}",
        "source": "registered",
        "fault": found.fault,
        **about,
        "bake": None if latest is None else latest.shown(),
    }


def _shown_of_model(service: "Service", name: str) -> dict[str, Any]:
    return {"id": name, "object": "style", "model": f"{service.model}/{name}", "source": "model", "fault": None}
