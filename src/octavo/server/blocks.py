"""An answer to a conversation as a row of blocks (reasoning, text, calls), which each API writes in its own words."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from octavo.frontend.parse.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning
from octavo.frontend.parse.message import MessageParser

Kind = Literal["reasoning", "text", "call"]


@dataclass
class Block:
    """Number ``index`` of the answer. ``text`` grows; that of a call are its arguments, a JSON object once complete."""

    kind: Kind
    index: int
    id: str = ""  # of a call
    name: str = ""  # of the tool that is called
    call: int = 0  # number of the call, among calls
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


class Change(NamedTuple):
    """A block begins, grows by ``text``, or ends."""

    what: Literal["open", "add", "close"]
    block: Block
    text: str = ""


class Blocks:
    """Makes them of the text of an answer. ``all`` are those that have begun. Without a ``parser`` all is text."""

    def __init__(
        self, parser: MessageParser | None, *, parallel_calls: bool = True, include_reasoning: bool = True
    ) -> None:
        """What was not asked for, reasoning or a second call, is left out."""
        self.all: list[Block] = []
        self.parsed = parser is not None
        self._parser = parser
        self._last_call = None if parallel_calls else 0
        self._include_reasoning = include_reasoning
        self._open: Block | None = None

    @property
    def called(self) -> bool:
        return any(block.kind == "call" for block in self.all)

    def of(self, kind: Kind) -> str:
        """The texts of the blocks of one kind, joined."""
        return "".join(block.text for block in self.all if block.kind == kind)

    def feed(self, text: str, *, final: bool) -> list[Change]:
        """What ``text`` changes; with ``final`` the last block ends."""
        changes: list[Change] = []
        for event in self._events(text, final):
            if isinstance(event, Content):
                self._grow("text", event.text, changes)
            elif isinstance(event, Reasoning):
                if self._include_reasoning:
                    self._grow("reasoning", event.text, changes)
            elif self._last_call is None or event.index <= self._last_call:
                self._call(event, changes)
        if final:
            self._end(changes)
        return changes

    def _events(self, text: str, final: bool) -> list[Event]:
        if self._parser is None:
            return [Content(text)] if text else []
        events = self._parser.feed(text)
        return events + self._parser.finish() if final else events

    def _call(self, event: CallStart | CallArguments | CallEnd, changes: list[Change]) -> None:
        match event:
            case CallStart(number, id, name):
                self._begin(Block("call", len(self.all), id, name, number), changes)
            case CallArguments(_, piece):
                self._grow("call", piece, changes)
            case CallEnd():
                self._end(changes)

    def _grow(self, kind: Kind, text: str, changes: list[Change]) -> None:
        block = self._open
        if block is None or block.kind != kind:
            block = Block(kind, len(self.all))
            self._begin(block, changes)
        block.pieces.append(text)
        changes.append(Change("add", block, text))

    def _begin(self, block: Block, changes: list[Change]) -> None:
        self._end(changes)
        self._open = block
        self.all.append(block)
        changes.append(Change("open", block))

    def _end(self, changes: list[Change]) -> None:
        if self._open is not None:
            changes.append(Change("close", self._open))
            self._open = None
