"""Rendering equals Transformers', bad messages are refused with their place, and templates cannot run away."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import ConfigError, ModelError, RequestError
from octavo.frontend.chat import ChatRenderer, check_variables, load_template
from octavo.frontend.template_shape import content_format
from tests.frontend.fakes import byte_level

# As in the GGUF file of SmolLM2-135M-Instruct.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{#- The system message comes first. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "Tools:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}{{- tool_call.arguments | tojson }}{{- "}" }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{%- set ns = namespace(index=0, seen=false) %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['user', 'assistant', 'system', 'tool'] %}
        {{- raise_exception('Unknown role ' + message['role']) }}
    {%- endif %}
    {%- if message['role'] == 'system' %}{% continue %}{% endif %}
    {%- if (message['role'] == 'user') != (ns.index % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {%- generation %}{{- ' ' ~ message['content']|trim ~ eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""
PARTS = """{% for message in messages %}<{{ message.role }}>{% for part in message['content'] %}
{% if part.type == 'text' %}[{{ part.text }}]{% endif %}{% endfor %}{% endfor %}"""

CHATS: dict[str, list[dict[str, Any]]] = {
    "one": [{"role": "user", "content": "Hi <b>&amp;</b> \n"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hé 中"}],
    "turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": " b "},
        {"role": "user", "content": "c"},
    ],
}
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": 'é "q" <b>', "parameters": {"type": "object"}}}
]


@pytest.fixture(scope="module")
def peer() -> Any:
    """Transformers' tokenizer, the reference for rendering."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=byte_level().lib, bos_token="<s>", eos_token="</s>")


def renderer(template: str | None) -> ChatRenderer:
    return ChatRenderer(template, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize("generation", [True, False])
@pytest.mark.parametrize("chat", sorted(CHATS))
@pytest.mark.parametrize("template", [SMOLLM2, LLAMA3, MISTRAL], ids=["smollm2", "llama3", "mistral"])
def test_rendering_equals_transformers(peer: Any, template: str, chat: str, generation: bool) -> None:
    messages = CHATS[chat]
    ours = renderer(template).render(messages, add_generation_prompt=generation)
    assert ours == peer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=generation
    )


def test_tools_and_variables_equal_transformers(peer: Any) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
    messages = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
    ]
    ours = renderer(LLAMA3).render(messages, tools=TOOLS, template_kwargs={"date_string": "today"})
    assert ours == peer.apply_chat_template(
        messages, chat_template=LLAMA3, tools=TOOLS, date_string="today", tokenize=False, add_generation_prompt=True
    )


DEEPSEEK = (
    "{{ tools }}{% for m in messages %}{% for tool in m['tool_calls'] or [] %}{{ tool['function']['name'] + '\\n' + "
    "'```json' + '\\n' + tool['function']['arguments'] + '\\n```' }}{% endfor %}{% endfor %}"
)
CALLING: list[Any] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"city": "Łódź"}'}}],
    },
    {"role": "tool", "tool_call_id": "1", "content": "rain"},
    {"role": "tool", "tool_call_id": "2", "content": "wind"},
]


@pytest.mark.parametrize("arguments", ['{"a": "é"}', {"a": "é"}])
def test_templates_that_join_arguments_to_text_get_them_as_text(arguments: Any) -> None:
    calls = [{"function": {"name": "f", "arguments": arguments}}]
    text = renderer(DEEPSEEK).render([{"role": "assistant", "content": None, "tool_calls": calls}], tools=TOOLS)
    assert text.endswith('f\n```json\n{"a": "é"}\n```')


def test_templates_that_walk_through_arguments_get_what_they_mean() -> None:
    template = (
        "{% for m in messages %}{% for call in m.tool_calls or [] %}{% set f = call['function'] %}"
        "{% if f['arguments'] is mapping %}{% for k, v in f['arguments'] | dictsort %}{{ k }}={{ v }};{% endfor %}"
        "{% else %}{{- f['arguments'] -}}{% endif %}{% endfor %}{% endfor %}"
    )
    calls = [{"function": {"name": "f", "arguments": '{"b": 1, "a": 2}'}}]
    assert renderer(template).render([{"role": "assistant", "content": None, "tool_calls": calls}]) == "a=2;b=1;"


@pytest.mark.parametrize("method", ["strip()", "split('</think>')[-1]", "startswith('x')", "replace('a', 'b')"])
def test_methods_of_a_text_with_numbers_and_braces_are_no_formats(method: str) -> None:
    template = "{% for m in messages %}{{ m.content." + method + " }}{% endfor %}"
    content = '{"id": 123456} is 100 % of 54321'
    expected = {"startswith('x')": "False", "replace('a', 'b')": content.replace("a", "b")}.get(method, content)
    assert renderer(template).render([{"role": "user", "content": content}]) == expected


@pytest.mark.parametrize("parts", [False, True])
def test_a_template_without_tools_gets_them_and_their_calls_as_text(parts: bool) -> None:
    content = "{% for p in m.content %}{{ p.text }}{% endfor %}" if parts else "{{ m.content }}"
    system = "{% if m.role == 'system' %}!{% endif %}"
    template = f"{{% for m in messages %}}[{{{{ m.role }}}}]{system}{content}{{% endfor %}}"
    text = renderer(template).render(CALLING, tools=TOOLS)
    call = '<tool_call>\n{"name": "f", "arguments": {"city": "Łódź"}}\n</tool_call>'
    responses = "<tool_response>\nrain\n</tool_response>\n<tool_response>\nwind\n</tool_response>"
    assert text.startswith("[system]!You can call tools.")
    assert json.dumps(TOOLS[0], ensure_ascii=False) in text
    assert text.endswith(f"[user]Weather?[assistant]I look.\n{call}[user]{responses}")
    assert "tool" not in renderer(template).render(CALLING[:1])
    without_system = renderer(template.replace(system, "")).render(CALLING[:1], tools=TOOLS)
    assert without_system.startswith("[user]You can call tools.")
    assert without_system.endswith("\n\nWeather?")


def test_tool_arguments_may_come_as_json_text() -> None:
    def chat(arguments: Any) -> list[dict[str, Any]]:
        calls = [{"type": "function", "function": {"name": "add", "arguments": arguments}}]
        return [{"role": "assistant", "content": None, "tool_calls": calls}]

    assert renderer(LLAMA3).render(chat('{"a": 1}')) == renderer(LLAMA3).render(chat({"a": 1}))
    with pytest.raises(RequestError, match="not JSON"):
        renderer(LLAMA3).render(chat("{"))


@pytest.mark.parametrize("last", ["The answer is", "The answer is  ", "[INST"])
@pytest.mark.parametrize("template", [SMOLLM2, LLAMA3, MISTRAL], ids=["smollm2", "llama3", "mistral"])
def test_a_continued_message_stays_open_as_with_transformers(peer: Any, template: str, last: str) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": last}]
    ours = renderer(template).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert ours == peer.apply_chat_template(
        messages, chat_template=template, tokenize=False, continue_final_message=True
    )


def test_variables_of_the_server_hold_where_a_conversation_brings_none() -> None:
    made = ChatRenderer("{{ a }}{{ b }}{{ c }}", variables={"a": 1, "b": 2})
    messages = [{"role": "user", "content": "q"}]
    assert made.render(messages) == "12"
    assert made.render(messages, template_kwargs={"b": 3, "c": 4}) == "134"
    check_variables(made.variables)
    with pytest.raises(ConfigError, match="default_chat_template_kwargs holds 'messages'"):
        check_variables({"messages": []})


def test_the_format_of_content_can_be_said() -> None:
    printing, looping = "{{ messages[0].content }}", "{% for p in messages[0].content %}[{{ p.text }}]{% endfor %}"
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert ChatRenderer(printing, content_format="openai").render(messages).startswith("[{")
    assert ChatRenderer(looping, content_format="openai").render(messages) == "[a][b]"
    assert ChatRenderer(looping, content_format="string").render(messages) == "[][][]"
    assert ChatRenderer(looping).render(messages) == "[a][b]"


def test_parts_are_joined_for_a_template_that_prints_the_content() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}]
    assert renderer(SMOLLM2).render(messages) == renderer(SMOLLM2).render([{"role": "user", "content": "a\nb"}])


def test_a_string_is_one_part_for_a_template_that_loops_over_parts() -> None:
    assert renderer(PARTS).render([{"role": "user", "content": "ab"}]) == "<user>[ab]"


@pytest.mark.parametrize(
    ("template", "form"),
    [
        (SMOLLM2, "string"),
        (LLAMA3, "string"),
        (PARTS, "openai"),
        ("{% set c = messages[0].content %}{% for p in c %}{{ p.text }}{% endfor %}", "openai"),
        ("{% macro show(content) %}{% for p in content | list %}{{ p }}{% endfor %}{% endmacro %}", "openai"),
        ("{% broken", "string"),
    ],
)
def test_the_format_of_content_is_detected(template: str, form: str) -> None:
    assert content_format(template)[0] == form


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        {"role": "user"},
        ["hi"],
        [{"content": "no role"}],
        [{"role": 5, "content": "a"}],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": "a", "extra": object()}],
        [{"role": "assistant", "content": "a", "tool_calls": [{}]}],
    ],
)
def test_bad_messages_are_refused(messages: Any) -> None:
    with pytest.raises(RequestError) as caught:
        renderer(SMOLLM2).render(messages)
    assert caught.value.param == "messages"


def test_what_the_template_raises_reaches_the_user() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        renderer(MISTRAL).render([{"role": "assistant", "content": "a"}])


def test_a_model_without_a_template_says_how_to_pass_one() -> None:
    with pytest.raises(RequestError, match="chat-template") as caught:
        renderer(None).render(CHATS["one"])
    assert caught.value.id == "HF061"
    assert renderer(None).render(CHATS["one"], chat_template="{{ messages|length }}") == "1"


def test_a_named_template_is_taken_for_tools_or_by_its_name() -> None:
    tokenizer = byte_level(chat_template="plain")
    tokenizer.chat_templates["tool_use"] = "with tools"
    ours = ChatRenderer.of(tokenizer)
    assert ours.render(CHATS["one"]) == "plain"
    assert ours.render(CHATS["one"], tools=TOOLS) == "with tools"
    assert ours.render(CHATS["one"], chat_template="tool_use") == "with tools"
    assert ChatRenderer.of(tokenizer, "given").render(CHATS["one"], tools=TOOLS) == "given"


def test_reserved_variables_are_refused() -> None:
    with pytest.raises(RequestError, match="'chat_template'"):
        renderer(SMOLLM2).render(CHATS["one"], template_kwargs={"chat_template": "x"})


def test_developer_is_system_for_templates_that_do_not_know_it() -> None:
    text = renderer(SMOLLM2).render([{"role": "developer", "content": "x"}])
    assert text.startswith("<|im_start|>system\nx")


def test_a_broken_template_is_an_error_of_the_model() -> None:
    with pytest.raises(ModelError, match="broken"):
        renderer("{% for %}").render(CHATS["one"])


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for i in range(1000) %}{% for j in range(1000) %}{{ messages }}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x|replace('a','aa') %}{% endfor %}",
        "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x.replace('a','aa') %}{% endfor %}",
        (
            "{% macro f(x) %}{{ x ~ x }}{% endmacro %}{% set n = namespace(x='a') %}"
            "{% for i in range(60) %}{% set n.x = f(n.x) %}{% endfor %}"
        ),
        "{{ 'a' * 1000000000 }}",
        "{{ 10 ** 100000000 }}",
        "{{ range(1000000000)|list }}",
        "{{ 'a'|center(1000000000) }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ '%1000000000d' % 5 }}",
        "{{ '%1000000000d'|format(5) }}",
        "{{ '{:>1000000000}'.format(5) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{% set a = f(n - 1) %}{% set b = f(n - 1) %}{% endif %}{% endmacro %}{{ f(50) }}",
    ],
)
def test_a_template_that_runs_away_is_stopped(template: str) -> None:
    began = time.thread_time()
    with pytest.raises(RequestError):
        renderer(template).render(CHATS["one"])
    assert time.thread_time() - began < 20  # it takes less than one; each of them alone would take minutes at least


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ namespace(__class__=1) }}",
        "{{ dict.mro() }}",
        "{{ raise_exception.__globals__.x }}",
        "{% include 'x' %}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(template: str) -> None:
    with pytest.raises(RequestError):
        renderer(template).render(CHATS["one"])


def test_loop_variables_work_under_the_limits() -> None:
    template = "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ ';' if not loop.last }}{% endfor %}"
    assert renderer(template).render(CHATS["turns"]) == "1/3;2/3;3/3"


def test_a_template_file_is_read_and_checked(tmp_path: Path) -> None:
    good, broken = tmp_path / "good.jinja", tmp_path / "broken.jinja"
    good.write_text("{{ 1 }}")
    broken.write_text("{% if %}")
    assert load_template(str(good)) == load_template("{{ 1 }}") == "{{ 1 }}"
    with pytest.raises(ConfigError, match="broken"):
        load_template(str(broken))
    with pytest.raises(ConfigError, match="broken"):
        load_template("{% if %}")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_template(str(tmp_path / "none.jinja"))
