"""The playground: one page at `/`, and the files beside this one that it consists of.

It is a client like any other. It holds no secret, so it needs no key; what it asks for goes through the same routes.
"""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import Response
from starlette.exceptions import HTTPException

PAGE = "index.html"
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FOLDER = Path(__file__).parent
# read once: what is not in here can't be asked for, whatever a path says
_FILES = {path.name: path.read_bytes() for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES}
# of the service; each needs no key
PATHS = ("/", *(f"/playground/{name}" for name in _FILES if name != PAGE))
# nothing from elsewhere, no script inside the page, and no other page around it
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",
}

router = APIRouter(include_in_schema=False)


def _file(name: str) -> Response:
    return Response(_FILES[name], headers={**_HEADERS, "content-type": _TYPES[Path(name).suffix]})


@router.api_route("/", methods=["GET", "HEAD"])
async def page() -> Response:
    """Return the page."""
    return _file(PAGE)


@router.api_route("/playground/{name}", methods=["GET", "HEAD"])
async def file(name: str) -> Response:
    """Return one of its files."""
    if f"/playground/{name}" not in PATHS:
        raise HTTPException(404)
    return _file(name)
