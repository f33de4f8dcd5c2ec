"""OpenAI's Responses API through the real client of OpenAI, with a model that says what it is told."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from octavo.server.responses.body import ReasoningEcho, Response, TextConfig
from octavo.server.responses.store import ResponseStore
from tests.server.clients import Said
from tests.server.fake import run
from tests.server.test_tools import CALL, CALL_2, HERMES, THINKING

WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
ADD: Any = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}


async def ask(setup: Said, input: Any = "hi", **options: Any) -> Any:
    return await setup.openai.responses.create(**({"model": "m", "input": input} | options))


def test_a_response_has_a_message_usage_and_what_was_asked() -> None:
    async def work() -> None:
        setup = Said("hello world")
        made = await ask(setup, instructions="be kind", metadata={"a": "b"}, temperature=0.5)
        assert (made.status, made.output_text, made.metadata) == ("completed", "hello world", {"a": "b"})
        assert (made.temperature, made.instructions, made.tool_choice) == (0.5, "be kind", "auto")
        assert setup.prompt() == "[system]be kind[user]hi[bot]"
        usage = made.usage
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens
        assert usage.input_tokens_details.cached_tokens == 4

    run(work)


def test_events_come_in_order_with_their_numbers_and_add_up_to_the_response() -> None:
    async def work() -> None:
        setup = Said("<think>\nwell\n</think>\n\nI look.\n" + CALL + "\n" + CALL_2, template=THINKING)
        whole = await ask(setup, tools=[WEATHER, ADD])
        events = [event async for event in await ask(setup, tools=[WEATHER, ADD], stream=True)]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        order = [event.type.removeprefix("response.") for event in events]
        compact = [kind for i, kind in enumerate(order) if i == 0 or order[i - 1] != kind]
        reasoning, text, call = (
            ["output_item.added", *middle, "output_item.done"]
            for middle in (
                ["content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done"],
                ["content_part.added", "output_text.delta", "output_text.done", "content_part.done"],
                ["function_call_arguments.delta", "function_call_arguments.done"],
            )
        )
        assert compact == ["created", "in_progress", *reasoning, *text, *call, *call, "completed"]
        final = events[-1].response
        assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
        assert [item.model_dump(exclude={"id", "call_id"}) for item in final.output] == [
            item.model_dump(exclude={"id", "call_id"}) for item in whole.output
        ]
        assert final.output[0].content[0].text == "well"
        assert json.loads(final.output[2].arguments) == {"city": "Łódź"}
        assert final.usage == whole.usage
        assert final.usage.output_tokens_details.reasoning_tokens == 4
        done = [event.item for event in events if event.type == "response.output_item.done"]
        assert done == final.output
        added = [event.item.id for event in events if event.type == "response.output_item.added"]
        assert added == [item.id for item in final.output]

    run(work)


def test_the_clients_own_stream_helper_puts_the_response_together() -> None:
    async def work() -> None:
        setup = Said("hello " + CALL, template=HERMES)
        async with setup.openai.responses.stream(model="m", input="hi", tools=[WEATHER]) as stream:
            final = await stream.get_final_response()
        assert final.output_text == "hello"
        assert json.loads(final.output[1].arguments) == {"city": "Łódź"}

    run(work)


def test_items_of_earlier_answers_become_one_message_of_the_chat() -> None:
    async def work() -> None:
        setup = Said("ok", template=HERMES + "{% for m in messages if m.thinking %}({{ m.thinking }}){% endfor %}")
        given = [
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "so"}]},
            {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'},
            {"type": "function_call", "call_id": "c2", "name": "add", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "2"},
            {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "0"}]},
        ]
        await ask(setup, given)
        assert setup.prompt() == (
            '[system]d[user]hi[assistant]so<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
            '<tool_call>{"name": "add", "arguments": {}}</tool_call>[tool]2[tool]0[bot](hm)'
        )

    run(work)


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_continues_an_earlier_one_without_its_instructions(stream: bool) -> None:
    async def work() -> None:
        setup = Said("hello " + CALL, template=HERMES)
        first = await ask(setup, tools=[WEATHER], instructions="old", stream=stream)
        if stream:
            first = [event async for event in first][-1].response
        output = {"type": "function_call_output", "call_id": first.output[1].call_id, "output": "rain"}
        second = await ask(setup, [output], previous_response_id=first.id, instructions="new")
        call = '<tool_call>{"name": "get_weather", "arguments": {"city": "Łódź"}}</tool_call>'
        assert setup.prompt() == f"[system]new[user]hi[assistant]hello{call}[tool]rain[bot]"
        assert second.previous_response_id == first.id
        await ask(setup, "more", previous_response_id=second.id)
        assert setup.prompt().startswith(f"[user]hi[assistant]hello{call}[tool]rain[assistant]hello")

    run(work)


def test_a_stored_response_can_be_read_listed_and_deleted() -> None:
    async def work() -> None:
        setup = Said("hello")
        made = await ask(setup)
        assert (await setup.openai.responses.retrieve(made.id)).output_text == "hello"
        (item,) = (await setup.openai.responses.input_items.list(made.id)).data
        assert item.content[0].text == "hi"
        await setup.openai.responses.delete(made.id)
        for work in (setup.openai.responses.retrieve, setup.openai.responses.delete):
            with pytest.raises(openai.NotFoundError):
                await work(made.id)
        with pytest.raises(openai.NotFoundError):
            await ask(setup, previous_response_id=made.id)

    run(work)


def test_a_response_that_is_not_to_be_stored_is_not() -> None:
    async def work() -> None:
        setup = Said("hello")
        made = await ask(setup, store=False)
        assert not made.model_extra.get("store")
        assert len(setup.server.service.responses) == 0
        with pytest.raises(openai.NotFoundError):
            await setup.openai.responses.retrieve(made.id)

    run(work)


def test_a_response_is_made_in_the_background_or_cancelled() -> None:
    async def work() -> None:
        setup = Said("hello")
        made = await ask(setup, background=True)
        assert made.status == "queued"
        await asyncio.gather(*setup.server.service.background.values())
        found = await setup.openai.responses.retrieve(made.id)
        assert (found.status, found.output_text) == ("completed", "hello")
        assert (await setup.openai.responses.cancel(made.id)).status == "completed"
        setup.server.fake.script = lambda request: []  # hangs
        made = await ask(setup, background=True)
        assert (await setup.openai.responses.cancel(made.id)).status == "cancelled"
        assert len(setup.server.fake.aborted) == 1
        assert not setup.server.service.background
        with pytest.raises(openai.BadRequestError, match="cancelled"):
            await ask(setup, previous_response_id=made.id)
        plain = await ask(Said("x"))
        with pytest.raises(openai.NotFoundError):
            await setup.openai.responses.cancel(plain.id)

    run(work)


def test_a_background_response_that_fails_says_so() -> None:
    async def work() -> None:
        setup = Said("hello")
        setup.server.die()
        made = await ask(setup, background=True)
        await asyncio.gather(*setup.server.service.background.values())
        found = await setup.openai.responses.retrieve(made.id)
        assert found.status == "failed"
        assert "killed" in found.error.message

    run(work)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_was_cut_off_is_incomplete(stream: bool) -> None:
    async def work() -> None:
        made = await ask(Said("hello world", finish="length"), max_output_tokens=2, stream=stream)
        if stream:
            events = [event async for event in made]
            assert events[-1].type == "response.incomplete"
            made = events[-1].response
        assert (made.status, made.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert made.output[-1].status == "incomplete"

    run(work)


def test_a_stream_that_breaks_ends_with_a_failed_response() -> None:
    async def work() -> None:
        setup = Said("hello world")
        setup.breaks()
        events = [event async for event in await ask(setup, stream=True)]
        assert events[-1].type == "response.failed"
        assert events[-1].response.status == "failed"
        assert "killed" in events[-1].response.error.message

    run(work)


def test_an_answer_without_a_word_is_an_empty_message_streamed_or_not() -> None:
    async def work() -> None:
        events = [event async for event in await ask(Said(""), stream=True)]
        for response in (events[-1].response, await ask(Said(""))):
            (message,) = response.output
            assert (message.status, message.content[0].text) == ("completed", "")

    run(work)


@pytest.mark.parametrize(("finish", "said"), [("length", "hello world"), ("stop", "hello world</s>")])
def test_log_probabilities_come_with_the_text(finish: str, said: str) -> None:
    async def work() -> None:
        setup = Said("hello world", finish=finish)
        options: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
        whole = await ask(setup, **options)
        scores = whole.output[0].content[0].logprobs
        assert "".join(one.token for one in scores) == said
        assert [len(one.top_logprobs) for one in scores] == [2] * len(scores)
        events = [event async for event in await ask(setup, stream=True, **options)]
        sent = [one.token for e in events if e.type == "response.output_text.delta" for one in e.logprobs]
        assert sent == [one.token for one in scores]

    run(work)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ({"format": {"type": "json_schema", "name": "x", "schema": {"type": "object", "title": "marker"}}}, "marker"),
        ({"format": {"type": "json_object"}}, '"object"'),
    ],
)
def test_output_can_be_held_to_a_form(text: Any, inside: str) -> None:
    async def work() -> None:
        setup = Said("{}")
        made = await ask(setup, text=text)
        grammar = setup.server.fake.requests[-1].sampling.guide.whole
        assert grammar is not None
        assert inside in grammar.text
        assert made.text.format.type == text["format"]["type"]

    run(work)


def test_a_forced_call_and_the_effort_reach_the_model() -> None:
    async def work() -> None:
        setup = Said('[{"name": "add", "arguments": {}}]', template=HERMES + "{{ reasoning_effort }}")
        choice: Any = {"type": "function", "name": "add"}
        made = await ask(setup, tools=[WEATHER, ADD], tool_choice=choice, reasoning={"effort": "low"})
        assert [(item.type, item.name) for item in made.output] == [("function_call", "add")]
        assert setup.prompt().endswith("low")
        grammar = setup.server.fake.requests[-1].sampling.guide.whole
        assert grammar is not None
        assert "get_weather" not in grammar.text

    run(work)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, r"input\[0\].content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, r"input\[0\]"),
        ({"input": []}, "input is empty"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"conversation": "c"}, "not a field"),
        ({"prompt": {"id": "p"}}, "not a field"),
        ({"background": True, "stream": True}, "background"),
        ({"background": True, "store": False}, "background"),
        ({"text": {"verbosity": "low"}}, "verbosity"),
        ({"reasoning": {"summary": "detailed"}}, "summary"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"text": {"format": {"type": "xml"}}}, "xml"),
    ],
)
def test_what_cannot_be_done_is_refused(options: Any, message: str) -> None:
    async def work() -> None:
        with pytest.raises(openai.BadRequestError, match=message):
            await ask(Said("x"), **options)

    run(work)


def test_the_store_is_bounded_and_forgets_the_least_recently_used() -> None:
    def response(id: str) -> Response:
        return Response(
            id=id, created_at=0, model="m", reasoning=ReasoningEcho(), temperature=1, text=TextConfig(),
            tool_choice="auto", top_p=1,
        )  # fmt: skip

    store = ResponseStore(max_count=3, max_bytes=10_000)
    for id in "abc":
        store.put(b"o", response(id), [], [])
    store.get(b"o", "a")
    store.put(b"o", response("d"), [], [])
    with pytest.raises(Exception, match="no response 'b'"):
        store.get(b"o", "b")
    with pytest.raises(Exception, match="no response 'a'"):
        store.get(b"another owner", "a")
    for i in range(50):
        store.put(b"o", response(f"large{i}"), [{"text": "x" * 3000}], [])
        assert store.size <= 10_000
    store.put(b"o", response("huge"), [{"text": "x" * 20_000}], [])
    with pytest.raises(Exception, match="no response 'huge'"):
        store.get(b"o", "huge")
    assert store.get(b"o", "large49").chat.startswith(b'[{"text"')
