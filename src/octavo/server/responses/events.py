"""Events of a streamed response. Each has the number of its place in the stream."""

from __future__ import annotations

from typing import Any

import msgspec

from octavo.server.answers import TokenLogprob
from octavo.server.responses.body import OutputItem, OutputText, ReasoningText, Response


class Event(msgspec.Struct, kw_only=True, tag_field="type"):
    """What all events have."""

    sequence_number: int = 0


class _OfResponse(Event, kw_only=True):
    response: Response


class Created(_OfResponse, tag="response.created"):
    """The first event."""


class InProgress(_OfResponse, tag="response.in_progress"):
    """The second event."""


class Completed(_OfResponse, tag="response.completed"):
    """The last event of a response that is whole."""


class IncompleteEnd(_OfResponse, tag="response.incomplete"):
    """The last event of one that reached ``max_output_tokens``."""


class Failed(_OfResponse, tag="response.failed"):
    """The last event of one that failed."""


class _OfItem(Event, kw_only=True):
    output_index: int
    item: OutputItem


class ItemAdded(_OfItem, tag="response.output_item.added"):
    """An item begins, still empty."""


class ItemDone(_OfItem, tag="response.output_item.done"):
    """An item is complete."""


class _InItem(Event, kw_only=True):
    item_id: str
    output_index: int


class _OfPart(_InItem, kw_only=True):
    content_index: int = 0
    part: OutputText | ReasoningText


class PartAdded(_OfPart, tag="response.content_part.added"):
    """The content of an item begins."""


class PartDone(_OfPart, tag="response.content_part.done"):
    """The content of an item is complete."""


class TextDelta(_InItem, kw_only=True, tag="response.output_text.delta"):
    """A piece of a message."""

    content_index: int = 0
    delta: str
    logprobs: list[TokenLogprob] = []


class TextDone(_InItem, kw_only=True, tag="response.output_text.done"):
    """All of its text."""

    content_index: int = 0
    text: str
    logprobs: list[Any] = []


class ReasoningDelta(_InItem, kw_only=True, tag="response.reasoning_text.delta"):
    """A piece of reasoning."""

    content_index: int = 0
    delta: str


class ReasoningDone(_InItem, kw_only=True, tag="response.reasoning_text.done"):
    """All of its text."""

    content_index: int = 0
    text: str


class ArgumentsDelta(_InItem, kw_only=True, tag="response.function_call_arguments.delta"):
    """A piece of the arguments of a call."""

    delta: str


class ArgumentsDone(_InItem, kw_only=True, tag="response.function_call_arguments.done"):
    """All of them."""

    name: str
    arguments: str


AnyEvent = (
    Created
    | InProgress
    | Completed
    | IncompleteEnd
    | Failed
    | ItemAdded
    | ItemDone
    | PartAdded
    | PartDone
    | TextDelta
    | TextDone
    | ReasoningDelta
    | ReasoningDone
    | ArgumentsDelta
    | ArgumentsDone
)
