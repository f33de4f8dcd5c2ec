"""``POST /v1/responses``: from the body to a conversation, and from the answer's blocks to items and events."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from octavo.errors import OctavoError
from octavo.frontend.outputs import Delta
from octavo.server import errors
from octavo.server.answers import TokenLogprob, chat_logprobs, now
from octavo.server.blocks import Block, Change
from octavo.server.endpoint import Conversation, Endpoint, Job, Origin
from octavo.server.responses import events, items
from octavo.server.responses.body import (
    CallItem,
    Incomplete,
    InputDetails,
    MessageItem,
    OutputDetails,
    OutputItem,
    OutputText,
    ReasoningEcho,
    ReasoningItem,
    ReasoningText,
    Response,
    ResponsesRequest,
    Status,
    TextConfig,
    Usage,
)
from octavo.server.service import Service
from octavo.server.sse import named_event
from octavo.server.tools import ToolUse, function_tool
from octavo.types import CompletionOutput, RequestOutput

PREFIX = "resp_"

# --- reading ----------------------------------------------------------------------------------------------------------


def read(service: Service, body: ResponsesRequest, origin: Origin) -> Conversation:
    """What is to be answered; a response that it continues must be in the store."""
    messages = items.of_input(body.input)
    if body.previous_response_id is not None:
        messages = service.responses.chat(origin.owner, body.previous_response_id) + messages
    if body.instructions:
        messages = [{"role": "system", "content": body.instructions}, *messages]
    return Conversation(messages=messages, use=_tools(body), template_kwargs=body.template_kwargs())


def _tools(body: ResponsesRequest) -> ToolUse:
    tools = [
        function_tool(tool.name, tool.parameters, tool.description, strict=tool.strict) for tool in body.tools or ()
    ]
    choice = body.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    return ToolUse.of(tools, choice, parallel=body.parallel_tool_calls)


# --- writing ----------------------------------------------------------------------------------------------------------


class ResponseWriter:
    """Writes one response, and puts it into the store when it has ended."""

    def __init__(self, job: Job[ResponsesRequest]) -> None:
        self._job = job
        (self._blocks,) = job.blocks()
        self._response = blank(job)
        self._logprobs: list[TokenLogprob] = []  # not sent yet
        self._sent = 0

    def whole(self, results: list[RequestOutput]) -> Response:
        (result,) = results
        (output,) = result.outputs
        self._blocks.feed(output.text, final=True)
        self._blocks.all = self._blocks.all or [_empty()]
        self._add_output()
        texts = [item for item in self._response.output if isinstance(item, MessageItem)]
        if texts:
            texts[-1].content[0].logprobs = self._scores(output.token_ids, output.logprobs)
        self._finish(result, output)
        return self._response

    def piece(self, number: int, delta: Delta) -> Iterable[bytes]:
        if not self._sent:
            yield self._event(events.Created(response=self._response))
            yield self._event(events.InProgress(response=self._response))
        self._logprobs += self._scores(delta.token_ids, delta.logprobs)
        for change in self._blocks.feed(delta.text, final=delta.finish_reason is not None):
            for event in self._of_change(change):
                yield self._event(event)

    def end(self, results: list[RequestOutput]) -> Iterable[bytes]:
        (result,) = results
        (output,) = result.outputs
        if not self._blocks.all:
            for event in self._empty_message():
                yield self._event(event)
        self._add_output()
        self._finish(result, output)
        kind = events.IncompleteEnd if self._response.status == "incomplete" else events.Completed
        yield self._event(kind(response=self._response))

    def broken(self, error: OctavoError) -> Iterable[bytes]:
        self._response.fail(error)
        return [self._event(events.Failed(response=self._response))]

    # --- the end ------------------------------------------------------------------------------------------------------

    def _add_output(self) -> None:
        self._response.output = [self._item(block, "completed") for block in self._blocks.all]

    def _finish(self, result: RequestOutput, output: CompletionOutput) -> None:
        if output.finish_reason == "abort":
            raise errors.shutting_down()
        response = self._response
        response.status, response.completed_at = "completed", now()
        if output.finish_reason == "length":
            response.status, response.incomplete_details = "incomplete", Incomplete("max_output_tokens")
            if response.output:
                response.output[-1].status = "incomplete"
        response.usage = self._usage(result, output)
        if response.store:
            self._store()

    def _store(self) -> None:
        job = self._job
        chat = [*job.conversation.messages][1 if job.body.instructions else 0 :] + items.of_output(self._blocks.all)
        job.service.responses.put(job.origin.owner, self._response, [dict(one) for one in chat], given_items(job))

    def _usage(self, result: RequestOutput, output: CompletionOutput) -> Usage:
        prompt, made = len(result.prompt_token_ids), len(output.token_ids)
        thought = self._blocks.of("reasoning")
        tokens = len(self._job.service.llm.inputs.encode(thought, add_special_tokens=False)) if thought else 0
        return Usage(
            input_tokens=prompt,
            input_tokens_details=InputDetails(result.num_cached_tokens),
            output_tokens=made,
            output_tokens_details=OutputDetails(min(tokens, made)),
            total_tokens=prompt + made,
        )

    # --- items and events ---------------------------------------------------------------------------------------------

    def _of_change(self, change: Change) -> Iterable[events.Event]:
        block, (id, index) = change.block, self._place(change.block)
        if change.what == "open":
            yield events.ItemAdded(output_index=index, item=self._item(block, "in_progress"))
            if block.kind != "call":
                yield events.PartAdded(item_id=id, output_index=index, part=_part(block, whole=False))
        elif change.what == "add" and block.kind == "text":
            yield self._text_delta(id, index, change.text)
        elif change.what == "add":
            kind = events.ReasoningDelta if block.kind == "reasoning" else events.ArgumentsDelta
            yield kind(item_id=id, output_index=index, delta=change.text)
        else:
            if block.kind == "text" and self._logprobs:  # of tokens without text, as the end is
                yield self._text_delta(id, index, "")
            yield from self._closed(block)

    def _text_delta(self, id: str, index: int, text: str) -> events.TextDelta:
        scores, self._logprobs = self._logprobs, []
        return events.TextDelta(item_id=id, output_index=index, delta=text, logprobs=scores)

    def _closed(self, block: Block) -> Iterable[events.Event]:
        id, index = self._place(block)
        if block.kind == "call":
            yield events.ArgumentsDone(item_id=id, output_index=index, name=block.name, arguments=block.text)
        else:
            done = events.TextDone if block.kind == "text" else events.ReasoningDone
            yield done(item_id=id, output_index=index, text=block.text)
            yield events.PartDone(item_id=id, output_index=index, part=_part(block, whole=True))
        yield events.ItemDone(output_index=index, item=self._item(block, "completed"))

    def _empty_message(self) -> Iterable[events.Event]:
        block = _empty()
        self._blocks.all.append(block)
        yield from self._of_change(Change("open", block))
        yield from self._closed(block)

    def _place(self, block: Block) -> tuple[str, int]:
        prefix = {"call": "fc", "text": "msg", "reasoning": "rs"}[block.kind]
        return f"{prefix}_{self._job.origin.id}_{block.index}", block.index

    def _item(self, block: Block, status: Status) -> OutputItem:
        id, whole = self._place(block)[0], status == "completed"
        if block.kind == "call":
            arguments = block.text if whole else ""
            return CallItem(id=id, status=status, call_id=block.id, name=block.name, arguments=arguments)
        if block.kind == "text":
            text = OutputText(text=block.text)
            return MessageItem(id=id, status=status, content=[text] if whole else [])
        thought = ReasoningText(text=block.text)
        return ReasoningItem(id=id, status=status, content=[thought] if whole else [])

    def _scores(self, token_ids: list[int], entries: Any) -> list[TokenLogprob]:
        if not self._job.body.wants_logprobs:
            return []
        return chat_logprobs(token_ids, entries or [], self._job.body.top_logprobs or 0).content

    def _event(self, event: events.Event) -> bytes:
        event.sequence_number, self._sent = self._sent, self._sent + 1
        return named_event(event)


def _empty() -> Block:
    """Clients look for a message, even of an answer without a word."""
    return Block("text", 0)


def _part(block: Block, *, whole: bool) -> OutputText | ReasoningText:
    text = block.text if whole else ""
    return OutputText(text=text) if block.kind == "text" else ReasoningText(text=text)


def blank(job: Job[ResponsesRequest]) -> Response:
    """The response before anything has come."""
    body, params = job.body, job.prepared[0].params
    effort = ReasoningEcho(body.reasoning.effort, body.reasoning.summary) if body.reasoning else ReasoningEcho()
    return Response(
        id=job.id,
        created_at=job.created,
        background=bool(body.background),
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        max_tool_calls=body.max_tool_calls,
        metadata=body.metadata or {},
        model=job.model,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning=effort,
        store=body.store is not False and not job.origin.delay,  # a batch would fill the store
        temperature=params.temperature,
        text=body.text or TextConfig(),
        tool_choice=body.tool_choice or "auto",
        tools=body.tools or [],
        top_logprobs=body.top_logprobs or 0,
        top_p=params.top_p,
        user=body.user,
    )


def given_items(job: Job[ResponsesRequest]) -> list[dict[str, Any]]:
    """The items of the input, each with an id."""
    given = job.body.input
    if isinstance(given, str):
        given = [{"role": "user", "content": [{"type": "input_text", "text": given}]}]
    return [{"type": "message", "id": f"item_{job.origin.id}_{i}", **item} for i, item in enumerate(given)]


ENDPOINT = Endpoint(ResponsesRequest, PREFIX, read, ResponseWriter)
