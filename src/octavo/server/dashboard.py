"""Pages for people: what the server is doing, live, and a chat. Each is one file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import re
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

import octavo
from octavo.server.answers import json_response
from octavo.server.decoding import decode_query
from octavo.server.history import Span
from octavo.server.service import Service
from octavo.types import Stats

PAGES = Path(__file__).parent / "pages"


class DataQuery(msgspec.Struct):
    """The query of ``/dashboard/data``."""

    after: Annotated[int, Meta(ge=0, lt=10**15, description="requests that ended after this number")] = 0


class EngineView(msgspec.Struct, kw_only=True):
    """One engine; ``stats`` are the latest that came from it."""

    running: bool
    reason: str
    stats: Stats


class DashboardData(msgspec.Struct, kw_only=True):
    """An answer to ``/dashboard/data``. Times are seconds since the start of this API process."""

    now: float
    model: str
    version: str
    device: str
    dtype: str
    max_model_len: int
    max_num_seqs: int
    page_size: int
    engines: list[EngineView]
    running: list[Span]
    ended: list[Span]


async def data(service: Service, request: Request) -> Response:
    """The state of the engines, the requests that run, and those that ended after number ``after``."""
    after = decode_query(request, DataQuery).after
    await service.refresh_stats()
    info = service.llm.info
    made = DashboardData(
        now=service.history.now(),
        model=service.names[0],
        version=octavo.__version__,
        device=info.device,
        dtype=info.dtype,
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        page_size=info.page_size,
        engines=[EngineView(running=e.running, reason=e.reason, stats=e.stats) for e in service.llm.client.engines()],
        running=service.history.running(),
        ended=service.history.after(after),
    )
    return json_response(made)


async def dashboard(service: Service, request: Request) -> Response:
    """The page that shows `data`."""
    return _page("dashboard.html")


async def chat(service: Service, request: Request) -> Response:
    """A page to talk with the model."""
    return _page("chat.html")


@cache
def _page(name: str) -> HTMLResponse:
    """A page of `PAGES`. Its policy lets its own script run and talk to this server, and nothing else."""
    text = (PAGES / name).read_text(encoding="utf-8")
    digests = " ".join(
        f"'sha256-{_digest(script)}'" for script in re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    )
    policy = (
        f"default-src 'none'; script-src {digests}; style-src 'unsafe-inline'; connect-src 'self'; img-src data:;"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(text, headers={"content-security-policy": policy, "x-content-type-options": "nosniff"})


def _digest(script: str) -> str:
    return base64.b64encode(sha256(script.encode()).digest()).decode()
