"""Which formats a model writes in: by name, or from its chat template and architecture."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from octavo.errors import ConfigError
from octavo.frontend.parse import (
    deepseek_v3,
    forced,
    gemma,
    generic,
    glm45,
    gpt_oss,
    hermes,
    kimi_k2,
    llama3_json,
    mistral,
    qwen3_coder,
)
from octavo.frontend.parse.message import MessageParser
from octavo.frontend.parse.openings import Opening, openers
from octavo.frontend.parse.reader import Parse, Reader, Steps, new_call_id
from octavo.frontend.parse.think import between
from octavo.frontend.parse.values import Tools
from octavo.frontend.template_shape import takes_tools
from octavo.structured import GrammarSpec, Guide

if TYPE_CHECKING:
    from octavo.hub.tokenizer import Tokenizer

AUTO, NONE = "auto", "none"


class ToolFormat(Protocol):
    """A format's module. `MARKERS` are those of its texts that may be special tokens; `OPENINGS` come before arguments
    in JSON."""

    @property
    def MARKERS(self) -> tuple[str, ...]: ...  # noqa: N802

    @property
    def OPENINGS(self) -> tuple[Opening, ...]: ...  # noqa: N802

    def parse(self, text: Reader) -> Steps[None]: ...


TOOLS: dict[str, ToolFormat] = {
    "deepseek_v3": deepseek_v3,
    "gemma": gemma,
    "glm45": glm45,
    "gpt_oss": gpt_oss,
    "hermes": hermes,
    "json": generic,
    "kimi_k2": kimi_k2,
    "llama3_json": llama3_json,
    "mistral": mistral,
    "qwen3_coder": qwen3_coder,
}
TOOL_ALIASES = {  # vLLM's further names
    "deepseek_v31": "deepseek_v3",
    "glm47": "glm45",
    "llama4_json": "llama3_json",
    "openai": "gpt_oss",
    "qwen3_xml": "qwen3_coder",
}
HARMONY = "gpt_oss"
REASONING = {
    "mistral": ("[THINK]", "[/THINK]"),
    "seed_oss": ("<seed:think>", "</seed:think>"),
    "think": ("<think>", "</think>"),
}
REASONING_ALIASES = {
    "openai_gptoss": HARMONY,
    **dict.fromkeys(
        ("deepseek_r1", "deepseek_v3", "glm45", "holo2", "kimi_k2", "minimax_m2", "nemotron_v3", "qwen3", "step3"),
        "think",
    ),
}

# Tokens of their own, with which a model may go from reasoning to calls without a word; others it may think about.
_BREAKS = {"kimi_k2": (kimi_k2.ALL_OPEN,), "deepseek_v3": (deepseek_v3.ALL_OPEN,)}

# The first of these texts that a template has decides; what is nearer to one family comes first.
_TOOL_SIGNS = (
    ("<|channel|>", HARMONY),
    ("<｜tool▁calls▁begin｜>", "deepseek_v3"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
    ("[TOOL_CALLS]", "mistral"),
    ("<arg_key>", "glm45"),
    ("<function=", "qwen3_coder"),
    ("<tool_call>", "hermes"),
    ("<|python_tag|>", "llama3_json"),
    ("dictionary of argument name and its value", "llama3_json"),
)
_REASONING_SIGNS = (
    ("<|channel|>", HARMONY),
    ("[THINK]", "mistral"),
    ("<seed:think>", "seed_oss"),
    ("<think>", "think"),
    ("</think>", "think"),
)
_ARCHITECTURES = {  # what a template without signs does not tell
    "GptOssForCausalLM": (HARMONY, HARMONY),
    "Qwen2ForCausalLM": ("hermes", None),
    "Qwen3ForCausalLM": ("hermes", "think"),
    "Qwen3MoeForCausalLM": ("hermes", "think"),
    **dict.fromkeys(("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"), ("gemma", None)),
}


def detect(template: str | None, architecture: str = "") -> tuple[str, str | None]:
    """(format of tool calls, format of reasoning or None) of a model."""
    text = template or ""
    by_tool, by_reasoning = _ARCHITECTURES.get(architecture, ("json", None))
    if by_tool != HARMONY and not takes_tools(text):
        by_tool = "hermes"  # that is what `tool_prompt` asks for
    tool = next((name for sign, name in _TOOL_SIGNS if sign in text), by_tool)
    reasoning = next((name for sign, name in _REASONING_SIGNS if sign in text), by_reasoning)
    return tool, reasoning


@dataclass(frozen=True)
class Formats:
    """How to read the answers of one model. None: calls, or reasoning, are content."""

    tool: str | None = None
    reasoning: str | None = None

    @classmethod
    def of(cls, template: str | None, architecture: str = "", *, tool: str = AUTO, reasoning: str = AUTO) -> Formats:
        """Those named, else those of the model; raises `ConfigError` for a name that is none."""
        own_tool, own_reasoning = detect(template, architecture)
        named_tool, named_reasoning = check_names(tool, reasoning)
        return cls(
            own_tool if named_tool == AUTO else named_tool,
            own_reasoning if named_reasoning == AUTO else named_reasoning,
        )

    @property
    def _harmony(self) -> bool:
        """Whether answers are messages of harmony: one parser reads reasoning and calls then."""
        return HARMONY in (self.tool, self.reasoning)

    def parser(
        self,
        prompt: str,
        tools: Tools,
        *,
        forced_calls: bool = False,
        new_id: Callable[[], str] | None = None,
    ) -> MessageParser | None:
        """A parser of one answer to ``prompt``; None if all of any answer is content. ``new_id`` names calls.

        ``forced_calls``: what follows the reasoning is what `forced` reads.
        """
        parsers: list[Parse] = []
        if self._harmony:
            parsers.append(gpt_oss.parse)
        elif self.reasoning is not None:
            start, end = REASONING[self.reasoning]
            breaks = self._breaks(tools) if not forced_calls else ()
            parsers.append(between(start, end, opened=prompt.rstrip().endswith(start), breaks=breaks))
        if forced_calls:
            parsers.append(forced.parse)
        elif tools and self.tool is not None and self.tool != HARMONY:
            parsers.append(TOOLS[self.tool].parse)
        if new_id is None:
            new_id = mistral.new_call_id if self.tool == "mistral" else new_call_id
        return MessageParser(parsers, tools, new_id) if parsers else None

    def guide(
        self, prompt: str, tools: Tools, whole: GrammarSpec | None = None, *, strict: Collection[str] = ()
    ) -> Guide | None:
        """What holds where in an answer to ``prompt``: ``whole`` after the reasoning, or else schemas of arguments.

        Raises `ValueError` if tools in ``strict`` cannot be held to theirs.
        """
        if whole is not None:
            start, end = self._reasoning(prompt, ())
            return Guide(whole=whole, reasoning_start=start, reasoning_end=end)
        if not tools or self.tool is None:
            return None
        try:
            found = openers(TOOLS[self.tool].OPENINGS, tools, strict)
        except ValueError:
            if strict:
                raise
            found = ()
        if not found:
            return None
        start, end = ("", "") if self.tool == HARMONY else self._reasoning(prompt, self._breaks(tools))
        return Guide(openers=found, reasoning_start=start, reasoning_end=end, strict=bool(strict))

    def _breaks(self, tools: Tools) -> tuple[str, ...]:
        return _BREAKS.get(self.tool or "", ()) if tools else ()

    def _reasoning(self, prompt: str, breaks: tuple[str, ...]) -> tuple[str, str]:
        """(what begins it, empty if it has begun; regex of what ends it, empty if there is none)."""
        if self._harmony:
            return "", "" if re.search(rf"{gpt_oss.FINAL}$", prompt) else gpt_oss.FINAL
        if self.reasoning is None:
            return "", ""
        start, end = REASONING[self.reasoning]
        opened = prompt.rstrip().endswith(start)
        return "" if opened else start, "|".join(re.escape(text) for text in (end, *breaks))

    def markers(self, *, tools: bool) -> frozenset[str]:
        """The texts that a parser must see even where they are special tokens, which have no text otherwise."""
        found: set[str] = set(REASONING.get(self.reasoning or "", ()))
        if self._harmony:
            found.update(gpt_oss.MARKERS)
        elif tools and self.tool is not None:
            found.update(TOOLS[self.tool].MARKERS)
        return frozenset(found)


def check_names(tool: str, reasoning: str) -> tuple[str | None, str | None]:
    """The formats with these names, `AUTO` as it is; raises `ConfigError` for a name that is none."""
    return (
        _named(tool, TOOLS, TOOL_ALIASES, "tool_call_parser"),
        _named(reasoning, {*REASONING, HARMONY}, REASONING_ALIASES, "reasoning_parser"),
    )


def special_ids(tokenizer: Tokenizer | None, markers: Collection[str]) -> frozenset[int]:
    """The ids of those of ``markers`` that are special tokens."""
    if tokenizer is None:
        return frozenset()
    ids = (tokenizer.token_to_id(marker) for marker in markers)
    return frozenset(id for id in ids if id is not None) & tokenizer.special_ids


def _named(name: str, known: Collection[str], aliases: Mapping[str, str], option: str) -> str | None:
    if name == NONE:
        return None
    name = aliases.get(name, name)
    if name != AUTO and name not in known:
        choices = ", ".join(sorted({AUTO, NONE, *known, *aliases}))
        raise ConfigError(f"{option} is {name!r}.", f"Give one of {choices}.")
    return name
