"""DeepSeek V3 and R1, with a line for the name and a fence around the arguments, and V3.1, without."""

from __future__ import annotations

from octavo.frontend.parse.openings import NAME, Opening
from octavo.frontend.parse.reader import Reader, Steps
from octavo.frontend.parse.values import Call, is_name

ALL_OPEN, ALL_CLOSE = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
OPEN, SEPARATOR, CLOSE = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
MARKERS = (ALL_OPEN, ALL_CLOSE, OPEN, SEPARATOR, CLOSE)
OPENINGS = (Opening(rf"{OPEN}(?:function{SEPARATOR})?{NAME}(?:{SEPARATOR}|\s*```json\s)", "arguments"),)


def parse(text: Reader) -> Steps[None]:
    """Reads content, then a section of calls."""
    while True:
        marker = yield from text.until(ALL_OPEN, OPEN)
        if marker is None:
            return
        if marker == ALL_OPEN:
            yield from text.space()
            if not (yield from text.skip(OPEN)):
                continue
        while (yield from _call(text)):
            yield from text.space()
            if (yield from text.skip(ALL_CLOSE)):
                text.drop()
                break
            if not (yield from text.skip(OPEN)):
                break


def _call(text: Reader) -> Steps[bool]:
    """``function<sep>name`` and fenced JSON, or ``name<sep>`` and JSON."""
    name = yield from text.word()
    if not (yield from text.skip(SEPARATOR)):
        return False
    if name == "function" and (yield from text.next()) not in ("{", " ", "\n"):
        name = yield from text.word()
        yield from text.space()
        yield from text.skip("```json")
    arguments = yield from text.json()
    if not is_name(name) or not isinstance(arguments, dict):
        return False
    yield from text.space()
    yield from text.skip("```")
    yield from text.space()
    yield from text.skip(CLOSE)
    return text.call([Call(name, arguments)])
