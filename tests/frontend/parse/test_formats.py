# ruff: noqa: E501 (templates and texts as they are)
"""Literal texts of each format, whole and in pieces; malformed and hostile ones."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import llguidance
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.frontend.parse import forced
from octavo.frontend.parse.events import CallArguments, CallEnd, CallStart, Content, Reasoning
from octavo.frontend.parse.message import MessageParser
from octavo.frontend.parse.reader import MAX_CALL, MAX_CALLS
from octavo.frontend.parse.registry import TOOLS, Formats

SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "opts": {"type": "object"}},
    },
    "add": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
}
PARIS = ("get_weather", {"city": "Paris"})
SUM = ("add", {"a": 1, "b": 2.5})


@dataclass
class Answer:
    """What a client puts together from the events, with the order of events checked."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)


def read(parser: MessageParser, pieces: Sequence[str]) -> Answer:
    answer, arguments, current = Answer(), "", -1
    for event in [*itertools.chain.from_iterable(map(parser.feed, pieces)), *parser.finish()]:
        if isinstance(event, Content):
            answer.content += event.text
        elif isinstance(event, Reasoning):
            answer.reasoning += event.text
        elif isinstance(event, CallStart):
            assert current == -1
            assert event.index == len(answer.calls)
            current, arguments = event.index, ""
            answer.calls.append((event.name, None))
            answer.ids.append(event.id)
        elif isinstance(event, CallArguments):
            assert event.index == current
            arguments += event.text
        else:
            assert isinstance(event, CallEnd)
            assert event.index == current
            value = json.loads(arguments, parse_constant=pytest.fail)
            assert isinstance(value, dict)
            arguments.encode()
            answer.calls[-1] = (answer.calls[-1][0], value)
            current = -1
    assert current == -1
    return answer


def parser(
    tool: str | None, reasoning: str | None = None, *, prompt: str = "", tools: Any = SCHEMAS, **options: Any
) -> MessageParser:
    ids = itertools.count()
    made = Formats(tool, reasoning).parser(prompt, tools, new_id=lambda: f"id{next(ids)}", **options)
    assert made is not None
    return made


def parse(tool: str | None, text: str, reasoning: str | None = None, **options: Any) -> Answer:
    """The answer, after a check that the text cut into single characters reads the same."""
    whole = read(parser(tool, reasoning, **options), [text])
    assert read(parser(tool, reasoning, **options), list(text)) == whole
    return whole


DS = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
KIMI = tuple(f"<|tool_{name}|>" for name in ("calls_section_begin", "call_begin", "call_argument_begin", "call_end"))
KIMI_END = "<|tool_calls_section_end|>"

# (format, text, content, calls)
GOOD: list[tuple[str, str, str, list[tuple[str, Any]]]] = [
    (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        "",
        [PARIS],
    ),
    (
        "hermes",
        (
            'Let me see.\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n<tool_call>\n'
            '{"name": "add", "arguments": {"a": 1, "b": 2.5}}\n</tool_call>'
        ),
        "Let me see.",
        [PARIS, SUM],
    ),
    (
        "hermes",
        (
            '<tool_call>[{"name": "get_weather", "arguments": {"city": "Paris"}}, '
            '{"name": "add", "arguments": {"a": 1, "b": 2.5}}]</tool_call>'
        ),
        "",
        [PARIS, SUM],
    ),
    (
        "hermes",
        '<tool_call>{"arguments": {"city": "</tool_call> \\" }{"}, "name": "get_weather"}</tool_call> done',
        "done",
        [("get_weather", {"city": '</tool_call> " }{'})],
    ),
    (
        "hermes",  # the closing tag was the stop string, or the arguments a string
        '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2.5}"}',
        "",
        [SUM],
    ),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", [("add", {})]),
    (
        "hermes",
        '<tool_call>{"name": "other", "arguments": {"x": [1, {"y": null}]}}</tool_call>',
        "",
        [
            ("other", {"x": [1, {"y": None}]}),
        ],
    ),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [PARIS]),
    (
        "llama3_json",
        '{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "add", "parameters": {"a": 1, "b": 2.5}}',
        "",
        [PARIS, SUM],
    ),
    (
        "llama3_json",
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}',
        "",
        [PARIS],
    ),
    ("llama3_json", 'I call:\n<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2.5}}', "I call:", [SUM]),
    ("llama3_json", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
    (
        "mistral",
        (
            '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}, '
            '{"name": "add", "arguments": {"a": 1, "b": 2.5}}]'
        ),
        "",
        [PARIS, SUM],
    ),
    (
        "mistral",
        'Sure.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]add[CALL_ID]abc123XYZ[ARGS]{"a": 1, "b": 2.5}',
        "Sure.",
        [PARIS, SUM],
    ),
    ("mistral", '[TOOL_CALLS]add{"a": 1, "b": 2.5}', "", [SUM]),
    (
        "deepseek_v3",
        (
            f'Now.\n{DS[0]}{DS[1]}function{DS[2]}get_weather\n```json\n{{"city": "Paris"}}\n```{DS[3]}\n'
            f'{DS[1]}function{DS[2]}add\n```json\n{{"a": 1, "b": 2.5}}\n```{DS[3]}{DS[4]}'
        ),
        "Now.",
        [PARIS, SUM],
    ),
    (
        "deepseek_v3",
        f'{DS[0]}{DS[1]}get_weather{DS[2]}{{"city": "Paris"}}{DS[3]}{DS[1]}add{DS[2]}{{"a": 1, "b": 2.5}}{DS[3]}{DS[4]}',
        "",
        [PARIS, SUM],
    ),
    ("deepseek_v3", f"{DS[0]}{DS[1]}function{DS[2]}{{}}{DS[3]}{DS[4]}", "", [("function", {})]),
    (
        "kimi_k2",
        (
            f'I look.{KIMI[0]}{KIMI[1]}functions.get_weather:0{KIMI[2]}{{"city": "Paris"}}{KIMI[3]}'
            f'{KIMI[1]}functions.add:1{KIMI[2]}{{"a": 1, "b": 2.5}}{KIMI[3]}{KIMI_END}'
        ),
        "I look.",
        [PARIS, SUM],
    ),
    (
        "glm45",
        (
            "Fine.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>\n"
            "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n"
            "<arg_key>b</arg_key>\n<arg_value>2.5</arg_value>\n</tool_call>"
        ),
        "Fine.",
        [PARIS, SUM],
    ),
    (
        "glm45",  # a string that looks like a number, an object, and a parameter that nothing declares
        (
            "<tool_call>get_weather<arg_key>city</arg_key><arg_value>75001</arg_value><arg_key>opts</arg_key>"
            '<arg_value>{"a": [1]}</arg_value><arg_key>x</arg_key><arg_value>True</arg_value></tool_call>'
        ),
        "",
        [("get_weather", {"city": "75001", "opts": {"a": [1]}, "x": True})],
    ),
    (
        "qwen3_coder",
        (
            "Ok\n<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>\n"
            "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2.5\n</parameter>\n</function>\n"
            "</tool_call>"
        ),
        "Ok",
        [PARIS, SUM],
    ),
    (
        "qwen3_coder",
        "<function=get_weather>\n<parameter=city>\n\n<b>\n  x\n\n</parameter>\n</function>",
        "",
        [("get_weather", {"city": "\n<b>\n  x\n"})],
    ),
    (
        "gpt_oss",
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
            '<|constrain|>json<|message|>{"city": "Paris"}<|call|>'
        ),
        "",
        [PARIS],
    ),
    (
        "gpt_oss",
        '<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{"a": 1, "b": 2.5}',
        "",
        [SUM],
    ),
    ("gpt_oss", "<|channel|>final<|message|>Hello  there\n<|return|>", "Hello  there\n", []),
    (
        "gemma",
        '```tool_code\nget_weather(city="Paris")\n```',
        "",
        [PARIS],
    ),
    ("gemma", "Yes:\n```tool_code\nprint(get_weather(city='Paris'))\nadd(a=1, b=2.5)\n```", "Yes:", [PARIS, SUM]),
    ("gemma", '```json\n{"name": "get_weather", "parameters": {"city": "Paris"}}\n```', "", [PARIS]),
    ("gemma", '```json\n{"name": "Bob"}\n```', '```json\n{"name": "Bob"}\n```', []),
    ("json", '{"name": "get_weather", "arguments": {"city": "Paris"}}', "", [PARIS]),
    (
        "json",
        (
            '```json\n[{"function": "get_weather", "parameters": {"city": "Paris"}}, '
            '{"function": {"name": "add", "arguments": {"a": 1, "b": 2.5}}}]\n```\nDone.'
        ),
        "Done.",
        [PARIS, SUM],
    ),
    ("json", '{"answer": 42}', '{"answer": 42}', []),
]


@pytest.mark.parametrize(("tool", "text", "content", "calls"), GOOD)
def test_the_texts_of_each_format_are_read(tool: str, text: str, content: str, calls: list[tuple[str, Any]]) -> None:
    answer = parse(tool, text)
    assert answer.content == content
    assert answer.calls == calls


def test_every_format_has_an_example_with_a_call() -> None:
    assert {tool for tool, _, _, calls in GOOD if calls} == set(TOOLS)


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, "12", "12"),
        ({"type": ["string", "null"]}, "12", "12"),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "null", None),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"type": "integer"}, "12", 12),
        ({"type": "boolean"}, "1", True),
        ({"type": "array"}, "[1, {}]", [1, {}]),
        ({"anyOf": 5, "enum": 6, "type": {}}, "1", 1),
        (True, "1.5", 1.5),
        (None, "1e999", "1e999"),
        (None, "[" * 100 + "]" * 100, "[" * 100 + "]" * 100),
        (None, "two words", "two words"),
    ],
)
def test_bare_values_are_typed_by_their_schema(schema: Any, text: str, value: Any) -> None:
    tools = {"f": {"properties": {"k": schema}}}
    call = f"<tool_call>f<arg_key>k</arg_key><arg_value>{text}</arg_value></tool_call>"
    (read_call,) = parse("glm45", call, tools=tools).calls
    assert read_call == ("f", {"k": value})
    assert type(read_call[1]["k"]) is type(value)


BROKEN = [
    ("hermes", "<tool_call>no json</tool_call>"),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}'),  # cut off
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": NaN}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1e999}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "add", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
    ("hermes", "<tool_call>{'name': 'add', 'arguments': {}}</tool_call>"),
    ("hermes", "<tool_call>" + '{"a":' * 100 + "1" + "}" * 100 + "</tool_call>"),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": ' + "9" * 5000 + "}}</tool_call>"),
    ("hermes", "a <tool_cal and <tool_call"),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": '),
    ("llama3_json", '<|python_tag|>brave_search.call(query="x")'),
    ("mistral", "[TOOL_CALLS] [1, 2]"),
    ("mistral", "[TOOL_CALLS]get_weather[ARGS]Paris"),
    ("deepseek_v3", f"{DS[0]}{DS[1]}function{DS[2]}f\n```python\nx\n```{DS[3]}{DS[4]}"),
    ("kimi_k2", f"{KIMI[0]}{KIMI[1]}functions.f:0{{}}{KIMI[3]}{KIMI_END}"),
    ("glm45", "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_val"),
    ("qwen3_coder", "<tool_call>\n<function=add>\n<parameter=a>\n1\n</function>\n</tool_call>"),
    ("gpt_oss", "<|channel|>commentary to=functions.add<|message|>not json"),
    ("gpt_oss", "<|channel|>" + "x" * 1000),
    ("gemma", "```tool_code\n__import__('os').system('true')\n```"),
    ("gemma", "```tool_code\nadd(a=1)"),
    ("gemma", "```tool_code\nadd(a=" + "[" * 500 + "]" * 500 + ")\n```"),
    ("gemma", "```tool_code\n" + "print(" * 5000 + ")" * 5000 + "\n```"),
    ("json", '{"name": "add", "arguments": {"a": 1}'),
]


@pytest.mark.parametrize(("tool", "text"), BROKEN)
def test_a_malformed_call_is_content_and_nothing_of_it_is_lost(tool: str, text: str) -> None:
    answer = parse(tool, text)
    assert answer.calls == []
    assert answer.content == text


def test_a_good_call_after_a_broken_one_is_read() -> None:
    good = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2.5}}</tool_call>'
    answer = parse("hermes", f"<tool_call>{{]</tool_call>{good}")
    assert answer.content == "<tool_call>{]</tool_call>"
    assert answer.calls == [SUM]


def test_without_tools_a_harmony_call_is_content() -> None:
    text = "<|channel|>commentary to=functions.add<|message|>{}"
    assert parse("gpt_oss", text, tools={}).content == text


def test_half_a_surrogate_pair_in_arguments_is_escaped() -> None:
    answer = parse("hermes", '<tool_call>{"name": "add", "arguments": {"a": "\\ud800"}}</tool_call>')
    assert answer.calls == [("add", {"a": "\ud800"})]


def test_ids_have_the_form_that_the_models_template_takes() -> None:
    def ids(tool: str, text: str) -> list[str]:
        made = Formats(tool, None).parser("", SCHEMAS)
        assert made is not None
        return read(made, [text]).ids

    (id,) = ids("mistral", '[TOOL_CALLS] [{"name": "add", "arguments": {}}]')
    assert len(id) == 9
    assert id.isalnum()
    (id,) = ids("kimi_k2", f"{KIMI[0]}{KIMI[1]}functions.add:3{KIMI[2]}{{}}{KIMI[3]}{KIMI_END}")
    assert id == "functions.add:3"
    first, second = ids("hermes", '<tool_call>{"name": "add"}</tool_call>' * 2)
    assert first != second
    assert first.startswith("call_")


def test_calls_and_their_length_are_bounded() -> None:
    one = '<tool_call>{"name": "add"}</tool_call>'
    answer = read(parser("hermes"), [one * (MAX_CALLS + 2)])
    assert len(answer.calls) == MAX_CALLS
    assert answer.content == one * 2
    long = '<tool_call>{"name": "add", "arguments": {"a": "' + "x" * MAX_CALL + '"}}</tool_call>'
    assert read(parser("hermes"), [long]).content == long
    value = "<tool_call>add<arg_key>a</arg_key><arg_value>" + "x" * (MAX_CALL + 1) + "</arg_value></tool_call>"
    assert read(parser("glm45"), [value]).content == value


# --- reasoning --------------------------------------------------------------------------------------------------------

THINK = [
    ("", "<think>\nHm, yes.\n</think>\n\nHello.\n", "Hm, yes.", "Hello.\n"),
    ("…<think>\n", "Hm, yes.\n</think>\n\nHello.", "Hm, yes.", "Hello."),
    ("…<think>\n\n</think>\n\n", "Hello.", "", "Hello."),
    ("", "Use the <think> tag.", "", "Use the <think> tag."),
    ("", "\n <think>cut off", "cut off", ""),
    ("", " plain ", "", " plain "),
    ("…<think>", "<think>twice</think>x", "twice", "x"),
]


@pytest.mark.parametrize(("prompt", "text", "reasoning", "content"), THINK)
def test_reasoning_is_split_off_be_it_opened_by_the_prompt_or_the_model(
    prompt: str, text: str, reasoning: str, content: str
) -> None:
    answer = parse(None, text, "think", prompt=prompt)
    assert (answer.reasoning, answer.content) == (reasoning, content)


def test_reasoning_may_be_followed_by_calls_and_calls_inside_it_are_none() -> None:
    call = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2.5}}</tool_call>'
    answer = parse("hermes", f"<think>{call}</think>\n\nSo:\n{call}", "think")
    assert answer == Answer("So:", call, [SUM], ["id0"])


def test_a_section_of_calls_ends_reasoning_that_was_left_open() -> None:
    call = f'{KIMI[0]}{KIMI[1]}functions.add:0{KIMI[2]}{{"a": 1, "b": 2.5}}{KIMI[3]}{KIMI_END}'
    answer = parse("kimi_k2", "Hm." + call, "think", prompt="<think>")
    assert answer == Answer("", "Hm.", [SUM], ["functions.add:0"])
    assert parse("kimi_k2", "Hm." + call, "think", prompt="<think>", tools={}).reasoning == "Hm." + call


def test_mistral_thinks_between_its_own_marks() -> None:
    answer = parse("mistral", '[THINK]Hm[/THINK][TOOL_CALLS]add[ARGS]{"a": 1, "b": 2.5}', "mistral")
    assert (answer.reasoning, answer.calls) == ("Hm", [SUM])


def test_harmony_has_reasoning_a_preamble_and_a_call() -> None:
    text = (
        "<|channel|>analysis<|message|>Think.<|end|><|start|>assistant<|channel|>commentary<|message|>I look."
        "<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city": "Paris"}'
    )
    answer = parse("gpt_oss", text, "gpt_oss")
    assert answer == Answer("I look.", "Think.", [PARIS], ["id0"])


# --- forced by a grammar ----------------------------------------------------------------------------------------------

FORCED = '[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name":"add","arguments":{"a": 1, "b": 2.5}}]'


def test_forced_calls_are_read_whatever_the_models_format() -> None:
    for tool in (None, "hermes", "gpt_oss"):
        for text in (FORCED, json.dumps(json.loads(FORCED), indent=4)):
            answer = parse(tool, text, forced_calls=True)
            assert answer == Answer("", "", [PARIS, SUM], ["id0", "id1"])


def test_reasoning_comes_before_what_is_forced_or_constrained() -> None:
    calls = Answer("", "Paris?", [PARIS, SUM], ["id0", "id1"])
    assert parse("hermes", f"Paris?</think>\n{FORCED}", "think", prompt="<think>", forced_calls=True) == calls
    assert parse("kimi_k2", f"<think>Paris?</think>{FORCED}", "think", forced_calls=True) == calls
    text = "<|channel|>analysis<|message|>Paris?<|end|><|start|>assistant<|channel|>final<|message|>"
    assert parse("gpt_oss", text + FORCED, "gpt_oss", forced_calls=True) == calls
    assert parse("hermes", 'Hm.</think>{"a": 1}', "think", prompt="<think>\n") == Answer('{"a": 1}', "Hm.")
    assert parse("hermes", '{"a": 1}', "think") == Answer('{"a": 1}')


def test_forced_calls_before_the_one_that_is_cut_off_are_kept() -> None:
    answer = parse("hermes", FORCED[:-20], forced_calls=True)
    assert answer.calls == [PARIS]
    assert answer.content == FORCED[FORCED.index(', {"name":"add"') + 2 : -20]


def matches(schema: dict[str, Any], text: str) -> bool:
    """Whether ``text`` is a whole output under ``schema``."""
    matcher = llguidance.LLMatcher(
        llguidance.LLTokenizer("byte"), llguidance.LLMatcher.grammar_from_json_schema(schema)
    )
    assert not matcher.get_error()
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


def test_the_schema_of_forced_calls_allows_calls_of_the_tools_and_nothing_else() -> None:
    node = {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}}
    tree = {"properties": {"root": {"$ref": "#/$defs/node"}}, "required": ["root"], "$defs": {"node": node}}
    schema = forced.schema({"tree": tree, "now": {}}, parallel=True)
    assert matches(schema, '[{"name": "tree", "arguments": {"root": {"v": 1, "next": {"v": 2}}}}]')
    assert matches(schema, '[{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]')
    assert not matches(schema, '[{"name": "tree", "arguments": {"root": {"v": "x"}}}]')
    assert not matches(schema, '[{"name": "now", "arguments": {"a": 1}}]')
    assert not matches(schema, '[{"name": "other", "arguments": {}}]')
    assert not matches(schema, "[]")
    single = forced.schema({"now": {}}, parallel=False)
    assert matches(single, '[{"name": "now", "arguments": {}}]')
    assert not matches(single, '[{"name": "now", "arguments": {}}, {"name": "now", "arguments": {}}]')


def test_parameters_that_are_nested_too_deep_are_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(100):
        deep = {"properties": {"a": deep}}
    with pytest.raises(ValueError, match="nested"):
        forced.schema({"f": deep}, parallel=True)


# --- any text, cut anywhere -------------------------------------------------------------------------------------------

FRAGMENTS = sorted(
    {mark for form in TOOLS.values() for mark in form.MARKERS}
    | {"<think>", "</think>", "[THINK]", "[/THINK]", "<function=", "</function>", "<parameter=", "</parameter>", ">"}
    | {"```tool_code\n", "```json\n", "```", "functions.add:0", "add", "get_weather", " to=functions.add", "analysis"}
    | {'{"name": "add", "arguments": {"a": 1}}', '{"name": "add", "parameters": {"a": "}"}}', '{"a": 1}', "{", "}", "["}
    | {"]", '"', "\\", ",", ":", ";", " ", "\n", "function", "final", "commentary", "add(a=1)", "é", "\\u00e9", "1"}
)
TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=4)), max_size=14).map("".join)
GOOD_TEXTS = st.sampled_from([text for _, text, _, _ in GOOD])
FORMATS = [(name, "gpt_oss" if name == "gpt_oss" else None) for name in TOOLS]
FORMATS += [("hermes", "think"), ("mistral", "mistral"), ("kimi_k2", "think"), ("glm45", "think")]


def cut(text: str, places: list[int]) -> list[str]:
    at = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(at)]


@pytest.mark.parametrize(("tool", "reasoning"), FORMATS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    text=st.one_of(TEXTS, st.tuples(TEXTS, GOOD_TEXTS, TEXTS).map("".join)),
    places=st.lists(st.integers(0, 2000), max_size=12),
    opened=st.booleans(),
)
def test_any_text_reads_the_same_however_it_is_cut(
    tool: str, reasoning: str | None, text: str, places: list[int], opened: bool
) -> None:
    prompt = "<think>\n" if opened else ""
    whole = read(parser(tool, reasoning, prompt=prompt), [text])
    assert read(parser(tool, reasoning, prompt=prompt), cut(text, places)) == whole
    assert read(parser(tool, reasoning, prompt=prompt), list(text)) == whole


ARGUMENTS = st.dictionaries(
    st.text(max_size=5),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(arguments=ARGUMENTS, ascii=st.booleans(), places=st.lists(st.integers(0, 500), max_size=5))
@pytest.mark.parametrize(
    ("tool", "before", "after"),
    [
        ("hermes", '<tool_call>\n{"name": "add", "arguments": ', "}\n</tool_call>"),
        ("mistral", "[TOOL_CALLS]add[ARGS]", ""),
        ("deepseek_v3", f"{DS[0]}{DS[1]}add{DS[2]}", f"{DS[3]}{DS[4]}"),
        ("kimi_k2", f"{KIMI[0]}{KIMI[1]}functions.add:0{KIMI[2]}", f"{KIMI[3]}{KIMI_END}"),
        ("gpt_oss", "<|channel|>commentary to=functions.add<|message|>", "<|call|>"),
        ("json", '{"name": "add", "arguments": ', "}"),
    ],
)
def test_arguments_of_any_kind_arrive_as_they_were_written(
    tool: str, before: str, after: str, arguments: dict[str, Any], ascii: bool, places: list[int]
) -> None:
    text = before + json.dumps(arguments, ensure_ascii=ascii) + after
    answer = read(parser(tool), cut(text, places))
    assert answer.calls == [("add", arguments)]
    assert answer.content == ""
