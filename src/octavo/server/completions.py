"""``POST /v1/completions``: continues one or more prompts, each ``n`` times.

Choice ``i * n + k`` is the k-th answer to prompt i.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from octavo.frontend.outputs import Delta
from octavo.server.answers import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
    completion_logprobs,
    name_of,
)
from octavo.server.completion_answer import CompletionAnswer
from octavo.server.endpoint import Endpoint, Job, Origin, Prompts
from octavo.server.protocol import CompletionRequest
from octavo.server.service import Service
from octavo.server.sse import event
from octavo.types import CompletionOutput, RequestOutput


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
        choices = [
            self._choice(i * len(result.outputs) + output.index, result, output)
            for i, result in enumerate(results)
            for output in result.outputs
        ]
        made = self._chunk(choices, self._usage(results))
        made.timings = self._timings(results)
        return made

    def piece(self, number: int, delta: Delta) -> Iterable[bytes]:
        choice = number * (self._body.n or 1) + delta.index
        text = "" if self._body.only_echo else delta.text
        made = self._delta(choice, text, delta)
        if choice not in self._begun:
            self._begun.add(choice)
            if self._body.echo:
                made.text = self._prompt_text(number) + text
            if self._body.return_token_ids:
                made.prompt_token_ids = self._job.prepared[number].prompt_token_ids
        yield event(self._chunk([made], self._tally.add(len(delta.token_ids)) if self._tally else None))

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        job = self._job
        return Completion(id=job.id, created=job.created, model=job.model, choices=choices, usage=usage)

    def _usage(self, results: list[RequestOutput]) -> Usage:
        usage = super()._usage(results)
        if self._body.only_echo:
            usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
        return usage

    def _prompt_text(self, number: int) -> str:
        prepared = self._job.prepared[number]
        return prepared.prompt if prepared.prompt is not None else self._decode(prepared.prompt_token_ids)

    def _decode(self, ids: list[int]) -> str:
        tokenizer = self._job.service.llm.tokenizer
        return tokenizer.decode(ids, skip_special_tokens=False) if tokenizer is not None else ""

    def _delta(self, choice: int, text: str, delta: Delta) -> CompletionChoice:
        return CompletionChoice(
            index=choice,
            text=text,
            logprobs=self._scores(choice, delta) if delta.logprobs else None,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=self._made_ids(delta.token_ids),
        )

    def _scores(self, choice: int, delta: Delta) -> CompletionLogprobs:
        as_ids = bool(self._body.return_tokens_as_token_ids)
        scores = completion_logprobs(delta.token_ids, delta.logprobs or [], as_ids=as_ids)
        before = self._offsets.get(choice, 0)
        scores.text_offset = [before + offset for offset in scores.text_offset]
        self._offsets[choice] = before + sum(map(len, scores.tokens))
        return scores

    def _made_ids(self, token_ids: list[int]) -> list[int] | msgspec.UnsetType:
        """Those that are shown, if any are."""
        if not self._body.return_token_ids:
            return msgspec.UNSET
        return [] if self._body.only_echo else token_ids

    def _choice(self, index: int, result: RequestOutput, output: CompletionOutput) -> CompletionChoice:
        body = self._body
        text = "" if body.only_echo else output.text
        if body.echo:
            text = self._prompt_text(index // len(result.outputs)) + text
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=None if body.logprobs is None else self._logprobs(result, output),
            finish_reason="length" if body.only_echo else output.finish_reason,
            stop_reason=output.stop_reason,
            prompt_logprobs=msgspec.UNSET if body.prompt_logprobs is None else result.prompt_logprobs,
            token_ids=self._made_ids(output.token_ids),
            prompt_token_ids=result.prompt_token_ids if body.return_token_ids else msgspec.UNSET,
        )

    def _logprobs(self, result: RequestOutput, output: CompletionOutput) -> CompletionLogprobs:
        made, as_ids = CompletionLogprobs(), bool(self._body.return_tokens_as_token_ids)
        if self._body.echo:
            whole = output.finish_reason != "abort"  # the end of the server may come before the prompt is computed
            for token, entry in zip(result.prompt_token_ids, result.prompt_logprobs or [], strict=whole):
                unnamed = f"token_id:{token}" if as_ids else self._decode([token])
                name = unnamed if entry is None else name_of(token, entry[token], as_ids)
                made.add(token, entry, name, as_ids=as_ids)
        if not self._body.only_echo:
            for token, entry in zip(output.token_ids, output.logprobs or [], strict=True):
                made.add(token, entry, name_of(token, entry[token], as_ids), as_ids=as_ids)
        return made


ENDPOINT = Endpoint(CompletionRequest, "cmpl-", read, _Answer)
