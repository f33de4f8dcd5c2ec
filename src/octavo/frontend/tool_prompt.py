"""Tools for templates that know nothing of them: described in the system message, called in Hermes' format.

What the model is told to write is what `parse.hermes` reads, and what earlier calls in the conversation look like.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Chat = list[dict[str, Any]]

_INTRODUCTION = """\
You can call tools. Each line between <tools> and </tools> describes one in JSON:
<tools>
{tools}
</tools>

To call a tool, write its name and its arguments as a JSON object between <tool_call> and </tool_call>:
<tool_call>
{{"name": "NAME", "arguments": {{"KEY": "VALUE"}}}}
</tool_call>
For several calls, write several of them. If no tool helps, answer without one."""


def describe(chat: Chat, tools: Sequence[Any], *, role: str) -> Chat:
    """The conversation with the tools before the text of its first message of ``role``, or in a new one."""
    lines = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = _INTRODUCTION.format(tools=lines)
    at = next((i for i, message in enumerate(chat) if message["role"] == role), None)
    if at is None:
        parts = any(isinstance(message["content"], list) for message in chat)  # the form that the template reads
        return [{"role": role, "content": [{"type": "text", "text": text}] if parts else text}, *chat]
    return [*chat[:at], _with_text(chat[at], text + "\n\n", before=True), *chat[at + 1 :]]


def spell_out(chat: Chat) -> Chat:
    """The conversation with calls as text of the assistant, and results as text of the user."""
    spelled: Chat = []
    for message in chat:
        if message["role"] == "tool":
            result = _with_text(_with_text(message, "<tool_response>\n", before=True), "\n</tool_response>")
            if spelled and spelled[-1]["role"] == "user":
                spelled[-1] = _with_text(spelled[-1], "\n" + _text(result))
            else:
                spelled.append({"role": "user", "content": result["content"]})
            continue
        calls = message.get("tool_calls") or ()
        plain = {key: value for key, value in message.items() if key != "tool_calls"}
        if calls:
            lines = [*([""] if message["content"] else []), *map(_call, calls)]
            plain = _with_text(plain, "\n".join(lines))
        spelled.append(plain)
    return spelled


def _call(call: dict[str, Any]) -> str:
    function = {key: call["function"].get(key) for key in ("name", "arguments")}
    return f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>"


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())


def _with_text(message: dict[str, Any], text: str, *, before: bool = False) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, list):
        part = {"type": "text", "text": text}
        return {**message, "content": [part, *content] if before else [*content, part]}
    parts = (text, content or "") if before else (content or "", text)
    return {**message, "content": "".join(parts)}
