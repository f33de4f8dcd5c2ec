"""Reasoning between two marks at the start of an answer."""

from __future__ import annotations

from octavo.frontend.parse.events import Reasoning
from octavo.frontend.parse.reader import Parse, Reader, Steps


def between(start: str, end: str, *, opened: bool, breaks: tuple[str, ...] = ()) -> Parse:
    """A parser of ``start`` reasoning ``end`` content; the prompt may have ``opened`` it already.

    Reasoning also ends before one of ``breaks``, with which content begins. Elsewhere than at the start of the answer
    ``start`` is content: an answer may well be about such marks.
    """

    def parse(text: Reader) -> Steps[None]:
        if not opened:
            yield from text.space()
        if (yield from text.skip(start)) or opened:
            text.drop()
            found = yield from text.until(end, *breaks, kind=Reasoning)
            if found not in breaks:
                text.drop()
        yield from text.until()

    return parse
