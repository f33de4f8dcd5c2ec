"""From the JSON of bodies and the parameters of queries to structs, with errors that name the field."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from octavo.errors import RequestError
from octavo.server.errors import ApiError

Body = TypeVar("Body", bound=msgspec.Struct)
_UNKNOWN = re.compile(r"unknown field `([^`]{0,100})")
_MISSING = re.compile(r"Object missing required field `([^`]{0,100})`")
_WHERE = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`$")


# Fields of other servers, and what means the same here.
_SAME = {
    "do_sample": "temperature: 0",
    "inputs": "prompt",
    "grammar": "structured_outputs",
    "json_schema": "response_format",
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_beams": "use_beam_search and n",
    "num_predict": "max_tokens",
    "prompt_token_ids": "prompt, a list of token ids",
    "repeat_penalty": "repetition_penalty",
}


def decode(body: bytes, kind: type[Body]) -> Body:
    """A request from its JSON; raises `RequestError` naming the field. Fields of no name that are null say nothing."""
    try:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.ValidationError as error:
            if not _UNKNOWN.search(str(error)):
                raise
            return msgspec.json.decode(_without_nulls(body), type=kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), kind.__struct_fields__) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ApiError(400, "invalid_json", "the body is not valid JSON.", "Send one JSON object.") from None


def decode_query(request: Request, kind: type[Body]) -> Body:
    """The parameters of a request's query that ``kind`` has; raises `RequestError` naming one that is wrong."""
    try:
        return msgspec.convert(dict(request.query_params), kind, strict=False)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None


def convert(value: object, kind: Any, where: str) -> Any:
    """A part of a body that was decoded as plain data, as one of the structs ``kind``; raises `RequestError`."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error).replace("`$", f"`$.{where}", 1)) from None


def _without_nulls(body: bytes) -> bytes:
    """``null`` is every field's default, so that without them the meaning is the same."""
    return msgspec.json.encode({name: value for name, value in msgspec.json.decode(body).items() if value is not None})


def _explain(message: str, fields: Sequence[str] = ()) -> RequestError:
    unknown, missing, where = _UNKNOWN.search(message), _MISSING.search(message), _WHERE.search(message)
    place = where[1] if where else ""
    if named := unknown or missing:
        name = f"{place}.{named[1]}" if place else named[1]
        if unknown:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.8)
            meant = _SAME.get(name) or (near[0] if near else "")
            remedy = f"Leave it out, or send {meant}." if meant else "Leave it out."
            return RequestError(f"{name!r} is not a field of this request.", remedy, param=name)
        return RequestError(f"{name} is missing.", "Send it.", param=name)
    text = message[: where.start()] if where else message
    field = place.split(".")[0].split("[")[0] or None
    return RequestError(f"{place or 'the body'}: {text[:200]}.", "See the API's reference for its form.", param=field)
