"""An answer as a row of blocks (reasoning, text, calls), as Anthropic's messages and OpenAI's responses have it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from octavo.frontend.parse.events import CallArguments, CallEnd, CallStart, Content, Reasoning
from octavo.server.message import ChoiceReader

Kind = Literal["reasoning", "text", "call"]


@dataclass
class Block:
    """``text`` grows; that of a call are its arguments, a JSON object once it is complete."""

    kind: Kind
    index: int
    id: str = ""  # of a call
    name: str = ""  # of the tool that is called
    text: str = ""


@dataclass(frozen=True)
class Change:
    """A block begins, grows by ``text``, or ends."""

    what: Literal["open", "add", "close"]
    block: Block
    text: str = ""


class Blocks:
    """Makes them of the text of an answer. ``all`` are those that have begun."""

    def __init__(self, reader: ChoiceReader) -> None:
        self.all: list[Block] = []
        self._reader = reader
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
        for event in self._reader.events(text, final=final):
            match event:
                case Content(piece):
                    changes += self._grow("text", piece)
                case Reasoning(piece):
                    changes += self._grow("reasoning", piece)
                case CallStart(_, id, name):
                    changes += self._begin(Block("call", len(self.all), id, name))
                case CallArguments(_, piece):
                    changes += self._grow("call", piece)
                case CallEnd():
                    changes += self._end()
        return changes + self._end() if final else changes

    def _grow(self, kind: Kind, text: str) -> list[Change]:
        changes = [] if self._open is not None and self._open.kind == kind else self._begin(Block(kind, len(self.all)))
        assert self._open is not None
        self._open.text += text
        return [*changes, Change("add", self._open, text)]

    def _begin(self, block: Block) -> list[Change]:
        changes = self._end()
        self._open = block
        self.all.append(block)
        return [*changes, Change("open", block)]

    def _end(self) -> list[Change]:
        ended, self._open = self._open, None
        return [] if ended is None else [Change("close", ended)]
