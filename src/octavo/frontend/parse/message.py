"""The parser of a whole answer: reasoning first, then content and calls, and white space between them tidied up."""

from __future__ import annotations

from collections.abc import Callable

from octavo.frontend.parse.events import CallStart, Content, Event, Reasoning
from octavo.frontend.parse.reader import Parse, Run, new_call_id
from octavo.frontend.parse.values import Tools


class MessageParser:
    """Parsers in a row; each reads what the one before it takes for content."""

    def __init__(self, parsers: list[Parse], tools: Tools, new_id: Callable[[], str] = new_call_id) -> None:
        self._runs = [Run(parse, tools, new_id) for parse in parsers]
        self._tidy = _Tidy()

    def feed(self, text: str) -> list[Event]:
        """What ``text`` adds to the message."""
        events: list[Event] = [Content(text)] if text else []
        for run in self._runs:
            events = _through(run, events)
        return self._tidy.take(events)

    def finish(self) -> list[Event]:
        """What was held back until now; nothing may be fed after it."""
        events: list[Event] = []
        for run in self._runs:
            events = _through(run, events) + run.finish()
        return self._tidy.take(events) + self._tidy.finish()


def _through(run: Run, events: list[Event]) -> list[Event]:
    made: list[Event] = []
    for event in events:
        made += run.feed(event.text) if isinstance(event, Content) else [event]
    return made


class _Tidy:
    """Drops white space around reasoning and around calls; an answer that is content alone stays as it is."""

    def __init__(self) -> None:
        self._kind: type[Content | Reasoning] | None = None  # of the text that is going on; None after a call
        self._strip = False  # it has not begun, and is to begin without white space
        self._held = ""  # white space at its end
        self._calls = False

    def take(self, events: list[Event]) -> list[Event]:
        made: list[Event] = []
        for event in events:
            if isinstance(event, Content | Reasoning):
                made += self._text(event)
                continue
            if isinstance(event, CallStart):
                self._calls, self._kind, self._held = True, None, ""
            made.append(event)
        return made

    def finish(self) -> list[Event]:
        ends_content = self._held and self._kind is Content and not self._calls
        return [Content(self._held)] if ends_content else []

    def _text(self, event: Content | Reasoning) -> list[Event]:
        kind = type(event)
        if kind is not self._kind:
            follows = self._kind is not None or self._calls
            self._kind, self._strip, self._held = kind, follows or kind is Reasoning, ""
        text = event.text.lstrip() if self._strip else event.text
        body = text.rstrip()
        if not body:
            self._held += text
            return []
        self._strip = False
        made, self._held = kind(self._held + body), text[len(body) :]
        return [made]
