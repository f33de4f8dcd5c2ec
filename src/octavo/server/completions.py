"""``POST /v1/completions``: continues one or more prompts, each ``n`` times.

Choice ``i * n + k`` is the k-th answer to prompt i.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import msgspec

from octavo.frontend.outputs import Delta
from octavo.server.answers import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Logprobs,
    Usage,
    name_of,
)
from octavo.server.completion_answer import CompletionAnswer
from octavo.server.endpoint import Endpoint, Job, Origin, Prompts
from octavo.server.protocol import CompletionRequest
from octavo.server.service import Service
from octavo.server.sse import event
from octavo.types import CompletionOutput, RequestOutput

Made = TypeVar("Made", Delta, CompletionOutput)


def read(service: Service, body: CompletionRequest, origin: Origin) -> Prompts:
    """What is to be continued."""
    return Prompts(
        prompts=body.prompts(),
        add_special_tokens=body.add_special_tokens is not False,
        clamp_max_tokens=body.max_tokens is None,  # a default is no demand
    )


class _Answer(CompletionAnswer[CompletionRequest]):
    def __init__(self, job: Job[CompletionRequest]) -> None:
        super().__init__(job)
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}  # characters of each choice that log-probabilities have named

    def whole(self, results: list[RequestOutput]) -> Completion:
        results = self._shown(results)
        choices = [
            self._choice(i * len(result.outputs) + output.index, i, result, output)
            for i, result in enumerate(results)
            for output in result.outputs
        ]
        made = self._chunk(choices, Usage.of(results))
        made.timings = self._timings(results)
        return made

    def piece(self, number: int, delta: Delta) -> Iterable[bytes]:
        index = number * (self._body.n or 1) + delta.index
        if self._body.only_echo:
            delta = _hidden(delta)
        choice = self._delta(index, delta)
        if index not in self._begun:
            self._begun.add(index)
            if self._body.echo:
                choice.text = self._prompt_text(number) + choice.text
            if self._body.return_token_ids:
                choice.prompt_token_ids = self._job.prepared[number].prompt_token_ids
        yield event(self._chunk([choice], self._usage_after(len(delta.token_ids))))

    def end(self, results: list[RequestOutput]) -> Iterable[bytes]:
        return super().end(self._shown(results))

    def _shown(self, results: list[RequestOutput]) -> list[RequestOutput]:
        if not self._body.only_echo:
            return results
        return [msgspec.structs.replace(one, outputs=list(map(_hidden, one.outputs))) for one in results]

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        job = self._job
        return Completion(id=job.id, created=job.created, model=job.model, choices=choices, usage=usage)

    def _prompt_text(self, number: int) -> str:
        prepared = self._job.prepared[number]
        return prepared.prompt if prepared.prompt is not None else self._decode(prepared.prompt_token_ids)

    def _decode(self, ids: list[int]) -> str:
        tokenizer = self._job.service.llm.tokenizer
        return tokenizer.decode(ids, skip_special_tokens=False) if tokenizer is not None else ""

    def _delta(self, index: int, delta: Delta) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text=delta.text,
            logprobs=self._next_logprobs(index, delta) if delta.logprobs else None,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self._body.return_token_ids else msgspec.UNSET,
        )

    def _all_logprobs(self, result: RequestOutput, output: CompletionOutput) -> CompletionLogprobs:
        scored: list[tuple[int, Logprobs | None]] = []
        if self._body.echo:  # the end of the server may come before all of the prompt is computed
            scored += zip(result.prompt_token_ids, result.prompt_logprobs or [], strict=False)
        return self._logprobs([*scored, *zip(output.token_ids, output.logprobs or [], strict=True)])

    def _next_logprobs(self, index: int, delta: Delta) -> CompletionLogprobs:
        """Their offsets go on where those of the choice's last piece ended."""
        made = self._logprobs(zip(delta.token_ids, delta.logprobs or [], strict=True))
        before = self._offsets.get(index, 0)
        made.text_offset = [before + offset for offset in made.text_offset]
        self._offsets[index] = before + sum(map(len, made.tokens))
        return made

    def _choice(self, index: int, number: int, result: RequestOutput, output: CompletionOutput) -> CompletionChoice:
        body = self._body
        return CompletionChoice(
            index=index,
            text=self._prompt_text(number) + output.text if body.echo else output.text,
            logprobs=None if body.logprobs is None else self._all_logprobs(result, output),
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            prompt_logprobs=msgspec.UNSET if body.prompt_logprobs is None else result.prompt_logprobs,
            token_ids=output.token_ids if body.return_token_ids else msgspec.UNSET,
            prompt_token_ids=result.prompt_token_ids if body.return_token_ids else msgspec.UNSET,
        )

    def _logprobs(self, scored: Iterable[tuple[int, Logprobs | None]]) -> CompletionLogprobs:
        """Of tokens, each with its candidates; nothing predicts the first one of a prompt."""
        made, as_ids = CompletionLogprobs(), bool(self._body.return_tokens_as_token_ids)
        for token, entry in scored:
            if entry is None:
                name = f"token_id:{token}" if as_ids else self._decode([token])
            else:
                name = name_of(token, entry[token], as_ids)
            made.add(token, entry, name, as_ids=as_ids)
        return made


def _hidden(made: Made) -> Made:
    """Without the token of `CompletionRequest.only_echo`, which is made for the sake of the prompt."""
    reason = made.finish_reason if made.finish_reason in (None, "abort") else "length"
    return msgspec.structs.replace(made, text="", token_ids=[], logprobs=None, finish_reason=reason, stop_reason=None)


ENDPOINT = Endpoint(CompletionRequest, "cmpl-", read, _Answer)
