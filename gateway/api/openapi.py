"""The API's description: ``/openapi.json``, which FastAPI generates from the routes, and
``/version``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

from fastapi.openapi import utils
from starlette.responses import Response
from starlette.routing import BaseRoute
from typing_extensions import TypedDict

from gateway.api.http import REF, JSONResponse
from gateway.api.routing import Call, make_router
from opticnerve import __version__

_KEY = "One of the server's API keys."
KEYS = {
    "key": {"type": "http", "scheme": "bearer", "description": _KEY},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": _KEY},
}

DESCRIPTION = """\
OpenAI's API for vision-language models, and Anthropic's Messages API under `/v1/messages`. Errors
have the shape of the API that they belong to. Every answer has an `x-request-id`: the request's
own, or a new one. A field of either API that is not described here is refused, unless its value
asks for nothing. Other unknown fields of a body are refused, but ignored in the objects within it.
The header `x-opticnerve-warnings` of an answer names ignored fields, and known fields that have no
effect. Every path that takes GET takes HEAD.
"""
TAGS = {
    "generation": "Answers about text and pictures.",
    "tokens": "The model's tokenizer.",
    "models": "What is served, by name.",
    "server": "Health, readiness and version.",
    "description": "This API's OpenAPI document, and a page that shows it.",
}


def describe(routes: Sequence[BaseRoute], needs_key: Callable[[str], bool]) -> bytes:
    """The OpenAPI document of ``routes``, as JSON. ``needs_key(path)``: whether an API key is
    required."""
    document = utils.get_openapi(
        title="OpticNerve",
        version=__version__,
        description=DESCRIPTION,
        routes=routes,
        tags=[{"name": name, "description": text} for name, text in TAGS.items()],
    )
    components = document["components"]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _share_schemas(operation, components["schemas"])
            if needs_key(path):
                operation["security"] = [{name: []} for name in KEYS]
                components["securitySchemes"] = KEYS
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _share_schemas(operation: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Moves schemas from ``gateway.api.http.content``, which FastAPI copies in place, to the shared
    ones."""
    for response in operation["responses"].values():
        for media in response.get("content", {}).values():
            schema = media.get("schema", {})
            schemas |= schema.pop("$defs", {})
            if "properties" in schema:
                schemas[schema["title"]] = schema
                media["schema"] = {"$ref": REF.format(model=schema["title"])}


router = make_router()


class Version(TypedDict):
    name: str
    version: str


VERSION: Version = {"name": "opticnerve", "version": __version__}


@router.get(
    "/version", tags=["server"], summary="Name and version of the server", response_model=Version
)
async def get_version(call: Call) -> Response:
    return JSONResponse(VERSION)


@router.get("/openapi.json", tags=["description"], summary="This OpenAPI document")
async def get_openapi(call: Call) -> Response:
    body = await asyncio.to_thread(lambda: call.app.document)
    return Response(body, media_type="application/json")
