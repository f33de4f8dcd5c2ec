"""``POST /v1/chat/completions``: answers a conversation, ``n`` times."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from octavo.frontend.outputs import Delta
from octavo.server.answers import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    FunctionCall,
    Logprobs,
    Message,
    MessageDelta,
    ToolCall,
    ToolCallDelta,
    Usage,
    chat_logprobs,
)
from octavo.server.blocks import Blocks, Change
from octavo.server.completion_answer import CompletionAnswer
from octavo.server.endpoint import Conversation, Endpoint, Job, Origin
from octavo.server.protocol import ChatRequest
from octavo.server.service import Service
from octavo.server.sse import event
from octavo.server.tools import ToolUse
from octavo.types import RequestOutput


def read(service: Service, body: ChatRequest, origin: Origin) -> Conversation:
    """What is to be answered, and how."""
    return Conversation(
        messages=body.messages,
        use=ToolUse.of(body.tools, body.tool_choice, parallel=body.parallel_tool_calls),
        include_reasoning=body.include_reasoning is not False,
        continue_final_message=bool(body.continue_final_message),
        add_generation_prompt=body.add_generation_prompt is not False,
        template_kwargs=body.template_kwargs(),
        documents=body.documents,
    )


class _Answer(CompletionAnswer[ChatRequest]):
    def __init__(self, job: Job[ChatRequest]) -> None:
        super().__init__(job)
        self._blocks = job.blocks()
        self._greeted: set[int] = set()

    def whole(self, results: list[RequestOutput]) -> ChatCompletion:
        (result,) = results
        choices = [
            ChatChoice(
                index=output.index,
                message=_whole(blocks, output.text),
                logprobs=self._logprobs(output.token_ids, output.logprobs),
                finish_reason=_finish_reason(blocks, output.finish_reason),
                stop_reason=output.stop_reason,
                token_ids=output.token_ids if self._body.return_token_ids else msgspec.UNSET,
            )
            for output, blocks in zip(result.outputs, self._blocks, strict=True)
        ]
        return ChatCompletion(
            id=self._job.id,
            created=self._job.created,
            model=self._job.model,
            choices=choices,
            usage=Usage.of([result]),
            timings=self._timings(results),
            prompt_logprobs=msgspec.UNSET if self._body.prompt_logprobs is None else result.prompt_logprobs,
            prompt_token_ids=result.prompt_token_ids if self._body.return_token_ids else msgspec.UNSET,
        )

    def piece(self, number: int, delta: Delta) -> Iterable[bytes]:
        if delta.index not in self._greeted:
            self._greeted.add(delta.index)
            chunk = self._chunk([ChatDelta(index=delta.index, delta=MessageDelta("assistant", ""))])
            if self._body.return_token_ids:
                chunk.prompt_token_ids = self._job.prepared[0].prompt_token_ids
            yield event(chunk)
        usage = self._usage_after(len(delta.token_ids))
        for choice in self._pieces(delta):
            yield event(self._chunk([choice], usage))

    def _chunk(self, choices: list[ChatDelta], usage: Usage | None = None) -> ChatChunk:
        job = self._job
        return ChatChunk(id=job.id, created=job.created, model=job.model, choices=choices, usage=usage)

    def _pieces(self, delta: Delta) -> list[ChatDelta]:
        """None while a parser waits for more, unless there are log-probabilities to send."""
        blocks, final = self._blocks[delta.index], delta.finish_reason is not None
        logprobs = self._logprobs(delta.token_ids, delta.logprobs)
        if blocks.parsed:
            messages = _messages(blocks.feed(delta.text, final=final))
        else:
            messages = [MessageDelta(content=delta.text)]
        if not messages and (final or logprobs is not None or self._body.return_token_ids):
            messages = [MessageDelta()]
        pieces = [ChatDelta(index=delta.index, delta=message) for message in messages]
        if pieces:
            pieces[0].logprobs = logprobs
            if self._body.return_token_ids:
                pieces[0].token_ids = delta.token_ids
            pieces[-1].finish_reason = _finish_reason(blocks, delta.finish_reason)
            pieces[-1].stop_reason = delta.stop_reason
        return pieces

    def _logprobs(self, token_ids: list[int], entries: list[Logprobs] | None) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        as_ids = bool(self._body.return_tokens_as_token_ids)
        return chat_logprobs(token_ids, entries or [], self._body.top_logprobs or 0, as_ids=as_ids)


def _whole(blocks: Blocks, text: str) -> Message:
    blocks.feed(text, final=True)
    content, reasoning = blocks.of("text"), blocks.of("reasoning")
    calls = [
        ToolCall(block.id, FunctionCall(name=block.name, arguments=block.text))
        for block in blocks.all
        if block.kind == "call"
    ]
    return Message(
        "assistant",
        content if content or not (calls or reasoning) else None,
        reasoning_content=reasoning or msgspec.UNSET,
        reasoning=reasoning or msgspec.UNSET,
        tool_calls=calls or msgspec.UNSET,
    )


def _messages(changes: Iterable[Change]) -> list[MessageDelta]:
    """``changes`` as pieces of a message: text and reasoning together, each part of a call by itself."""
    pieces: list[MessageDelta] = []
    for change in changes:
        block, text = change.block, change.text
        if block.kind == "call" and change.what != "close":
            call = ToolCallDelta(index=block.call, function=FunctionCall(arguments=text))
            if change.what == "open":
                call.id, call.type, call.function.name = block.id, "function", block.name
            pieces.append(MessageDelta(tool_calls=[call]))
        elif change.what == "add":
            if not pieces or pieces[-1].tool_calls:
                pieces.append(MessageDelta())
            last = pieces[-1]
            if block.kind == "text":
                last.content = (last.content or "") + text
            else:
                last.reasoning_content = last.reasoning = (last.reasoning or "") + text
    return pieces


def _finish_reason(blocks: Blocks, reason: str | None) -> str | None:
    """OpenAI's, from the engine's."""
    return "tool_calls" if reason == "stop" and blocks.called else reason


ENDPOINT = Endpoint(ChatRequest, "chatcmpl-", read, _Answer)
