"""Every format recovers the calls of many functions exactly, whole and in pieces; broken ones are content."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

from octavo.frontend.parse.registry import TOOLS
from tests.frontend.parse.functions import CALLS, SCHEMAS, WRITERS, Call, Write
from tests.frontend.parse.test_formats import Answer, parser, read

BEFORE = "Let me look: 2 < 3, {x}, “ok”."
AFTER = "That is all — I think."
each = pytest.mark.parametrize(
    ("name", "write", "before", "after"), WRITERS, ids=[writer[1].__name__ for writer in WRITERS]
)


def chunks(text: str, source: random.Random) -> Iterator[str]:
    """``text`` in pieces of random sizes, mostly small."""
    at = 0
    while at < len(text):
        size = source.choice((1, 1, 2, 3, 5, 8, 40))
        yield text[at : at + size]
        at += size


def recovered(name: str, text: str, seed: int) -> Answer:
    """The answer, after a check that two random ways of cutting the text change nothing."""
    whole = read(parser(name, tools=SCHEMAS), [text])
    for more in range(2):
        pieces = chunks(text, random.Random(2 * seed + more))
        assert read(parser(name, tools=SCHEMAS), list(pieces)) == whole
    return whole


def exactly(calls: Sequence[Call], wanted: Sequence[Call]) -> None:
    """Equal, with equal types: True is not 1 and 1 is not 1.0."""
    assert repr(calls) == repr(list(wanted))


def test_there_are_enough_functions_and_a_writer_for_every_format() -> None:
    assert len(SCHEMAS) == 40
    assert {writer[0] for writer in WRITERS} == set(TOOLS)


@each
def test_a_single_call_is_read_as_it_was_meant(name: str, write: Write, before: str, after: str) -> None:
    for seed, call in enumerate(CALLS):
        answer = recovered(name, write([call]), seed)
        exactly(answer.calls, [call])
        assert answer.content == ""


@each
def test_parallel_calls_are_read_in_order(name: str, write: Write, before: str, after: str) -> None:
    source = random.Random(7)
    for seed in range(30):
        calls = source.sample(CALLS, source.randint(2, 5))
        answer = recovered(name, write(calls), seed)
        exactly(answer.calls, calls)
        assert len(set(answer.ids)) == len(calls)
        assert answer.content == ""


@each
def test_calls_with_text_around_them(name: str, write: Write, before: str, after: str) -> None:
    source = random.Random(8)
    for seed in range(30):
        calls = source.sample(CALLS, source.randint(1, 2))
        answer = recovered(name, before.format(BEFORE) + write(calls) + after.format(AFTER), seed)
        exactly(answer.calls, calls)
        assert answer.content.startswith(BEFORE if before else "")
        assert answer.content.endswith(AFTER)
        assert len(answer.content) <= len(BEFORE + AFTER) + 2


@each
def test_calls_that_are_cut_off_are_content_and_those_before_them_are_calls(
    name: str, write: Write, before: str, after: str
) -> None:
    """Wherever the last of two calls ends too early, its arguments are never announced in part."""
    source = random.Random(9)
    for seed in range(30):
        calls = source.sample(CALLS, 2)
        text = write(calls)
        start = len(write(calls[:1]))
        cut = source.randrange(start, len(text))
        answer = recovered(name, text[:cut], seed)
        exactly(answer.calls, calls[: len(answer.calls)])
        early = recovered(name, text[: source.randrange(1, max(2, start - 40))], seed)
        exactly(early.calls, calls[: len(early.calls)])


@pytest.mark.parametrize(
    ("name", "write"), [writer[:2] for writer in WRITERS if writer[0] not in ("glm45", "qwen3_coder", "gemma")]
)
def test_arguments_that_are_no_json_are_never_a_call(name: str, write: Write) -> None:
    for seed, (tool, arguments) in enumerate(CALLS):
        text = write([(tool, arguments)])
        if arguments:  # the first of them loses its opening quote
            at = text.index("{", text.index(tool) + len(tool))
            broken = text[:at] + text[at:].replace('"', "", 1)
            assert recovered(name, broken, seed).calls == []
