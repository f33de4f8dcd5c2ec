"""Structured output as a user asks for it (`StructuredOutputsParams`) and as the core takes it (`Guide`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from octavo.errors import RequestError

MAX_GRAMMAR_BYTES = 128 << 10  # of a grammar's text; also bounds how deep its rules can refer to each other
MAX_GBNF_BYTES = 32 << 10  # GBNF is translated by Python code
GrammarKind = Literal["json_schema", "regex", "lark", "gbnf"]
# Between the parts of JSON. Bounded: some models, once in it, would never find out of an endless indentation.
JSON_WHITESPACE = r"[ \t\n\r]{1,40}"
_REMEDY = "See docs/operations.md, structured output."


class GrammarSpec(msgspec.Struct, frozen=True):
    """What an output must match. Equal specs share one compiled grammar."""

    kind: GrammarKind
    text: str


class Opener(msgspec.Struct, frozen=True):
    """A text after which a grammar holds.

    ``pattern`` is a regex of at most a few hundred bytes, made by octavo and never by a user; what its group matches is
    the key of the grammar in ``bodies``, "" without a group.
    """

    pattern: str
    bodies: dict[str, GrammarSpec]


class Guide(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an output must match, and where.

    ``whole``: the answer, all of it. Else ``openers``: what follows any of them, and then text again. Nothing holds
    inside of reasoning, which ends with what the regex ``reasoning_end`` matches; it has begun already, or, with
    ``reasoning_start``, begins if that is the first token of the output. ``strict``: a grammar that cannot be compiled
    is the client's error, else what it would have held is not held.
    """

    whole: GrammarSpec | None = None
    openers: tuple[Opener, ...] = ()
    reasoning_start: str = ""
    reasoning_end: str = ""  # as an opener's pattern
    strict: bool = True

    def specs(self) -> list[GrammarSpec]:
        """Every grammar that is needed, once."""
        whole = [] if self.whole is None else [self.whole]
        return list(dict.fromkeys(whole + [spec for opener in self.openers for spec in opener.bodies.values()]))


class StructuredOutputsParams(msgspec.Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What the output must match, one of: names and meanings are those of vLLM's class of this name."""

    json: str | dict[str, Any] | bool | None = None  # a JSON schema
    regex: str | None = None  # of the whole output, anchored at both ends
    choice: list[str] | None = None
    grammar: str | None = None  # Lark, or GBNF as of llama.cpp
    json_object: bool | None = None  # any JSON object
    disable_any_whitespace: bool = False  # of JSON
    whitespace_pattern: str | None = None  # regex of the whitespace between the parts of JSON

    def spec(self) -> GrammarSpec:
        """As the core takes it; raises `RequestError` unless one kind is given, well formed and not too long."""
        given = [name for name in _KINDS if getattr(self, name) not in (None, [])]
        if self.json_object is False:
            given.remove("json_object")
        if len(given) != 1:
            raise _refusal(
                f"structured_outputs has {' and '.join(given) or 'none'} of {', '.join(_KINDS)}.", "Give exactly one."
            )
        spec = self._of_kind(given[0])
        limit = MAX_GBNF_BYTES if spec.kind == "gbnf" else MAX_GRAMMAR_BYTES
        try:
            size = len(spec.text.encode())
        except UnicodeEncodeError:
            raise _refusal(f"the {given[0]} has half a surrogate pair.", "Send valid Unicode.") from None
        if size > limit:
            raise _refusal(f"the {given[0]} has {size} bytes, more than {limit}.", "Make it smaller.")
        return spec

    def _of_kind(self, kind: str) -> GrammarSpec:
        if kind == "json_object":
            return self._schema({"type": "object"})
        if kind == "json":
            return self._schema(self.json)
        if kind == "regex":
            return GrammarSpec("regex", self.regex or "")
        if kind == "choice":
            choices = [one for one in self.choice or [] if one]
            if len(choices) != len(self.choice or []):
                raise _refusal("choice contains an empty string.", "Remove it.")
            return GrammarSpec("lark", "start: " + " | ".join(_quoted(one) for one in dict.fromkeys(choices)))
        text = self.grammar or ""
        return GrammarSpec("lark" if is_lark(text) else "gbnf", text)

    def _schema(self, schema: str | Mapping[str, Any] | bool | None) -> GrammarSpec:
        """The schema as compact JSON: what is not JSON gets no further."""
        try:
            if isinstance(schema, str):
                schema = msgspec.json.decode(schema)
            if not isinstance(schema, Mapping | bool):
                raise _refusal(f"the JSON schema is of type {type(schema).__name__}.", "Give an object.")
            if schema is True:
                schema = {}
            if isinstance(schema, Mapping):
                given = schema.get("x-guidance", {})  # llguidance's own options
                if not isinstance(given, Mapping):
                    raise _refusal("x-guidance is no object.", "Leave it out.")
                chosen = given.keys() & {"whitespace_flexible", "whitespace_pattern"}
                schema = {**schema, "x-guidance": {**({} if chosen else self._whitespace()), **given}}
            return GrammarSpec("json_schema", msgspec.json.encode(schema).decode())
        except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as error:
            raise _refusal(f"the JSON schema is not JSON: {str(error)[:200]}.", "Send one JSON object.") from None

    def _whitespace(self) -> dict[str, Any]:
        if self.disable_any_whitespace:
            return {"whitespace_flexible": False}
        return {"whitespace_pattern": self.whitespace_pattern or JSON_WHITESPACE}


_KINDS = ("json", "regex", "choice", "grammar", "json_object")


def is_lark(text: str) -> bool:
    """Whether a grammar is Lark's and not GBNF: it has a rule ``start`` or says so."""
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("%llguidance"):
            return True
        if line.startswith("start"):
            rest = line[len("start") :].lstrip()
            if rest.startswith(":") and not rest.startswith("::="):
                return True
    return False


def _quoted(text: str) -> str:
    """A string literal of Lark."""
    return msgspec.json.encode(text).decode()


def _refusal(cause: str, remedy: str) -> RequestError:
    return RequestError(cause, f"{remedy} {_REMEDY}", param="structured_outputs")
