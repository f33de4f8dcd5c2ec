"""Mistral: ``[TOOL_CALLS] [{"name": …, "arguments": {…}}, …]``; later ``[TOOL_CALLS]name[ARGS]{…}`` for each call."""

from __future__ import annotations

import secrets
import string

from octavo.frontend.parse.openings import NAME, Opening
from octavo.frontend.parse.reader import Reader, Steps
from octavo.frontend.parse.values import Call, calls_of, is_name

OPEN, ID, ARGUMENTS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
MARKERS = (OPEN, ID, ARGUMENTS)
OPENINGS = (
    Opening(r"\[TOOL_CALLS\]\s*\[", "calls"),
    Opening(rf"\[TOOL_CALLS\]\s*{NAME}\s*(?:\[CALL_ID\]\w{{0,64}})?\[ARGS\]", "arguments"),
)


def new_call_id() -> str:
    """Nine letters or digits: Mistral's templates refuse any other id in a history."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def parse(text: Reader) -> Steps[None]:
    """Reads content with calls in it."""
    while (yield from text.until(OPEN)):
        yield from text.space()
        if (yield from text.next()) in ("[", "{"):
            text.call(calls_of((yield from text.json())))
            continue
        name = yield from text.word()
        yield from text.space()
        if (yield from text.skip(ID)):
            yield from text.word()  # the model's ids are not always of the form that its template wants
        yield from text.skip(ARGUMENTS)
        arguments = yield from text.json()
        if is_name(name) and isinstance(arguments, dict):
            text.call([Call(name, arguments)])
