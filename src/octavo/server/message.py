"""One choice of a chat answer: from the text of the model to the fields of the message, in pieces or whole."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from octavo.frontend.parse.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from octavo.frontend.parse.message import MessageParser
from octavo.server.answers import FunctionCall, Message, MessageDelta, ToolCall, ToolCallDelta


class ChoiceReader:
    """Makes the pieces of a message. Without a ``parser`` all text is content."""

    def __init__(
        self, parser: MessageParser | None, *, parallel_calls: bool = True, include_reasoning: bool = True
    ) -> None:
        self._parser = parser
        self._last_call = None if parallel_calls else 0
        self._include_reasoning = include_reasoning
        self._called = False

    def events(self, text: str, *, final: bool) -> list[Event]:
        """What ``text`` adds to the answer, without what was not asked for."""
        if self._parser is None:
            return [Content(text)] if text else []
        events = self._parser.feed(text)
        if final:
            events = events + self._parser.finish()
        return [event for event in events if self._wanted(event)]

    def feed(self, text: str, *, final: bool) -> list[MessageDelta]:
        """The same as pieces of a chat message; a piece has text, or the start or arguments of a call."""
        if self._parser is None:
            return [MessageDelta(content=text)]
        deltas: list[MessageDelta] = []
        for event in self.events(text, final=final):
            delta = _delta(event)
            if delta is None:
                continue
            if deltas and delta.tool_calls is None and deltas[-1].tool_calls is None:
                deltas[-1] = _joined(deltas[-1], delta)
            else:
                deltas.append(delta)
        return deltas

    def whole(self, text: str) -> Message:
        """The message that ``text`` is."""
        return _message(self.feed(text, final=True))

    def finish_reason(self, reason: str | None) -> str | None:
        """OpenAI's, from the engine's."""
        return "tool_calls" if self._called and reason == "stop" else reason

    def _wanted(self, event: Event) -> bool:
        if isinstance(event, Reasoning):
            return self._include_reasoning
        if isinstance(event, Content):
            return True
        if self._last_call is not None and event.index > self._last_call:
            return False
        self._called = True
        return True


def _delta(event: Event) -> MessageDelta | None:
    match event:
        case Content(text):
            return MessageDelta(content=text)
        case Reasoning(text):
            return MessageDelta(reasoning_content=text, reasoning=text)
        case CallEnd():
            return None
        case CallStart(index, id, name):
            call = ToolCallDelta(index=index, id=id, type="function", function=FunctionCall(name=name))
        case CallArguments(index, text):
            call = ToolCallDelta(index=index, function=FunctionCall(arguments=text))
    return MessageDelta(tool_calls=[call])


def _joined(left: MessageDelta, right: MessageDelta) -> MessageDelta:
    def both(name: str) -> str | None:
        parts = [part for part in (getattr(left, name), getattr(right, name)) if part is not None]
        return "".join(parts) if parts else None

    return MessageDelta(
        content=both("content"), reasoning_content=both("reasoning_content"), reasoning=both("reasoning")
    )


def _message(deltas: Sequence[MessageDelta]) -> Message:
    content = "".join(delta.content or "" for delta in deltas)
    reasoning = "".join(delta.reasoning or "" for delta in deltas)
    calls: list[ToolCall] = []
    for piece in (call for delta in deltas for call in delta.tool_calls or ()):
        if piece.id is not None:
            calls.append(ToolCall(piece.id, FunctionCall(name=piece.function.name)))
        calls[piece.index].function.arguments += piece.function.arguments
    return Message(
        "assistant",
        content if content or not (calls or reasoning) else None,
        reasoning_content=reasoning or msgspec.UNSET,
        reasoning=reasoning or msgspec.UNSET,
        tool_calls=calls or msgspec.UNSET,
    )
