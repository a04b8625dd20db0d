"""The pages for browsers: the playground at ``/``, and ``/docs``, which shows the OpenAPI document.

They are static files of this package, without secrets and without anything from another host, so
they are served without a key. A page calls the gateway with its visitor's key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from starlette.responses import HTMLResponse, Response

from gateway.api.http import JSONResponse
from gateway.api.openapi import VERSION, Version
from gateway.api.routing import Call, make_router
from gateway.api.unserved import not_found

TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "cache-control": "no-cache",  # Cached, and revalidated by its ETag.
    "content-security-policy": POLICY,
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

router = make_router("description")


class Root(Version):
    models: list[str]
    health: str
    docs: str


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file as it is sent."""

    body: bytes
    media_type: str
    etag: str

    @classmethod
    def of(cls, body: bytes, name: str) -> StaticFile:
        digest = hashlib.sha256(body).hexdigest()[:32]
        return cls(body, TYPES[PurePath(name).suffix], f'"{digest}"')

    def answer(self, call: Call, **headers: str) -> Response:
        """The file, or a 304 for a browser that has it."""
        sent = {**HEADERS, "etag": self.etag, **headers}
        known = call.headers.get("if-none-match", "")
        if self.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
            return Response(None, 304, sent)
        return Response(self.body, 200, {**sent, "content-type": self.media_type})


def _read_all() -> Mapping[str, StaticFile]:
    folder = files(__package__) / "files"
    return {each.name: StaticFile.of(each.read_bytes(), each.name) for each in folder.iterdir()}


FILES = _read_all()
PAGE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/html": {"schema": {"type": "string"}}}}
}


@router.get(
    "/",
    summary="A page to chat on, for browsers; for others the server's version, models and paths",
    response_model=Root,
    responses=PAGE,
)
async def get_root(call: Call) -> Response:
    if "text/html" in call.headers.get("accept", ""):
        return FILES["index.html"].answer(call, vary="Accept")
    root: Root = {
        **VERSION,
        "models": list(call.names.names),
        "health": "/health",
        "docs": "/docs",
    }
    return JSONResponse(root, headers={"vary": "Accept"})


@router.get("/docs", summary="A page that shows the OpenAPI document", response_class=HTMLResponse)
async def get_docs(call: Call) -> Response:
    return FILES["docs.html"].answer(call)


@router.get("/playground/{name}", include_in_schema=False)
async def get_file(call: Call, name: str) -> Response:
    if name not in FILES:
        raise not_found(call.url.path, call.app.routes)
    return FILES[name].answer(call)
