"""Renders Jinja chat templates, which come with models and are not trusted, in a sandbox with limits.

The dialect is that of Transformers (`trim_blocks`, `lstrip_blocks`, loop controls, the ``generation`` block, `tojson`
without HTML escapes, `strftime_now`, `raise_exception`). On top of Jinja's immutable sandbox, a rendering may not take
more than `MAX_STEPS` turns of loops, `MAX_SECONDS`, or build a text longer than `MAX_CHARS`. Limits are checked
wherever a template can repeat or multiply something: loops, output, operators and calls.
"""

from __future__ import annotations

import contextvars
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import jinja2.utils
from jinja2 import nodes
from jinja2.parser import Parser

MAX_CHARS = 8 << 20  # of one value, and of all output
MAX_STEPS = 200_000
MAX_SECONDS = 5.0
MAX_TEMPLATE = 1 << 20  # characters of a template
_LONG_NUMBER = re.compile(r"\d{5}")  # a width in a format, such as "%99999d"


class LimitReached(jinja2.TemplateError):
    """A template that would take too long or write too much."""


class _Budget:
    """What is left for one rendering."""

    def __init__(self) -> None:
        self.steps = MAX_STEPS
        self.chars = MAX_CHARS
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise LimitReached(f"more than {MAX_STEPS} turns of loops")
        if self.steps % 64 == 0 and time.monotonic() > self.deadline:
            raise LimitReached(f"longer than {MAX_SECONDS:g} seconds")

    def write(self, count: int) -> None:
        self.chars -= count
        if self.chars < 0:
            raise LimitReached(f"more than {MAX_CHARS} characters")


_budget: contextvars.ContextVar[_Budget] = contextvars.ContextVar("budget")


def render(template: str, variables: Mapping[str, Any]) -> str:
    """The text of ``template``. ``variables`` must be plain data: str, int, float, bool, None, list, dict.

    Raises `jinja2.TemplateError` and whatever else the template's expressions raise; see `chat` for what users see.
    """
    compiled = compile_template(template)
    token = _budget.set(_Budget())
    try:
        text = compiled.render(variables)
    finally:
        _budget.reset(token)
    _sized(text)
    return text


@functools.lru_cache(maxsize=32)
def compile_template(template: str) -> jinja2.Template:
    """Compiles, at a cost of milliseconds, once for each text. Raises `jinja2.TemplateSyntaxError`."""
    if len(template) > MAX_TEMPLATE:
        raise jinja2.TemplateSyntaxError(f"the template is longer than {MAX_TEMPLATE} characters", 1)
    return _environment().from_string(template)


@functools.lru_cache(maxsize=32)
def parse_template(template: str) -> nodes.Template:
    """The syntax tree, for questions about a template. Raises `jinja2.TemplateSyntaxError`."""
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(extensions=[_Generation, jinja2.ext.loopcontrols])
    return plain.parse(template)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks what a model would have written; here it only opens a scope."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Puts a check around everything that loops iterate over and around the results of ``~``."""
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = _filtered(loop.iter, "__counted")
        _wrap_concat(tree)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            size = _length(left) * (right if isinstance(right, int) else 1)
            size = max(size, _length(right) * (left if isinstance(left, int) else 1))
            if size > MAX_CHARS:
                raise LimitReached(f"more than {MAX_CHARS} characters")
        elif operator == "**" and (abs(left) > 1_000_000 or abs(right) > 100):
            raise LimitReached("a power with large operands")
        elif operator == "%":
            _no_wide_format(left)
        return _sized(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        _budget.get().step()
        for value in (*args, *kwargs.values()):
            if isinstance(value, int) and abs(value) > MAX_CHARS:
                raise LimitReached(f"a call with the number {value}")
        method = getattr(obj, "__wrapped__", obj)  # Jinja wraps those that format
        if getattr(method, "__name__", "") in ("format", "format_map"):
            _no_wide_format(getattr(method, "__self__", None))
        return _sized(super().call(context, obj, *args, **kwargs))


@functools.cache
def _environment() -> _Sandbox:
    env = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols], finalize=_written
    )
    env.filters["tojson"] = _tojson
    env.filters["__counted"] = _counted
    env.filters["__sized"] = _sized
    for name in ("format", "center", "indent", "replace", "join", "wordwrap"):
        env.filters[name] = _checked(env.filters[name])
    env.globals["dict"] = _dict
    env.globals["namespace"] = _Namespace
    env.globals["raise_exception"] = _raise
    env.globals["strftime_now"] = _strftime_now
    return env


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=node.environment)


def _wrap_concat(node: nodes.Node) -> None:
    for field, value in node.iter_fields():
        if isinstance(value, list):
            for child in value:
                if isinstance(child, nodes.Node):
                    _wrap_concat(child)
            setattr(node, field, [_filtered(v, "__sized") if isinstance(v, nodes.Concat) else v for v in value])
        elif isinstance(value, nodes.Node):
            _wrap_concat(value)
            if isinstance(value, nodes.Concat):
                setattr(node, field, _filtered(value, "__sized"))


@jinja2.pass_context  # keeps the compiler from evaluating it ahead of the rendering
def _counted(context: Any, values: Iterable[Any]) -> Iterator[Any]:
    budget = _budget.get()
    for value in values:
        budget.step()
        yield value


def _written(value: Any) -> Any:
    budget = _budget.get(None)  # there is none while constants are folded
    if budget is not None:
        budget.write(len(value) if isinstance(value, str) else len(str(value)))
    return value


def _sized(value: Any) -> Any:
    if _length(value) > MAX_CHARS:
        raise LimitReached(f"more than {MAX_CHARS} characters")
    return value


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _no_wide_format(value: Any) -> None:
    if isinstance(value, str) and ("%" in value or "{" in value) and _LONG_NUMBER.search(value):
        raise LimitReached("a format with a long number")


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that can make much out of little, with limits on its numbers and on its result."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, int) and abs(a) > 10_000 for a in (*args, *kwargs.values())):
            raise LimitReached("a filter with a large number")
        if function.__name__ == "do_format":
            _no_wide_format(args[0])
        return _sized(function(*args, **kwargs))

    return checked


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """Instead of the type itself, whose attributes lead out of the sandbox."""
    return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """Without names that mean something to Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self = args[0]
        for name in dict(*args[1:], **kwargs):
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, *args[1:], **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if not isinstance(name, str) or name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the name {name!r}")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
