"""JSON in a model's text: where a value ends, what it means, and whether it is a call."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn, TypeAlias, TypeGuard

MAX_DEPTH = 64  # of nested objects and lists
MAX_NAME = 256

Tools: TypeAlias = Mapping[str, Mapping[str, Any]]  # the JSON schema of the parameters by the tool's name

_QUOTED = re.compile(r'["\\]')
_PLAIN = re.compile(r"[\s\w:,.+-]*", re.ASCII)
_CLOSES = {"{": "}", "[": "]"}


class Call(NamedTuple):
    """``id`` is the model's own name for the call, in formats that have one."""

    name: str
    arguments: dict[str, Any]
    id: str | None = None


class JsonEnd:
    """Finds the end of a JSON object or list in text that comes in pieces, which start with its first character."""

    def __init__(self) -> None:
        self._open: list[str] = []  # the brackets that must come
        self._quoted = False
        self._escaped = False

    def scan(self, text: str, at: int) -> tuple[int, bool | None]:
        """Reads ``text`` from ``at``: (where it stopped, True if the value ends there, False if it is broken).

        None: all of the text was read, and the value goes on. It is broken where a bracket does not match or where a
        character cannot be JSON; finer errors are left to `decode`.
        """
        while at < len(text):
            if self._quoted:
                at = self._string(text, at)
                continue
            at = self._skip_plain(text, at)
            if at == len(text):
                break
            char = text[at]
            if char == '"' and self._open:
                self._quoted = True
            elif char in _CLOSES and len(self._open) < MAX_DEPTH:
                self._open.append(_CLOSES[char])
            elif self._open and char == self._open[-1]:
                self._open.pop()
                if not self._open:
                    return at + 1, True
            else:
                return at, False
            at += 1
        return at, None

    def _skip_plain(self, text: str, at: int) -> int:
        found = _PLAIN.match(text, at)
        return found.end() if found and self._open else at

    def _string(self, text: str, at: int) -> int:
        """The position after the string, or the end of ``text``."""
        if self._escaped:
            self._escaped = False
            return at + 1
        found = _QUOTED.search(text, at)
        if found is None:
            return len(text)
        self._escaped = found[0] == "\\"
        self._quoted = self._escaped
        return found.end()


def decode(text: str) -> Any:
    """The value that ``text`` is the JSON of; None for anything that is none, or that is nested too deep.

    Line breaks inside strings are read as models mean them. NaN and infinities are no JSON.
    """
    try:
        return _loads(text)
    except ValueError:
        return None


def _loads(text: str) -> Any:
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] in _CLOSES and not JsonEnd().scan(text, start)[1]:
        raise ValueError("a bracket is missing, or they are nested too deep")
    return json.loads(text, strict=False, parse_constant=_refuse, parse_float=_finite)


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def encode(arguments: Mapping[str, Any]) -> str:
    """The JSON of a call's arguments; escapes are used only where a string is no Unicode."""
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    return text if is_unicode(text) else json.dumps(arguments, allow_nan=False)


def is_unicode(text: str) -> bool:
    """Whether it can be sent: half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_name(name: Any) -> TypeGuard[str]:
    """Whether a tool can be called so."""
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable() and is_unicode(name)


def call_of(value: Any) -> Call | None:
    """A call from ``{"name": …, "arguments" or "parameters": {…}}``, also inside ``"function"``; None if it is none."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict):
        return None
    name = value.get("name", value.get("function"))
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):
        arguments = decode(arguments)
    elif arguments is None:
        arguments = {}
    return Call(name, arguments) if is_name(name) and isinstance(arguments, dict) else None


def calls_of(value: Any) -> list[Call]:
    """The calls of one object or of a list of them; none if one of them is no call."""
    found = [call_of(one) for one in (value if isinstance(value, list) else [value])]
    return [call for call in found if call is not None] if all(found) else []


def typed(text: str, schema: Any) -> Any:
    """What a bare ``text`` means as a value of ``schema``: formats without quotes leave that to the reader."""
    kinds = _kinds(schema)
    if "string" in kinds and kinds <= {"string", "null"}:
        return None if "null" in kinds and text.strip() == "null" else text
    try:
        value = _loads(text)
    except ValueError:
        return {"true": True, "false": False, "none": None}.get(text.strip().lower(), text)
    if kinds == {"boolean"} and value in (0, 1):
        return bool(value)
    return value


def _kinds(schema: Any) -> set[str]:
    """The types that a schema allows, as far as it says so without references."""
    if not isinstance(schema, Mapping):
        return set()
    kind, choices = schema.get("type"), schema.get("enum")
    found = {one for one in (kind if isinstance(kind, list) else [kind]) if isinstance(one, str)}
    for options in (schema.get("anyOf"), schema.get("oneOf")):
        for one in options if isinstance(options, list) else ():
            found |= _kinds(one)
    if not found and isinstance(choices, list) and all(isinstance(one, str) for one in choices):
        return {"string"}
    return found


def schema_of(tools: Tools, name: str, key: str) -> Any:
    """The schema of one parameter, if the tool declares it."""
    properties = tools.get(name, {}).get("properties")
    return properties.get(key) if isinstance(properties, Mapping) else None
