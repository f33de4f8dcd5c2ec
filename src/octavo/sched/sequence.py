"""One request inside the scheduler, and the only functions that move it forward.

    0          computed              len(tokens)   known
    ├──────────────┼──────────────────────┼──────────┤
    │ K/V in pages │ todo: a step computes the next of these
    │ (or in flight)                      │ inflight: sampled, value not read yet

There are no phases: a prompt, its chunks, a recomputation and a decode all close the gap between computed and known.
An item with drafts computes and samples these, too; what turns out not to hold was never known or computed.
"""

from __future__ import annotations

import time
from array import array
from enum import Enum

from octavo.cache.pages import Page
from octavo.cache.prefix import split_keys
from octavo.sched.drafts import Lookup
from octavo.types import FinishReason, Request


class Status(Enum):
    """Where a request is. It may go from RUNNING back to WAITING, when it is preempted; DONE is for good."""

    WAITING = 0
    RUNNING = 1
    DONE = 2


class SequenceState:
    """State of one request. ``epoch`` counts admissions: results of an earlier epoch no longer concern the pages."""

    __slots__ = (
        "cached",
        "capacity",
        "committed",
        "computed",
        "epoch",
        "held",
        "id",
        "inflight",
        "keys",
        "limit",
        "lookup",
        "order",
        "pages",
        "preemptions",
        "prompt_len",
        "published",
        "queued",
        "row",
        "salt",
        "sampling",
        "scored",
        "status",
        "tokens",
    )

    def __init__(self, request: Request, order: int, max_len: int) -> None:
        tokens = array("i")
        tokens.frombytes(request.token_ids)
        self.id = request.id
        self.sampling = request.sampling
        self.salt = request.salt
        self.order = (request.priority, order)  # smaller runs first and is preempted last
        self.tokens: list[int] = tokens.tolist()
        self.prompt_len = len(self.tokens)
        self.limit = min(self.prompt_len + request.sampling.max_tokens, max_len)  # tokens at which it ends
        self.keys = split_keys(request.page_hashes)  # keys of full pages, as far as anyone needed them
        self.status = Status.WAITING
        self.row = -1
        self.pages: list[Page] = []
        self.capacity = 0  # tokens that its pages hold
        self.computed = 0  # tokens whose K/V is computed or launched
        self.committed = 0  # … and whose step has been read back
        self.published = 0  # pages offered for reuse
        self.inflight = 0
        self.scored = 0  # prompt log-probabilities sent
        self.cached = 0
        self.queued = time.monotonic()  # when it came; from the first step on, the seconds until then
        self.epoch = 0
        self.preemptions = 0
        self.held = False  # waits until `Scheduler.resume`
        self.lookup: Lookup | None = None  # its drafts, once it has had any looked for

    @property
    def known(self) -> int:
        return len(self.tokens) + self.inflight

    @property
    def todo(self) -> int:
        return self.known - self.computed

    @property
    def ready(self) -> bool:
        """Whether a waiting one may run: it is not held, and no value of its tokens is still to be read."""
        return not (self.inflight or self.held)

    def start(self, row: int, hit: list[Page], page_size: int) -> None:
        """Admission to ``row``, with the pages that the prefix cache had."""
        self.status = Status.RUNNING
        self.row = row
        self.epoch += 1
        self.pages = list(hit)
        self.computed = self.committed = self.capacity = len(hit) * page_size
        self.published = len(hit)
        if self.preemptions == 0:
            self.cached = self.computed
            self.queued = time.monotonic() - self.queued

    def advance(self, count: int) -> bool:
        """``count`` more tokens are launched; returns whether that reaches the end of the known: one is sampled."""
        self.computed += count
        if self.computed < len(self.tokens) + self.inflight:
            return False
        self.inflight += 1
        return True

    @property
    def end(self) -> FinishReason | None:
        """What the newest token, a sampled one, ends it for."""
        length, end_ids = len(self.tokens), self.sampling.end_ids
        if end_ids and self.tokens[-1] in end_ids and length - self.prompt_len >= self.sampling.min_tokens:
            return "stop"
        return "length" if length >= self.limit else None

    def preempt(self) -> list[Page]:
        """Back to waiting; returns the pages to release. A token in flight stays: it was computed rightly."""
        self.status = Status.WAITING
        self.preemptions += 1
        return self._leave()

    def finish(self) -> list[Page]:
        """The end; returns the pages to release."""
        self.status = Status.DONE
        return self._leave()

    def _leave(self) -> list[Page]:
        pages, self.pages = self.pages, []
        self.row = -1
        self.epoch += 1
        self.computed = self.committed = self.published = self.capacity = 0
        return pages
