"""Where a grammar holds: sequences of tokens under the guides that `Formats` makes, drawn at random where it holds."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest

from octavo.core.compiler import Compiler
from octavo.core.constraint import Constraint, Grammar
from octavo.core.vocabulary import Vocabulary
from octavo.frontend.parse.registry import REASONING, TOOLS, Formats
from octavo.structured import GrammarSpec, Guide
from tests.frontend.fakes import FakeTokenizer, byte_level
from tests.frontend.parse.functions import CALLS, SCHEMAS, WRITERS, Write
from tests.frontend.parse.test_formats import matches, parse

TOOLS_OF_REQUEST: dict[str, dict[str, Any]] = {
    "get": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "maximum": 9}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "get_weather": {
        "type": "object",
        "properties": {
            "unit": {"enum": ["°C", "°F"]},
            "at": {"$ref": "#/$defs/place"},
            "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["unit", "at"],
        "additionalProperties": False,
        "$defs": {"place": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 2}},
    },
    "now": {},
}
HELD = [name for name, module in TOOLS.items() if module.OPENINGS]
NEW_TOKENS = ("<think>", "</think>", '>\n{"', "}}\n", "</think>\n\n")  # some that straddle the end of a mark
DS, KIMI = "<｜tool▁{}｜>", "<|tool_{}|>"
# (format, what the model writes before the grammar holds, and after it)
WAYS = [
    ("hermes", "I look. <tool_call>", "</tool_call>"),
    ("hermes", '<tool_call>\n{"', "</tool_call>"),
    ("mistral", "[TOOL_CALLS] [", ""),
    ("mistral", "[TOOL_CALLS]get[ARGS]", ""),
    ("mistral", "[TOOL_CALLS]get_weather[CALL_ID]a1B2c3D4e[ARGS]", ""),
    ("deepseek_v3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    (
        "deepseek_v3",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get\n```json\n",
        "\n```<｜tool▁call▁end｜>",
    ),
    (
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>",
        "<|tool_call_end|>",
    ),
    ("gpt_oss", "<|channel|>commentary to=functions.get <|constrain|>json<|message|>", "<|call|>"),
    ("gpt_oss", "<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>", ""),
    ("llama3_json", '{"name": "get_weather", "parameters":', ""),
    ("llama3_json", '<|python_tag|>{"name": "now", "parameters": ', ""),
    ("json", '[{"name":"get","arguments":', "]"),
    ("gemma", 'Well.\n```json\n{"name": "get", "arguments": ', "\n```"),
]


class Setup:
    """A vocabulary of bytes, the special tokens of all formats and a few longer tokens; grammars are compiled once."""

    def __init__(self) -> None:
        self.tokenizer: FakeTokenizer = byte_level()
        special = sorted({mark for module in TOOLS.values() for mark in module.MARKERS})
        self.tokenizer.lib.add_special_tokens(special)
        self.tokenizer.lib.add_tokens(list(NEW_TOKENS))
        self.tokenizer.special_ids |= {self.tokenizer.lib.token_to_id(mark) for mark in special}
        size = self.tokenizer.lib.get_vocab_size(with_added_tokens=True)
        self.vocabulary = Vocabulary.of(self.tokenizer, size, (self.tokenizer.eos_id or 0,))
        self.compiler = Compiler(lambda: self.vocabulary)
        self.known: dict[GrammarSpec, Grammar] = {}

    def constraint(self, guide: Guide | None) -> Constraint:
        assert guide is not None
        for spec in guide.specs():
            if spec not in self.known:
                made = self.compiler.compile(spec)
                assert isinstance(made, Grammar), made
                self.known[spec] = made
        return Constraint(guide, self.known, self.compiler.texts)

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def text(self, ids: Sequence[int]) -> str:
        return b"".join(self.vocabulary.tokens[id] for id in ids).decode()

    def accept(self, one: Constraint, ids: Iterable[int]) -> None:
        for id in ids:
            assert not one.masks or id in allowed(one), self.text([id])
            one.accept(id)
            one.fill()
            assert not one.error

    def draw(self, one: Constraint, seed: int) -> list[int]:
        """Random tokens for as long as a grammar holds; every token that is allowed has its chance."""
        drawn: list[int] = []
        source = random.Random(seed)
        while one.masks and not one.finished:
            assert len(drawn) < 2000
            drawn.append(source.choice(allowed(one)))
            self.accept(one, drawn[-1:])
        return drawn


def allowed(one: Constraint) -> list[int]:
    return [int(i) for i in np.flatnonzero(np.unpackbits(one.mask.view(np.uint8), bitorder="little"))]


@pytest.fixture(scope="module")
def setup() -> Any:
    made = Setup()
    yield made
    made.compiler.kill()
    made.compiler.close()


def test_every_format_whose_arguments_are_json_is_held() -> None:
    assert sorted(HELD) == sorted(set(TOOLS) - {"glm45", "qwen3_coder"}) == sorted({way[0] for way in WAYS})


@pytest.mark.parametrize(("name", "before", "after"), WAYS)
def test_random_tokens_after_an_opener_are_calls_that_fit_their_schemas(
    setup: Setup, name: str, before: str, after: str
) -> None:
    for seed in range(12):
        one = setup.constraint(Formats(name).guide("", TOOLS_OF_REQUEST))
        assert not one.masks
        start = setup.ids(before)
        setup.accept(one, start)
        assert one.masks, "the opener was not seen"
        ids = start + setup.draw(one, seed)
        assert not one.finished
        answer = parse(name, setup.text(ids) + after, tools=TOOLS_OF_REQUEST)
        assert answer.calls
        for tool, arguments in answer.calls:
            schema = TOOLS_OF_REQUEST[tool] or {"type": "object", "additionalProperties": False}
            assert matches(schema, json.dumps(arguments, ensure_ascii=False)), (tool, arguments)


@pytest.mark.parametrize(
    ("name", "write"),
    [writer[:2] for writer in WRITERS if writer[0] in HELD],
    ids=lambda one: getattr(one, "__name__", one),
)
def test_calls_as_models_write_them_are_let_through(setup: Setup, name: str, write: Write) -> None:
    held = 0
    for call in CALLS:
        one = setup.constraint(Formats(name).guide("", SCHEMAS))
        for id in setup.ids(write([call])):
            held += one.masks
            goes_on = one.masks and id not in allowed(one)  # beyond the end of what is held: another token must do
            setup.accept(one, itertools.chain(*map(setup.ids, setup.text([id]))) if goes_on else [id])
        assert not one.finished
    assert held > 1000 or name == "gemma"  # which writes Python


def test_the_next_call_is_held_too_and_text_between_is_free(setup: Setup) -> None:
    one = setup.constraint(Formats("hermes").guide("", TOOLS_OF_REQUEST))
    ids: list[int] = []
    for seed, text in enumerate(("<tool_call>", "</tool_call> and <tool_call>", "</tool_call>\n<tool_call>")):
        setup.accept(one, setup.ids(text))
        assert one.masks
        ids += setup.ids(text) + setup.draw(one, seed)
        assert not one.masks
    assert len(parse("hermes", setup.text(ids), tools=TOOLS_OF_REQUEST).calls) >= 3


def test_a_longer_name_is_not_taken_for_the_shorter_one(setup: Setup) -> None:
    for name, text in (
        ("gpt_oss", "<|channel|>commentary to=functions.get_weather<|message|>"),
        ("kimi_k2", "<|tool_call_begin|>functions.get_weather:1<|tool_call_argument_begin|>"),
        ("mistral", "[TOOL_CALLS]get_weather[ARGS]"),
    ):
        one = setup.constraint(Formats(name).guide("", TOOLS_OF_REQUEST))
        setup.accept(one, setup.ids(text))
        arguments = json.loads(setup.text(setup.draw(one, 0)))
        assert "unit" in arguments


def test_a_tool_that_the_request_does_not_have_is_not_held(setup: Setup) -> None:
    one = setup.constraint(Formats("mistral").guide("", TOOLS_OF_REQUEST))
    setup.accept(one, setup.ids('[TOOL_CALLS]other[ARGS]{"anything": '))
    assert not one.masks


WHOLE = GrammarSpec("regex", "[ab]{3}")


@pytest.mark.parametrize("name", REASONING)
def test_a_grammar_holds_from_the_end_of_reasoning_that_the_prompt_has_opened(setup: Setup, name: str) -> None:
    start, end = REASONING[name]
    for prompt, thought in itertools.product((f"hi {start}", f"hi {start}\n"), ("", "abc", 'x"{<tool_call>\n')):
        one = setup.constraint(Formats("hermes", name).guide(prompt, {}, WHOLE))
        assert not one.masks
        setup.accept(one, setup.ids(thought + end))
        assert one.masks
        assert setup.text(setup.draw(one, 1)).strip("ab") == ""
        assert one.finished


def test_reasoning_may_begin_with_the_answers_first_token_and_nowhere_else(setup: Setup) -> None:
    mark = setup.tokenizer.token_to_id("<think>")
    one = setup.constraint(Formats("hermes", "think").guide("hi", {}, WHOLE))
    assert one.masks
    assert setup.text(allowed(one)).replace("<think>", "") in ("ab", "ba")
    setup.accept(one, [mark or 0])
    assert not one.masks
    setup.accept(one, setup.ids("zzz</think>"))
    assert one.masks
    assert mark not in allowed(one)

    without = setup.constraint(Formats("hermes", "think").guide("hi", {}, WHOLE))
    setup.accept(without, setup.ids("a"))
    assert mark not in allowed(without)
    setup.accept(without, setup.ids("bb"))
    assert without.finished


def test_without_a_reasoning_format_a_grammar_holds_from_the_first_token(setup: Setup) -> None:
    one = setup.constraint(Formats("hermes").guide("hi <think>", {}, WHOLE))
    assert sorted(setup.text(allowed(one))) == ["a", "b"]


def test_white_space_in_the_token_that_ends_reasoning_is_not_part_of_the_answer(setup: Setup) -> None:
    one = setup.constraint(Formats("hermes", "think").guide("<think>", {}, WHOLE))
    setup.accept(one, [setup.tokenizer.token_to_id("</think>\n\n") or 0])
    assert sorted(setup.text(allowed(one))) == ["a", "b"]


def test_harmony_is_held_in_its_final_message(setup: Setup) -> None:
    one = setup.constraint(Formats("gpt_oss", "gpt_oss").guide("<|start|>assistant", {}, WHOLE))
    setup.accept(one, setup.ids("<|channel|>analysis<|message|>Hm.<|start|>assistant"))
    assert not one.masks
    setup.accept(one, setup.ids("<|channel|>final <|constrain|>json<|message|>"))
    assert sorted(setup.text(allowed(one))) == ["a", "b"]
    begun = Formats("gpt_oss", "gpt_oss").guide("<|channel|>final<|message|>", {}, WHOLE)
    assert setup.constraint(begun).masks


def test_an_opener_inside_of_reasoning_opens_nothing_unless_the_format_breaks_off_there(setup: Setup) -> None:
    one = setup.constraint(Formats("hermes", "think").guide("<think>", TOOLS_OF_REQUEST))
    setup.accept(one, setup.ids("a call looks like <tool_call>"))
    assert not one.masks
    setup.accept(one, setup.ids("</think>now: <tool_call>"))
    assert one.masks
    kimi = setup.constraint(Formats("kimi_k2", "think").guide("<think>", TOOLS_OF_REQUEST))
    setup.accept(kimi, setup.ids(next(way[1] for way in WAYS if way[0] == "kimi_k2")))
    assert kimi.masks


def test_a_strict_tool_must_be_held_whole_and_another_as_far_as_it_can(setup: Setup) -> None:
    odd = {"f": {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}}
    lenient = Formats("kimi_k2").guide("", odd)
    assert lenient is not None and not lenient.strict
    assert isinstance(setup.compiler.compile(lenient.specs()[0]), Grammar)
    strict = Formats("kimi_k2").guide("", odd, strict={"f"})
    assert strict is not None and strict.strict
    assert "uniqueItems" in str(setup.compiler.compile(strict.specs()[0]))


def test_what_cannot_be_held_at_all_is_left_free_unless_it_is_strict() -> None:
    many = {f"f{i}": TOOLS_OF_REQUEST["get"] for i in range(200)}
    assert Formats("hermes").guide("", many) is None
    with pytest.raises(ValueError, match="more than"):
        Formats("hermes").guide("", many, strict={"f1"})
