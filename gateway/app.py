"""The gateway's HTTP face: routes, and the middleware around them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway import chats, health
from gateway.admission import Admission
from gateway.auth import Keys
from gateway.http import BodyLimits, JSONResponse, error_response
from gateway.middleware import Authentication, Disconnect, Drain, Errors, RequestScope
from gateway.names import ServedNames
from gateway.pipeline import Pipeline
from opticnerve import __version__
from opticnerve.config import GatewayConfig
from opticnerve.drain import Running
from opticnerve.errors import MethodNotAllowed, NotFound

Handler = Callable[["Gateway", Request, Send], Awaitable[Response | None]]


@dataclass
class Gateway:
    """What the routes share; one a process."""

    config: GatewayConfig
    keys: Keys
    admission: Admission
    names: ServedNames
    pipeline: Pipeline
    running: Running = field(default_factory=lambda: Running("the gateway"))
    draining: bool = False

    @property
    def limits(self) -> BodyLimits:
        config = self.config
        return BodyLimits(
            config.max_request_bytes,
            config.max_request_values,
            config.body_timeout_s,
            config.ignore_unknown_fields,
        )


class Endpoint:
    """One route as an ASGI application. A handler answers by itself, or returns the answer."""

    def __init__(self, gateway: Gateway, path: str, method: str, handler: Handler) -> None:
        self.gateway = gateway
        self.path = path
        self.methods = (method, "HEAD") if method == "GET" else (method,)
        self.handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["state"]["route"] = self.path
        if scope["method"] not in self.methods:
            error = MethodNotAllowed(
                f"{self.path} takes {self.methods[0]}, not {scope['method'][:20]}"
            )
            answer = error_response(error, {"allow": ", ".join(self.methods)})
            await answer(scope, receive, send)
            return
        response = await self.handler(self.gateway, Request(scope, receive), send)
        if response is not None:
            await response(scope, receive, send)


def make_app(gateway: Gateway) -> ASGIApp:
    """The application, outermost layer first: scope, CORS, errors, keys, drain,
    disconnects, routes."""
    config = gateway.config
    routes: list[tuple[str, str, Handler]] = [
        ("/v1/chat/completions", "POST", chats.chat),
        ("/v1/apply_template", "POST", chats.apply_template),
        ("/v1/models", "GET", list_models),
        ("/v1/models/{name:path}", "GET", get_model),
        ("/health", "GET", get_health),
        ("/live", "GET", get_live),
        ("/ready", "GET", get_ready),
        ("/version", "GET", get_version),
        ("/", "GET", get_root),
    ]
    if config.telemetry.metrics_port < 0:
        routes.append(("/metrics", "GET", get_metrics))
    app: ASGIApp = Router(
        [Route(path, Endpoint(gateway, path, method, call)) for path, method, call in routes],
        redirect_slashes=False,
        default=_unknown,
    )
    app = Disconnect(app)
    app = Drain(app, gateway.running)
    app = Authentication(app, gateway.keys, public_models=config.public_models)
    app = Errors(app)
    if config.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-opticnerve-warnings", "retry-after"],
        )
    return RequestScope(app)


async def _unknown(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        raise NotFound(f"there is no {scope['path'][:100]!r} here; see /v1/models and /health")


async def list_models(gateway: Gateway, request: Request, send: Send) -> Response:
    return JSONResponse(gateway.names.cards())


async def get_model(gateway: Gateway, request: Request, send: Send) -> Response:
    return JSONResponse(gateway.names.card(request.path_params["name"]))


async def get_health(gateway: Gateway, request: Request, send: Send) -> Response:
    pipeline = gateway.pipeline
    body = health.health(
        gateway.config,
        pipeline.pairing,
        gateway.admission,
        len(pipeline.encoders.references),
        draining=gateway.draining,
    )
    return JSONResponse(body)


async def get_live(gateway: Gateway, request: Request, send: Send) -> Response:
    return JSONResponse({"status": "live"})


async def get_ready(gateway: Gateway, request: Request, send: Send) -> Response:
    status, body = health.readiness(gateway.pipeline.pairing, draining=gateway.draining)
    return JSONResponse(body, status)


async def get_version(gateway: Gateway, request: Request, send: Send) -> Response:
    return JSONResponse({"name": "opticnerve", "version": __version__})


async def get_metrics(gateway: Gateway, request: Request, send: Send) -> Response:
    return Response(generate_latest(), headers={"content-type": CONTENT_TYPE_LATEST})


async def get_root(gateway: Gateway, request: Request, send: Send) -> Response:
    return JSONResponse(
        {
            "name": "opticnerve",
            "version": __version__,
            "models": list(gateway.names.names),
            "health": "/health",
        }
    )
