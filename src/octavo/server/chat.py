"""``POST /v1/chat/completions``."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from octavo.frontend.inputs import Prepared
from octavo.frontend.outputs import Delta
from octavo.server.message import ChoiceReader
from octavo.server.protocol import ChatRequest, decode
from octavo.server.responses import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Logprobs,
    MessageDelta,
    Usage,
    chat_logprobs,
    now,
)
from octavo.server.runs import Runs
from octavo.server.service import Service
from octavo.server.sse import EventStream, event, while_connected
from octavo.server.tools import ToolUse


async def create(service: Service, request: Request) -> ASGIApp:
    """Answers a conversation, ``n`` times."""
    body = decode(await request.body(), ChatRequest)
    body.check()
    model = service.model(body.model)
    id = f"chatcmpl-{request.scope['request_id']}"
    use = ToolUse.of(body)
    params = use.constrained(body.chat_params(service.llm.default_params()))
    prepared = await service.llm.prepare_chat(
        body.messages,
        params,
        id,
        priority=body.priority or 0,
        add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
        tools=use.shown or None,
        template_kwargs=body.template_kwargs(),
    )
    prepared = dataclasses.replace(prepared, kept_ids=service.kept_ids(tools=bool(use.schemas)))
    answer = _Answer(service, body, model, id, prepared, use)
    if body.stream:
        return EventStream(answer.events())
    whole = await while_connected(request.receive, answer.whole())
    return Response(msgspec.json.encode(whole), media_type="application/json")


class _Answer:
    def __init__(
        self, service: Service, body: ChatRequest, model: str, id: str, prepared: Prepared, use: ToolUse
    ) -> None:
        self._body, self._model, self._id = body, model, id
        self._runs = Runs(service, [prepared])
        self._created = now()
        self._readers = [
            ChoiceReader(
                service.formats.parser(
                    prepared.prompt or "",
                    use.schemas,
                    forced_calls=use.forced,
                    constrained=prepared.params.structured_outputs is not None,
                ),
                parallel_calls=use.parallel,
                include_reasoning=body.include_reasoning is not False,
            )
            for _ in prepared.requests
        ]

    async def whole(self) -> ChatCompletion:
        (result,) = await self._runs.finish()
        choices = [
            ChatChoice(
                index=output.index,
                message=reader.whole(output.text),
                logprobs=self._logprobs(output.token_ids, output.logprobs),
                finish_reason=reader.finish_reason(output.finish_reason),
                stop_reason=output.stop_reason,
            )
            for output, reader in zip(result.outputs, self._readers, strict=True)
        ]
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=Usage.of([result]),
            prompt_logprobs=msgspec.UNSET if self._body.prompt_logprobs is None else result.prompt_logprobs,
        )

    async def events(self) -> AsyncGenerator[bytes, None]:
        greeted: set[int] = set()
        async with contextlib.aclosing(self._runs.deltas()) as deltas:
            async for _, delta in deltas:
                if delta.index not in greeted:
                    greeted.add(delta.index)
                    yield event(self._chunk([ChatDelta(index=delta.index, delta=MessageDelta("assistant", ""))]))
                for choice in self._pieces(delta):
                    yield event(self._chunk([choice]))
        if self._body.include_usage:
            yield event(self._chunk([], Usage.of(self._runs.results)))

    def _chunk(self, choices: list[ChatDelta], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def _pieces(self, delta: Delta) -> list[ChatDelta]:
        """None while a reader waits for more, unless there are log-probabilities to send."""
        reader, final = self._readers[delta.index], delta.finish_reason is not None
        logprobs = self._logprobs(delta.token_ids, delta.logprobs)
        messages = reader.feed(delta.text, final=final)
        if not messages and (final or logprobs is not None):
            messages = [MessageDelta()]
        pieces = [ChatDelta(index=delta.index, delta=message) for message in messages]
        if pieces:
            pieces[0].logprobs = logprobs
            pieces[-1].finish_reason = reader.finish_reason(delta.finish_reason)
            pieces[-1].stop_reason = delta.stop_reason
        return pieces

    def _logprobs(self, token_ids: list[int], entries: list[Logprobs] | None) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(token_ids, entries or [], self._body.top_logprobs or 0)
