"""Gemma 3: a fenced block, ``tool_code`` with calls in Python or in JSON, or ``json`` with a call.

A JSON block may be meant for the user, so a call in it must name one of the request's tools.
"""

from __future__ import annotations

from octavo.frontend.parse.openings import BARE_CALL
from octavo.frontend.parse.python_call import parse_calls
from octavo.frontend.parse.reader import Reader, Steps
from octavo.frontend.parse.values import calls_of, decode

CODE, JSON, CLOSE = "```tool_code\n", "```json\n", "```"
MARKERS: tuple[str, ...] = ()
OPENINGS = (BARE_CALL,)


def parse(text: Reader) -> Steps[None]:
    """Reads content with blocks in it."""
    while True:
        marker = yield from text.until(CODE, JSON)
        if marker is None:
            return
        if marker == JSON:
            calls = calls_of((yield from text.json()))
            yield from text.space()
            whole = (yield from text.skip(CLOSE)) or not (yield from text.next())
        else:
            code = yield from text.collect(CLOSE)
            whole = code is not None
            calls = (calls_of(decode(code)) or parse_calls(code)) if code is not None else []
        if whole and all(call.name in text.tools for call in calls):
            text.call(calls)
