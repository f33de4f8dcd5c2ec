"""Qwen3-Coder and later: ``<tool_call><function=name><parameter=k>v</parameter>…</function></tool_call>``.

Values are bare, as in `glm45`, with a line break on both sides that is not part of them.
"""

from __future__ import annotations

from typing import Any

from octavo.frontend.parse.openings import Opening
from octavo.frontend.parse.reader import Reader, Steps
from octavo.frontend.parse.values import MAX_NAME, Call, is_name, schema_of, typed

OPEN, CLOSE = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END, PARAMETER, PARAMETER_END = "<function=", "</function>", "<parameter=", "</parameter>"
MARKERS = (OPEN, CLOSE)
OPENINGS: tuple[Opening, ...] = ()  # its values are not JSON


def parse(text: Reader) -> Steps[None]:
    """Reads content with calls in it; models leave the outer tag out at times."""
    while True:
        marker = yield from text.until(OPEN, FUNCTION)
        if marker is None:
            return
        if marker == OPEN:
            yield from text.space()
            if not (yield from text.skip(FUNCTION)):
                continue
        name = yield from text.collect(">", MAX_NAME)
        if name is None or not is_name(name):
            continue
        arguments = yield from _arguments(text, name)
        if arguments is None:
            continue
        yield from text.space()
        yield from text.skip(CLOSE)
        text.call([Call(name, arguments)])


def _arguments(text: Reader, name: str) -> Steps[dict[str, Any] | None]:
    """Up to the end of the function; None if it is broken."""
    arguments: dict[str, Any] = {}
    while True:
        yield from text.space()
        if (yield from text.skip(FUNCTION_END)):
            return arguments
        if not (yield from text.skip(PARAMETER)):
            return None
        key = yield from text.collect(">", MAX_NAME)
        value = None if key is None else (yield from text.collect(PARAMETER_END))
        if key is None or value is None:
            return None
        value = value.removeprefix("\n").removesuffix("\n")
        arguments[key] = typed(value, schema_of(text.tools, name, key))
