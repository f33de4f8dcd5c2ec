# ruff: noqa: E501 (templates and texts as they are)
"""Which formats are chosen for which models. The templates are the telling parts of real ones."""

from __future__ import annotations

import pytest

from octavo.errors import ConfigError
from octavo.frontend.parse.registry import REASONING_ALIASES, TOOL_ALIASES, Formats, detect, special_ids
from tests.frontend.fakes import byte_level

QWEN25 = r"""{%- if tools %}{{- "\n\nFor each function call, return a json object with function name and arguments within
<tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}
\n</tool_call><|im_end|>\n" }}{%- endif %}{{- '<tool_call>\n{"name": "' }}{{- tool_call.name }}"""
QWEN3 = (
    QWEN25
    + r"""{%- if '</think>' in content %}{%- set reasoning_content =
content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}{%- endif %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"""
)
QWEN3_CODER = r"""If you choose to call a function ONLY reply in the following format with NO suffix:\n\n<tool_call>\n
<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>"""
HERMES3 = r"""{{ "Use the following pydantic model json schema for each tool call you will make: <tool_call>\n" }}"""
LLAMA31 = r"""{%- if builtin_tools is defined %}{{- "<|python_tag|>" + tool_call.name + ".call(" }}{%- endif %}
{{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}{{- tool_call.arguments | tojson }}"""
LLAMA32 = r"""{{- 'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.' }}
{{- "<|start_header_id|>user<|end_header_id|>\n\n" }}"""
MISTRAL = (
    r"""{{- "[TOOL_CALLS][" }}{%- for tool_call in message.tool_calls %}{{- ', "id": "' + tool_call.id + '"}' }}"""
)
MAGISTRAL = r"""{{- '[THINK]' + block['thinking'] + '[/THINK]' }}{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}"""
DEEPSEEK_V3 = r"""{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name']}}"""
DEEPSEEK_R1 = (
    DEEPSEEK_V3
    + r"""{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{'<｜Assistant｜><think>\n'}}"""
)
GPT_OSS = r"""{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}"""
GEMMA = r"""{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}"""
GLM = r"""{{ '\n<tool_call>' + tc.name }}<arg_key>{{ k }}</arg_key>\n<arg_value>{{ v }}</arg_value>{{ '<think></think>' }}"""
KIMI = r"""<|tool_calls_section_begin|>{%- for tool_call in message['tool_calls'] -%}<|tool_call_begin|>"""
KIMI_THINKING = KIMI + "<think>{{ message.reasoning_content }}</think>"
SMOLLM = (
    r"""{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>'}}"""
)


@pytest.mark.parametrize(
    ("template", "tool", "reasoning"),
    [
        (QWEN25, "hermes", None),
        (QWEN3, "hermes", "think"),
        (QWEN3_CODER, "qwen3_coder", None),
        (HERMES3, "hermes", None),
        (LLAMA31, "llama3_json", None),
        (LLAMA32, "llama3_json", None),
        (MISTRAL, "mistral", None),
        (MAGISTRAL, "mistral", "mistral"),
        (DEEPSEEK_V3, "deepseek_v3", None),
        (DEEPSEEK_R1, "deepseek_v3", "think"),
        (GPT_OSS, "gpt_oss", "gpt_oss"),
        (GEMMA, "hermes", None),  # described as `tool_prompt` does
        (GLM, "glm45", "think"),
        (KIMI, "kimi_k2", None),
        (KIMI_THINKING, "kimi_k2", "think"),
        (SMOLLM, "hermes", None),
        ("{% for tool in tools %}{{ tool.name }}{% endfor %}", "json", None),
        (None, "hermes", None),
    ],
)
def test_formats_follow_from_the_template(template: str | None, tool: str, reasoning: str | None) -> None:
    assert detect(template) == (tool, reasoning)


def test_the_architecture_decides_where_the_template_says_nothing() -> None:
    assert detect(SMOLLM, "Qwen3ForCausalLM") == ("hermes", "think")
    assert detect(GEMMA + "{{ tools }}", "Gemma3ForCausalLM") == ("gemma", None)
    assert detect(MISTRAL, "Qwen3ForCausalLM") == ("mistral", "think")
    assert detect(None, "GptOssForCausalLM") == ("gpt_oss", "gpt_oss")


def test_names_override_and_those_of_vllm_are_known() -> None:
    assert Formats.of(QWEN3, tool="llama4_json", reasoning="deepseek_r1") == Formats("llama3_json", "think")
    assert Formats.of(QWEN3, tool="none", reasoning="none") == Formats(None, None)
    assert Formats.of(QWEN3) == Formats("hermes", "think")
    for name in TOOL_ALIASES:
        assert Formats.of(None, tool=name).tool is not None
    for name in REASONING_ALIASES:
        assert Formats.of(None, reasoning=name).reasoning is not None


@pytest.mark.parametrize("options", [{"tool": "nope"}, {"reasoning": "nope"}])
def test_an_unknown_name_is_refused_with_those_that_are_known(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"hermes|deepseek_r1"):
        Formats.of(None, **options)


def test_markers_that_are_special_tokens_are_found_by_id() -> None:
    tokenizer = byte_level()
    ids = special_ids(tokenizer, {"<|end|>", "<tool>", "<think>"})
    assert ids == {tokenizer.token_to_id("<|end|>")}  # the others are ordinary, or none at all
    assert special_ids(None, {"<|end|>"}) == frozenset()


def test_markers_are_those_of_what_is_read() -> None:
    formats = Formats("kimi_k2", "think")
    assert formats.markers(tools=False) == {"<think>", "</think>"}
    assert "<|tool_call_begin|>" in formats.markers(tools=True)
    assert "<|message|>" in Formats("gpt_oss", "gpt_oss").markers(tools=False)
    assert Formats("hermes", None).markers(tools=False) == frozenset()
