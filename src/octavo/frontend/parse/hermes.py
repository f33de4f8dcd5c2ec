"""Hermes, Qwen 2.5 and 3: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``; SmolLM2 has a list in there."""

from __future__ import annotations

from octavo.frontend.parse.openings import Opening
from octavo.frontend.parse.reader import Reader, Steps
from octavo.frontend.parse.values import calls_of

OPEN, CLOSE = "<tool_call>", "</tool_call>"
MARKERS = (OPEN, CLOSE)
OPENINGS = (Opening(OPEN, "call"),)


def parse(text: Reader) -> Steps[None]:
    """Reads content with calls in it."""
    while (yield from text.until(OPEN)):
        calls = calls_of((yield from text.json()))
        if not calls:
            continue
        yield from text.space()
        yield from text.skip(CLOSE)
        text.call(calls)
