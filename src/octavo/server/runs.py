"""The prompts of one HTTP request, answered side by side."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence

from octavo.async_llm import merged
from octavo.errors import OctavoError
from octavo.frontend.beams import BeamSearchParams
from octavo.frontend.inputs import Prepared
from octavo.frontend.outputs import Delta
from octavo.server.service import Service
from octavo.types import RequestOutput


class Runs:
    """Answers to several prompts with the same parameters, by a search if there are ``beams``. `batches` may be called
    once.

    Whatever ends it, a failure of one prompt or the client's leaving, the others are aborted with it.
    """

    def __init__(
        self,
        service: Service,
        prepared: Sequence[Prepared],
        traceparent: str = "",
        beams: BeamSearchParams | None = None,
    ) -> None:
        self._service = service
        self._traceparent = traceparent
        llm = service.llm
        self._generations = [llm.run(one) if beams is None else llm.search(one, beams) for one in prepared]

    @property
    def results(self) -> list[RequestOutput]:
        """One a prompt: everything so far."""
        return [generation.state.snapshot() for generation in self._generations]

    async def batches(self) -> AsyncGenerator[tuple[int, list[Delta]], None]:
        """(number of the prompt, what was added to its outputs since the turn before), as they come."""
        service = self._service
        with service.admitted():
            otherwise = "abort"  # the client left
            for generation in self._generations:
                service.history.started(generation.state)
            try:
                async with contextlib.aclosing(merged(self._generations)) as items:
                    async for item in items:
                        yield item
            except OctavoError:
                otherwise = "error"
                raise
            finally:
                for generation, result in zip(self._generations, self.results, strict=True):
                    params = generation.state.prepared.params
                    service.metrics.finished(result, params, otherwise)
                    if service.tracing is not None:
                        service.tracing.ended(result, params, self._traceparent, otherwise)
                    reason = next((o.finish_reason for o in result.outputs if o.finish_reason), None)
                    service.history.ended(generation.state, result, reason or otherwise)

    async def finish(self) -> list[RequestOutput]:
        """Waits for the end of all."""
        async with contextlib.aclosing(self.batches()) as items:
            async for _ in items:
                pass
        return self.results
