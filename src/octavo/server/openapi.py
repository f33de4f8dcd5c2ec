"""The server's description for programs (``/openapi.json``) and for people (``/docs``), from the table of routes."""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import octavo
from octavo.sampling_params import BOUNDS, LENGTHS
from octavo.server.answers import json_response
from octavo.server.errors import ANTHROPIC_PATHS, AnthropicErrorBody, ErrorBody
from octavo.server.route import Route
from octavo.server.service import Service

JSON = "application/json"
_PLACE = "#/components/schemas/{name}"
_PATH_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
# Fields that mean what a field of `SamplingParams` does, under another name.
_SAME_AS = {"max_completion_tokens": "max_tokens", "max_output_tokens": "max_tokens", "stop_sequences": "stop"}
Json = dict[str, Any]


async def openapi(service: Service, request: Request) -> Response:
    """This description, OpenAPI 3.1."""
    prefix = request.scope.get("prefix")
    return json_response(document(service.routes) | ({"servers": [{"url": prefix}]} if prefix else {}))


async def docs(service: Service, request: Request) -> Response:
    """The same as a page without scripts and without anything from elsewhere."""
    policy = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
    return Response(page(document(service.routes)), headers=policy, media_type="text/html")


@functools.lru_cache(maxsize=1)
def document(routes: tuple[Route, ...]) -> Json:
    """The whole description."""
    types = [kind for route in routes for kind in (route.body, route.answer, route.event) if not _plain(kind)]
    (schemas, components) = msgspec.json.schema_components([*types, ErrorBody, AnthropicErrorBody], ref_template=_PLACE)
    places = {id(kind): schema for kind, schema in zip([*types, ErrorBody, AnthropicErrorBody], schemas, strict=True)}
    for route in routes:
        for kind in (route.body, *([] if route.endpoint is None else [route.endpoint.body])):
            if not _plain(kind):
                _bound(components[places[id(kind)]["$ref"].rpartition("/")[2]])
    paths: Json = {}
    for route in routes:
        path = _PATH_PARAMETER.sub(r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, places)
    return {
        "openapi": "3.1.0",
        "info": {"title": "octavo", "version": octavo.__version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _plain(kind: Any) -> bool:
    """Whether it is no type with a schema."""
    return kind is None or isinstance(kind, str)


def _operation(route: Route, places: dict[int, Json]) -> Json:
    error = AnthropicErrorBody if route.path.startswith(ANTHROPIC_PATHS) else ErrorBody
    made: Json = {
        "summary": route.text,
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.path}").strip("_"),
        "responses": {
            "200": {"description": "The answer.", **_content(route, places)},
            "default": {"description": "An error.", "content": {JSON: {"schema": places[id(error)]}}},
        },
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in _PATH_PARAMETER.findall(route.path)
    ]
    parameters += [
        {"name": field.name, "in": "query", "schema": msgspec.json.schema(field.type)}
        for field in (msgspec.structs.fields(route.query) if route.query else ())
    ]
    if parameters:
        made["parameters"] = parameters
    if route.body is not None:
        made["requestBody"] = {"required": True, "content": {JSON: {"schema": places[id(route.body)]}}}
    if route.form:
        made["requestBody"] = {"required": True, "content": {"multipart/form-data": {"schema": _form(route.form)}}}
    return made


def _content(route: Route, places: dict[int, Json]) -> Json:
    content: Json = {}
    if isinstance(route.answer, str):
        content[route.answer] = {"schema": {"type": "string"}}
    elif route.answer is not None:
        content[JSON] = {"schema": places[id(route.answer)]}
    if route.event is not None:
        content["text/event-stream"] = {"schema": _event(places[id(route.event)])}
    return {"content": content} if content else {}


def _event(data: Json) -> Json:
    """An event of a stream as OpenAPI 3.2 describes it; the last one of completions is ``[DONE]``."""
    text = {"type": "string", "contentMediaType": JSON, "contentSchema": data}
    return {"type": "object", "required": ["data"], "properties": {"event": {"type": "string"}, "data": text}}


def _form(names: Sequence[str]) -> Json:
    """Fields of a form: the one called ``file`` is a file, others are short texts."""
    fields = {name: {"type": "string", **({"format": "binary"} if name == "file" else {})} for name in names}
    return {"type": "object", "required": list(names), "properties": fields}


def _bound(component: Json) -> None:
    """Adds the limits of `SamplingParams.validate`, which types cannot say."""
    for name, schema in component.get("properties", {}).items():
        field = _SAME_AS.get(name, name)
        for branch in schema.get("anyOf", [schema]):
            kind = branch.get("type")
            if field in BOUNDS and kind in ("integer", "number"):
                low, high = BOUNDS[field]
                lowest = 0 if name == "max_tokens" else low  # 0 with echo
                branch["exclusiveMinimum" if field == "top_p" else "minimum"] = lowest
                branch["maximum"] = high
            if field in LENGTHS and kind in ("array", "object"):
                branch["maxItems" if kind == "array" else "maxProperties"] = LENGTHS[field]


# --- the page ---------------------------------------------------------------------------------------------------------

_STYLE = """
:root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}
code{font:13px ui-monospace,monospace}summary{cursor:pointer;padding:.3rem 0}details details{margin-left:1.5rem}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.15rem .6rem .15rem 0;vertical-align:top}
tr{border-bottom:1px solid #8883}.m{display:inline-block;width:4.5rem;font-weight:600}p{margin:.2rem 0 .6rem}
"""


def page(description: Json) -> str:
    """``description`` as HTML."""
    schemas: Json = description["components"]["schemas"]
    operations = "".join(
        _section(method.upper(), path, operation)
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
    )
    structures = "".join(_structure(name, schema) for name, schema in sorted(schemas.items()))
    title = f"octavo {html.escape(description['info']['version'])}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f'<h1>{title}</h1><p>For programs: <a href="openapi.json">openapi.json</a>.</p>'
        f"<h2>Endpoints</h2>{operations}<h2>Structures</h2>{structures}</html>"
    )


def _section(method: str, path: str, operation: Json) -> str:
    rows = [("parameter", f"<code>{html.escape(one['name'])}</code>") for one in operation.get("parameters", [])]
    bodies = operation.get("requestBody", {}).get("content", {})
    rows += [("body", f"{html.escape(kind)}: {_kind(one['schema'])}") for kind, one in bodies.items()]
    for status, answer in operation["responses"].items():
        kinds = answer.get("content", {})
        rows += [(status, f"{html.escape(kind)}: {_kind(one['schema'])}") for kind, one in kinds.items()]
    table = "".join(f"<tr><th>{name}</th><td>{text}</td></tr>" for name, text in rows)
    head = f'<span class="m">{method}</span><code>{html.escape(path)}</code> {html.escape(operation["summary"])}'
    return f"<details><summary>{head}</summary><table>{table}</table></details>"


def _structure(name: str, schema: Json) -> str:
    required = schema.get("required", ())
    rows = "".join(
        f"<tr><td><code>{html.escape(field)}</code>{' *' if field in required else ''}</td><td>{_kind(one)}</td></tr>"
        for field, one in schema.get("properties", {}).items()
    )
    text = html.escape(schema.get("description", ""))
    heading = f'<summary id="{html.escape(name)}"><code>{html.escape(name)}</code></summary>'
    return f"<details>{heading}<p>{text}</p><table>{rows}</table></details>"


def _kind(schema: Json) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        name = html.escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if "data" in schema.get("properties", ()):
        return f"events of {_kind(schema['properties']['data']['contentSchema'])}"
    for word in ("anyOf", "oneOf"):
        if word in schema:
            return " | ".join(dict.fromkeys(map(_kind, schema[word])))
    if "enum" in schema:
        return " | ".join(f"<code>{html.escape(repr(one))}</code>" for one in schema["enum"])
    if "const" in schema:
        return f"<code>{html.escape(repr(schema['const']))}</code>"
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    limits = [f"{sign} {schema[key]}" for key, sign in _SIGNS.items() if key in schema]
    return html.escape(" ".join([schema.get("type", "anything"), *limits]))


_SIGNS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤"}
