"""Items of a response's input, and of its output, as messages of a chat."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from octavo.server.blocks import Block
from octavo.server.decoding import convert
from octavo.server.responses.body import (
    CallOutput,
    InputItem,
    InputMessage,
    InputText,
    OldCall,
    OldOutputText,
    OldReasoning,
    OldRefusal,
)
from octavo.server.tools import past_call

Messages = list[dict[str, Any]]


def of_input(given: str | list[dict[str, Any]]) -> Messages:
    """Checked; raises `RequestError` naming the item. Reasoning, text and calls in a row are one message."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    chat: Messages = []
    for i, raw in enumerate(given):
        item = convert({"type": "message"} | raw, InputItem, f"input[{i}]")
        match item:
            case InputMessage(role="assistant"):
                _assistant(chat, content=_text(item.content))
            case InputMessage():
                chat.append({"role": item.role, "content": _text(item.content)})
            case OldReasoning():
                _assistant(chat, reasoning="\n".join(part.text for part in item.content or item.summary))
            case OldCall():
                _assistant(chat, call=past_call(item.call_id, item.name, item.arguments))
            case CallOutput():
                chat.append({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)})
    return chat


def of_output(blocks: Iterable[Block]) -> Messages:
    """The answer as the next request's prompt has it."""
    chat: Messages = []
    for block in blocks:
        if block.kind == "reasoning":
            _assistant(chat, reasoning=block.text)
        elif block.kind == "text":
            _assistant(chat, content=block.text)
        else:
            _assistant(chat, call=past_call(block.id, block.name, block.text))
    return chat


def _assistant(
    chat: Messages, *, content: str | None = None, reasoning: str | None = None, call: dict[str, Any] | None = None
) -> None:
    """Adds to the assistant's message at the end, or begins one when it has such a part already."""
    last = chat[-1] if chat and chat[-1]["role"] == "assistant" else None
    over = last is None or (last.get("tool_calls") and call is None) or (last["content"] is not None and call is None)
    if last is None or over:
        last = {"role": "assistant", "content": None}
        chat.append(last)
    if content is not None:
        last["content"] = content
    if reasoning:
        last["reasoning_content"] = (
            f"{last['reasoning_content']}\n{reasoning}" if "reasoning_content" in last else reasoning
        )
    if call is not None:
        last.setdefault("tool_calls", []).append(call)


def _text(content: str | list[InputText] | list[InputText | OldOutputText | OldRefusal]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.refusal if isinstance(part, OldRefusal) else part.text for part in content)
