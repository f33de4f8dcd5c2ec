"""Texts after which a model writes the arguments of a call in JSON, and the grammars that hold it to their schemas.

A format's module lists its openings; one whose arguments are not JSON has none. Whitespace is as in structured output,
properties come in the schema's order, and a call's name comes before its arguments.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from octavo.frontend.parse.forced import arguments_of, call_schemas
from octavo.frontend.parse.values import Tools
from octavo.structured import JSON_WHITESPACE, MAX_GRAMMAR_BYTES, GrammarSpec, Opener

MAX_TOOLS = 128  # that are held to their schemas
NAME = "<NAME>"  # in a pattern: any tool's name


class Opening(NamedTuple):
    """``pattern`` is a regex; the ``body`` that follows what it matches is the arguments of the tool that is named in
    it, and ``close``; or one call or a list of them; or the calls of a list that is open already, and its end."""

    pattern: str
    body: Literal["arguments", "call", "calls"]
    close: str = ""


# JSON that begins like a call of a tool of the request; what marks calls in formats where nothing but JSON does.
BARE_CALL = Opening(rf'\{{\s*"name"\s*:\s*"{NAME}"\s*,\s*"(?:arguments|parameters)"\s*:', "arguments", "}")


def openers(openings: Collection[Opening], tools: Tools, strict: Collection[str]) -> tuple[Opener, ...]:
    """For calls of ``tools``. Those in ``strict`` are held to every keyword of their schemas, or the request is
    refused; with others keywords that cannot be held are ignored. Raises `ValueError` if there is too much to hold."""
    if not openings:
        return ()
    if len(tools) > MAX_TOOLS:
        raise ValueError(f"more than {MAX_TOOLS}, which is what can be held to schemas")
    names = "|".join(re.escape(name) for name in sorted(tools, key=len, reverse=True))
    made = tuple(Opener(one.pattern.replace(NAME, f"({names})"), _bodies(one, tools, bool(strict))) for one in openings)
    size = sum(len(spec.text.encode()) for opener in made for spec in opener.bodies.values())
    if size > MAX_GRAMMAR_BYTES:
        raise ValueError(f"schemas of {size} bytes, more than {MAX_GRAMMAR_BYTES}")
    return made


def _bodies(opening: Opening, tools: Tools, strict: bool) -> dict[str, GrammarSpec]:
    if opening.body == "arguments":
        return {name: _arguments(schema, opening.close, strict) for name, schema in tools.items()}
    call = _json({"anyOf": call_schemas(tools, "#/anyOf")}, strict)
    start = 'call (WS? "," WS? call)* WS? "]"'
    if opening.body == "call":
        start = f'(call | "[" WS? {start})'
    return {"": _lark(f"start: WS? {start}", f"call: %json {call}")}


def _arguments(schema: Mapping[str, Any], close: str, strict: bool) -> GrammarSpec:
    end = f" WS? {msgspec.json.encode(close).decode()}" if close else ""
    return _lark(f"start: WS? arguments{end}", f"arguments: %json {_json(arguments_of(schema), strict)}")


def _json(schema: Mapping[str, Any], strict: bool) -> str:
    options = {"whitespace_pattern": JSON_WHITESPACE, "lenient": not strict, "coerce_one_of": not strict}
    return msgspec.json.encode({**schema, "x-guidance": options}).decode()


def _lark(*rules: str) -> GrammarSpec:
    return GrammarSpec("lark", "\n".join((*rules, f"WS: /{JSON_WHITESPACE}/", "")))
