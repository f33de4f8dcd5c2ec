"""Anthropic's Messages API through the real client of Anthropic, with a model that says what it is told."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest

from tests.frontend.fakes import prompt_of
from tests.server.clients import Said
from tests.server.fake import run
from tests.server.test_tools import CALL, CALL_2, HERMES, THINKING

ASK: Any = {"model": "m", "max_tokens": 500, "messages": [{"role": "user", "content": "hi"}]}
WEATHER: Any = {
    "name": "get_weather",
    "description": "Weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
ADD: Any = {"name": "add", "input_schema": {"type": "object"}}


def test_a_message_has_text_reason_and_usage_without_cached_tokens() -> None:
    async def work() -> None:
        setup = Said("hello world")
        message = await setup.anthropic.messages.create(**ASK, system="be kind")
        assert (message.type, message.role, message.model) == ("message", "assistant", "m")
        assert message.id.startswith("msg_")
        assert [block.text for block in message.content] == ["hello world"]
        assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
        assert setup.prompt() == "[system]be kind[user]hi[bot]"
        prompt = len(prompt_of(setup.server.fake.requests[-1]))
        assert (message.usage.input_tokens, message.usage.cache_read_input_tokens) == (prompt - 4, 4)

    run(work)


def test_a_stream_puts_together_the_same_message_and_its_events_come_in_order() -> None:
    async def work() -> None:
        text = "<think>\nwell\n</think>\n\nI look.\n" + CALL + "\n" + CALL_2
        setup = Said(text, template=THINKING)
        ask = {**ASK, "tools": [WEATHER, ADD]}
        whole = await setup.anthropic.messages.create(**ask)
        kinds = []
        async with setup.anthropic.messages.stream(**ask) as stream:
            async for event in stream:
                kinds.append(event.type)
            final = await stream.get_final_message()
        assert [block.type for block in whole.content] == ["thinking", "text", "tool_use", "tool_use"]
        assert (whole.content[0].thinking, whole.content[1].text) == ("well", "I look.")
        assert [(block.name, block.input) for block in whole.content[2:]] == [
            ("get_weather", {"city": "Łódź"}),
            ("add", {"a": 1}),
        ]
        assert whole.stop_reason == final.stop_reason == "tool_use"
        plain = [block.model_dump(exclude={"id", "parsed_output"}) for block in whole.content]
        assert [block.model_dump(exclude={"id", "parsed_output"}) for block in final.content] == plain
        assert final.usage.output_tokens == whole.usage.output_tokens
        assert final.usage.cache_read_input_tokens == whole.usage.cache_read_input_tokens == 4
        assert (kinds[0], kinds[-2:]) == ("message_start", ["message_delta", "message_stop"])
        assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4

    run(work)


def test_every_event_has_its_name_and_nothing_follows_the_last() -> None:
    async def work() -> None:
        response = await Said("hello").server.post("/v1/messages", {**ASK, "stream": True})
        events = [part.split("\n") for part in response.text.strip().split("\n\n")]
        assert all(name == f"event: {json.loads(data[6:])['type']}" for name, data in events)
        assert json.loads(events[-1][1][6:]) == {"type": "message_stop"}

    run(work)


def test_results_of_tools_and_thoughts_go_to_the_template_as_chat_messages() -> None:
    async def work() -> None:
        setup = Said("ok", template=HERMES + "{% for m in messages if m.thinking %}({{ m.thinking }}){% endfor %}")
        calls = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}}
        result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "2"}]}
        failure = {"type": "tool_result", "tool_use_id": "t2", "content": "gone", "is_error": True}
        thought = {"type": "thinking", "thinking": "hm", "signature": ""}
        messages: Any = [
            *ASK["messages"],
            {"role": "assistant", "content": [thought, {"type": "text", "text": "so"}, calls]},
            {"role": "user", "content": [result, failure, {"type": "text", "text": "and?"}]},
        ]
        await setup.anthropic.messages.create(**{**ASK, "messages": messages})
        assert setup.prompt() == (
            '[user]hi[assistant]so<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
            "[tool]2[tool]Error: gone[user]and?[bot](hm)"
        )

    run(work)


def test_an_answer_that_has_begun_is_continued() -> None:
    async def work() -> None:
        setup = Said(" you")
        messages: Any = [*ASK["messages"], {"role": "assistant", "content": "I see"}]
        message = await setup.anthropic.messages.create(**{**ASK, "messages": messages})
        assert setup.prompt() == "[user]hi[assistant]I see"
        assert message.content[0].text == " you"

    run(work)


@pytest.mark.parametrize(
    ("changes", "reason", "sequence"),
    [({"stop_sequences": ["wor"]}, "stop_sequence", "wor"), ({"max_tokens": 2}, "max_tokens", None)],
)
def test_why_an_answer_ended(changes: Any, reason: str, sequence: str | None) -> None:
    async def work() -> None:
        message = await Said("hello world", finish="length").anthropic.messages.create(**{**ASK, **changes})
        assert (message.stop_reason, message.stop_sequence) == (reason, sequence)

    run(work)


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "add"}])
def test_a_forced_call_is_held_to_a_grammar(choice: Any) -> None:
    async def work() -> None:
        setup = Said('[{"name": "add", "arguments": {"a": 1}}]')
        message = await setup.anthropic.messages.create(**ASK, tools=[WEATHER, ADD], tool_choice=choice)
        assert [(block.type, block.name) for block in message.content] == [("tool_use", "add")]
        grammar = setup.server.fake.requests[-1].sampling.guide.whole
        assert grammar is not None
        assert ("get_weather" in grammar.text) == (choice["type"] == "any")

    run(work)


def test_thinking_that_is_switched_off_reaches_the_template_and_is_not_shown() -> None:
    async def work() -> None:
        text = "<think>a</think>b"
        shown = THINKING + "{{ enable_thinking }}{{ thinking_budget }}{{ reasoning_effort }}"
        setup = Said(text, template=shown)
        message = await setup.anthropic.messages.create(**ASK, thinking={"type": "disabled"})
        assert [block.type for block in message.content] == ["text"]
        assert setup.prompt().endswith("[bot]False")
        on: Any = {"thinking": {"type": "enabled", "budget_tokens": 1024}, "output_config": {"effort": "low"}}
        message = await setup.anthropic.messages.create(**ASK, **on)
        assert [block.type for block in message.content] == ["thinking", "text"]
        assert setup.prompt().endswith("[bot]True1024low")

    run(work)


def test_output_can_be_held_to_a_schema() -> None:
    async def work() -> None:
        setup = Said('{"a": 1}')
        form: Any = {"format": {"type": "json_schema", "schema": {"type": "object", "title": "marker"}}}
        await setup.anthropic.messages.create(**ASK, output_config=form)
        grammar = setup.server.fake.requests[-1].sampling.guide.whole
        assert grammar is not None
        assert "marker" in grammar.text

    run(work)


def test_tokens_are_counted_as_the_message_has_them_and_nothing_is_asked_of_the_engine() -> None:
    async def work() -> None:
        setup = Said("x", template=HERMES)
        ask: Any = {"model": "m", "messages": ASK["messages"], "system": "s", "tools": [WEATHER]}
        count = await setup.anthropic.messages.count_tokens(**ask)
        assert not setup.server.fake.requests
        await setup.anthropic.messages.create(**ask, max_tokens=5)
        assert count.input_tokens == len(prompt_of(setup.server.fake.requests[-1]))

    run(work)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "there is an image"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, "tool_res"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search|input_schema"),
        ({"extra_body": {"mcp_servers": []}}, "not a field"),
        ({"stop_sequences": ["x" * 2000]}, "stop string"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"temperature": -1.0}}, "temperature"),
    ],
)
def test_what_cannot_be_done_is_refused_in_anthropics_words(changes: Any, message: str) -> None:
    async def work() -> None:
        with pytest.raises(anthropic.BadRequestError, match=message) as error:
            await Said("x").anthropic.messages.create(**{**ASK, **changes})
        body: Any = error.value.body
        assert body["type"] == "error"
        assert body["error"]["type"] == "invalid_request_error"
        assert body["request_id"] == error.value.response.headers["x-request-id"]

    run(work)


def test_other_errors_are_the_clients_own_kinds_too() -> None:
    async def work() -> None:
        with pytest.raises(anthropic.NotFoundError):
            await Said("x").anthropic.messages.create(**{**ASK, "model": "claude"})
        with pytest.raises(anthropic.AuthenticationError):
            await Said("x", key="wrong", api_key="right").anthropic.messages.create(**ASK)
        assert await Said("x", key="right", api_key="right").anthropic.messages.create(**ASK)
        dead = Said("x")
        dead.server.die()
        with pytest.raises(anthropic.InternalServerError):
            await dead.anthropic.messages.create(**ASK)

    run(work)


def test_a_stream_that_breaks_ends_with_an_error_event() -> None:
    async def work() -> None:
        setup = Said("hello world")
        setup.breaks()
        stream = await setup.anthropic.messages.create(**ASK, stream=True)
        with pytest.raises(anthropic.APIStatusError, match="killed"):
            [event async for event in stream]

    run(work)
