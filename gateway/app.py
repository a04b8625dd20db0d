"""The gateway's ASGI application: the routes of its APIs, and the middleware around them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.api import apply_template, chat, completions, health, models, openapi, tokens
from gateway.api.anthropic import routes as anthropic
from gateway.api.http import send_error
from gateway.api.models import ServedNames
from gateway.api.realtime import route as realtime
from gateway.api.responses import routes as responses
from gateway.api.routing import WARNINGS
from gateway.api.schemas.parsing import problem_text
from gateway.api.unserved import not_found
from gateway.edge.admission import Admission
from gateway.edge.auth import Keys, needs_key
from gateway.edge.connections import Connections
from gateway.edge.middleware import (
    Authentication,
    Cancellation,
    Errors,
    PageGuard,
    RequestScope,
)
from gateway.edge.rates import HEADERS
from gateway.pipeline import Pipeline
from gateway.playground import pages
from opticnerve import addresses
from opticnerve.config import GatewayConfig
from opticnerve.errors import InvalidRequest, MethodNotAllowed
from opticnerve.process import Running

APIS = (
    chat.router,
    completions.router,
    anthropic.router,
    realtime.router,
    responses.router,
    apply_template.router,
    tokens.router,
    models.router,
    health.router,
    openapi.router,
    pages.router,
)


@dataclass
class Gateway:
    """The objects that all routes share; one per process."""

    config: GatewayConfig
    keys: Keys
    connections: Connections
    admission: Admission
    names: ServedNames
    pipeline: Pipeline
    running: Running


class Api(FastAPI):
    """The routes, without FastAPI's own middleware, which would answer errors before ours could.
    FastAPI's exceptions are translated to OpticNerveError."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
        self.state.gateway = gateway
        self._keyed = gateway.keys.required
        self._public_models = gateway.config.public_models
        self.router.default = _not_found
        for router in APIS:
            self.router.routes.extend(router.routes)
        if gateway.config.telemetry.metrics_port < 0:
            self.router.routes.extend(health.metrics_router.routes)

    def build_middleware_stack(self) -> ASGIApp:
        return AsyncExitStackMiddleware(self.router)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except RequestValidationError as error:
            problem = error.errors()[0]
            param = str(problem["loc"][-1])
            raise InvalidRequest(f"{param}: {problem_text(problem)}", param=param) from error
        except HTTPException as error:
            if error.status_code != 405:
                raise not_found(scope["path"], self.routes) from error
            refusal, allowed = _not_allowed(scope, error)
            await send_error(refusal, scope, receive, send, allow=allowed)

    @functools.cached_property
    def document(self) -> bytes:
        """The OpenAPI document as JSON, generated on first use."""
        return openapi.describe(self.routes, self._needs_key)

    def _needs_key(self, path: str) -> bool:
        return self._keyed and needs_key(path, public_models=self._public_models)


async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """What the router calls for a path without a route, HTTP or WebSocket."""
    raise not_found(scope["path"], scope["app"].routes)


def _not_allowed(scope: Scope, error: HTTPException) -> tuple[MethodNotAllowed, str]:
    """The error, and the methods that are allowed."""
    allowed = (error.headers or {}).get("Allow", "")
    also = ", HEAD" if allowed == "GET" else ""
    method = scope["state"]["method"][:20]  # HEAD is served as GET.
    refusal = MethodNotAllowed(f"{scope['route'].path} takes {allowed}, not {method}")
    return refusal, allowed + also


def make_app(gateway: Gateway) -> ASGIApp:
    """The application, outermost layer first: scope, CORS, errors, pages, keys,
    cancellation, routes."""
    config = gateway.config
    app: ASGIApp = Cancellation(Api(gateway), gateway.running)
    app = Authentication(app, gateway.keys, public_models=config.public_models)
    host = config.listen_host
    local = not gateway.keys.required and addresses.is_loopback(host)
    app = PageGuard(app, {host, *config.allowed_hosts}, config.cors_origins, local=local)
    app = Errors(app)
    if config.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "request-id", WARNINGS, "retry-after", *HEADERS],
        )
    return RequestScope(app)
