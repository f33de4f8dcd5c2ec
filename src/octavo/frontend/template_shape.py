"""What a chat template reads of a conversation, told from its syntax tree. Of a broken one nothing is known."""

from __future__ import annotations

import functools
from typing import Literal, TypeAlias

import jinja2
from jinja2 import nodes

from octavo.frontend import sandbox

ContentFormat: TypeAlias = Literal["string", "openai"]


@functools.lru_cache(maxsize=32)
def content_format(template: str) -> tuple[ContentFormat, bool]:
    """How a template reads a message's content: (format, whether it also asks for its type).

    "openai" when it loops over the parts of the content, "string" when it prints it.
    """
    tree = _tree(template)
    names = {"content"}  # and what is set from a content
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
            names.add(assign.target.name)
    loops = any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
    asks = any(test.name == "string" for test in tree.find_all(nodes.Test))
    return ("openai" if loops else "string"), asks


@functools.lru_cache(maxsize=32)
def takes_tools(template: str) -> bool:
    """Whether a template shows the model tools."""
    return any(name.name == "tools" for name in _tree(template).find_all(nodes.Name))


@functools.lru_cache(maxsize=32)
def wants_arguments_as_text(template: str) -> bool:
    """Whether a template puts the arguments of calls into the prompt as they are; most make JSON of what they mean."""
    tree = _tree(template)
    meant = [one.node for one in tree.find_all(nodes.Filter) if one.name == "tojson"]
    meant += [one.node for one in tree.find_all(nodes.Test) if one.name == "mapping"]
    if any(_is_field(node, "arguments") for node in meant):
        return False
    shown = [part for one in tree.find_all(nodes.Add) for part in (one.left, one.right)]
    shown += [part for one in tree.find_all(nodes.Concat) for part in one.nodes]
    shown += [part for one in tree.find_all(nodes.Output) for part in one.nodes]
    return any(_is_field(node, "arguments") for node in shown)


def _tree(template: str) -> nodes.Template:
    try:
        return sandbox.parse_template(template)
    except jinja2.TemplateSyntaxError:
        return nodes.Template([])


def _is_field(node: nodes.Node | None, name: str) -> bool:
    """Whether it is ``x.name`` or ``x["name"]``."""
    if isinstance(node, nodes.Getattr):
        return node.attr == name
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == name


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    while isinstance(node, nodes.Filter) and node.node is not None:
        node = node.node
    return _is_field(node, "content") or (isinstance(node, nodes.Name) and node.name in names)
