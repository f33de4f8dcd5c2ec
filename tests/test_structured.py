from __future__ import annotations

import json
from typing import Any

import pytest

from octavo.errors import RequestError
from octavo.sampling_params import SamplingParams
from octavo.structured import MAX_GBNF_BYTES, MAX_GRAMMAR_BYTES, StructuredOutputsParams, is_lark


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ({"json": {"type": "integer"}}, "json_schema"),
        ({"json": '{"type": "integer"}'}, "json_schema"),
        ({"json": True}, "json_schema"),
        ({"json_object": True}, "json_schema"),
        ({"regex": "a+", "json_object": False}, "regex"),
        ({"choice": ["a", "b"]}, "lark"),
        ({"grammar": 'start: "a"'}, "lark"),
        ({"grammar": 'root ::= "a"'}, "gbnf"),
    ],
)
def test_each_way_of_asking_is_one_kind_of_grammar(given: dict[str, Any], kind: str) -> None:
    assert StructuredOutputsParams(**given).spec().kind == kind


def test_equal_schemas_are_equal_specs_however_they_are_written() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "null"}, "a": {"enum": [1, "é"]}}}
    as_text = StructuredOutputsParams(json=json.dumps(schema, indent=2)).spec()
    assert as_text == StructuredOutputsParams(json=schema).spec()
    assert list(json.loads(as_text.text)["properties"]) == ["b", "a"]


def test_whitespace_is_bounded_unless_the_request_says_otherwise() -> None:
    def options(**given: Any) -> dict[str, Any]:
        text = StructuredOutputsParams(**{"json": {}, **given}).spec().text
        return dict(json.loads(text)["x-guidance"])

    assert "{1," in options()["whitespace_pattern"]
    assert options(disable_any_whitespace=True) == {"whitespace_flexible": False}
    assert options(whitespace_pattern=" ?")["whitespace_pattern"] == " ?"
    assert set(options(json={"x-guidance": {"lenient": True}})) == {"lenient", "whitespace_pattern"}
    assert options(json={"x-guidance": {"whitespace_flexible": False}}) == {"whitespace_flexible": False}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "none"),
        ({"regex": "a", "choice": ["a"]}, "regex and choice"),
        ({"choice": []}, "none"),
        ({"choice": ["a", ""]}, "empty string"),
        ({"json": "{"}, "not JSON"),
        ({"json": "[1]"}, "list"),
        ({"json": '{"type": "object"}}, {"x": 1'}, "not JSON"),
        ({"json": {"a": object()}}, "not JSON"),
        ({"json": '{"a":' * 5000 + "1" + "}" * 5000}, "not JSON"),
        ({"json": {"x-guidance": 3}}, "x-guidance"),
        ({"regex": "a" * (MAX_GRAMMAR_BYTES + 1)}, str(MAX_GRAMMAR_BYTES)),
        ({"grammar": 'root ::= "a"' + " " * MAX_GBNF_BYTES}, str(MAX_GBNF_BYTES)),
        ({"regex": "\ud800"}, "surrogate"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, Any], words: str) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**given))
    with pytest.raises(RequestError, match=words) as caught:
        params.validate()
    assert caught.value.param == "structured_outputs"


def test_lark_is_told_from_gbnf_in_linear_time() -> None:
    assert is_lark('\n  %llguidance {}\nstart: "a"')
    assert is_lark('A: "x"\nstart : A')
    assert not is_lark('start ::= "a"')
    assert not is_lark('root ::= "start: x"')
    assert not is_lark("\n" * MAX_GRAMMAR_BYTES)
