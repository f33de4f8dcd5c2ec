"""``POST /v1/messages`` and ``/v1/messages/count_tokens``: Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.errors import OctavoError, RequestError
from octavo.frontend.outputs import Delta
from octavo.server import errors
from octavo.server.answers import json_response
from octavo.server.anthropic.body import (
    Block,
    BlockDelta,
    BlockStart,
    BlockStop,
    CountTokensRequest,
    Event,
    ImagePart,
    InputDelta,
    Message,
    MessageDelta,
    MessagesRequest,
    MessageStart,
    MessageStop,
    Stop,
    TextBlock,
    TextDelta,
    TextPart,
    ThinkingBlock,
    ThinkingDelta,
    ThinkingPart,
    TokenCount,
    ToolChoice,
    ToolResultPart,
    ToolUseBlock,
    ToolUsePart,
    Turn,
    Usage,
)
from octavo.server.blocks import Block as Part
from octavo.server.blocks import Change, Kind
from octavo.server.decoding import decode
from octavo.server.endpoint import Conversation, Endpoint, Job, Origin, prepare
from octavo.server.service import Service
from octavo.server.sse import named_event
from octavo.server.tools import ToolUse, function_tool, past_call
from octavo.types import CompletionOutput, RequestOutput

# --- reading ----------------------------------------------------------------------------------------------------------


def read(service: Service, body: CountTokensRequest, origin: Origin) -> Conversation:
    """What is to be answered, and how."""
    system = _text("system", body.system)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for turn in body.messages:
        messages += _messages(turn)
    thinking = body.thinking
    return Conversation(
        messages=messages,
        use=_tools(body),
        include_reasoning=thinking is None or (thinking.type != "disabled" and thinking.display != "omitted"),
        continue_final_message=body.messages[-1].role == "assistant",
        template_kwargs=body.template_kwargs(),
    )


def _tools(body: CountTokensRequest) -> ToolUse:
    tools = [
        function_tool(tool.name, tool.input_schema, tool.description or "", strict=tool.strict)
        for tool in body.tools or ()
    ]
    choice = body.tool_choice or ToolChoice(type="auto" if tools else "none")
    wanted: Any = {"any": "required"}.get(choice.type, choice.type)
    if choice.type == "tool":
        wanted = {"type": "function", "function": {"name": choice.name}}
    return ToolUse.of(tools, wanted, parallel=not choice.disable_parallel_tool_use)


def _messages(turn: Turn) -> list[dict[str, Any]]:
    """A turn as chat messages: results of tools are messages of their own there, and come first."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    results: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for part in turn.content:
        match part:
            case ImagePart():
                raise _image("messages")
            case TextPart():
                texts.append({"type": "text", "text": part.text})
            case ThinkingPart():
                thoughts.append(part.thinking)
            case ToolUsePart():
                calls.append(past_call(part.id, part.name, msgspec.json.encode(part.input).decode()))
            case ToolResultPart():
                results.append(_result(part))
    if turn.role == "user" and (calls or thoughts):
        raise RequestError(
            "a user's message holds tool_use or thinking.", "They are the assistant's.", param="messages"
        )
    if turn.role == "assistant" and results:
        raise RequestError("an assistant's turn holds tool_result.", "It is the user's.", param="messages")
    message: dict[str, Any] = {"role": turn.role, "content": texts or None}
    if calls:
        message["tool_calls"] = calls
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return [*results, *([message] if texts or calls or thoughts or not results else [])]


def _result(part: ToolResultPart) -> dict[str, Any]:
    content = _text("messages", part.content)
    text = f"Error: {content}" if part.is_error else content
    return {"role": "tool", "tool_call_id": part.tool_use_id, "content": text}


def _text(field: str, content: str | list[TextPart | ImagePart] | None) -> str:
    if isinstance(content, str):
        return content
    if any(isinstance(part, ImagePart) for part in content or ()):
        raise _image(field)
    return "\n".join(part.text for part in content or () if isinstance(part, TextPart))


def _image(field: str) -> RequestError:
    return RequestError("there is an image.", "Only text is read here.", param=field)


# --- writing ----------------------------------------------------------------------------------------------------------


class _Answer:
    def __init__(self, job: Job[MessagesRequest]) -> None:
        self._job = job
        (self._blocks,) = job.blocks()
        self._begun = False

    def whole(self, results: list[RequestOutput]) -> Message:
        (result,) = results
        (output,) = result.outputs
        self._blocks.feed(output.text, final=True)
        stop = self._stop(output)
        message = self._message(_usage(result), [_block(part, whole=True) for part in self._blocks.all])
        message.stop_reason, message.stop_sequence = stop.stop_reason, stop.stop_sequence
        return message

    def piece(self, number: int, delta: Delta) -> Iterable[bytes]:
        if not self._begun:
            self._begun = True
            prompt = len(self._job.prepared[0].prompt_token_ids)
            usage = Usage(input_tokens=prompt, output_tokens=0, cache_read_input_tokens=0)
            yield named_event(MessageStart(self._message(usage, [])))
        for change in self._blocks.feed(delta.text, final=delta.finish_reason is not None):
            yield named_event(_of_change(change))

    def end(self, results: list[RequestOutput]) -> Iterable[bytes]:
        (result,) = results
        yield named_event(MessageDelta(self._stop(result.outputs[0]), _usage(result)))
        yield named_event(MessageStop())

    def broken(self, error: OctavoError) -> Iterable[bytes]:
        return [named_event(errors.anthropic_body(error, self._job.origin.id))]

    def _message(self, usage: Usage, content: list[Block]) -> Message:
        return Message(id=self._job.id, model=self._job.model, content=content, usage=usage)

    def _stop(self, output: CompletionOutput) -> Stop:
        if output.finish_reason == "abort":
            raise errors.shutting_down()
        if output.finish_reason == "length":
            return Stop("max_tokens", None)
        if isinstance(output.stop_reason, str):
            return Stop("stop_sequence", output.stop_reason)
        return Stop("tool_use" if self._blocks.called else "end_turn", None)


def _usage(result: RequestOutput) -> Usage:
    cached = result.num_cached_tokens
    return Usage(
        input_tokens=len(result.prompt_token_ids) - cached,
        output_tokens=sum(len(output.token_ids) for output in result.outputs),
        cache_read_input_tokens=cached,
    )


def _block(part: Part, *, whole: bool) -> Block:
    """A block with all of its text, or as it begins."""
    text = part.text if whole else ""
    if part.kind == "call":
        return ToolUseBlock(part.id, part.name, msgspec.Raw(text.encode() or b"{}"))
    return TextBlock(text) if part.kind == "text" else ThinkingBlock(text)


def _of_change(change: Change) -> Event:
    index = change.block.index
    if change.what == "open":
        return BlockStart(index, _block(change.block, whole=False))
    if change.what == "close":
        return BlockStop(index)
    return BlockDelta(index, _DELTAS[change.block.kind](change.text))


_DELTAS: dict[Kind, type[TextDelta | ThinkingDelta | InputDelta]] = {
    "text": TextDelta,
    "reasoning": ThinkingDelta,
    "call": InputDelta,
}


ENDPOINT = Endpoint(MessagesRequest, "msg_", read, _Answer)


async def count_tokens(service: Service, request: Request) -> Response:
    """How many tokens the prompt of a message has."""
    body, origin = decode(await request.body(), CountTokensRequest), Origin.of(request)
    body.check()
    service.model(body.model)
    (prepared,) = await prepare(service, body, read(service, body, origin), origin.id, origin)
    return json_response(TokenCount(len(prepared.prompt_token_ids)))
