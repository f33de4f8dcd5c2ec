"""Llama 3.1 to 3.3: an answer that is ``{"name": …, "parameters": {…}}``, or several; ``<|python_tag|>`` may precede.

Nothing else tells such a call from other JSON, so it must name one of the request's tools.
"""

from __future__ import annotations

from octavo.frontend.parse.openings import BARE_CALL
from octavo.frontend.parse.reader import Reader, Steps
from octavo.frontend.parse.values import call_of

TAG = "<|python_tag|>"
MARKERS = (TAG,)
OPENINGS = (BARE_CALL,)


def parse(text: Reader) -> Steps[None]:
    """Reads calls at the start and after the tag, content elsewhere."""
    yield from text.space()
    yield from text.skip(TAG)
    while True:
        while (yield from text.next()) == "{":
            call = call_of((yield from text.json()))
            if call is None or call.name not in text.tools or not text.call([call]):
                break
            yield from text.space()
            yield from text.skip(";")
            yield from text.space()
            if (yield from text.next()) in ("{", ""):
                text.drop()
        if not (yield from text.until(TAG)):
            return
        yield from text.space()
