"""How all parsers read: a text that comes in pieces, as if it were there from the beginning.

A parser is a generator that reads with ``yield from``; where the text so far does not decide, the reader yields until
there is more. No method's result depends on where the text was cut, so no parser's does.
"""

from __future__ import annotations

import functools
import re
import secrets
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeAlias, TypeVar

from octavo.frontend.parse.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from octavo.frontend.parse.values import MAX_NAME, Call, JsonEnd, Tools, decode, encode

MAX_CALL = 2**20  # characters of one call; longer ones are content
MAX_CALLS = 128  # in one answer

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]

_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"[\w.:/-]*")


def new_call_id() -> str:
    """An id of the form that OpenAI's have."""
    return f"call_{secrets.token_hex(12)}"


class Reader:
    """The text of one answer. Whatever a parser reads and neither drops nor turns into a call is content."""

    def __init__(self, tools: Tools, new_id: Callable[[], str] = new_call_id) -> None:
        self.tools = tools
        self.events: list[Event] = []
        self._new_id = new_id
        self._calls = 0
        self._text = ""
        self._at = 0
        self._ended = False
        self._raw: list[str] = []  # read, but not decided upon

    def push(self, text: str) -> None:
        """Adds a piece."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """There will be no more."""
        self._ended = True

    def keep(self) -> None:
        """What was read and not decided upon is content."""
        self._emit("".join(self._raw), Content)
        self._raw.clear()

    def drop(self) -> None:
        """What was read and not decided upon is of no interest to anybody."""
        self._raw.clear()

    def call(self, calls: Sequence[Call]) -> bool:
        """What was read are these calls; False, and nothing is changed, if there are none or too many."""
        if not calls or not self.tools or self._calls + len(calls) > MAX_CALLS:
            return False
        self._raw.clear()
        for one in calls:
            index, self._calls = self._calls, self._calls + 1
            self.events.append(CallStart(index, one.id or self._new_id(), one.name))
            self.events.append(CallArguments(index, encode(one.arguments)))
            self.events.append(CallEnd(index))
        return True

    # --- reading ------------------------------------------------------------------------------------------------------

    def until(self, *markers: str, kind: type[Content | Reasoning] = Content) -> Steps[str | None]:
        """Lets the text go up to the first of ``markers``, which it reads and returns; None at the end of the text."""
        self.keep()
        marker = yield from self._scan(markers, lambda text: self._emit(text, kind))
        if marker is not None:
            self._raw.append(marker)
        return marker

    def collect(self, marker: str, limit: int = MAX_CALL) -> Steps[str | None]:
        """Reads up to ``marker`` and over it; None if that does not come within ``limit`` characters."""
        pieces: list[str] = []
        found = yield from self._scan((marker,), pieces.append, limit)
        self._raw += [*pieces, found or ""]
        return None if found is None else "".join(pieces)

    def next(self) -> Steps[str]:
        """The next character, not read; empty at the end."""
        yield from self._more()
        return self._text[self._at : self._at + 1]

    def skip(self, literal: str) -> Steps[bool]:
        """Reads ``literal`` if it comes next."""
        while not self._ended and len(self._text) - self._at < len(literal):
            if not literal.startswith(self._text[self._at :]):
                return False
            yield
        if not self._text.startswith(literal, self._at):
            return False
        self._read(self._at + len(literal))
        return True

    def space(self) -> Steps[str]:
        """Reads white space."""
        return (yield from self._run(_SPACE, MAX_CALL))

    def word(self) -> Steps[str]:
        """Reads what names of tools are made of."""
        return (yield from self._run(_WORD, MAX_NAME))

    def json(self) -> Steps[Any]:
        """Reads white space and a JSON object or list; None, having read up to the fault, if there is none."""
        yield from self.space()
        scanner, room = JsonEnd(), MAX_CALL
        pieces: list[str] = []
        while room:
            yield from self._more()
            at = self._at
            end, whole = scanner.scan(self._text[: at + room] if len(self._text) - at > room else self._text, at)
            pieces.append(self._read(end))
            room -= end - at
            if whole:
                return decode("".join(pieces))
            if whole is False or (self._ended and self._at == len(self._text)):
                return None
        return None

    # --- inside -------------------------------------------------------------------------------------------------------

    def _scan(self, markers: Sequence[str], sink: Callable[[str], None], room: int | None = None) -> Steps[str | None]:
        """Hands the text before the first of ``markers`` to ``sink``; at most ``room`` characters, then it is None.

        No marker may begin with another one, or overlap with it.
        """
        while True:
            found = _pattern(markers).search(self._text, self._at) if markers else None
            if found is not None:
                end = found.start()
            else:
                end = len(self._text) - (0 if self._ended else _held(self._text, self._at, markers))
            if room is not None and end - self._at > room:
                sink(self._text[self._at : self._at + room])
                self._at += room
                return None
            sink(self._text[self._at : end])
            if room is not None:
                room -= end - self._at
            self._at = end
            if found is not None:
                self._at = found.end()
                return found[0]
            if self._ended:
                return None
            yield

    def _run(self, pattern: re.Pattern[str], room: int) -> Steps[str]:
        """Reads the characters of a class."""
        pieces: list[str] = []
        while room:
            yield from self._more()
            found = pattern.match(self._text, self._at, self._at + room)
            if found is None or found.end() == self._at:
                break
            room -= found.end() - self._at
            pieces.append(self._read(found.end()))
        return "".join(pieces)

    def _more(self) -> Steps[None]:
        while len(self._text) == self._at and not self._ended:
            yield

    def _read(self, end: int) -> str:
        text = self._text[self._at : end]
        self._at = end
        self._raw.append(text)
        return text

    def _emit(self, text: str, kind: type[Content | Reasoning]) -> None:
        if text:
            self.events.append(kind(text))


@functools.lru_cache(maxsize=64)
def _pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, markers)))  # literals only: one pass, nothing to try again


def _held(text: str, at: int, markers: Sequence[str]) -> int:
    """How many characters at the end may be the beginning of a marker."""
    longest = min(max(map(len, markers), default=1) - 1, len(text) - at)
    if not any(text.find(marker[0], len(text) - longest) >= 0 for marker in markers):
        return 0
    for size in range(longest, 0, -1):
        tail = text[len(text) - size :]
        if any(marker.startswith(tail) for marker in markers):
            return size
    return 0


Parse: TypeAlias = Callable[[Reader], Steps[None]]


class Run:
    """A parser at work on one text."""

    def __init__(self, parse: Parse, tools: Tools, new_id: Callable[[], str] = new_call_id) -> None:
        self._reader = Reader(tools, new_id)
        self._steps = parse(self._reader)
        next(self._steps, None)

    def feed(self, text: str) -> list[Event]:
        """What ``text`` adds."""
        self._reader.push(text)
        next(self._steps, None)
        return self._take()

    def finish(self) -> list[Event]:
        """What was held back until now."""
        self._reader.end()
        next(self._steps, None)
        self._reader.keep()
        return self._take()

    def _take(self) -> list[Event]:
        events, self._reader.events = self._reader.events, []
        return events
