"""Reasoning, grammars and tools together, through the real client, on a model with random weights, run hot.

Its tokenizer has the marks of Qwen's formats; `logit_bias` makes them likely, and nothing else helps it to write JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from tokenizers import AddedToken, Tokenizer

from tests.e2e.serving import Server, running
from tools import tiny

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
THINK, UNTHINK, CALL, UNCALL = range(tiny.VOCAB_SIZE, tiny.VOCAB_SIZE + len(MARKS))
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools> <tool_call>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if open is defined %}<think>\n{% endif %}"
)
POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["a", "bc"]}},
    "required": ["x", "kind"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
MOVE: Any = {"type": "function", "function": {"name": "move", "parameters": POINT}}
SAY_PARAMETERS = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "maxLength": 4},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["text"],
    "additionalProperties": False,
}
SAY: Any = {"type": "function", "function": {"name": "say", "parameters": SAY_PARAMETERS}}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}
OPEN = {"chat_template_kwargs": {"open": True}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guides") / "tiny"
    tiny.tokenizer(folder)
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
    made.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    size = {"vocab_size": tiny.VOCAB_SIZE + len(MARKS), "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(tiny.config(**size)))
    command = ["-m", "octavo", "serve", str(folder), "--port", "0", "--load-format", "dummy", "--dtype", "float32"]
    command += ["--kv-cache-memory-bytes", "16M", "--device", "cpu", "--max-num-seqs", "16"]
    with running(command, tmp_path_factory.mktemp("log") / "log") as one:
        yield one


@pytest.fixture
def ask(server: Server) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        def call(likely: dict[int, float], **options: Any) -> Any:
            bias = {str(token): value for token, value in likely.items()}
            given = {"model": "tiny", "temperature": 1.5, "max_tokens": 300, "logit_bias": bias, "seed": 1}
            return client.chat.completions.create(messages=[{"role": "user", "content": "Hi"}], **(given | options))

        yield call


def check_point(value: Any) -> None:
    assert value.keys() == {"x", "kind"}
    assert type(value["x"]) is int and 0 <= value["x"] <= 99
    assert value["kind"] in ("a", "bc")


def check_call(call: Any) -> None:
    arguments = json.loads(call.function.arguments)
    if call.function.name == "move":
        check_point(arguments)
        return
    assert call.function.name == "say"
    assert "text" in arguments and arguments.keys() <= {"text", "tags"}
    assert len(arguments["text"]) <= 4 and all(type(tag) is bool for tag in arguments.get("tags", []))


def together(stream: Any) -> tuple[str, str, str | None]:
    """(reasoning, content, reason) of a streamed choice; asserts that no reasoning follows content."""
    reasoning = content = ""
    reason = None
    for chunk in stream:
        for choice in chunk.choices:
            more = getattr(choice.delta, "reasoning_content", None) or ""
            assert not (more and content)
            reasoning, content = reasoning + more, content + (choice.delta.content or "")
            reason = choice.finish_reason or reason
    return reasoning, content, reason


def test_a_schema_holds_after_the_reasoning_that_the_prompt_opened_also_in_a_stream(ask: Any) -> None:
    for seed in range(3):
        options: Any = {"response_format": FORMAT, "extra_body": OPEN, "seed": seed}
        message = ask({UNTHINK: 4, tiny.EOS: -100}, **options).choices[0].message
        assert message.reasoning_content.strip()
        check_point(json.loads(message.content))
        streamed = together(ask({UNTHINK: 4, tiny.EOS: -100}, stream=True, **options))
        assert streamed == (message.reasoning_content, message.content, "stop")


def test_a_schema_holds_from_the_first_token_where_there_is_no_reasoning(ask: Any) -> None:
    choice = ask({THINK: -100}, response_format=FORMAT).choices[0]
    assert not getattr(choice.message, "reasoning_content", None)
    check_point(json.loads(choice.message.content))
    choice = ask({THINK: 7, UNTHINK: 7, tiny.EOS: -100}, response_format=FORMAT).choices[0]
    assert choice.message.reasoning_content
    check_point(json.loads(choice.message.content))


def test_random_calls_with_the_choice_auto_fit_their_schemas(ask: Any) -> None:
    calls = 0
    for seed in range(3):
        options: Any = {"tools": [MOVE, SAY], "n": 4, "seed": seed}
        answer = ask({CALL: 6, THINK: -100, UNCALL: 2, tiny.EOS: -100}, **options)
        for choice in answer.choices:
            made = choice.message.tool_calls or []
            calls += len(made)
            for call in made:
                check_call(call)
            # What is content has no call in it but one that the limit cut off.
            assert (choice.message.content or "").count("<tool_call>") <= (choice.finish_reason == "length")
    assert calls > 20


def test_calls_stream_to_the_same_after_reasoning(ask: Any) -> None:
    options: Any = {"tools": [MOVE, SAY], "extra_body": OPEN}
    likely = {UNTHINK: 5, CALL: 6, tiny.EOS: -100}
    message = ask(likely, **options).choices[0].message
    assert message.tool_calls and message.reasoning_content
    pieces = [c.delta.tool_calls for chunk in ask(likely, stream=True, **options) for c in chunk.choices]
    arguments = "".join(one.function.arguments or "" for piece in pieces for one in piece or ())
    assert arguments == "".join(call.function.arguments for call in message.tool_calls)
    for call in message.tool_calls:
        check_call(call)


def test_a_required_call_comes_after_reasoning(ask: Any) -> None:
    options: Any = {"tools": [MOVE, SAY], "tool_choice": "required", "parallel_tool_calls": False}
    message = ask({UNTHINK: 4, tiny.EOS: -100}, extra_body=OPEN, **options).choices[0].message
    assert message.reasoning_content and message.content is None
    (call,) = message.tool_calls
    check_call(call)


def test_a_strict_tool_that_cannot_be_held_is_refused_and_another_is_not(ask: Any) -> None:
    odd: Any = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": odd}}
    assert ask({}, tools=[tool], max_tokens=5).choices
    with pytest.raises(openai.BadRequestError, match="uniqueItems"):
        ask({}, tools=[{"type": "function", "function": tool["function"] | {"strict": True}}], max_tokens=5)
