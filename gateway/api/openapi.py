"""What the HTTP API says of itself: ``/openapi.json``, and ``/docs``, the page that shows it.

FastAPI writes the description from the routes. It reads no request and writes no answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import Depends, Header, Path, Query
from fastapi.openapi.utils import get_openapi
from fastapi.params import Depends as Dependency
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from pydantic.json_schema import SkipJsonSchema, models_json_schema
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute

from gateway.api.schemas import answers
from gateway.api.schemas.apply import ApplyTemplateRequest
from gateway.api.schemas.chat import ChatRequest
from opticnerve import __version__

REF = "#/components/schemas/{model}"
KEY = Depends(HTTPBearer(scheme_name="key", description="One of the server's API keys."))

DESCRIPTION = """\
OpenAI's API for vision-language models. Errors have OpenAI's shape. Every answer has an
`x-request-id`: the request's, or one that the server gave it. A field of OpenAI's that is not
described here is refused unless its value asks for nothing. Unknown fields of a body are refused,
and those of the objects in it ignored: `x-opticnerve-warnings` of an answer names them, and what
else a request says in vain. Where a path takes GET, it takes HEAD.
"""
TAGS = {
    "chat": "Answers about text and pictures.",
    "models": "What is served, by name.",
    "server": "How the server is.",
    "description": "What the API says of itself.",
}

Responses = Mapping[int | str, dict[str, Any]]


# What an operation takes, as the parameters of a function that is never called. A docstring would
# be the operation's description.


def takes_nothing() -> None: ...


def takes_chat(
    body: ChatRequest,
    x_opticnerve_timings: Annotated[
        Literal["1", "true"] | SkipJsonSchema[None],
        Header(description="As `timings` in the body."),
    ] = None,
) -> None: ...


def takes_messages(body: ApplyTemplateRequest) -> None: ...


def takes_readiness(
    pictures: Annotated[bool, Query(description="Ask for both pools.")] = False,
) -> None: ...


def takes_name(name: Annotated[str, Path(description="It may hold slashes.")]) -> None: ...


def content(media_type: str, model: type[BaseModel]) -> dict[str, Any]:
    return {"content": {media_type: {"schema": {"$ref": REF.format(model=model.__name__)}}}}


CHUNKS = {
    "description": "The answer; with `stream`, its chunks as server-sent events, then `[DONE]`.",
    **content("text/event-stream", answers.ChatCompletionChunk),
}
NOT_READY = {"description": "Not yet.", **content("application/json", answers.NotReady)}
UNHEALTHY = {"description": "The same.", **content("application/json", answers.Health)}
ERRORS: Responses = {
    "4XX": {
        "description": "The request is at fault, or (429) there are too many of them.",
        **content("application/json", answers.ErrorAnswer),
    },
    "5XX": {
        "description": "The server is at fault, or (503) not all of it is there.",
        **content("application/json", answers.ErrorAnswer),
    },
}
REFERRED = (answers.ErrorAnswer, answers.ChatCompletionChunk, answers.NotReady)
"""The models of ``content``, of which FastAPI does not know."""


@dataclass(frozen=True, slots=True)
class Operation:
    """A route, and what the description says of it. ``name`` is what generated clients call it."""

    method: str
    path: str
    name: str
    tag: str
    summary: str
    takes: Callable[..., None] = takes_nothing
    gives: type[BaseModel] | None = None  # As JSON.
    media: type[Response] = JSONResponse
    also: Responses = field(default_factory=dict)  # What it answers besides, by status.

    def options(self, *, keyed: bool) -> dict[str, Any]:
        """As FastAPI's routes take them. ``keyed``: callers need a key."""
        keys: list[Dependency] = [KEY] if keyed else []
        return {
            "methods": [self.method],
            "name": self.name,
            "operation_id": self.name,
            "tags": [self.tag],
            "summary": self.summary,
            "response_model": self.gives,
            "response_class": self.media,
            "response_description": "The answer.",
            "responses": {**self.also, **ERRORS},
            "dependencies": keys,
        }


CHAT = Operation(
    "POST",
    "/v1/chat/completions",
    "create_chat_completion",
    "chat",
    "Answer a chat about text and pictures",
    takes=takes_chat,
    gives=answers.ChatCompletion,
    also={200: CHUNKS},
)
APPLY_TEMPLATE = Operation(
    "POST",
    "/v1/apply_template",
    "apply_template",
    "chat",
    "Render a chat: its prompt, token ids and spans, without an answer",
    takes=takes_messages,
    gives=answers.Prompt,
)
LIST_MODELS = Operation(
    "GET",
    "/v1/models",
    "list_models",
    "models",
    "The names that requests may ask for",
    gives=answers.ModelList,
)
GET_MODEL = Operation(
    "GET",
    "/v1/models/{name:path}",
    "get_model",
    "models",
    "One name",
    takes=takes_name,
    gives=answers.ModelCard,
)
HEALTH = Operation(
    "GET",
    "/health",
    "get_health",
    "server",
    "Every worker's state, and the settings in effect; 503 when nothing is served",
    gives=answers.Health,
    also={503: UNHEALTHY},
)
LIVE = Operation(
    "GET", "/live", "get_live", "server", "Whether the gateway runs", gives=answers.Live
)
READY = Operation(
    "GET",
    "/ready",
    "get_ready",
    "server",
    "Whether requests may be sent here: once every kind was served, while text is",
    takes=takes_readiness,
    gives=answers.Ready,
    also={503: NOT_READY},
)
VERSION = Operation(
    "GET",
    "/version",
    "get_version",
    "server",
    "Name and version of the server",
    gives=answers.Version,
)
METRICS = Operation(
    "GET", "/metrics", "get_metrics", "server", "Prometheus metrics", media=PlainTextResponse
)
ROOT = Operation("GET", "/", "get_root", "description", "Where to begin", gives=answers.Root)
OPENAPI = Operation("GET", "/openapi.json", "get_openapi", "description", "This description")
DOCS = Operation(
    "GET", "/docs", "get_docs", "description", "A page that shows it", media=HTMLResponse
)


def describe(routes: Sequence[BaseRoute]) -> bytes:
    """The OpenAPI document of ``routes``, as JSON."""
    document = get_openapi(
        title="OpticNerve",
        version=__version__,
        description=DESCRIPTION,
        routes=routes,
        tags=[{"name": name, "description": text} for name, text in TAGS.items()],
    )
    _, schemas = models_json_schema(
        [(model, "serialization") for model in REFERRED], ref_template=REF
    )
    document["components"]["schemas"] |= schemas["$defs"]
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


# Keys are typed into this page: it runs one version of Swagger UI, known by its digest, and no
# other script.
SWAGGER_UI = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5.35.0"
SCRIPT_DIGEST = "sha384-gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9"
STYLE_DIGEST = "sha384-WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I"

PAGE = f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>OpticNerve API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="{SWAGGER_UI}/swagger-ui.css"
  integrity="{STYLE_DIGEST}" crossorigin="anonymous">
</head>
<body>
<div id="docs">
<p>This page needs Swagger UI from cdn.jsdelivr.net, which this browser has not reached. The API's
description itself is <a href="/openapi.json">/openapi.json</a>.</p>
</div>
<script src="{SWAGGER_UI}/swagger-ui-bundle.js"
  integrity="{SCRIPT_DIGEST}" crossorigin="anonymous"></script>
<script>SwaggerUIBundle({{url: "/openapi.json", dom_id: "#docs", deepLinking: true}})</script>
</body>
</html>
"""
