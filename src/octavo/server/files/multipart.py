"""Forms as browsers and clients upload them: ``multipart/form-data`` (RFC 7578), already in memory and bounded."""

from __future__ import annotations

from dataclasses import dataclass

from octavo.errors import RequestError

MAX_FIELDS = 16
MAX_BOUNDARY = 70  # RFC 2046


@dataclass(frozen=True)
class Field:
    """``filename`` is None where the field is no file."""

    filename: str | None
    data: bytes


def parse(content_type: str, body: bytes) -> dict[str, Field]:
    """The fields of a form by name; raises `RequestError` for anything else."""
    kind, _, rest = content_type.partition(";")
    boundary = _parameters(rest).get("boundary", "")
    if kind.strip().lower() != "multipart/form-data" or not 0 < len(boundary) <= MAX_BOUNDARY:
        raise _bad("the body is no form.", "Send multipart/form-data with a boundary.")
    pieces = (b"\r\n" + body).split(b"\r\n--" + boundary.encode(errors="replace"), MAX_FIELDS + 2)
    if len(pieces) > MAX_FIELDS + 2 or not pieces[-1].startswith(b"--"):
        raise _bad(f"the form has no end, or more than {MAX_FIELDS} fields.")
    fields: dict[str, Field] = {}
    for piece in pieces[1:-1]:
        name, field = _field(piece)
        if name in fields:
            raise _bad(f"the form has two fields {name[:100]!r}.")
        fields[name] = field
    return fields


def _field(piece: bytes) -> tuple[str, Field]:
    head, found, data = piece.partition(b"\r\n\r\n")
    for line in head.decode("utf-8", "replace").split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-disposition":
            parameters = _parameters(value.partition(";")[2])
            if found and "name" in parameters:
                return parameters["name"], Field(parameters.get("filename"), data)
    raise _bad("a field of the form has no name.")


def _parameters(text: str) -> dict[str, str]:
    """``; a="x"; b=y`` as a dict. A quoted value ends at the next quote that has no backslash before it."""
    found: dict[str, str] = {}
    while text:
        name, _, text = text.partition("=")
        if text.startswith('"'):
            value, end = [], 1
            while end < len(text) and text[end] != '"':
                end += text[end] == "\\" and end + 1 < len(text)
                value.append(text[end])
                end += 1
            found[name.strip("; ").lower()] = "".join(value)
            text = text[end + 1 :].lstrip(" ;")
        else:
            plain, _, text = text.partition(";")
            found[name.strip("; ").lower()] = plain.strip()
    return found


def _bad(cause: str, remedy: str = "Check the form.") -> RequestError:
    return RequestError(cause, remedy, param="file")
