"""Reasoning between two marks at the start of an answer."""

from __future__ import annotations

from octavo.frontend.parse.events import Reasoning
from octavo.frontend.parse.reader import Parse, Reader, Steps


def between(start: str, end: str, *, opened: bool) -> Parse:
    """A parser of ``start`` reasoning ``end`` content; the prompt may have ``opened`` it already.

    Elsewhere ``start`` is content: an answer may well be about such marks.
    """

    def parse(text: Reader) -> Steps[None]:
        if not opened:
            yield from text.space()
        if (yield from text.skip(start)) or opened:
            text.drop()
            yield from text.until(end, kind=Reasoning)
            text.drop()
        yield from text.until()

    return parse
