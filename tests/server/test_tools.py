"""Tool calls and reasoning through the real client of OpenAI, with a model that says what it is told."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from octavo.frontend.parse.registry import Formats
from octavo.server.service import formats_of
from tests.frontend.fakes import prompt_of
from tests.server.fake import Server, run, speak

HERMES = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools> as <tool_call>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}[bot]{% endif %}"
)
THINKING = HERMES + "{# <think> #}{% if think is defined %}<think>\n{% endif %}"
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ADD: Any = {"type": "function", "function": {"name": "add"}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Łódź"}}\n</tool_call>'
CALL_2 = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ASK: Any = [{"role": "user", "content": "hi"}]


class Setup:
    """A server whose model says ``text``, and a client for it."""

    def __init__(self, text: str, *, template: str = HERMES, finish: str = "length", **options: Any) -> None:
        self.server = Server(template=template, max_model_len=4096, **options)
        tokens = self.server.tokenizer.encode(text)
        if finish == "stop":
            tokens = [*tokens, self.server.tokenizer.eos_id or 0]
        self.server.fake.script = speak(tokens, finish=finish)
        http = httpx.AsyncClient(transport=httpx.ASGITransport(self.server.app), base_url="http://test/v1")
        self.client = openai.AsyncOpenAI(api_key="x", base_url="http://test/v1", http_client=http, max_retries=0)

    async def ask(self, **options: Any) -> Any:
        return await self.client.chat.completions.create(**({"model": "m", "messages": ASK} | options))

    def prompt(self) -> str:
        """What the model saw last."""
        return self.server.tokenizer.decode(prompt_of(self.server.fake.requests[-1]), skip_special_tokens=False)


def said(text: str, **options: Any) -> Setup:
    """The model ends by itself after ``text``."""
    return Setup(text, finish="stop", **options)


def test_a_call_is_in_the_message_and_ends_it() -> None:
    async def work() -> None:
        setup = said("I look.\n" + CALL)
        choice = (await setup.ask(tools=[WEATHER])).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content == "I look."
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        assert call.id.startswith("call_")
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments) == {"city": "Łódź"}
        assert json.loads(setup.prompt().split("<tools>")[1].split("</tools>")[0]) == [WEATHER]

    run(work)


def test_a_streamed_call_comes_as_id_and_name_and_then_arguments() -> None:
    async def work() -> None:
        stream = await said(CALL + "\n" + CALL_2).ask(tools=[WEATHER, ADD], stream=True)
        chunks = [chunk async for chunk in stream]
        deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
        assert deltas[0].role == "assistant"
        assert "".join(delta.content or "" for delta in deltas) == ""
        pieces = [call for delta in deltas for call in delta.tool_calls or ()]
        starts = [piece for piece in pieces if piece.id is not None]
        assert [(one.index, one.type, one.function.name, one.function.arguments) for one in starts] == [
            (0, "function", "get_weather", ""),
            (1, "function", "add", ""),
        ]
        assert starts[0].id != starts[1].id
        rest = [piece for piece in pieces if piece.id is None]
        assert all(piece.function.name is None and piece.type is None for piece in rest)
        arguments = ["".join(p.function.arguments for p in rest if p.index == index) for index in (0, 1)]
        assert [json.loads(one) for one in arguments] == [{"city": "Łódź"}, {"a": 1}]
        reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
        assert reasons[-1] == "tool_calls"
        assert not any(reasons[:-1])

    run(work)


def test_the_clients_own_stream_helper_puts_the_message_together() -> None:
    async def work() -> None:
        setup = said("So.\n" + CALL + CALL_2)
        async with setup.client.chat.completions.stream(model="m", messages=ASK, tools=[WEATHER, ADD]) as stream:
            async for _ in stream:
                pass
            message = (await stream.get_final_completion()).choices[0].message
        whole = (await setup.ask(tools=[WEATHER, ADD])).choices[0].message
        assert message.content == whole.content == "So."
        assert [c.function.arguments for c in message.tool_calls or ()] == [
            c.function.arguments for c in whole.tool_calls
        ]

    run(work)


@pytest.mark.parametrize("stream", [False, True])
def test_only_the_first_call_is_answered_without_parallel_calls(stream: bool) -> None:
    async def work() -> None:
        setup = said(CALL + CALL_2)
        answer = await setup.ask(tools=[WEATHER, ADD], parallel_tool_calls=False, stream=stream)
        if stream:
            calls = [c for chunk in [one async for one in answer] for c in chunk.choices[0].delta.tool_calls or ()]
            assert {call.index for call in calls} == {0}
        else:
            assert [call.function.name for call in answer.choices[0].message.tool_calls] == ["get_weather"]

    run(work)


def test_tokens_of_a_conversation_can_be_counted_with_its_tools() -> None:
    async def work() -> None:
        setup = said("x")
        await setup.ask(tools=[WEATHER])
        answer = await setup.server.post("/tokenize", {"messages": ASK, "tools": [WEATHER]})
        assert answer.json()["tokens"] == prompt_of(setup.server.fake.requests[-1])

    run(work)


def test_without_tools_or_with_none_a_call_is_content() -> None:
    async def work() -> None:
        for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
            setup = said(CALL)
            choice = (await setup.ask(**options)).choices[0]
            assert choice.message.content == CALL
            assert choice.message.tool_calls is None
            assert choice.finish_reason == "stop"
            assert "<tools>" not in setup.prompt()

    run(work)


def test_a_call_that_the_length_limit_cut_off_is_content() -> None:
    async def work() -> None:
        choice = (await Setup(CALL[:-20]).ask(tools=[WEATHER])).choices[0]
        assert choice.finish_reason == "length"
        assert choice.message.content == CALL[:-20]
        assert choice.message.tool_calls is None

    run(work)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_apart_from_content(opened: bool, stream: bool) -> None:
    async def work() -> None:
        text = "Hm, let me think.\n</think>\n\nHello."
        setup = said(text if opened else "<think>\n" + text, template=THINKING)
        extra = {"chat_template_kwargs": {"think": 1}} if opened else {}
        answer = await setup.ask(stream=stream, extra_body=extra)
        parts = [c.choices[0].delta async for c in answer] if stream else [answer.choices[0].message]
        assert "".join(part.content or "" for part in parts) == "Hello."
        for name in ("reasoning_content", "reasoning"):
            assert "".join(getattr(part, name, None) or "" for part in parts) == "Hm, let me think."

    run(work)


def test_reasoning_can_be_left_out() -> None:
    async def work() -> None:
        setup = said("<think>\nHm.\n</think>\n\nHello.", template=THINKING)
        message = (await setup.ask(extra_body={"include_reasoning": False})).choices[0].message
        assert message.content == "Hello."
        assert not hasattr(message, "reasoning_content")

    run(work)


def test_reasoning_then_a_call_and_logprobs_of_every_token() -> None:
    async def work() -> None:
        setup = said(f"<think>Hm.</think>\n{CALL}", template=THINKING)
        stream = await setup.ask(tools=[WEATHER], stream=True, logprobs=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        choices = [choice for chunk in chunks for choice in chunk.choices]
        scored = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content]
        assert len(scored) == chunks[-1].usage.completion_tokens
        assert choices[-1].finish_reason == "tool_calls"

    run(work)


def test_each_of_n_choices_has_its_own_calls() -> None:
    async def work() -> None:
        answer = await said(CALL).ask(tools=[WEATHER], n=3)
        ids = {choice.message.tool_calls[0].id for choice in answer.choices}
        assert len(ids) == 3

    run(work)


def test_a_history_with_calls_and_results_goes_back_to_the_template() -> None:
    async def work() -> None:
        setup = said(CALL)
        message = (await setup.ask(tools=[WEATHER])).choices[0].message
        history = [
            *ASK,
            message.model_dump(exclude_unset=True),
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"},
        ]
        await setup.ask(messages=history, tools=[WEATHER])
        call = '<tool_call>{"arguments": {"city": "Łódź"}, "name": "get_weather"}</tool_call>'
        assert setup.prompt().endswith(f"[user]hi[assistant]{call}[tool]rain[bot]")

    run(work)


def test_markers_that_are_special_tokens_are_seen_and_other_special_tokens_are_not_shown() -> None:
    async def work() -> None:
        setup = said(f"<|end|>So.<|end|>{CALL}<|end|>", special=("<tool_call>", "</tool_call>"))
        message = (await setup.ask(tools=[WEATHER])).choices[0].message
        assert message.content == "So."
        assert message.tool_calls[0].function.name == "get_weather"
        assert (await setup.ask()).choices[0].message.content.startswith("So.\n{")

    run(work)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_forced_call_is_constrained_to_its_schema_and_read(choice: Any, stream: bool) -> None:
    async def work() -> None:
        setup = said('[{"name": "get_weather", "arguments": {"city": "Oslo"}}]')
        answer = await setup.ask(tools=[ADD, WEATHER], tool_choice=choice, stream=stream)
        if stream:
            choices = [chunk.choices[0] async for chunk in answer]
            pieces = [call.function for one in choices for call in one.delta.tool_calls or ()]
            name, arguments, reason = pieces[0].name, "".join(p.arguments for p in pieces), choices[-1].finish_reason
        else:
            (call,) = answer.choices[0].message.tool_calls
            name, arguments, reason = call.function.name, call.function.arguments, answer.choices[0].finish_reason
        assert (name, arguments, reason) == ("get_weather", '{"city": "Oslo"}', "tool_calls")
        grammar = setup.server.fake.requests[-1].sampling.guide.whole
        assert grammar is not None
        names = [one["properties"]["name"]["const"] for one in json.loads(grammar.text)["items"]["anyOf"]]
        assert names == (["add", "get_weather"] if choice == "required" else ["get_weather"])

    run(work)


def test_the_formats_are_the_models_unless_they_are_named() -> None:
    llm = Server(template=THINKING).llm
    assert formats_of(llm) == Formats("hermes", "think")
    assert formats_of(llm, tool="mistral", reasoning="none") == Formats("mistral", None)
    llm.renderer.named["tool_use"] = "{{ tools }}[TOOL_CALLS]"
    assert formats_of(llm).tool == "mistral"


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "x" * 200}}]}, "tools"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]}, "tools"),
    ({"tools": [{"type": "retrieval"}]}, "tools"),
    ({"tools": [WEATHER, WEATHER]}, "tools"),
    ({"tools": [ADD] * 600}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "custom"}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}]}, "tools"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": "f"}, "function_call"),
]


@pytest.mark.parametrize(("options", "param"), BAD)
def test_malformed_tools_are_refused_by_name(options: dict[str, Any], param: str) -> None:
    async def work() -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            await said("x").ask(**options)
        assert refused.value.param == param

    run(work)
