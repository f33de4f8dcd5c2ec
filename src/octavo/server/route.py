"""What the table of routes is made of."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

if TYPE_CHECKING:
    from octavo.server.endpoint import Endpoint
    from octavo.server.service import Service

Handler = Callable[["Service", Request], Awaitable[ASGIApp]]


@dataclass(frozen=True)
class Route:
    """``body`` and ``answer`` are the types of the JSON that comes and goes, ``event`` that of a stream's events.
    ``query`` is a struct of the parameters of the query.

    ``answer`` is a media type where it is no JSON, and None where there is no body. ``form`` names the fields of a
    multipart body. ``endpoint`` is set where the handler asks the model.
    """

    method: str
    path: str
    handler: Handler
    text: str
    body: Any = None
    answer: Any = None
    event: Any = None
    form: tuple[str, ...] = ()
    query: type[msgspec.Struct] | None = None
    endpoint: Endpoint[Any] | None = None


def endpoints_of(routes: Iterable[Route]) -> dict[str, Endpoint[Any]]:
    """Those that generate text, by path."""
    return {route.path: route.endpoint for route in routes if route.endpoint is not None}
