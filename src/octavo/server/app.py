"""The routes, and the guard around all of them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.routing import Route as HttpRoute
from starlette.routing import Router
from starlette.types import ASGIApp

from octavo.server import admin, answers, chat, completions, dashboard, embeddings, openapi, render
from octavo.server import protocol as bodies
from octavo.server.anthropic import body as anthropic
from octavo.server.anthropic import messages
from octavo.server.batches import routes as batches
from octavo.server.batches.store import Batch
from octavo.server.files import routes as files
from octavo.server.files.store import FileObject
from octavo.server.guard import MAX_BODY_BYTES, Guard
from octavo.server.keys import Keys
from octavo.server.responses import answer
from octavo.server.responses import body as response
from octavo.server.responses import events as response_events
from octavo.server.responses import routes as responses
from octavo.server.route import Handler, Route
from octavo.server.service import Service

PROMETHEUS = "text/plain"
DOCS = frozenset({"/docs", "/openapi.json"})
NOBODY = Keys()

ROUTES = (
    Route(
        "POST", "/v1/completions", completions.ENDPOINT.handle, "Continue prompts.",
        body=bodies.CompletionRequest, answer=answers.Completion, event=answers.Completion,
        endpoint=completions.ENDPOINT,
    ),
    Route(
        "POST", "/v1/chat/completions", chat.ENDPOINT.handle, "Answer a conversation.",
        body=bodies.ChatRequest, answer=answers.ChatCompletion, event=answers.ChatChunk, endpoint=chat.ENDPOINT,
    ),
    Route(
        "POST", "/v1/embeddings", embeddings.ENDPOINT.handle, "Embed texts.",
        body=bodies.EmbeddingRequest, answer=answers.Embeddings, endpoint=embeddings.ENDPOINT,
    ),
    Route(
        "POST", "/v1/responses", responses.create, "Answer items of input with items of output.",
        body=response.ResponsesRequest, answer=response.Response, event=response_events.AnyEvent,
        endpoint=answer.ENDPOINT,
    ),
    Route("GET", "/v1/responses/{id}", responses.retrieve, "A stored response.", answer=response.Response),
    Route("DELETE", "/v1/responses/{id}", responses.delete, "Forget a stored response.", answer=response.Deleted),
    Route(
        "POST", "/v1/responses/{id}/cancel", responses.cancel, "Stop a response in the background.",
        answer=response.Response,
    ),
    Route(
        "GET", "/v1/responses/{id}/input_items", responses.input_items, "What a stored response was asked.",
        answer=answers.Page[dict[str, Any]],
    ),
    Route(
        "POST", "/v1/messages", messages.ENDPOINT.handle, "Answer a conversation as Anthropic's API does.",
        body=anthropic.MessagesRequest, answer=anthropic.Message, event=anthropic.Event, endpoint=messages.ENDPOINT,
    ),
    Route(
        "POST", "/v1/messages/count_tokens", messages.count_tokens, "Count the tokens of a message's prompt.",
        body=anthropic.CountTokensRequest, answer=anthropic.TokenCount,
    ),
    Route(
        "POST", "/v1/files", files.upload, "Upload a file for a batch.", answer=FileObject, form=("file", "purpose")
    ),
    Route(
        "GET", "/v1/files", files.listing, "The files, the latest first.",
        query=files.FileQuery, answer=answers.Page[FileObject],
    ),
    Route("GET", "/v1/files/{id}", files.retrieve, "What is known of a file.", answer=FileObject),
    Route("DELETE", "/v1/files/{id}", files.delete, "Delete a file.", answer=files.FileDeleted),
    Route("GET", "/v1/files/{id}/content", files.content, "A file's content.", answer="application/octet-stream"),
    Route(
        "POST", "/v1/batches", batches.create, "Work on the lines of a file, after everything else.",
        body=batches.BatchRequest, answer=Batch,
    ),
    Route(
        "GET", "/v1/batches", batches.listing, "The batches, the latest first.",
        query=batches.BatchQuery, answer=answers.Page[Batch],
    ),
    Route("GET", "/v1/batches/{id}", batches.retrieve, "The state of a batch.", answer=Batch),
    Route("POST", "/v1/batches/{id}/cancel", batches.cancel, "Stop a batch.", answer=Batch),
    Route("GET", "/v1/models", admin.models, "The models that are served.", answer=answers.ModelList),
    Route("GET", "/v1/models/{name:path}", admin.model, "One of them.", answer=answers.ModelCard),
    Route(
        "POST", "/render", render.render, "The prompt that a request becomes.",
        body=render.RenderRequest, answer=render.Rendered,
    ),
    Route(
        "POST", "/tokenize", admin.tokenize, "Token ids of a text or of a conversation.",
        body=bodies.TokenizeRequest, answer=answers.Tokenized,
    ),
    Route(
        "POST", "/detokenize", admin.detokenize, "The text of token ids.",
        body=bodies.DetokenizeRequest, answer=answers.Detokenized,
    ),
    Route("GET", "/health", admin.health, "200 if a turn of the engine's loop answers."),
    Route("GET", "/ready", admin.ready, "200 if a request would be taken now."),
    Route("GET", "/load", admin.load, "How much there is to do.", answer=answers.Load),
    Route("GET", "/ping", admin.ping, "200 if the API process answers."),
    Route("POST", "/ping", admin.ping, "The same."),
    Route("GET", "/version", admin.version, "The version.", answer=answers.Version),
    Route("GET", "/metrics", admin.metrics, "Metrics for Prometheus.", answer=PROMETHEUS),
    Route(
        "POST", "/reset_prefix_cache", admin.reset_prefix_cache, "Forget cached prefixes.", answer=answers.Success
    ),
    Route("GET", "/", dashboard.chat, "A page to talk with the model.", answer="text/html"),
    Route("GET", "/dashboard", dashboard.dashboard, "A page that shows what goes on.", answer="text/html"),
    Route(
        "GET", "/dashboard/data", dashboard.data, "What that page shows.",
        query=dashboard.DataQuery, answer=dashboard.DashboardData,
    ),
    Route("GET", "/openapi.json", openapi.openapi, "This description.", answer=dict),
    Route("GET", "/docs", openapi.docs, "This description as a page.", answer="text/html"),
)  # fmt: skip


def build_app(
    service: Service,
    *,
    keys: Keys = NOBODY,
    max_body: int = MAX_BODY_BYTES,
    log_requests: bool = False,
    echo_ids: bool = False,
    without: frozenset[str] = frozenset(),
) -> ASGIApp:
    """The whole server as one ASGI application, ``without`` the routes of these paths."""
    service.routes = tuple(route for route in ROUTES if route.path not in without)
    paths: dict[str, dict[str, Handler]] = {}
    for route in service.routes:
        paths.setdefault(route.path, {})[route.method] = route.handler
    routes = [
        HttpRoute(path, partial(_handle, service, handlers), methods=[*handlers]) for path, handlers in paths.items()
    ]
    router = Router(routes, redirect_slashes=False)
    return Guard(router, keys=keys, max_body=max_body, log_requests=log_requests, echo_ids=echo_ids)


async def _handle(service: Service, handlers: Mapping[str, Handler], request: Request) -> ASGIApp:
    """By method; HEAD is GET without the body, which the HTTP server leaves out."""
    return await handlers["GET" if request.method == "HEAD" else request.method](service, request)
