"""The OpenAPI document: what the framework writes of the routes, with the replies that they really give."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

# what any route may answer besides its own status, and what those that work may answer too
_COMMON = (400, 401, 403, 404, 408, 413, 415, 499, 500, 503)
_WORK = (409, 429, 504, 507)
_TEXTS = {
    400: "The request is wrong; `param` names the field.",
    401: "The API key is missing or unknown.",
    403: "The key may not do this.",
    404: "There is no such thing.",
    408: "The body did not arrive in time.",
    409: "What was asked for contradicts an earlier request.",
    413: "The body is too large.",
    415: "The body is compressed, or of another type.",
    429: "The queue is full, or the key has too many pictures on their way; see Retry-After.",
    499: "The request was cancelled.",
    500: "The request failed for a reason of the server's.",
    503: "The server is starting or shutting down, or its engine was lost; see Retry-After.",
    504: "The deadline passed.",
    507: "There is no room for a style.",
}
_TEXT, _MAYBE_TEXT, _WHOLE = {"type": "string"}, {"type": ["string", "null"]}, {"type": "integer"}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": _TEXT, "type": _TEXT, "param": _MAYBE_TEXT, "code": _MAYBE_TEXT},
        }
    },
}
_IMAGES = {
    "type": "object",
    "required": ["created", "data", "size", "quality", "background", "output_format", "usage", "stylefast"],
    "properties": {
        "created": _WHOLE,
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"b64_json": _TEXT, "url": _TEXT},
                "oneOf": [{"required": ["b64_json"]}, {"required": ["url"]}],
            },
        },
        **dict.fromkeys(("size", "quality", "background", "output_format", "safety_identifier"), _TEXT),
        "usage": {
            "type": "object",
            "required": ["input_tokens", "output_tokens", "total_tokens"],
            "properties": dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), _WHOLE),
        },
        "stylefast": {
            "type": "object",
            "required": ["id", "model", "seeds", "warnings"],
            "properties": {
                **dict.fromkeys(("id", "model"), _TEXT),
                "seeds": {"type": "array", "items": _WHOLE},
                "warnings": {"type": "array", "items": _TEXT},
            },
        },
    },
}
# replies of routes that draw for OpenAI's clients
DRAWN: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The pictures; with `stream`, events.",
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/Images"}},
            "text/event-stream": {"schema": {"description": "Server-sent events, each with an object as its data."}},
        },
    }
}


def document(app: FastAPI) -> None:
    """Make an application describe itself so."""

    def describe() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _described(app)
        return app.openapi_schema

    app.openapi = describe


def _described(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, routes=app.routes)
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):  # errors have the envelope
        schemas.pop(name, None)
    schemas |= {"Error": _ERROR, "Images": _IMAGES}
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    found["security"] = [{"key": []}, {}]  # a server without keys wants none
    for methods in found["paths"].values():
        for method, operation in methods.items():
            replies = operation["responses"]
            replies.pop("422", None)
            for status in _COMMON if method == "get" else _COMMON + _WORK:
                content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
                replies[str(status)] = {"description": _TEXTS[status], "content": content}
    return found
