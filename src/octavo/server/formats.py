"""The ways in which a request can ask for structured output: OpenAI's, vLLM's, and vLLM's older one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from octavo.errors import RequestError
from octavo.structured import StructuredOutputsParams

JsonSchema = str | dict[str, Any] | bool
GUIDED = ("json", "regex", "choice", "grammar")


class JsonSchemaFormat(msgspec.Struct, forbid_unknown_fields=True):
    """``strict`` changes nothing: the schema always holds."""

    name: str | None = None
    description: str | None = None
    schema: JsonSchema | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """OpenAI's ``response_format``."""

    type: str
    json_schema: JsonSchemaFormat | None = None

    def params(self, field: str = "response_format") -> StructuredOutputsParams | None:
        """What the output must match; None for text. Raises `RequestError`, naming ``field``, for an unknown type."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if self.type != "json_schema":
            what = f"{field} {self.type[:100]!r} is not supported."
            raise RequestError(what, "Use text, json_object or json_schema.", param=field)
        if self.json_schema is None or self.json_schema.schema is None:
            raise RequestError(f"{field} has no schema (json_schema.schema).", "Send the schema.", param=field)
        return StructuredOutputsParams(json=self.json_schema.schema)


def structured(
    response_format: ResponseFormat | None,
    structured_outputs: StructuredOutputsParams | None,
    guided: Mapping[str, Any],
) -> StructuredOutputsParams | None:
    """What the output must match, if anything; raises `RequestError` if several fields say so.

    ``guided`` are the values of vLLM's older fields ``guided_json``, …, without that prefix.
    """
    options = {"whitespace_pattern": guided.get("whitespace_pattern")}
    asked = {
        "response_format": response_format.params() if response_format else None,
        "structured_outputs": structured_outputs,
        **{
            f"guided_{name}": msgspec.structs.replace(StructuredOutputsParams(), **{name: guided[name]}, **options)
            for name in GUIDED
            if guided.get(name) is not None
        },
    }
    given = {name: params for name, params in asked.items() if params is not None}
    if len(given) > 1:
        raise RequestError(f"{' and '.join(given)} are both set.", "Set one.", param=next(iter(given)))
    return next(iter(given.values()), None)
