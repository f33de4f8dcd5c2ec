"""Calls as Python writes them: ``name(key="text", other=[1, None])``. Only literals are read; nothing is run."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from octavo.frontend.parse.values import MAX_DEPTH, Call, is_name

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_NUMBER = re.compile(r"-?[0-9]{1,400}(\.[0-9]{0,400})?([eE][+-]?[0-9]{1,4})?")
_PIECE = re.compile(r"[^'\"\\]+|\\.|['\"]", re.DOTALL)
_WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\n": "", "\\": "\\", "'": "'", '"': '"'}


class _Broken(Exception):
    pass


def parse_calls(text: str) -> list[Call]:
    """The calls of a text that holds nothing else: one a line, or a list of them; none if anything is wrong."""
    reader = _Reader(text)
    try:
        return reader.calls()
    except _Broken:
        return []


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def calls(self) -> list[Call]:
        listed = self._skip("[")
        found = []
        while self._peek() not in ("", "]"):
            found.append(self._call())
            self._skip("," if listed else ";")
        if listed:
            self._expect("]")
        if self._peek():
            raise _Broken
        return found

    def _call(self, *, printed: bool = False) -> Call:
        name = self._name()
        self._expect("(")
        if name == "print" and not printed:  # models like to look at results
            call = self._call(printed=True)
            self._expect(")")
            return call
        arguments: dict[str, Any] = {}
        while not self._skip(")"):
            key = self._name()
            self._expect("=")
            arguments[key] = self._value(0)
            if self._peek() != ")":
                self._expect(",")
        if not is_name(name):
            raise _Broken
        return Call(name, arguments)

    def _value(self, depth: int) -> Any:
        char = self._peek()
        if depth > MAX_DEPTH:
            raise _Broken
        if char and char in "'\"":
            return self._string(char)
        if char and char in "[(":
            return self._list("]" if char == "[" else ")", depth)
        if char == "{":
            return self._dict(depth)
        if found := _NUMBER.match(self._text, self._at):
            self._at = found.end()
            return self._number(found)
        word = self._name()
        if word not in _WORDS:
            raise _Broken
        return _WORDS[word]

    def _list(self, close: str, depth: int) -> list[Any]:
        self._at += 1
        values = []
        while not self._skip(close):
            values.append(self._value(depth + 1))
            if self._peek() != close:
                self._expect(",")
        return values

    def _dict(self, depth: int) -> dict[str, Any]:
        self._at += 1
        values = {}
        while not self._skip("}"):
            key = self._value(depth + 1)
            if not isinstance(key, str):
                raise _Broken
            self._expect(":")
            values[key] = self._value(depth + 1)
            if self._peek() != "}":
                self._expect(",")
        return values

    def _number(self, found: re.Match[str]) -> int | float:
        if not found[1] and not found[2]:
            return int(found[0])
        value = float(found[0])
        if not math.isfinite(value):
            raise _Broken
        return value

    def _string(self, quote: str) -> str:
        close = quote * 3 if self._text.startswith(quote * 3, self._at) else quote
        self._at += len(close)
        pieces: list[str] = []
        while not self._text.startswith(close, self._at):
            found = _PIECE.match(self._text, self._at)
            if found is None:
                raise _Broken
            self._at = found.end()
            pieces.append(self._unescaped(found[0]) if found[0][0] == "\\" else found[0])
        self._at += len(close)
        return "".join(pieces)

    def _unescaped(self, escape: str) -> str:
        if escape[1] != "u":
            return _ESCAPES.get(escape[1], escape)
        digits = self._text[self._at : self._at + 4]
        self._at += 4
        try:
            return str(json.loads(f'"\\u{digits}"'))
        except ValueError:
            raise _Broken from None

    def _name(self) -> str:
        self._peek()
        found = _NAME.match(self._text, self._at)
        if found is None:
            raise _Broken
        self._at = found.end()
        return found[0]

    def _peek(self) -> str:
        """The next character that is no white space."""
        found = _SPACE.match(self._text, self._at)
        self._at = found.end() if found else self._at
        return self._text[self._at : self._at + 1]

    def _skip(self, char: str) -> bool:
        if self._peek() != char:
            return False
        self._at += 1
        return True

    def _expect(self, char: str) -> None:
        if not self._skip(char):
            raise _Broken
