"""From what the core sends to what a user sees: text, log-probabilities, reasons for the end, n outputs as one.

Two forms: a `Delta` for each step, cheap, for streams; and `RequestOutput`, cumulative, made only when asked for.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

import msgspec

from octavo.errors import OctavoError, Overloaded, RequestError
from octavo.frontend.detokenize import Detokenizer, TextDecoder
from octavo.frontend.inputs import Prepared, unpack
from octavo.types import CompletionOutput, Logprob, RequestMetrics, RequestOutput, TokenLogprobs, TokenOutput

Logprobs = dict[int, Logprob]


class Delta(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one step added to one of a request's outputs.

    ``text`` lags behind ``token_ids`` while a character is unfinished or a stop string may be coming; the pieces add up
    to the final text. The last delta of an output has ``finish_reason``.
    """

    request_id: str
    index: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[Logprobs] | None = None  # one entry a token, when asked for
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class _Output:
    """One of the n outputs, growing."""

    def __init__(self, index: int, prepared: Prepared, decoder: TextDecoder | None) -> None:
        params = prepared.params
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[Logprobs] | None = None if params.logprobs is None else []
        self.cumulative = 0.0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.embedding: list[float] | None = None
        self.detokenizer: Detokenizer | None = None
        if decoder is not None and params.detokenize:
            self.detokenizer = Detokenizer(decoder, prepared.prompt_token_ids, params, keep=prepared.kept_ids)

    def take_text(self) -> str:
        final = self.finish_reason is not None
        return self.detokenizer.take(final=final) if self.detokenizer else ""

    def snapshot(self) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text=self.detokenizer.text() if self.detokenizer else "",
            token_ids=list(self.token_ids),
            cumulative_logprob=None if self.logprobs is None else self.cumulative,
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            embedding=self.embedding,
        )


class RequestState:
    """A request of a user and its outputs so far.

    ``eos_ids`` end an output with no ``stop_reason``; other tokens that end one are its ``stop_reason``.
    """

    def __init__(self, prepared: Prepared, decoder: TextDecoder | None, eos_ids: Collection[int] = ()) -> None:
        self.prepared = prepared
        self.num_cached_tokens = 0
        self.prompt_logprobs: list[Logprobs | None] | None = None
        if prepared.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]  # nothing predicts the first token
        self.metrics = RequestMetrics(arrival_time=prepared.arrival_time)
        self._decoder = decoder
        self._eos_ids = frozenset() if prepared.params.ignore_eos else frozenset(eos_ids)
        self._outputs = [_Output(i, prepared, decoder) for i in range(len(prepared.requests))]
        self._index = {request.id: i for i, request in enumerate(prepared.requests)}
        self._unfinished = len(self._outputs)

    @property
    def finished(self) -> bool:
        return not self._unfinished

    @property
    def generated(self) -> int:
        """Tokens so far, over all outputs."""
        return sum(len(output.token_ids) for output in self._outputs)

    def unfinished_ids(self) -> list[str]:
        """Ids, as the core knows them, of the outputs that have not ended."""
        return [r.id for r, o in zip(self.prepared.requests, self._outputs, strict=True) if o.finish_reason is None]

    def process(self, output: TokenOutput) -> Delta | None:
        """Takes a step's tokens of one output; None if they change nothing that a user sees.

        When the delta has a ``finish_reason`` and ``output`` has none, a stop string was found: the caller aborts
        ``output.id``. What the core says of that output from then on is ignored here.
        Raises the error that ended the request, if one did: `RequestError`, `Overloaded` or another `OctavoError`.
        """
        one = self._outputs[self._index[output.id]]
        if one.finish_reason is not None:
            return None
        if output.finish_reason == "error":
            raise error_of(output)
        self._take_prompt(output)
        count = self._take_tokens(one, output)
        self._finish(one, output)
        text = one.take_text()
        if not count and not text and one.finish_reason is None:
            return None
        return Delta(
            request_id=self.prepared.id,
            index=one.index,
            text=text,
            token_ids=one.token_ids[-count:] if count else [],
            logprobs=None if one.logprobs is None else one.logprobs[-count:] if count else [],
            finish_reason=one.finish_reason,
            stop_reason=one.stop_reason,
        )

    def snapshot(self) -> RequestOutput:
        """Everything so far. The lists of its outputs are the caller's; those of the prompt are shared."""
        return RequestOutput(
            request_id=self.prepared.id,
            prompt=self.prepared.prompt,
            prompt_token_ids=self.prepared.prompt_token_ids,
            outputs=[o.snapshot() for o in self._outputs],
            finished=self.finished,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=self.num_cached_tokens,
            metrics=self.metrics,
        )

    def _take_prompt(self, output: TokenOutput) -> None:
        if output.cached and self._index[output.id] == 0:
            self.num_cached_tokens = output.cached
        if output.prompt_logprobs and self.prompt_logprobs is not None and self._index[output.id] == 0:
            self.prompt_logprobs = [*self.prompt_logprobs, *map(self._logprobs, output.prompt_logprobs)]

    def _take_tokens(self, one: _Output, output: TokenOutput) -> int:
        """Appends tokens up to a stop string; returns how many."""
        tokens = output.token_ids
        if output.embedding:
            one.embedding = unpack(output.embedding, "f").tolist()
        if (tokens or output.embedding) and self.metrics.first_token_time is None:
            now = self.metrics.first_token_time = time.monotonic()
            self.metrics.scheduled_time = min(self.metrics.arrival_time + output.queued, now)
        # The token that ended the output has no text, unless it is asked for; core and frontend agree on its place.
        ends = output.finish_reason == "stop" and not self.prepared.params.include_stop_str_in_output
        silent = len(tokens) - 1 if ends else len(tokens)
        for at, token in enumerate(tokens):
            one.token_ids.append(token)
            if one.logprobs is not None and at < len(output.logprobs):
                one.cumulative += output.logprobs[at].logprob
                one.logprobs.append(self._logprobs(output.logprobs[at]))
            if one.detokenizer is not None and at < silent and one.detokenizer.push(token):
                return at + 1
        return len(tokens)

    def _finish(self, one: _Output, output: TokenOutput) -> None:
        text = one.detokenizer
        if text is not None and text.stopped is None and output.finish_reason is not None:
            text.finish()
        if text is not None and text.stopped is not None:
            one.finish_reason, one.stop_reason = "stop", text.stopped
        elif output.finish_reason is not None:
            one.finish_reason = output.finish_reason
            if output.finish_reason == "stop" and output.token_ids and one.token_ids[-1] not in self._eos_ids:
                one.stop_reason = one.token_ids[-1]
        if one.finish_reason is not None:
            self._unfinished -= 1
            if not self._unfinished:
                self.metrics.finished_time = time.monotonic()

    def _logprobs(self, entry: TokenLogprobs) -> Logprobs:
        """The token itself and the best ones, in that order, as vLLM's dict."""
        name = self._decoder.name if self._decoder is not None and self.prepared.params.detokenize else None
        found = {entry.token: Logprob(entry.logprob, entry.rank, name(entry.token) if name else None)}
        for rank, (token, logprob) in enumerate(zip(entry.top_ids, entry.top_logprobs, strict=True), 1):
            if token not in found:
                found[token] = Logprob(logprob, rank, name(token) if name else None)
        return found


class OutputProcessor:
    """The states of all requests of one engine, for a caller that gets the outputs of many requests at once."""

    def __init__(self, decoder: TextDecoder | None, eos_ids: Collection[int] = ()) -> None:
        self._decoder = decoder
        self._eos_ids = eos_ids
        self._states: dict[str, RequestState] = {}  # by the core's ids

    def add(self, prepared: Prepared) -> RequestState:
        """Expects outputs of ``prepared`` from now on."""
        state = RequestState(prepared, self._decoder, self._eos_ids)
        self._states.update((request.id, state) for request in prepared.requests)
        return state

    @property
    def pending(self) -> int:
        """How many of the core's requests have not ended."""
        return len(self._states)

    def process(self, outputs: Iterable[TokenOutput]) -> tuple[list[tuple[RequestState, Delta]], list[str]]:
        """(what changed, ids to abort because of a stop string). Outputs of unknown ids are ignored.

        Raises the error of the first request that ended with one; call `drop` for what is to be given up with it.
        """
        changed: list[tuple[RequestState, Delta]] = []
        aborts: list[str] = []
        for output in outputs:
            state = self._states.get(output.id)
            if state is None:
                continue
            if output.finish_reason is not None:
                del self._states[output.id]
            delta = state.process(output)
            if delta is None:
                continue
            changed.append((state, delta))
            if delta.finish_reason is not None and output.finish_reason is None:
                del self._states[output.id]
                aborts.append(output.id)
        return changed, aborts

    def drop(self) -> list[str]:
        """Forgets every request; returns the ids to abort."""
        ids = list(self._states)
        self._states.clear()
        return ids


def error_of(output: TokenOutput) -> OctavoError:
    """The exception for a terminal output that carries an error, by its HTTP status."""
    if output.status == Overloaded.status:
        return Overloaded(output.error, "")
    if output.status == RequestError.status:
        return RequestError(output.error)
    return OctavoError(output.error)
