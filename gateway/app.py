"""The gateway's HTTP face: routes, and the middleware around them.

FastAPI matches requests to routes and describes the routes. Requests are read, and answers and
errors are written, by ``gateway.api.http`` and the handlers alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cached_property

from fastapi.routing import APIRoute, APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api import chat as chats
from gateway.api import health, openapi
from gateway.api.http import WARNINGS, BodyLimits, ErrorResponse, JSONResponse, read_switch
from gateway.api.models import ServedNames
from gateway.api.openapi import Operation
from gateway.edge.admission import Admission
from gateway.edge.auth import Keys, needs_key
from gateway.edge.connections import Connections
from gateway.edge.middleware import Authentication, Disconnect, Drain, Errors, RequestScope
from gateway.edge.pageguard import PageGuard
from gateway.pipeline import Pipeline
from opticnerve import __version__, addresses
from opticnerve.config import GatewayConfig
from opticnerve.errors import MethodNotAllowed, NotFound, Unauthenticated
from opticnerve.process import Running

Handler = Callable[["Gateway", Request, Send], Awaitable[Response | None]]


@dataclass
class Gateway:
    """What the routes share; one a process."""

    config: GatewayConfig
    keys: Keys
    connections: Connections
    admission: Admission
    names: ServedNames
    pipeline: Pipeline
    running: Running = field(default_factory=lambda: Running("the gateway"))
    draining: bool = False

    def knows(self, request: Request) -> bool:
        """Whether a request for an open path has a key, where keys are asked for."""
        try:
            self.keys.identify(request.headers.get("authorization"))
        except Unauthenticated:
            return False
        return True

    @property
    def limits(self) -> BodyLimits:
        config = self.config
        return BodyLimits(
            config.max_request_bytes,
            config.max_request_values,
            config.body_timeout_s,
            config.stall_timeout_s,
            config.ignore_unknown_fields,
        )


class Endpoint(APIRoute):
    """One route. What FastAPI would do with a request is left out: a handler answers by itself, or
    returns the answer."""

    def __init__(self, gateway: Gateway, operation: Operation, handler: Handler) -> None:
        path, method = operation.path, operation.method
        public_models = gateway.config.public_models
        keyed = gateway.keys.required and needs_key(path, public_models=public_models)
        super().__init__(path, operation.takes, **operation.options(keyed=keyed))
        self.gateway = gateway
        self.allowed = (method, "HEAD") if method == "GET" else (method,)
        self.handler = handler

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["route"] = self.path
        if scope["method"] not in self.allowed:
            error = MethodNotAllowed(
                f"{self.path} takes {self.allowed[0]}, not {scope['method'][:20]}"
            )
            answer = ErrorResponse(error, {"allow": ", ".join(self.allowed)})
            await answer(scope, receive, send)
            return
        response = await self.handler(self.gateway, Request(scope, receive), send)
        if response is not None:
            await response(scope, receive, send)


class Routes(APIRouter):
    """All routes, and the document that describes them: written when it is first asked for."""

    @cached_property
    def document(self) -> bytes:
        return openapi.describe(self.routes)


def make_app(gateway: Gateway) -> ASGIApp:
    """The application, outermost layer first: scope, CORS, errors, pages, keys, drain,
    disconnects, routes."""
    config = gateway.config
    app: ASGIApp = Routes(routes=make_routes(gateway), redirect_slashes=False, default=_unknown)
    app = Disconnect(app)
    app = Drain(app, gateway.running)
    app = Authentication(app, gateway.keys, public_models=config.public_models)
    host = config.listen_host
    if not gateway.keys.required and addresses.is_loopback(host):
        app = PageGuard(app, {host, *config.allowed_hosts}, config.cors_origins)
    app = Errors(app)
    if config.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", WARNINGS, "retry-after"],
        )
    return RequestScope(app)


def make_routes(gateway: Gateway) -> list[BaseRoute]:
    handlers: list[tuple[Operation, Handler]] = [
        (openapi.CHAT, chats.chat),
        (openapi.APPLY_TEMPLATE, chats.apply_template),
        (openapi.LIST_MODELS, list_models),
        (openapi.GET_MODEL, get_model),
        (openapi.HEALTH, get_health),
        (openapi.LIVE, get_live),
        (openapi.READY, get_ready),
        (openapi.VERSION, get_version),
        (openapi.ROOT, get_root),
        (openapi.OPENAPI, get_openapi),
        (openapi.DOCS, get_docs),
    ]
    if gateway.config.telemetry.metrics_port < 0:
        handlers.append((openapi.METRICS, get_metrics))
    return [Endpoint(gateway, operation, handler) for operation, handler in handlers]


async def _unknown(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        raise NotFound(f"there is no {scope['path'][:100]!r} here; see /v1/models and /health")


async def list_models(gateway: Gateway, request: Request, send: Send) -> Response:
    return JSONResponse(gateway.names.cards())


async def get_model(gateway: Gateway, request: Request, send: Send) -> Response:
    return JSONResponse(gateway.names.card(request.path_params["name"]))


async def get_health(gateway: Gateway, request: Request, send: Send) -> Response:
    pipeline = gateway.pipeline
    status, body = health.health(
        gateway.config,
        pipeline.pairing,
        gateway.admission,
        len(pipeline.encoders.references),
        draining=gateway.draining,
    )
    return JSONResponse(body if gateway.knows(request) else health.public(body), status)


async def get_live(gateway: Gateway, request: Request, send: Send) -> Response:
    return JSONResponse({"status": "live"})


async def get_ready(gateway: Gateway, request: Request, send: Send) -> Response:
    status, body = health.readiness(
        gateway.pipeline.pairing,
        pictures=read_switch(request, "pictures"),
        draining=gateway.draining,
    )
    return JSONResponse(body if gateway.knows(request) else health.public(body), status)


async def get_version(gateway: Gateway, request: Request, send: Send) -> Response:
    return JSONResponse({"name": "opticnerve", "version": __version__})


async def get_metrics(gateway: Gateway, request: Request, send: Send) -> Response:
    return Response(generate_latest(), headers={"content-type": CONTENT_TYPE_LATEST})


async def get_openapi(gateway: Gateway, request: Request, send: Send) -> Response:
    routes: Routes = request.scope["router"]
    body = await asyncio.to_thread(lambda: routes.document)
    return Response(body, media_type="application/json")


async def get_docs(gateway: Gateway, request: Request, send: Send) -> Response:
    return HTMLResponse(openapi.PAGE)


async def get_root(gateway: Gateway, request: Request, send: Send) -> Response:
    return JSONResponse(
        {
            "name": "opticnerve",
            "version": __version__,
            "models": list(gateway.names.names),
            "health": "/health",
            "docs": "/docs",
        }
    )
