"""Bodies of Anthropic's Messages API: requests, answers and events (API version 2023-06-01)."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from octavo.errors import RequestError
from octavo.server.protocol import JsonSchema, Sampled
from octavo.structured import StructuredOutputsParams

# --- requests ---------------------------------------------------------------------------------------------------------


class _Part(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """``cache_control`` is about prices: prefixes are cached here in any case."""

    cache_control: Any = None


class TextPart(_Part, kw_only=True, tag="text"):
    """A text."""

    text: str
    citations: Any = None  # of earlier answers; the model does not see them


class ImagePart(_Part, kw_only=True, tag="image"):
    """Refused: only text is read."""

    source: Any = None


class ThinkingPart(_Part, kw_only=True, tag="thinking"):
    """What the model thought. There are no signatures here: any is accepted."""

    thinking: str
    signature: str = ""


class ToolUsePart(_Part, kw_only=True, tag="tool_use"):
    """An earlier call."""

    id: str
    name: str
    input: dict[str, Any]
    caller: Any = None


class ToolResultPart(_Part, kw_only=True, tag="tool_result"):
    """What a tool answered."""

    tool_use_id: str
    content: str | list[TextPart | ImagePart] | None = None
    is_error: bool | None = None


class Turn(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A message of the conversation. The last one, if it is the assistant's, is continued."""

    role: Literal["user", "assistant"]
    content: str | list[TextPart | ImagePart | ThinkingPart | ToolUsePart | ToolResultPart]


class Tool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool that the client runs; those that Anthropic runs do not exist here."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: Any = None
    eager_input_streaming: Any = None


class ToolChoice(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``any`` is a call of any tool, ``tool`` of the one with that name."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The template's variable ``enable_thinking``, and ``thinking_budget`` for models that were trained to keep one.

    Nothing cuts reasoning off at ``budget_tokens``.
    """

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None  # there are no summaries: the whole is sent


class OutputFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Structured output."""

    type: Literal["json_schema"]
    schema: JsonSchema


class OutputConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``effort`` is the template's variable ``reasoning_effort``, if it has one."""

    effort: str | None = None
    format: OutputFormat | None = None


class CountTokensRequest(Sampled, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/messages/count_tokens``: what the prompt of `MessagesRequest` is made of."""

    messages: list[Turn]
    system: str | list[TextPart | ImagePart] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_control: Any = None

    def check(self) -> None:
        super().check()
        if not self.messages:
            raise RequestError("messages is empty.", "Send at least one message.", param="messages")

    def own_sampling(self) -> dict[str, Any]:
        return {"max_tokens": 1}

    def own_constraints(self) -> dict[str, StructuredOutputsParams | None]:
        form = self.output_config.format if self.output_config else None
        return {"output_config.format": None if form is None else StructuredOutputsParams(json=form.schema)}

    def template_kwargs(self) -> dict[str, Any]:
        """Variables for the chat template."""
        given: dict[str, Any] = {}
        if self.thinking is not None:
            given["enable_thinking"] = self.thinking.type != "disabled"
            if self.thinking.budget_tokens is not None:
                given["thinking_budget"] = self.thinking.budget_tokens
        if self.output_config is not None and self.output_config.effort is not None:
            given["reasoning_effort"] = self.output_config.effort
        return given | (self.chat_template_kwargs or {})


class MessagesRequest(CountTokensRequest, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/messages``."""

    max_tokens: int
    stop_sequences: list[str] | None = None

    def own_sampling(self) -> dict[str, Any]:
        return {"stop": self.stop_sequences} if self.stop_sequences else {}


# --- answers ----------------------------------------------------------------------------------------------------------


class Usage(msgspec.Struct, kw_only=True):
    """``input_tokens`` are those that were not found in the prefix cache."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


class TextBlock(msgspec.Struct, tag_field="type", tag="text"):
    """A part of the answer."""

    text: str
    citations: None = None


class ThinkingBlock(msgspec.Struct, tag_field="type", tag="thinking"):
    """What the model thought; without a signature, since nobody checks one."""

    thinking: str
    signature: str = ""


class ToolUseBlock(msgspec.Struct, tag_field="type", tag="tool_use"):
    """A call; ``input`` is its arguments as a JSON object."""

    id: str
    name: str
    input: msgspec.Raw


Block = TextBlock | ThinkingBlock | ToolUseBlock
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class Message(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    """An answer to ``/v1/messages``."""

    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Block]
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    usage: Usage


class TokenCount(msgspec.Struct):
    """An answer to ``/v1/messages/count_tokens``."""

    input_tokens: int


# --- events -----------------------------------------------------------------------------------------------------------


class MessageStart(msgspec.Struct, tag_field="type", tag="message_start"):
    """The first event: a message without content."""

    message: Message


class BlockStart(msgspec.Struct, tag_field="type", tag="content_block_start"):
    """A block begins, still empty."""

    index: int
    content_block: Block


class TextDelta(msgspec.Struct, tag_field="type", tag="text_delta"):
    """Text of a `TextBlock`."""

    text: str


class ThinkingDelta(msgspec.Struct, tag_field="type", tag="thinking_delta"):
    """Text of a `ThinkingBlock`."""

    thinking: str


class InputDelta(msgspec.Struct, tag_field="type", tag="input_json_delta"):
    """Text of a `ToolUseBlock`'s input."""

    partial_json: str


class BlockDelta(msgspec.Struct, tag_field="type", tag="content_block_delta"):
    """Block ``index`` goes on."""

    index: int
    delta: TextDelta | ThinkingDelta | InputDelta


class BlockStop(msgspec.Struct, tag_field="type", tag="content_block_stop"):
    """Block ``index`` is complete."""

    index: int


class Stop(msgspec.Struct):
    """Why the message ends."""

    stop_reason: StopReason | None
    stop_sequence: str | None


class MessageDelta(msgspec.Struct, tag_field="type", tag="message_delta"):
    """The end of the message, and its usage."""

    delta: Stop
    usage: Usage


class MessageStop(msgspec.Struct, tag_field="type", tag="message_stop"):
    """The last event."""


Event = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop
