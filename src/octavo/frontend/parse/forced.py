"""An answer that a grammar forces to be a list of calls, ``[{"name": …, "arguments": {…}}, …]``, whatever the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.frontend.parse.reader import Reader, Steps
from octavo.frontend.parse.values import MAX_DEPTH, Tools, call_of

_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}  # a tool without parameters


def schema(tools: Tools, *, parallel: bool) -> dict[str, Any]:
    """The JSON schema of such a list; raises `ValueError` for parameters that are nested too deep."""
    limit = {} if parallel else {"maxItems": 1}
    return {"type": "array", "items": {"anyOf": call_schemas(tools, "#/items/anyOf")}, "minItems": 1, **limit}


def call_schemas(tools: Tools, to: str) -> list[dict[str, Any]]:
    """That of a call ``{"name": …, "arguments": {…}}`` for each tool, to stand in a list at the pointer ``to``."""
    return [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                "arguments": _moved(arguments_of(parameters), f"{to}/{i}/properties/arguments"),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for i, (name, parameters) in enumerate(tools.items())
    ]


def arguments_of(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a tool's arguments."""
    return {"type": "object", **parameters} if parameters else _NOTHING


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
