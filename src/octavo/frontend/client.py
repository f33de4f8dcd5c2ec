"""The one interface between a service and an engine, wherever that engine runs.

`core_client.CoreClient` is the one over ZeroMQ, `balancer.Balancer` shares requests among several such; tests use a
fake. A client never sees text, only token ids.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from octavo.types import EngineInfo, Request, Stats, TokenOutput


@dataclass(frozen=True)
class EngineState:
    """One of the engines behind a client. ``stats`` are the latest that came; ``reason`` says why it is not running."""

    running: bool
    stats: Stats
    reason: str = ""


class EngineClient(Protocol):
    """One engine, or several that look like one. `info` and `stats` are of all together.

    Every accepted request gets exactly one terminal `TokenOutput`, whatever happens to it.

    A refusal by the core (queue full, no memory for the prompt) is a terminal output too: ``finish_reason="error"``
    with the message in ``error`` and the HTTP status in ``status``. Only the death of the engine raises, `EngineDead`.
    """

    @property
    def info(self) -> EngineInfo:
        """What the core said when it was ready."""
        ...

    @property
    def stats(self) -> Stats:
        """The latest statistics that came, with a step's outputs or from `health`."""
        ...

    def engines(self) -> Sequence[EngineState]:
        """Each engine behind this client, as far as it is known without asking."""
        ...

    async def submit(self, request: Request) -> AsyncGenerator[list[TokenOutput], None]:
        """Sends ``request``; the iterator ends after the terminal output. The id must not be in use.

        Each turn gives all that came since the one before, at least one output: more than one where the loop is busy.

        Raises `EngineDead`, here or while iterating. Dropping the iterator does not abort: call `abort`.
        """
        ...

    async def abort(self, ids: Sequence[str]) -> None:
        """Ends requests early; unknown and finished ids are ignored. Each ends with ``finish_reason="abort"``."""
        ...

    async def health(self) -> Stats:
        """Statistics from a turn of the core's loop; raises `EngineDead` when there is none in time."""
        ...

    async def reset_prefix_cache(self) -> None:
        """Forgets all cached prefixes; requests that run keep their pages, which nobody else finds any more."""
        ...

    async def close(self) -> None:
        """Stops the engine and waits for it. May be called twice."""
        ...
