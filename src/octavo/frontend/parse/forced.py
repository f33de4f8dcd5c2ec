"""An answer that a grammar forces to be a list of calls, ``[{"name": …, "arguments": {…}}, …]``, whatever the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.frontend.parse.reader import Reader, Steps
from octavo.frontend.parse.values import MAX_DEPTH, Tools, call_of

_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}  # a tool without parameters


def schema(tools: Tools, *, parallel: bool) -> dict[str, Any]:
    """The JSON schema of such a list; raises `ValueError` for parameters that are nested too deep."""
    choices = []
    for i, (name, parameters) in enumerate(tools.items()):
        here = f"#/items/anyOf/{i}/properties/arguments"
        arguments = _moved({"type": "object", **parameters}, here) if parameters else _NOTHING
        choices.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": arguments},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    limit = {} if parallel else {"maxItems": 1}
    return {"type": "array", "items": {"anyOf": choices}, "minItems": 1, **limit}


def _moved(schema: Any, to: str, depth: int = 0) -> Any:
    """A copy of ``schema`` whose references to its own root are references to ``to``."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(schema, list):
        return [_moved(one, to, depth + 1) for one in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {key: _moved(value, to, depth + 1) for key, value in schema.items()}
    reference = moved.get("$ref")
    if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")):
        moved["$ref"] = to + reference[1:]
    return moved


def parse(text: Reader) -> Steps[None]:
    """Reads the calls; one that is cut off is content."""
    yield from text.space()
    yield from text.skip("[")
    yield from text.space()
    while (yield from text.next()) == "{":
        call = call_of((yield from text.json()))
        if call is None or not text.call([call]):
            break
        yield from text.space()
        if (yield from text.skip(",")) or (yield from text.skip("]")):
            yield from text.space()
            text.drop()
    yield from text.until()
