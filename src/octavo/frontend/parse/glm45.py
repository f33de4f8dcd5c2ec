"""GLM-4.5 and later: ``<tool_call>name``, then ``<arg_key>k</arg_key><arg_value>v</arg_value>``…, ``</tool_call>``.

Values are bare: those of parameters that the tool declares as strings are taken as they stand, others as JSON.
"""

from __future__ import annotations

from typing import Any

from octavo.frontend.parse.openings import Opening
from octavo.frontend.parse.reader import Reader, Steps
from octavo.frontend.parse.values import Call, is_name, schema_of, typed

OPEN, CLOSE = "<tool_call>", "</tool_call>"
KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
MARKERS = (OPEN, CLOSE, KEY, KEY_END, VALUE, VALUE_END)
OPENINGS: tuple[Opening, ...] = ()  # its values are not JSON


def parse(text: Reader) -> Steps[None]:
    """Reads content with calls in it."""
    while (yield from text.until(OPEN)):
        yield from text.space()
        name = yield from text.word()
        arguments = yield from _arguments(text, name)
        if arguments is not None and is_name(name):
            text.call([Call(name, arguments)])


def _arguments(text: Reader, name: str) -> Steps[dict[str, Any] | None]:
    """Up to the end of the call; None if it is broken."""
    arguments: dict[str, Any] = {}
    while True:
        yield from text.space()
        if (yield from text.skip(CLOSE)):
            return arguments
        if not (yield from text.skip(KEY)):
            return None
        key = yield from text.collect(KEY_END)
        yield from text.space()
        if key is None or not (yield from text.skip(VALUE)):
            return None
        value = yield from text.collect(VALUE_END)
        if value is None:
            return None
        arguments[key.strip()] = typed(value, schema_of(text.tools, name, key.strip()))
