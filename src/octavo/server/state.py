"""For load balancers: whether the server takes requests, and how many it has."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.errors import EngineDead, Overloaded
from octavo.server.answers import json_response
from octavo.server.errors import shutting_down
from octavo.server.service import Service


class Load(msgspec.Struct, kw_only=True):
    """An answer to ``/load``. ``server_load`` counts the requests of this API process that are being answered."""

    server_load: int
    running: int
    waiting: int
    kv_cache_usage: float  # 0 to 1


async def ready(service: Service, request: Request) -> Response:
    """200 if a request would be taken now; 503 if the engine does not answer, its queue is full, or all ends."""
    if service.closing:
        raise shutting_down()
    try:
        stats = await service.llm.health()
    except EngineDead as error:
        raise Overloaded(error.cause, error.remedy) from None
    if service.max_waiting is not None and stats.waiting >= service.max_waiting:
        raise Overloaded(f"{stats.waiting} requests are waiting, the limit.")
    return Response()


async def load(service: Service, request: Request) -> Response:
    """How much there is to do, from a turn of the engine's loop."""
    stats = await service.llm.health()
    used = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
    made = Load(server_load=service.active, running=stats.running, waiting=stats.waiting, kv_cache_usage=used)
    return json_response(made)
