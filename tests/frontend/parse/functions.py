"""Functions as people declare them, each with the arguments of a call, and what a model of each format writes to call.

Arguments come in the order of their schema, as held calls do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

Call = tuple[str, dict[str, Any]]


def string(**more: Any) -> dict[str, Any]:
    return {"type": "string", **more}


def number(**more: Any) -> dict[str, Any]:
    return {"type": "number", **more}


def integer(**more: Any) -> dict[str, Any]:
    return {"type": "integer", **more}


def array(items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


def obj(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), **more}


BOOL = {"type": "boolean"}
PLACE = obj({"lat": number(minimum=-90, maximum=90), "lon": number(minimum=-180, maximum=180)}, "lat", "lon")
ADDRESS = obj({"street": string(), "zip": string(pattern="^[0-9]{5}$"), "country": string(enum=["DE", "PL"])}, "street")
NODE = {"type": "object", "properties": {"v": integer(), "next": {"$ref": "#/$defs/node"}}, "required": ["v"]}

# (name, schema of the parameters, arguments of a call)
FUNCTIONS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("get_weather", obj({"city": string(), "unit": string(enum=["celsius", "fahrenheit"])}, "city"), {"city": "Łódź"}),
    ("get_time", obj({"timezone": string()}, "timezone"), {"timezone": "Europe/Warsaw"}),
    ("math.add", obj({"a": number(), "b": number()}, "a", "b"), {"a": 1, "b": -2.5}),
    ("math.power", obj({"base": number(), "exponent": integer()}, "base", "exponent"), {"base": 1.5e-7, "exponent": 3}),
    ("list_files", obj({"path": string(), "all": BOOL}, "path"), {"path": "/home/ö/my files", "all": True}),
    ("now", {}, {}),
    ("ping", obj({}), {}),
    (
        "send_email",
        obj({"to": array(string(format="email")), "subject": string(), "body": string()}, "to", "subject", "body"),
        {
            "to": ["a@b.org", "c.d@e.com"],
            "subject": "Re: «hello»",
            "body": 'Dear all,\n\n1. x < y && y > z\n2. "ok"\t✓',
        },
    ),
    (
        "create_event",
        obj(
            {
                "title": string(maxLength=80),
                "start": string(format="date-time"),
                "attendees": array(obj({"name": string(), "optional": BOOL}, "name")),
                "reminders": array(integer(minimum=0), maxItems=3),
            },
            "title",
            "start",
        ),
        {
            "title": "Réunion d'équipe",
            "start": "2026-11-22T09:30:00Z",
            "attendees": [{"name": "Zoë", "optional": False}, {"name": "李雷"}],
            "reminders": [10, 60],
        },
    ),
    (
        "search",
        obj({"query": string(), "limit": integer(minimum=1, maximum=50), "sort": {"enum": ["date", "rank"]}}, "query"),
        {"query": '"exact phrase" OR site:example.org -foo', "limit": 5, "sort": "date"},
    ),
    (
        "route",
        obj({"from": PLACE, "to": PLACE}, "from", "to"),
        {"from": {"lat": 52.2, "lon": 21}, "to": {"lat": -1, "lon": 0}},
    ),
    ("set_alarm", obj({"at": string(pattern="^[0-2][0-9]:[0-5][0-9]$")}, "at"), {"at": "07:45"}),
    (
        "translate",
        obj({"text": string(), "to": string(enum=["pl", "日本語"])}, "text", "to"),
        {"text": "Good 🌅!", "to": "日本語"},
    ),
    (
        "update_user",
        obj({"id": integer(), "nick": {"type": ["string", "null"]}, "address": ADDRESS}, "id"),
        {"id": 12345678901, "nick": None, "address": {"street": "Ulica 1/2", "zip": "00123", "country": "PL"}},
    ),
    (
        "run_sql",
        obj({"sql": string(), "params": array({"anyOf": [integer(), {"type": "null"}]})}, "sql"),
        {"sql": "SELECT * FROM t\nWHERE a <> 'x' AND b = {c}", "params": [1, None]},
    ),
    (
        "plot",
        obj({"points": array(array(number(), minItems=2, maxItems=2))}, "points"),
        {"points": [[0, 1], [2.5, -3]]},
    ),
    (
        "set_color",
        obj({"rgb": array(integer(minimum=0, maximum=255), minItems=3, maxItems=3)}, "rgb"),
        {"rgb": [255, 0, 8]},
    ),
    ("toggle", obj({"device": string(), "on": BOOL}, "device", "on"), {"device": "lamp-3", "on": False}),
    (
        "filter",
        obj({"where": {"anyOf": [obj({"eq": string()}, "eq"), obj({"in": array(integer())}, "in")]}}, "where"),
        {"where": {"in": [1, 2, 3]}},
    ),
    (
        "build_list",
        obj({"head": {"$ref": "#/$defs/node"}}, "head", **{"$defs": {"node": NODE}}),
        {"head": {"v": 1, "next": {"v": 2}}},
    ),
    (
        "write_file",
        obj({"path": string(), "content": string()}, "path", "content"),
        {"path": "a.py", "content": "def f(x):\n    return {'a': [x]}\n"},
    ),
    (
        "book_flight",
        obj({"from": string(pattern="^[A-Z]{3}$"), "seats": integer(minimum=1)}, "from", "seats"),
        {"from": "WAW", "seats": 2},
    ),
    (
        "convert",
        obj({"amount": number(), "currency": string(enum=["EUR", "PLN", "¥"])}, "amount"),
        {"amount": 99.95, "currency": "¥"},
    ),
    (
        "tag",
        obj({"labels": {"type": "object", "additionalProperties": string()}}, "labels"),
        {"labels": {"env": "prod", "ключ": "x"}},
    ),
    (
        "rate",
        obj({"stars": {"enum": [1, 2, 3, 4, 5]}, "why": string()}, "stars"),
        {"stars": 5, "why": 'C\'est "très" bon\\!'},
    ),
    (
        "play",
        obj({"track": string(), "volume": number(minimum=0, maximum=1)}, "track"),
        {"track": "Dvořák: No. 9", "volume": 0.25},
    ),
    (
        "order",
        obj({"items": array(obj({"sku": string(), "qty": integer()}, "sku", "qty"))}, "items"),
        {"items": [{"sku": "A-1", "qty": 2}]},
    ),
    (
        "nested",
        obj({"a": obj({"b": obj({"c": obj({"d": array(BOOL)}, "d")}, "c")}, "b")}, "a"),
        {"a": {"b": {"c": {"d": [True]}}}},
    ),
    (
        "empty_values",
        obj({"text": string(), "list": array(integer()), "map": obj({})}, "text"),
        {"text": "", "list": [], "map": {}},
    ),
    ("ns/tool:v2", obj({"q": string()}, "q"), {"q": "slashes and colons"}),
    (
        "regex_replace",
        obj({"pattern": string(), "flags": string()}, "pattern"),
        {"pattern": "^\\s*(\\w+)\\[\\d{1,3}\\]$", "flags": "gi"},
    ),
    (
        "schedule",
        obj({"days": array({"enum": ["mo", "tu", "we"]}), "at": string(format="time")}, "days"),
        {"days": ["mo", "we"]},
    ),
    ("html", obj({"source": string()}, "source"), {"source": '<p class="x">a &amp; b</p>'}),
    (
        "either",
        obj({"value": {"oneOf": [array(integer()), obj({"k": integer()}, "k")]}}, "value"),
        {"value": {"k": -1}},
    ),
    (
        "const_kind",
        obj({"kind": {"const": "circle"}, "r": number(exclusiveMinimum=0)}, "kind", "r"),
        {"kind": "circle", "r": 1.25},
    ),
    ("long_list", obj({"ids": array(integer())}, "ids"), {"ids": list(range(60))}),
    ("big_numbers", obj({"x": number(), "n": integer()}, "x", "n"), {"x": 1e21, "n": -9007199254740993}),
    ("emoji", obj({"react": string(enum=["👍", "👎🏽", "❤️"])}, "react"), {"react": "👎🏽"}),
    ("optional_only", obj({"a": string(), "b": string(), "c": string()}), {"b": "only the second"}),
    ("multi_line", obj({"poem": string()}, "poem"), {"poem": "eins\n  zwei\n\ndrei"}),
]
SCHEMAS = {name: schema for name, schema, _ in FUNCTIONS}
CALLS: list[Call] = [(name, arguments) for name, _, arguments in FUNCTIONS]


def dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def bare(value: Any) -> str:
    return value if isinstance(value, str) else dumps(value)


def hermes(calls: Sequence[Call]) -> str:
    body = [
        f'<tool_call>\n{{"name": {dumps(name)}, "arguments": {dumps(given)}}}\n</tool_call>' for name, given in calls
    ]
    return "\n".join(body)


def mistral(calls: Sequence[Call]) -> str:
    return "[TOOL_CALLS] " + dumps([{"name": name, "arguments": given} for name, given in calls])


def mistral_v13(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{dumps(given)}" for name, given in calls)


def deepseek_v3(calls: Sequence[Call]) -> str:
    body = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{dumps(given)}\n```<｜tool▁call▁end｜>"
        for name, given in calls
    ]
    return "<｜tool▁calls▁begin｜>" + "\n".join(body) + "<｜tool▁calls▁end｜>"


def deepseek_v31(calls: Sequence[Call]) -> str:
    body = [f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{dumps(given)}<｜tool▁call▁end｜>" for name, given in calls]
    return "<｜tool▁calls▁begin｜>" + "".join(body) + "<｜tool▁calls▁end｜>"


def kimi_k2(calls: Sequence[Call]) -> str:
    body = [
        f"<|tool_call_begin|>functions.{name}:{i}<|tool_call_argument_begin|>{dumps(given)}<|tool_call_end|>"
        for i, (name, given) in enumerate(calls)
    ]
    return "<|tool_calls_section_begin|>" + "".join(body) + "<|tool_calls_section_end|>"


def gpt_oss(calls: Sequence[Call]) -> str:
    body = [
        f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{dumps(given)}<|call|>"
        for name, given in calls
    ]
    return "<|start|>assistant".join(body)


def llama3_json(calls: Sequence[Call]) -> str:
    return "; ".join(f'{{"name": {dumps(name)}, "parameters": {dumps(given)}}}' for name, given in calls)


def generic(calls: Sequence[Call]) -> str:
    return dumps([{"name": name, "arguments": given} for name, given in calls])


def gemma(calls: Sequence[Call]) -> str:
    """Calls in Python, which has names with dots but none with slashes; those are written in JSON."""
    body = [
        f"```json\n{dumps({'name': name, 'parameters': given})}\n```"
        if not name.replace(".", "_").isidentifier() or not all(key.isidentifier() and key != "from" for key in given)
        else f"```tool_code\n{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})\n```"
        for name, given in calls
    ]
    return "\n".join(body)


def glm45(calls: Sequence[Call]) -> str:
    return "\n".join(
        f"<tool_call>{name}\n"
        + "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{bare(v)}</arg_value>\n" for k, v in given.items())
        + "</tool_call>"
        for name, given in calls
    )


def qwen3_coder(calls: Sequence[Call]) -> str:
    return "\n".join(
        f"<tool_call>\n<function={name}>\n"
        + "".join(f"<parameter={k}>\n{bare(v)}\n</parameter>\n" for k, v in given.items())
        + "</function>\n</tool_call>"
        for name, given in calls
    )


Write = Callable[[Sequence[Call]], str]
# (format, how it writes calls, text that can come before them, text that can come after them)
WRITERS: list[tuple[str, Write, str, str]] = [
    ("hermes", hermes, "{}\n", "\n{}"),
    ("mistral", mistral, "{}", "\n{}"),
    ("mistral", mistral_v13, "{}", "\n{}"),
    ("deepseek_v3", deepseek_v3, "{}", "\n{}"),
    ("deepseek_v3", deepseek_v31, "{}\n\n", "{}"),
    ("kimi_k2", kimi_k2, "{}", "{}"),
    (
        "gpt_oss",
        gpt_oss,
        "<|channel|>commentary<|message|>{}<|end|><|start|>assistant",
        "<|start|>assistant<|channel|>final<|message|>{}",
    ),
    ("llama3_json", llama3_json, "{}\n<|python_tag|>", "\n{}"),
    ("json", generic, "", "\n{}"),
    ("gemma", gemma, "{}\n", "\n{}"),
    ("glm45", glm45, "{}\n", "\n{}"),
    ("qwen3_coder", qwen3_coder, "{}\n\n", "\n{}"),
]
