"""The routes, and the guard around all of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from starlette.requests import Request
from starlette.routing import Route, Router
from starlette.types import ASGIApp

from octavo.server import admin, chat, completions
from octavo.server.anthropic import messages
from octavo.server.guard import MAX_BODY_BYTES, Guard
from octavo.server.responses import routes as responses
from octavo.server.service import Service

Handler = Callable[[Service, Request], Awaitable[ASGIApp]]

ROUTES: list[tuple[str, str, Handler]] = [
    ("POST", "/v1/completions", completions.ENDPOINT.handle),
    ("POST", "/v1/chat/completions", chat.ENDPOINT.handle),
    ("POST", "/v1/responses", responses.create),
    ("GET", "/v1/responses/{id}", responses.retrieve),
    ("DELETE", "/v1/responses/{id}", responses.delete),
    ("POST", "/v1/responses/{id}/cancel", responses.cancel),
    ("GET", "/v1/responses/{id}/input_items", responses.input_items),
    ("POST", "/v1/messages", messages.ENDPOINT.handle),
    ("POST", "/v1/messages/count_tokens", messages.count_tokens),
    ("GET", "/v1/models", admin.models),
    ("GET", "/v1/models/{name:path}", admin.model),
    ("POST", "/tokenize", admin.tokenize),
    ("POST", "/detokenize", admin.detokenize),
    ("GET", "/health", admin.health),
    ("GET", "/ping", admin.ping),
    ("POST", "/ping", admin.ping),
    ("GET", "/version", admin.version),
    ("GET", "/metrics", admin.metrics),
    ("POST", "/reset_prefix_cache", admin.reset_prefix_cache),
]


def build_app(
    service: Service, *, api_key: str | None = None, max_body: int = MAX_BODY_BYTES, log_requests: bool = False
) -> ASGIApp:
    """The whole server as one ASGI application."""
    routes = [Route(path, partial(handler, service), methods=[method]) for method, path, handler in ROUTES]
    router = Router(routes, redirect_slashes=False)
    return Guard(router, api_key=api_key, max_body=max_body, log_requests=log_requests)
