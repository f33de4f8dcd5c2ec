"""``POST /v1/completions``."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from octavo.frontend.inputs import Prepared, Prompt
from octavo.frontend.outputs import Delta
from octavo.server.protocol import CompletionRequest, decode
from octavo.server.responses import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
    completion_logprobs,
    name_of,
    now,
)
from octavo.server.runs import Runs
from octavo.server.service import Service
from octavo.server.sse import EventStream, event, while_connected
from octavo.types import CompletionOutput, RequestOutput, SamplingParams


async def create(service: Service, request: Request) -> ASGIApp:
    """Continues one or more prompts, each ``n`` times; choice ``i * n + k`` is the k-th answer to prompt i."""
    body = decode(await request.body(), CompletionRequest)
    body.check()
    model = service.model(body.model)
    id = f"cmpl-{request.scope['request_id']}"
    params = _params(body, service.llm.default_params())
    prepared = [
        await service.llm.prepare(
            _prompt(service, body, prompt),
            params,
            f"{id}-{i}",
            priority=body.priority or 0,
            clamp_max_tokens=body.max_tokens is None,  # a default is no demand
        )
        for i, prompt in enumerate(body.prompts())
    ]
    answer = _Answer(service, body, model, id, prepared)
    if body.stream:
        return EventStream(answer.events())
    whole = await while_connected(request.receive, answer.whole())
    return Response(msgspec.json.encode(whole), media_type="application/json")


def _params(body: CompletionRequest, defaults: SamplingParams) -> SamplingParams:
    changes: dict[str, int | None] = {"logprobs": body.logprobs}
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        changes["prompt_logprobs"] = body.logprobs
    if _only_echo(body):
        changes["max_tokens"] = 1  # made, and not shown
    return body.sampling_params(defaults, **changes)


def _prompt(service: Service, body: CompletionRequest, prompt: str | list[int]) -> Prompt:
    if body.add_special_tokens is not False or not isinstance(prompt, str):
        return prompt
    return {"prompt": prompt, "prompt_token_ids": service.llm.inputs.encode_prompt(prompt, add_special_tokens=False)}


def _only_echo(body: CompletionRequest) -> bool:
    """``max_tokens`` 0 with ``echo``: how evaluation harnesses score a text."""
    return bool(body.echo) and body.max_tokens == 0


class _Answer:
    def __init__(
        self, service: Service, body: CompletionRequest, model: str, id: str, prepared: list[Prepared]
    ) -> None:
        self._llm, self._body, self._model, self._id = service.llm, body, model, id
        self._prepared = prepared
        self._runs = Runs(service, prepared)
        self._created = now()

    async def whole(self) -> Completion:
        results = await self._runs.finish()
        choices = [
            self._choice(i * len(result.outputs) + output.index, result, output)
            for i, result in enumerate(results)
            for output in result.outputs
        ]
        return self._piece(choices, self._usage(results))

    async def events(self) -> AsyncGenerator[bytes, None]:
        count = self._body.n or 1
        echoed: set[int] = set()
        async with contextlib.aclosing(self._runs.deltas()) as deltas:
            async for number, delta in deltas:
                choice = number * count + delta.index
                text = "" if _only_echo(self._body) else delta.text
                if self._body.echo and choice not in echoed:
                    echoed.add(choice)
                    text = self._prompt_text(number) + text
                yield event(self._piece([self._delta(choice, text, delta)]))
        if self._body.include_usage:
            yield event(self._piece([], self._usage(self._runs.results)))

    def _piece(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _usage(self, results: list[RequestOutput]) -> Usage:
        usage = Usage.of(results)
        if _only_echo(self._body):
            usage.completion_tokens, usage.total_tokens = 0, usage.prompt_tokens
        return usage

    def _prompt_text(self, number: int) -> str:
        prepared = self._prepared[number]
        return prepared.prompt if prepared.prompt is not None else self._decode(prepared.prompt_token_ids)

    def _decode(self, ids: list[int]) -> str:
        tokenizer = self._llm.tokenizer
        return tokenizer.decode(ids, skip_special_tokens=False) if tokenizer is not None else ""

    def _delta(self, choice: int, text: str, delta: Delta) -> CompletionChoice:
        scores = completion_logprobs(delta.token_ids, delta.logprobs) if delta.logprobs else None
        return CompletionChoice(
            index=choice,
            text=text,
            logprobs=scores,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )

    def _choice(self, index: int, result: RequestOutput, output: CompletionOutput) -> CompletionChoice:
        body = self._body
        text = "" if _only_echo(body) else output.text
        if body.echo:
            text = self._prompt_text(index // len(result.outputs)) + text
        return CompletionChoice(
            index=index,
            text=text,
            logprobs=None if body.logprobs is None else self._logprobs(result, output),
            finish_reason="length" if _only_echo(body) else output.finish_reason,
            stop_reason=output.stop_reason,
            prompt_logprobs=msgspec.UNSET if body.prompt_logprobs is None else result.prompt_logprobs,
        )

    def _logprobs(self, result: RequestOutput, output: CompletionOutput) -> CompletionLogprobs:
        made = CompletionLogprobs()
        if self._body.echo:
            for token, entry in zip(result.prompt_token_ids, result.prompt_logprobs or [], strict=True):
                made.add(token, entry, self._decode([token]) if entry is None else name_of(token, entry[token]))
        if not _only_echo(self._body):
            for token, entry in zip(output.token_ids, output.logprobs or [], strict=True):
                made.add(token, entry, name_of(token, entry[token]))
        return made
