"""Bodies of OpenAI's Responses API: requests, and the response itself. Events are in `events`."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from octavo.errors import OctavoError, RequestError
from octavo.server.answers import TokenLogprob
from octavo.server.protocol import (
    JsonSchema,
    JsonSchemaFormat,
    ResponseFormat,
    Sampled,
    check_metadata,
    check_top_logprobs,
)
from octavo.structured import StructuredOutputsParams

LOGPROBS = "message.output_text.logprobs"
ENCRYPTED = "reasoning.encrypted_content"  # nothing to do: reasoning is sent as it is, and read when it comes back
Status = Literal["in_progress", "completed", "incomplete"]

# --- input ------------------------------------------------------------------------------------------------------------


class _Part(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    pass


class InputText(_Part, kw_only=True, tag="input_text"):
    """A text of the input."""

    text: str
    prompt_cache_breakpoint: Any = None


class OldOutputText(_Part, kw_only=True, tag="output_text"):
    """A text of an earlier answer."""

    text: str
    annotations: Any = None
    logprobs: Any = None


class OldRefusal(_Part, kw_only=True, tag="refusal"):
    """A refusal of an earlier answer, read as its text."""

    refusal: str


class InputMessage(_Part, kw_only=True, tag="message"):
    """``type`` may be missing."""

    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[InputText | OldOutputText | OldRefusal]
    id: str | None = None
    status: str | None = None
    phase: Any = None


class OldCall(_Part, kw_only=True, tag="function_call"):
    """A call in an earlier answer."""

    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class CallOutput(_Part, kw_only=True, tag="function_call_output"):
    """What the tool answered."""

    call_id: str
    output: str | list[InputText]
    id: str | None = None
    status: str | None = None


class OldSummary(_Part, kw_only=True, tag="summary_text"):
    """A part of `OldReasoning`."""

    text: str


class OldThought(_Part, kw_only=True, tag="reasoning_text"):
    """A part of `OldReasoning`."""

    text: str


class OldReasoning(_Part, kw_only=True, tag="reasoning"):
    """Reasoning of an earlier answer. Encrypted reasoning is another provider's and cannot be read."""

    id: str | None = None
    summary: list[OldSummary] = []
    content: list[OldThought] | None = None
    encrypted_content: None = None
    status: str | None = None


InputItem = InputMessage | OldCall | CallOutput | OldReasoning

# --- the request ------------------------------------------------------------------------------------------------------


class Reasoning(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``effort`` is the template's variable ``reasoning_effort``, if it has one. There are no summaries."""

    effort: str | None = None
    summary: Literal["auto"] | None = None
    generate_summary: Literal["auto"] | None = None


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """As ``response_format`` of chat completions, with the schema one level higher."""

    type: str = "text"
    name: str | None = None
    description: str | None = None
    schema: JsonSchema | None = None
    strict: bool | None = None

    def params(self) -> StructuredOutputsParams | None:
        """What the output must match; None for text."""
        inner = None if self.schema is None else JsonSchemaFormat(self.name, self.description, self.schema, self.strict)
        return ResponseFormat(self.type, inner).params("text.format")


class TextConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``verbosity`` has only its default."""

    format: TextFormat = msgspec.field(default_factory=TextFormat)
    verbosity: Literal["medium"] | None = None


class FunctionTool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool that the client runs; those that OpenAI runs do not exist here."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponsesStreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What can be said about a stream."""

    include_obfuscation: Any = None  # padding against eavesdroppers: OpenAI's, without effect


class ResponsesRequest(Sampled, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/responses``."""

    input: str | list[dict[str, Any]]  # items: see `InputItem`
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None  # of tools that the server runs: there are none
    tools: list[FunctionTool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    truncation: Literal["disabled"] | None = None
    store: bool | None = None
    background: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    metadata: dict[str, str] | None = None
    user: str | None = None
    stop: str | list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def own_sampling(self) -> dict[str, Any]:
        own: dict[str, Any] = {"max_tokens": self.max_output_tokens}
        return own | {"logprobs": self.top_logprobs or 0} if self.wants_logprobs else own

    def own_constraints(self) -> dict[str, StructuredOutputsParams | None]:
        return {"text.format": self.text.format.params() if self.text else None}

    def check(self) -> None:
        super().check()
        if self.input == []:
            raise RequestError("input is empty.", "Send a text or at least one item.", param="input")
        unknown = [name for name in self.include or () if name not in (LOGPROBS, ENCRYPTED)]
        if unknown:
            cause = f"include names {unknown[0][:100]!r}, which does not exist here."
            raise RequestError(cause, f"Leave it out; there are {LOGPROBS} and {ENCRYPTED}.", param="include")
        if self.top_logprobs and not self.wants_logprobs:
            raise RequestError("top_logprobs is set.", f"Add {LOGPROBS} to include.", param="top_logprobs")
        check_top_logprobs(self.top_logprobs)
        if self.background and (self.stream or self.store is False):
            cause = "background goes neither with stream nor with store false."
            raise RequestError(cause, "Poll GET /v1/responses/{id}.", param="background")
        check_metadata(self.metadata)

    def template_kwargs(self) -> dict[str, Any]:
        """Variables for the chat template."""
        effort = self.reasoning.effort if self.reasoning else None
        return ({} if effort is None else {"reasoning_effort": effort}) | (self.chat_template_kwargs or {})


# --- the response -----------------------------------------------------------------------------------------------------


class OutputText(msgspec.Struct, kw_only=True, tag_field="type", tag="output_text"):
    """The text of a message."""

    text: str = ""
    annotations: list[Any] = []
    logprobs: list[TokenLogprob] = []


class ReasoningText(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning_text"):
    """The text of reasoning."""

    text: str = ""


class MessageItem(msgspec.Struct, kw_only=True, tag_field="type", tag="message"):
    """A message in the output."""

    id: str
    status: Status = "in_progress"
    role: Literal["assistant"] = "assistant"
    content: list[OutputText] = []


class ReasoningItem(msgspec.Struct, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model thought before the next item."""

    id: str
    status: Status = "in_progress"
    summary: list[Any] = []
    content: list[ReasoningText] = []


class CallItem(msgspec.Struct, kw_only=True, tag_field="type", tag="function_call"):
    """A call; ``call_id`` is what the answer of the tool refers to."""

    id: str
    status: Status = "in_progress"
    call_id: str
    name: str
    arguments: str = ""


OutputItem = MessageItem | ReasoningItem | CallItem


class InputDetails(msgspec.Struct):
    """``cached_tokens`` were found in the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(msgspec.Struct):
    """``reasoning_tokens`` are those of the text of reasoning."""

    reasoning_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """What a response took, in tokens."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Failure(msgspec.Struct):
    """Why a response failed."""

    code: Literal["server_error"]
    message: str


class Incomplete(msgspec.Struct):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ReasoningEcho(msgspec.Struct):
    """What the request said of reasoning."""

    effort: str | None = None
    summary: str | None = None


class Response(msgspec.Struct, kw_only=True):
    """An answer to ``/v1/responses``, whole or in progress."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"] = "in_progress"
    background: bool = False
    error: Failure | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: int | None = None
    metadata: dict[str, str] = {}
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    reasoning: ReasoningEcho
    store: bool = True
    temperature: float
    text: TextConfig
    tool_choice: str | dict[str, Any]
    tools: list[FunctionTool] = []
    top_logprobs: int = 0
    top_p: float
    truncation: Literal["disabled"] = "disabled"
    usage: Usage | None = None
    user: str | None = None

    def fail(self, error: OctavoError) -> None:
        """It ends with ``error``."""
        self.status, self.error = "failed", Failure("server_error", str(error))


class Deleted(msgspec.Struct):
    """An answer to ``DELETE /v1/responses/{id}``."""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True
