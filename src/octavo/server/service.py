"""What the handlers share: the engine, the names it is served under, and whether requests are still taken."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.config import ModelOptions
from octavo.errors import EngineDead
from octavo.frontend.parse.registry import AUTO, Formats, special_ids
from octavo.server.errors import shutting_down, unknown_model
from octavo.server.files.store import FileStore
from octavo.server.history import History
from octavo.server.metrics import Metrics
from octavo.server.responses.store import ResponseStore
from octavo.server.route import Route, endpoints_of
from octavo.server.tracing import Tracing

if TYPE_CHECKING:
    from octavo.async_llm import AsyncLLM
    from octavo.server.endpoint import Endpoint

STATS_SECONDS = 1.0  # how long to wait for fresh statistics before the last ones are taken


class Service:
    """One engine behind one server. ``names[0]`` is the name that answers have by default; others are accepted too."""

    def __init__(
        self,
        llm: AsyncLLM,
        names: tuple[str, ...],
        formats: Formats | None = None,
        *,
        max_waiting: int | None = None,
        files: FileStore | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """``formats`` are those of tool calls and reasoning; default: what the model's template tells.

        ``max_waiting`` is how many requests may wait in the engine, if that is known; without ``files`` there are no
        batches.
        """
        self.llm = llm
        self.names = names
        self.shown = (names[0], *(name for name in names[1:] if not Path(name).exists()))  # a path is nobody's business
        self.formats = formats or formats_of(llm)
        self._kept_ids = [special_ids(llm.tokenizer, self.formats.markers(tools=tools)) for tools in (False, True)]
        self.metrics = Metrics(names[0])
        self.history = History()
        self.tracing = tracing
        self.responses = ResponseStore()
        self.background: dict[str, asyncio.Task[None]] = {}  # responses that nobody waits for
        self.files = files
        self.batches: dict[str, asyncio.Task[None]] = {}
        self.closing = False
        self.max_waiting = max_waiting
        self.routes: tuple[Route, ...] = ()  # set once, by `app.build_app` or `run_batch`
        self._active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def active(self) -> int:
        """Requests that are being answered."""
        return self._active

    @cached_property
    def endpoints(self) -> dict[str, Endpoint[Any]]:
        """Those that ask the model, by path."""
        return endpoints_of(self.routes)

    def model(self, wanted: str | None) -> str:
        """The name to answer with; raises `ApiError` (404) for a model that is not served."""
        if wanted is not None and wanted not in self.names:
            raise unknown_model(wanted[:200], self.names[0])
        return wanted or self.names[0]

    def kept_ids(self, *, tools: bool) -> frozenset[int]:
        """Special tokens that `formats` needs the text of."""
        return self._kept_ids[tools]

    async def refresh_stats(self) -> None:
        """Asks the engines for their statistics; those that do not answer soon keep their last ones."""
        with contextlib.suppress(EngineDead, TimeoutError):
            await asyncio.wait_for(self.llm.health(), STATS_SECONDS)

    @contextlib.contextmanager
    def admitted(self) -> Iterator[None]:
        """Around the work on one request; raises `Overloaded` once the server is shutting down."""
        if self.closing:
            raise shutting_down()
        self._active += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    async def drained(self, seconds: float) -> bool:
        """Takes no more requests and waits for those that run; False if some still do after ``seconds``."""
        self.closing = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            return False
        return True


def formats_of(llm: AsyncLLM, *, tool: str = AUTO, reasoning: str = AUTO) -> Formats:
    """The formats with these names, else those that the model's templates and architecture tell."""
    return Formats.of(llm.renderer.sources, llm.architecture, tool=tool, reasoning=reasoning)


def served_names(model: ModelOptions, given: str | None) -> tuple[str, ...]:
    """The names of ``--served-model-name`` (separated by commas), else the model's; of a local one its last part first.

    A path tells about the machine, so it is accepted in requests but not shown.
    """
    names = [name.strip() for name in (given or "").split(",") if name.strip()]
    if names:
        return tuple(names)
    path = Path(model.model)
    return (path.name, model.model) if path.exists() and path.name else (model.model,)
