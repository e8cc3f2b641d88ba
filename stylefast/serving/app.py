"""The web application: OpenAI's image routes, the service's own, and one shape for all errors."""

import asyncio
import base64
import hashlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

import stylefast
from stylefast.errors import StyleError
from stylefast.provenance import Provenance
from stylefast.serving import a1111, fields, media, openapi, playground, replies, safety, style_routes, tracing
from stylefast.serving.addresses import Fetcher
from stylefast.serving.dispatcher import DRAINING, READY, Dispatcher
from stylefast.serving.fields import Edit, Generation, Served, Wanted
from stylefast.serving.guard import Guard
from stylefast.serving.links import Links
from stylefast.serving.messages import Made, Pixels
from stylefast.serving.metrics import Metrics
from stylefast.serving.registry import Registered, StyleRegistry
from stylefast.serving.replies import ApiError
from stylefast.serving.safety import Call, Safety
from stylefast.serving.settings import ServeSettings
from stylefast.serving.starts import mask_of_clear
from stylefast.serving.tickets import Register, Ticket
from stylefast.values import quoted

logger = logging.getLogger("stylefast.serving")

KEEP_ALIVE_SECONDS = 15.0  # between two signs of life in a stream; proxies close silent connections
WATCH_SECONDS = 0.1  # between two looks whether the client is still there
LEAST_READ_SECONDS = 1.0
_METHODS = ("GET", "HEAD", "POST", "DELETE")
_NO_IDS = ("/v1/images/generations", "/v1/images/edits")  # which look like /v1/images/{id}
MOST_KEY = 255  # characters of an idempotency key
SCAN_SECONDS = 0.5  # age of the list of registered styles that a request for pictures takes
_PREVIEW_QUALITY = 85


class Service:
    """State that the routes share: settings, queue, register, metrics, and threads that encode pictures."""

    def __init__(
        self, settings: ServeSettings, dispatcher: Dispatcher, provenance: Provenance, safety: Safety | None = None
    ):
        self.settings, self.dispatcher, self.provenance, self.safety = settings, dispatcher, provenance, safety
        self.links = Links(settings.link_seconds, settings.link_bytes)
        self.register = Register(settings.keep_results)
        self.metrics = Metrics(dispatcher, provenance.seconds_left)
        self.encoders = ThreadPoolExecutor(2, "stylefast-encode")
        self.fetcher = Fetcher(settings.image_url_hosts) if settings.allow_image_urls else None
        self.started = int(time.time())
        self.registry = None if settings.styles_dir is None else StyleRegistry(settings.styles_dir)
        self.bakes: dict[str, style_routes.Bake] = {}  # the latest of each style
        self.chosen: dict[str, str] = {}  # by owner: the model that A1111's clients have set
        if self.registry is not None:
            self.registry.scan()

    @property
    def facts(self) -> Mapping[str, Any]:
        """Return what the engine says of its model. Raises ApiError while it is not loaded."""
        if not self.dispatcher.facts:
            raise replies.draining() if self.dispatcher.state == DRAINING else replies.starting()
        return self.dispatcher.facts

    @property
    def served(self) -> Served:
        """Return what there is to ask for. Raises ApiError while the model is not loaded."""
        facts, found = self.facts, self.registered(SCAN_SECONDS)
        usable = {name: one.manifest for name, one in found.items() if one.fault is None and one.manifest is not None}
        return Served(
            self.model,
            [*facts["styles"], *usable],
            facts["size"],
            self.settings.accept_any_model,
            facts["adapters"],
            {name: manifest.defaults for name, manifest in usable.items()},
            {name: one.fault for name, one in found.items() if one.fault and name not in facts["styles"]},
            facts["controls"],
        )

    def registered(self, max_age: float = 0.0) -> Mapping[str, Registered]:
        """Return the styles on disk by name, looked up at most `max_age` seconds ago."""
        if self.registry is None:
            return {}
        self.registry.taken = self.facts["styles"]
        try:
            return self.registry.scan(max_age)
        except StyleError as error:
            logger.error("%s", error)
            return {}

    @property
    def model(self) -> str:
        """Return the name by which clients know the model."""
        return self.settings.served_model_name or self.dispatcher.facts.get("model", "")

    async def check_request(self, owner: str, requests: Sequence[Any], uploads: Sequence[media.Upload]) -> None:
        """Raise ApiError if the operator's check refuses a request."""
        if self.safety is None:
            return
        with self._counted(safety.REQUEST):
            await self.safety.check_request(Call(requests, owner, [upload.content for upload in uploads]))

    async def check_picture(
        self, owner: str, wanted: Wanted, pixels: Pixels, index: int = 0, preview: bool = False
    ) -> Pixels:
        """Return a picture as the operator's check lets it pass. Raises ApiError if it is refused."""
        if self.safety is None:
            return pixels
        with self._counted(safety.PICTURE):
            call = Call(wanted.call["requests"], owner, index=index, preview=preview)
            return await self.safety.check_picture(pixels, call)

    async def checked(self, ticket: Ticket, wanted: Wanted, made: Sequence[Made]) -> list[Made]:
        """Return finished pictures as the operator's check lets them pass. Raises ApiError if one is refused."""
        found = []
        for index, one in enumerate(made):
            pixels = await self.check_picture(ticket.owner, wanted, one.pixels, index)
            # a record would make the picture that was not to be shown
            other = pixels is not one.pixels
            found.append(replace(one, pixels=pixels, record=None, parameters=None, short=None) if other else one)
        ticket.unchecked = False
        return found

    @contextmanager
    def _counted(self, check: str) -> Iterator[None]:
        try:
            yield
        except ApiError:
            self.metrics.refused(check)
            raise

    async def encode(self, call: Callable[[], bytes]) -> bytes:
        """Run an encoder in a thread."""
        with tracing.encoding():
            return await asyncio.get_running_loop().run_in_executor(self.encoders, call)


def create_app(settings: ServeSettings, make_dispatcher: Callable[[], Dispatcher]) -> FastAPI:
    """Return the ASGI application; the engine starts with it, and ends with it.

    Raises InvalidRequest and MissingDependency for signatures and safety checks that can't be had.
    """
    provenance = Provenance.of(
        not settings.no_provenance, settings.c2pa_certificate, settings.c2pa_key, settings.require_provenance
    )

    checks = None if settings.safety is None else Safety(settings.safety)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        dispatcher = make_dispatcher()
        app.state.service = Service(settings, dispatcher, provenance, checks)
        dispatcher.start()
        try:
            yield
        finally:
            await style_routes.end_bakes(app.state.service)
            await dispatcher.close()
            if checks is not None:
                await asyncio.to_thread(checks.close)

    app = FastAPI(title="stylefast", version=stylefast.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    for kind in (HTTPException, RequestValidationError, ApiError, Exception):
        app.add_exception_handler(kind, _error_reply)
    _add_health(app)
    _add_images(app)
    _add_models(app)
    app.include_router(a1111.router)
    app.include_router(playground.router)
    app.include_router(style_routes.router)
    app.add_middleware(Guard, settings=settings, app_of_routes=app)
    openapi.document(app)
    return app


# errors


async def _error_reply(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 405:
        error = _wrong_method(request)
    return reply_of(as_api_error(error))


def _wrong_method(request: Request) -> ApiError:
    """Return the error for a path that has other methods."""
    right = []
    for method in ("POST",) if request.url.path in _NO_IDS else _METHODS:
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] == Match.FULL for route in request.app.router.routes):
            right.append(method)
    message = f"this path has {' and '.join(right)} alone"
    return ApiError(405, message, code="method_not_allowed", more_headers={"allow": ", ".join(right)})


def as_api_error(error: Exception) -> ApiError:
    """Return any error as one that a client may see."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        codes = {404: "not_found", 413: "body_too_large"}
        return ApiError(error.status_code, str(error.detail).lower(), code=codes.get(error.status_code))
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return ApiError(400, str(first["msg"]), param=".".join(map(str, first["loc"][1:])) or None)
    logger.exception("a request failed for a reason of ours", exc_info=error)
    return replies.of_engine(type(error).__name__, "")


def reply_of(error: ApiError) -> JSONResponse:
    """Return the reply of an error."""
    return JSONResponse(error.body(), error.status, error.headers())


# health


def _add_health(app: FastAPI) -> None:
    @app.get("/livez", include_in_schema=False)
    async def livez() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz", include_in_schema=False)
    @app.get("/health", include_in_schema=False)
    async def readyz(request: Request) -> JSONResponse:
        dispatcher = request.app.state.service.dispatcher
        ready = dispatcher.state == READY
        return JSONResponse({"status": dispatcher.state}, 200 if ready else 503)

    @app.get("/version", include_in_schema=False)
    async def version() -> dict[str, str]:
        return {"version": stylefast.__version__}

    @app.get("/metrics", include_in_schema=False)
    async def metrics(request: Request) -> Response:
        body, kind = request.app.state.service.metrics.page()
        return Response(body, media_type=kind)


# models


def _add_models(app: FastAPI) -> None:
    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        """List the model, and each of its styles as a model of its own."""
        service = request.app.state.service
        service.registered()
        served = service.served
        styles = [None, *served.styles]
        return {"object": "list", "data": [_model(service, served, served.model, style) for style in styles]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        """Describe one of them."""
        service = request.app.state.service
        served = service.served
        _, style = fields.model_and_style(name, served)
        return _model(service, served, served.model, style)


def _model(service: Service, served: Served, name: str, style: str | None) -> dict[str, Any]:
    width, height = served.native_size
    return {
        "id": name if style is None else f"{name}/{style}",
        "object": "model",
        "created": service.started,
        "owned_by": "stylefast",
        "stylefast": {"style": style, "size": f"{width}x{height}", "methods": fields.methods(served)},
    }


# images


def _add_images(app: FastAPI) -> None:
    schema = {name: kind.model_json_schema() for name, kind in (("json", Generation), ("form", Edit))}
    edits = {
        **schema["form"],
        "properties": {**schema["form"]["properties"], **_IMAGE_PARTS},
        "required": ["prompt", "image"],
    }
    in_json = {**edits, "properties": {**edits["properties"], "image": fields.IN_JSON, "mask": fields.PICTURE_IN_JSON}}

    @app.post(
        "/v1/images/generations",
        responses=openapi.DRAWN,
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema["json"]}}}},
    )
    async def generations(request: Request) -> Response:
        """Draw pictures."""
        service = request.app.state.service
        body = fields.read_json(await json_body(request))
        return await _answer(request, service, fields.wanted(body, service.served), "image_generation")

    @app.post(
        "/v1/images/edits",
        responses=openapi.DRAWN,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"multipart/form-data": {"schema": edits}, "application/json": {"schema": in_json}},
            }
        },
    )
    async def edits_(request: Request) -> Response:
        """Draw pictures in the style of those sent along."""
        service = request.app.state.service
        served = service.served
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "application/json":
            body, files = await images_in_json(
                service, fields.read_json(await json_body(request)), files=("image", "mask")
            )
        elif kind == "multipart/form-data":
            body, files = await read_form(request, files=("image", "mask"))
        else:
            raise ApiError(
                415, "the body must be multipart/form-data or application/json", code="unsupported_media_type"
            )
        images, masks = files["image"], files["mask"]
        if not images:
            raise ApiError(400, "image is missing; send one picture or several", param="image", code="missing_image")
        if len(masks) > 1:
            raise ApiError(400, "mask was sent twice; send one", param="mask", code="invalid_request")
        mask = await service.encode(partial(mask_of_clear, masks[0])) if masks else None
        return await _answer(request, service, fields.wanted(body, served, images, True, mask), "image_edit")

    @app.post("/v1/images/variations", include_in_schema=False)
    async def variations() -> None:
        raise ApiError(404, "variations are no longer part of this interface; use /v1/images/edits", code="not_found")

    async def not_an_id() -> None:
        raise HTTPException(405)

    for path in _NO_IDS:
        app.add_api_route(path, not_an_id, methods=["GET", "DELETE"], include_in_schema=False)

    @app.head("/v1/images/{secret}/{name}", include_in_schema=False)
    @app.get("/v1/images/{secret}/{name}")
    async def linked(request: Request, secret: str, name: str) -> Response:
        """Return a picture by the address in a reply to `response_format: "url"`; it needs no key."""
        service = request.app.state.service
        found = service.links.find(f"/v1/images/{secret}/{name}")
        headers = {"x-content-type-options": "nosniff", "cache-control": "private, max-age=3600"}
        headers |= {"content-security-policy": "default-src 'none'; sandbox"}
        return Response(found.content, media_type=f"image/{found.form}", headers=headers)

    @app.get("/v1/images/{number}")
    async def progress(request: Request, number: str) -> dict[str, Any]:
        """Tell how far a request is; its id is the reply's x-request-id, which a client may also choose."""
        service = request.app.state.service
        return service.register.find(number, _asker(request)).shown()

    @app.delete("/v1/images/{number}")
    async def cancel(request: Request, number: str) -> dict[str, Any]:
        """Cancel a request: at once if it waits, after the current step if it runs. May be repeated."""
        service = request.app.state.service
        ticket = service.register.find(number, _asker(request))
        return {
            "id": number,
            "object": "image.request",
            "cancelled": service.dispatcher.cancel(ticket),
            "status": ticket.shown()["status"],
        }


_FILE = {"type": "string", "format": "binary"}
_IMAGE_PARTS = {"image": {"type": "array", "items": _FILE, "maxItems": fields.MOST_UPLOADS}, "mask": _FILE}


def _asker(request: Request) -> str | None:
    """Return whose requests the client may see; None: everybody's."""
    return None if request.state.is_admin else request.state.owner


async def json_body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body must be application/json, not {kind[:80]}", code="unsupported_media_type")
    return await request.body()


async def read_form(
    request: Request, nested: Sequence[str] = ("stylefast",), files: Sequence[str] = ("image",)
) -> tuple[dict[str, Any], dict[str, list[media.Upload]]]:
    """Return the fields of a form, and its pictures by their fields. Names and types of its files are not believed.

    nested: fields that are objects. files: fields that are pictures.
    """
    _, options = parse_options_header(request.headers["content-type"])
    charset = options.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8", "us-ascii"):
        # others are not needed, and some of Python's take minutes for a megabyte
        raise ApiError(415, f"the form's charset is {quoted(charset)}; send utf-8", code="unsupported_media_type")
    # the parser would take what is not UTF-8 for Latin-1 and say nothing; this keeps the bytes, and the last one counts
    headers = Headers({"content-type": f"{request.headers['content-type']}; charset=latin-1"})
    try:
        async with aclosing(request.stream()) as stream:
            limits = {"max_files": fields.MOST_UPLOADS + 2, "max_fields": 200, "max_part_size": 2**20}
            form = await MultiPartParser(headers, stream, **limits).parse()
    except MultiPartException as error:
        raise ApiError(400, f"the form is damaged: {error.message}"[:300], code="invalid_form") from None
    texts, found = [], {name: [] for name in files}
    try:
        for name, value in form.multi_items():
            if not isinstance(value, UploadFile):
                texts.append((_utf8(name), _utf8(value)))
            elif (field := name.removesuffix("[]")) in found:
                found[field].append(media.upload(await value.read(), field))
            else:
                texts.append((_utf8(name), "a file"))  # `wanted` refuses what it does not know
    finally:
        await form.close()
    _check_count(found["image"])
    return fields.from_form(texts, nested), found


def _check_count(images: Sequence[Any]) -> None:
    if len(images) > fields.MOST_UPLOADS:
        message = f"image has {len(images)} pictures; at most {fields.MOST_UPLOADS} are allowed"
        raise ApiError(400, message, param="image", code="invalid_request")


def _utf8(text: str) -> str:
    try:
        return text.encode("latin-1").decode("utf-8")
    except UnicodeError:
        raise ApiError(400, "the form is damaged: a text in it is not UTF-8", code="invalid_form") from None


async def images_in_json(
    service: Service, body: dict[str, Any], files: Sequence[str] = ("image",)
) -> tuple[dict[str, Any], dict[str, list[media.Upload]]]:
    """Return a body without its pictures, and the pictures by their fields, fetched where that is allowed.

    Raises ApiError.
    """
    room, found = service.settings.body_limit, {}
    for name in files:
        given = body.pop(name, None) or (body.pop("images", None) if name == "image" else None) or []
        given = given if isinstance(given, list) else [given]
        _check_count(given)
        found[name] = [fields.content_of(one, name) for one in given]
        room -= sum(len(one.content) for one in found[name] if isinstance(one, media.Upload))
    for name, contents in found.items():
        for i, one in enumerate(contents):
            if isinstance(one, str):
                contents[i] = await _fetched(service, one, name, room)
                room -= len(contents[i].content)
    return body, found


async def _fetched(service: Service, address: str, name: str, room: int) -> media.Upload:
    if service.fetcher is None:
        raise ApiError(
            400,
            f"{name} is an address, and this server fetches none; send the picture itself, in base64",
            param=name,
            code="url_not_allowed",
        )
    return await service.fetcher.picture(address, name, room)


def ticket_of(request: Request, service: Service, wanted: Wanted) -> Ticket:
    """Return the ticket of what a request asks for. Raises ApiError for a bad id or deadline."""
    if not request.state.id_is_fit:
        raise ApiError(
            400,
            "x-request-id must have 1 to 128 letters, digits, and . _ : -",
            param="x-request-id",
            code="invalid_request",
        )
    number = request.state.request_id
    return Ticket(
        number,
        request.state.owner,
        wanted.call,
        [upload.content for upload in wanted.uploads],
        wanted.partial_images,
        _seconds(request, wanted, service.settings),
    )


def _seconds(request: Request, wanted: Wanted, settings: ServeSettings) -> float:
    """Return how long a request may take: what the client's library waits, what it says, and our limit."""
    limits = [settings.deadline]
    if wanted.deadline is not None:
        limits.append(wanted.deadline)
    for name in ("x-stainless-read-timeout", "x-stylefast-deadline"):
        text = request.headers.get(name)
        if text is None:
            continue
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0.0
        if seconds > 0:
            limits.append(max(seconds, LEAST_READ_SECONDS))
        elif name.startswith("x-stylefast"):
            raise ApiError(400, f"{name} must be seconds, above 0", param=name, code="invalid_request")
    return min(limits)


def submit(
    request: Request, service: Service, wanted: Wanted, key: str | None = None, digest: str = "", tongue: str = "openai"
) -> Ticket:
    """Register and queue what is wanted; `tongue`: of the route. Raises ApiError."""
    ticket = ticket_of(request, service, wanted)
    ticket.tongue, ticket.trace = tongue, tracing.here()
    ticket.unchecked = service.safety is not None
    service.register.add(ticket, key, digest)
    try:
        service.dispatcher.submit(ticket)
    except ApiError:
        service.register.drop(ticket)
        raise
    return ticket


async def _answer(request: Request, service: Service, wanted: Wanted, kind: str) -> Response:
    """Queue what is wanted and answer: with all pictures, or with a stream of events."""
    key, digest, ticket = request.headers.get("idempotency-key"), "", None
    if key is not None and not 1 <= len(key) <= MOST_KEY:
        raise ApiError(
            400,
            f"idempotency-key has {len(key)} characters; it must have 1 to {MOST_KEY}",
            param="idempotency-key",
            code="invalid_request",
        )
    # before the rest, which must not be interrupted
    await service.check_request(request.state.owner, wanted.call["requests"], wanted.uploads)
    if key is not None:
        asked = json.dumps([wanted.call, wanted.form, wanted.compression, kind], sort_keys=True).encode()
        digest = hashlib.sha256(b"".join([asked, *(upload.content for upload in wanted.uploads)])).hexdigest()
        ticket = service.register.repeated(request.state.owner, key, digest)
    if ticket is None:
        ticket = submit(request, service, wanted, key=key, digest=digest)
    asker = Asker(service, ticket, wanted.stay)
    if wanted.stream:
        return _Stream(_events(service, wanted, ticket, kind), asker)
    with asker:
        made = await service.checked(ticket, wanted, await while_connected(request, wanted, ticket))
        encoded = [await service.encode(partial(_picture, service, one, wanted)) for one in made]
        if wanted.linked:
            base = (service.settings.public_url or str(request.base_url)).rstrip("/")
            data = [{"url": base + path} for path in service.links.add(encoded, wanted.form)]
        else:
            data = [{"b64_json": base64.b64encode(content).decode("ascii")} for content in encoded]
        return JSONResponse(_reply(wanted, ticket, made, data), headers=_times(ticket))


class Asker:
    """An HTTP request that is being answered with a ticket; several may share one by their idempotency key.

    When the last one ends, a ticket that is not over is cancelled unless it shall stay, and pictures that can't be
    asked for again are dropped. An error in the `with` block is the ticket's, as an ApiError, though it was done.
    """

    def __init__(self, service: Service, ticket: Ticket, stay: bool):
        self._service, self._ticket, self._stay = service, ticket, stay
        ticket.askers += 1

    def __enter__(self) -> "Asker":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception):
            self.leave()
            return
        found = as_api_error(error)
        self._ticket.refuse(found)
        self.leave()
        raise found from None

    def leave(self) -> None:
        """End."""
        self._ticket.askers -= 1
        if self._ticket.askers:
            return
        self._ticket.unchecked = False
        if not self._stay:
            self._service.dispatcher.cancel(self._ticket)
        if self._ticket.key is None:
            self._ticket.forget_pictures()


class _Stream(StreamingResponse):
    """A stream of events, which may end at any time, also before the first one was asked for."""

    def __init__(self, events: AsyncIterator[str], asker: Asker):
        # the second is for nginx, which would hold the events back
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._asker = asker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._asker.leave()


async def while_connected(request: Request, wanted: Wanted, ticket: Ticket) -> Sequence[Made]:
    """Wait for the pictures. Raises ApiError if the client leaves, unless it asked otherwise."""
    waiting = asyncio.ensure_future(ticket.wait())
    try:
        while True:
            done, _ = await asyncio.wait([waiting], timeout=WATCH_SECONDS)
            if done:
                return waiting.result()
            if not wanted.stay and await request.is_disconnected():
                raise replies.cancelled()
    finally:
        waiting.cancel()


def _times(ticket: Ticket) -> dict[str, str]:
    return {
        "x-stylefast-queue-ms": f"{1e3 * ticket.queue_seconds:.0f}",
        "x-stylefast-compute-ms": f"{1e3 * ticket.compute_seconds:.0f}",
    }


def _picture(service: Service, made: Made, wanted: Wanted) -> bytes:
    return media.encoded(
        made.pixels.image(),
        wanted.form,
        wanted.compression,
        made.record,
        made.parameters,
        service.provenance,
        made.short,
    )


def _preview(service: Service, pixels: Pixels, wanted: Wanted) -> bytes:
    width, height = (int(side) for side in wanted.size.split("x"))
    image = pixels.image().resize((width, height), Image.Resampling.BICUBIC)
    return media.encoded(image, wanted.form, _PREVIEW_QUALITY, None, None, service.provenance, finished=False)


def _common(wanted: Wanted) -> dict[str, Any]:
    found = {"size": wanted.size, "quality": wanted.quality, "background": "opaque", "output_format": wanted.form}
    return found if wanted.safety_identifier is None else {**found, "safety_identifier": wanted.safety_identifier}


def _usage(wanted: Wanted, ticket: Ticket) -> dict[str, Any]:
    """Count tokens: CLIP's of the prompts, 256 for a reference, one for 16 x 16 pixels of the output."""
    width, height = (int(side) for side in wanted.size.split("x"))
    images, output = 256 * len(wanted.uploads), ticket.count * -(-width // 16) * -(-height // 16)
    given = ticket.text_tokens + images
    return {
        "input_tokens": given,
        "input_tokens_details": {"image_tokens": images, "text_tokens": ticket.text_tokens},
        "output_tokens": output,
        "total_tokens": given + output,
    }


def _extension(wanted: Wanted, ticket: Ticket, made: Sequence[Made]) -> dict[str, Any]:
    warnings = [*wanted.warnings, *dict.fromkeys(warning for one in made for warning in one.warnings)]
    return {"id": ticket.id, "model": wanted.model, "seeds": [one.seed for one in made], "warnings": warnings}


def _reply(wanted: Wanted, ticket: Ticket, made: Sequence[Made], data: Sequence[Mapping]) -> dict[str, Any]:
    return {
        "created": int(ticket.created),
        "data": data,
        **_common(wanted),
        "usage": _usage(wanted, ticket),
        "stylefast": _extension(wanted, ticket, made),
    }


async def _events(service: Service, wanted: Wanted, ticket: Ticket, kind: str) -> AsyncIterator[str]:
    """Yield the events of a stream: previews, then the picture or an error; signs of life in between."""
    number, common = 0, {"created_at": int(ticket.created), **_common(wanted)}
    progress = ticket.progress()
    pending = asyncio.ensure_future(anext(progress, None))
    try:
        while True:
            done, _ = await asyncio.wait([pending], timeout=KEEP_ALIVE_SECONDS)
            if not done:
                yield ": keep-alive\n\n"
                continue
            found = pending.result()
            if found is None:
                break
            for unchecked in found.previews[:1]:
                pixels = await service.check_picture(ticket.owner, wanted, unchecked, preview=True)
                content = await service.encode(partial(_preview, service, pixels, wanted))
                event = {"type": f"{kind}.partial_image", "partial_image_index": number, **common}
                yield _event(event | {"b64_json": base64.b64encode(content).decode("ascii")})
                number += 1
            pending = asyncio.ensure_future(anext(progress, None))
        (made,) = await service.checked(ticket, wanted, await ticket.wait())
        content = await service.encode(partial(_picture, service, made, wanted))
        event = {"type": f"{kind}.completed", **common, "usage": _usage(wanted, ticket)}
        event["stylefast"] = _extension(wanted, ticket, [made])
        yield _event(event | {"b64_json": base64.b64encode(content).decode("ascii")})
    except Exception as error:
        found = as_api_error(error)
        service.dispatcher.cancel(ticket)  # a preview that was refused; what is over stays as it is
        ticket.refuse(found)
        yield _event(found.event())
    finally:
        pending.cancel()


def _event(content: Mapping[str, Any]) -> str:
    return f"event: {content['type']}\ndata: {json.dumps(content)}\n\n"
