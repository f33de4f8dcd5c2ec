"""The tools of a request: what the model is shown of them, and what it may or must call."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from octavo.errors import RequestError
from octavo.frontend.inputs import Prepared
from octavo.frontend.parse import forced
from octavo.frontend.parse.registry import Formats
from octavo.sampling_params import SamplingParams
from octavo.structured import StructuredOutputsParams

MAX_TOOLS = 512
_NAME = re.compile(r"[\w./:-]{1,128}", re.ASCII)

Tool = dict[str, Any]
Choice = Literal["none", "auto", "required"]


@dataclass(frozen=True)
class ToolUse:
    """``shown`` go to the template; ``schemas`` are those of the parameters of the tools that may be called; ``strict``
    names those that ask for every keyword of theirs to be held."""

    shown: tuple[Tool, ...] = ()
    schemas: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    choice: Choice = "none"
    parallel: bool = True
    strict: frozenset[str] = frozenset()

    @classmethod
    def of(cls, given: Sequence[Tool] | None, tool_choice: Any = None, *, parallel: bool | None = None) -> ToolUse:
        """Tools and a choice in the form of chat completions, checked; raises `RequestError`.

        With the choice ``none`` the model is not shown any tool.
        """
        given = given or ()
        if len(given) > MAX_TOOLS:
            raise RequestError(f"tools has {len(given)} entries, more than {MAX_TOOLS}.", param="tools")
        tools = {_name(tool, i): tool for i, tool in enumerate(given)}
        if len(tools) < len(given):
            raise RequestError("two tools have the same name.", "Rename one of them.", param="tools")
        choice, named = _choice(tool_choice, tools)
        if choice == "none":
            return cls()
        schemas = {name: tool["function"].get("parameters") or {} for name, tool in tools.items()}
        if named is not None:
            schemas = {named: schemas[named]}
        strict = frozenset(name for name, tool in tools.items() if tool["function"].get("strict") is True)
        return cls(tuple(tools.values()), schemas, choice, parallel is not False and named is None, strict)

    def guided(self, formats: Formats, prepared: Prepared) -> Prepared:
        """``prepared`` with its grammars where they hold: after reasoning, or for the arguments of calls."""
        given = prepared.requests[0].sampling.guide
        whole = None if given is None else given.whole
        try:
            guide = formats.guide(prepared.prompt or "", self.schemas, whole, strict=self.strict)
        except ValueError as error:
            raise _bad(f"tools with strict are {error}", "Send fewer or simpler ones, or without strict.") from None
        if guide is None:
            return prepared
        requests = [
            msgspec.structs.replace(one, sampling=msgspec.structs.replace(one.sampling, guide=guide))
            for one in prepared.requests
        ]
        return dataclasses.replace(prepared, requests=requests)

    @property
    def forced(self) -> bool:
        """Whether the answer must be calls and nothing else."""
        return self.choice == "required"

    def constrained(self, params: SamplingParams) -> SamplingParams:
        """``params`` with the grammar of a forced call; raises `RequestError` if there is another one already."""
        if not self.forced:
            return params
        if params.structured_outputs is not None:
            raise RequestError(
                "tool_choice asks for a call, and another field asks for output of another form.",
                'Set one of them, or tool_choice to "auto".',
                param="tool_choice",
            )
        try:
            schema = forced.schema(self.schemas, parallel=self.parallel)
        except ValueError as error:
            raise _bad(f"the parameters of a tool are {error}", "Use a simpler schema.") from None
        outputs = StructuredOutputsParams(json=schema)
        outputs.spec()  # raises for one that is too long
        return msgspec.structs.replace(params, structured_outputs=outputs)


def function_tool(
    name: str, parameters: Mapping[str, Any] | None, description: str | None, *, strict: bool | None
) -> Tool:
    """A tool of another API in the form of chat completions."""
    given = {"name": name, "description": description, "parameters": parameters, "strict": strict or None}
    return {"type": "function", "function": {key: value for key, value in given.items() if value is not None}}


def past_call(id: str, name: str, arguments: str) -> dict[str, Any]:
    """A call of an earlier answer in that form."""
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _name(tool: Tool, at: int) -> str:
    """The name of a tool, whose form is checked."""
    where = f"tools[{at}]"
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, Mapping):
        raise _bad(f"{where} is no function", 'Its form is {"type": "function", "function": {"name": …}}.')
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _bad(f"{where}.function.name is {str(name)[:200]!r}", "Use 1 to 128 letters, digits and any of _ - . / :")
    parameters = function.get("parameters")
    if not isinstance(parameters, Mapping | None) or (parameters and parameters.get("type", "object") != "object"):
        raise _bad(f"{where}.function.parameters is no object", "Give the JSON schema of an object.")
    if not isinstance(function.get("description"), str | None):
        raise _bad(f"{where}.function.description is no text", "Give a text.")
    return name


def _bad(what: str, remedy: str) -> RequestError:
    return RequestError(f"{what}.", remedy, param="tools")


def _choice(choice: Any, tools: Mapping[str, Tool]) -> tuple[Choice, str | None]:
    """(what is to be done, the one tool that is named)."""
    if choice is None:
        return ("auto" if tools else "none"), None
    if choice == "none" or (choice == "auto" and not tools):
        return "none", None
    if choice == "auto":
        return "auto", None
    if not tools:
        raise RequestError(
            "tool_choice asks for a call, but there are no tools.", "Send tools, or leave it out.", param="tool_choice"
        )
    if choice == "required":
        return "required", None
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise RequestError(
            "tool_choice is none of the forms known here.",
            'Give "auto", "none", "required" or {"type": "function", "function": {"name": …}}.',
            param="tool_choice",
        )
    if name not in tools:
        raise RequestError(f"tool_choice names {name[:200]!r}, which is none of tools.", param="tool_choice")
    return "required", name
