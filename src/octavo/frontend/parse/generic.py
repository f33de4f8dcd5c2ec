"""Models without a format of their own: an answer that is a call, or a list of them, in JSON, perhaps fenced.

Nothing else tells such a call from other JSON, so it must name one of the request's tools.
"""

from __future__ import annotations

from octavo.frontend.parse.openings import BARE_CALL
from octavo.frontend.parse.reader import Reader, Steps
from octavo.frontend.parse.values import calls_of

MARKERS: tuple[str, ...] = ()
OPENINGS = (BARE_CALL,)


def parse(text: Reader) -> Steps[None]:
    """Reads calls at the start, content after them."""
    yield from text.space()
    fenced = yield from text.skip("```")
    if fenced:
        yield from text.skip("json")
        yield from text.space()
    while (yield from text.next()) in ("{", "["):
        calls = calls_of((yield from text.json()))
        if not all(call.name in text.tools for call in calls) or not text.call(calls):
            break
        yield from text.space()
        if fenced and (yield from text.skip("```")):
            text.drop()
            break
    yield from text.until()
