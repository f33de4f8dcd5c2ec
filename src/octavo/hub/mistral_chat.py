"""Chat templates of Mistral's instruct formats, for repos that bring a tokenizer but no template.

The version of the tokenizer says which format its model was trained on: v1 spells ``[INST]`` as text; from v2 on it is
a token, and tools exist; v7 has a system prompt of its own; v11 writes a call as name and arguments; v13 drops the ids
of calls and puts the tools before the first user message, not the last. The space behind such a token that
SentencePiece models expect is put there by `hub.mistral_tokenizer`.
"""

from __future__ import annotations

from typing import Final

_VERSIONS: Final = frozenset((1, 2, 3, 7, 11, 13))

_V1: Final = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- set ns.system = ns.system ~ message.content ~ '\\n\\n' %}
{%- elif message.role == 'user' %}
{{- '[INST] ' ~ ns.system ~ message.content ~ ' [/INST]' }}
{%- set ns.system = '' %}
{%- elif message.role == 'assistant' %}
{{- ' ' ~ message.content ~ eos_token }}
{%- else %}
{{- raise_exception('this format knows the roles system, user and assistant, not ' ~ message.role) }}
{%- endif %}
{%- endfor %}
"""

# ``version`` is set in front of it.
_LATER: Final = """\
{{- bos_token }}
{%- set ns = namespace(first=none, last=none, system='') %}
{%- for message in messages if message.role == 'user' %}
{%- if ns.first is none %}{%- set ns.first = message %}{%- endif %}
{%- set ns.last = message %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- if version >= 7 %}
{{- '[SYSTEM_PROMPT]' ~ space ~ message.content ~ '[/SYSTEM_PROMPT]' }}
{%- else %}
{%- set ns.system = ns.system ~ message.content ~ '\\n\\n' %}
{%- endif %}
{%- elif message.role == 'user' %}
{%- if tools and message is sameas(ns.first if version >= 13 else ns.last) %}
{{- '[AVAILABLE_TOOLS]' ~ space }}{{ tools | tojson }}{{ '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{{- '[INST]' ~ space ~ (ns.system if message is sameas(ns.last) else '') ~ message.content ~ '[/INST]' }}
{%- elif message.role == 'assistant' %}
{%- if message.content %}{{- space ~ message.content }}{%- endif %}
{%- if message.tool_calls and version >= 11 %}
{%- for call in message.tool_calls %}
{{- '[TOOL_CALLS]' ~ call.function.name }}
{%- if version < 13 %}{{- '[CALL_ID]' ~ call.id[-9:] }}{%- endif %}
{{- '[ARGS]' }}{{ call.function.arguments | tojson }}
{%- endfor %}
{%- elif message.tool_calls %}
{{- '[TOOL_CALLS]' ~ space ~ '[' }}
{%- for call in message.tool_calls %}
{{- '{"name": ' }}{{ call.function.name | tojson }}{{ ', "arguments": ' }}{{ call.function.arguments | tojson }}
{{- ', "id": ' }}{{ call.id[-9:] | tojson }}{{ '}' if loop.last else '}, ' }}
{%- endfor %}
{{- ']' }}
{%- endif %}
{{- eos_token }}
{%- elif message.role == 'tool' %}
{{- '[TOOL_RESULTS]' ~ space }}
{%- if version >= 13 %}
{{- message.content }}
{%- elif version >= 7 %}
{{- message.tool_call_id[-9:] ~ '[TOOL_CONTENT]' ~ space ~ message.content }}
{%- else %}
{{- '{"content": ' }}
{%- if message.content[:1] in ('{', '[') %}{{- message.content }}{%- else %}{{- message.content | tojson }}{%- endif %}
{{- ', "call_id": ' }}{{ message.tool_call_id[-9:] | tojson }}{{ '}' }}
{%- endif %}
{{- '[/TOOL_RESULTS]' }}
{%- else %}
{{- raise_exception('this format knows the roles system, user, assistant and tool, not ' ~ message.role) }}
{%- endif %}
{%- endfor %}
"""


def template_for(version: int) -> str | None:
    """The template of ``version``; None for one that is not known here."""
    if version not in _VERSIONS:
        return None
    if version == 1:
        return _V1
    return f"{{%- set version = {version} %}}{_LATER}"
