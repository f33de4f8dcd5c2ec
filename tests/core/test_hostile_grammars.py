"""Grammars that are made to cost time or memory: each is refused, or compiled and followed, within bounds."""

from __future__ import annotations

import json
import random
import resource
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from octavo.core.compiler import Compiler
from octavo.core.constraint import Constraint, Grammar
from octavo.core.vocabulary import Vocabulary
from octavo.structured import GrammarSpec, Guide
from tests.frontend.fakes import byte_level

TOKENIZER = byte_level()
LONGEST_MASK = 5.0  # seconds of a processor; nobody but the request itself waits for it
MOST_MEMORY = 512  # MiB that this process may grow by, over all of them


def schema(value: Any) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(value))


def regex(text: str) -> GrammarSpec:
    return GrammarSpec("regex", text)


def lark(text: str) -> GrammarSpec:
    return GrammarSpec("lark", text)


def either(i: int) -> Any:
    return {"anyOf": [{"properties": {f"a{i}": {"type": "string"}}}, {"properties": {f"b{i}": {"type": "integer"}}}]}


ITEMS = {"type": "array", "minItems": 500, "maxItems": 500}
DOUBLED = {f"d{i}": {"properties": {k: {"$ref": f"#/$defs/d{i + 1}"} for k in "xy"}} for i in range(40)}
HOSTILE = {
    "nested repeats": regex("(((((a{1,50}){1,50}){1,50}){1,50}){1,50}){1,50}"),
    "giant repeat": regex("a{1000000000}"),
    "optional repeats": regex("(?:(?:(?:a?){50}){50}){50}a{100}"),
    "exponential automaton": regex("(a|b)*a" + "(a|b)" * 30 + "c"),
    "many unicode classes": regex(r"(\p{L}|\p{N}|\p{M}|\p{S}|\p{P}){1,5000}"),
    "unicode repeats": regex("(" + "|".join(rf"\p{{L}}{{{i}}}" for i in range(1, 300)) + ")"),
    "big class": regex("[" + "".join(chr(c) for c in range(0x100, 0x8000, 2)) + "]{1,2000}"),
    "case folding": regex("(?i)(abcdefghijklmnopqrstuvwxyz|ß){1,2000}"),
    "complements": lark("start: A\nA: ~/(.*a.{30}b.*)*/ & ~/(.*c.{29}d.*)/"),
    "many terminals": lark("start: (" + " | ".join(f"T{i}" for i in range(500)) + ")*\n"
                           + "".join(f"T{i}: /.*{i}.*/\n" for i in range(500))),
    "ambiguous rules": lark('start: a*\na: b* | c*\nb: "x"*\nc: "x"?\n'),
    "repeated rules": lark('start: a{0,1000}\na: b{0,1000}\nb: c{0,1000}\nc: "x"'),
    "huge choice": lark("start: " + " | ".join(f'"word{i}"' for i in range(6000))),
    "huge enum": schema({"enum": [f"value {i}" for i in range(5000)]}),
    "huge constant": schema({"const": {f"k{i}": i for i in range(3000)}}),
    "many properties": schema({"properties": {f"k{i}": {"type": "string"} for i in range(1500)}}),
    "product of unions": schema({"allOf": [either(i) for i in range(20)]}),
    "doubling references": schema({"$defs": {**DOUBLED, "d40": {"type": "string"}}, "$ref": "#/$defs/d0"}),
    "nested arrays": schema({**ITEMS, "items": {**ITEMS, "items": ITEMS}}),
    "deep schema": schema(json.loads('{"items":' * 100 + "{}" + "}" * 100)),
    "long strings": schema({"type": "string", "minLength": 1_000_000, "maxLength": 2_000_000}),
    "divisor": schema({"type": "integer", "multipleOf": 999_999_937}),
    "range": schema({"type": "integer", "minimum": -(10**300), "maximum": 10**300}),
    "reference to itself": schema({"$ref": "#"}),
    "whitespace": schema({"type": "object", "x-guidance": {"whitespace_pattern": "(a{1,300}){1,300}"}}),
    "parentheses": GrammarSpec("gbnf", "root ::= " + "(" * 400 + '"a"' + ")*" * 400),
}  # fmt: skip


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    made = Compiler(lambda: Vocabulary.of(TOKENIZER, 300, (TOKENIZER.eos_id or 0,)))
    assert isinstance(made.compile(regex("a")), Grammar)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield made
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MOST_MEMORY << 10
    made.kill()
    made.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_costs_little_to_compile_and_to_follow(compiler: Compiler, name: str) -> None:
    spec = HOSTILE[name]
    made = compiler.compile(spec)  # takes COMPILE_SECONDS twice at most, where others' limits would allow hours
    if isinstance(made, str):
        assert made.startswith("The grammar")
        return
    one, source = Constraint(Guide(whole=spec), {spec: made}, compiler.texts), random.Random(1)
    for _ in range(40):
        allowed = np.flatnonzero(np.unpackbits(one.mask.view(np.uint8), count=300, bitorder="little"))
        assert len(allowed)
        one.accept(int(source.choice(allowed)))
        began = time.thread_time()
        if not one.finished:
            one.fill()
        assert time.thread_time() - began < LONGEST_MASK
        if one.finished:  # complete, or given up on with a reason
            break
