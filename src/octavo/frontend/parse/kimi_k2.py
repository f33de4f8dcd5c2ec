"""Kimi K2: a section of calls, each ``functions.name:number`` and its arguments. That text is the call's id, too."""

from __future__ import annotations

import re

from octavo.frontend.parse.openings import NAME, Opening
from octavo.frontend.parse.reader import Reader, Steps
from octavo.frontend.parse.values import Call, is_name

ALL_OPEN, ALL_CLOSE = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
OPEN, ARGUMENTS, CLOSE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
MARKERS = (ALL_OPEN, ALL_CLOSE, OPEN, ARGUMENTS, CLOSE)
OPENINGS = (
    Opening(
        rf"{re.escape(OPEN)}\s*(?:functions\.)?{NAME}(?::\d{{1,6}})?\s*{re.escape(ARGUMENTS)}",
        "arguments",
    ),
)


def parse(text: Reader) -> Steps[None]:
    """Reads content, then a section of calls."""
    while (yield from text.until(ALL_OPEN)):
        yield from text.space()
        while (yield from text.skip(OPEN)) and (yield from _call(text)):
            yield from text.space()
        if (yield from text.skip(ALL_CLOSE)):
            text.drop()


def _call(text: Reader) -> Steps[bool]:
    yield from text.space()
    id = yield from text.word()
    yield from text.space()
    if not (yield from text.skip(ARGUMENTS)):
        return False
    arguments = yield from text.json()
    name = id.removeprefix("functions.").rpartition(":")[0] or id
    if not is_name(name) or not isinstance(arguments, dict):
        return False
    yield from text.space()
    yield from text.skip(CLOSE)
    return text.call([Call(name, arguments, id)])
