"""From messages to the text of a prompt: validation, content parts, the model's chat template."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import jinja2

from octavo.errors import ConfigError, ModelError, RequestError
from octavo.frontend import sandbox, tool_prompt
from octavo.frontend.template_shape import ContentFormat, content_format, takes_tools, wants_arguments_as_text

if TYPE_CHECKING:
    from octavo.hub.tokenizer import Tokenizer

Message: TypeAlias = Mapping[str, Any]  # as OpenAI's: {"role": …, "content": …, …}
WantedFormat: TypeAlias = Literal["auto", "string", "openai"]

_TEXT_PARTS = {"text", "input_text", "output_text"}
_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"}
_RESERVED |= {"chat_template", "tokenize"}
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which templates look for it
MAX_SHOWN = 100  # characters of a template in a message
MAX_DEPTH = 64  # of what is nested in a message or a tool


class ChatRenderer:
    """Renders conversations with one model's template. ``special_tokens`` are what templates call ``bos_token`` etc.

    ``named`` are further templates of the model; the one called ``tool_use`` is taken when there are tools.
    ``content_format`` overrides `template_shape.content_format`; ``variables`` are those of templates where a
    conversation brings none.
    """

    def __init__(
        self,
        template: str | None,
        special_tokens: Mapping[str, str] | None = None,
        named: Mapping[str, str] | None = None,
        content_format: WantedFormat = "auto",
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.template = template
        self.content_format = content_format
        self.variables = dict(variables or {})
        self.named = dict(named or {})
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer | None,
        template: str | None = None,
        content_format: WantedFormat = "auto",
        variables: Mapping[str, Any] | None = None,
    ) -> ChatRenderer:
        """With the templates of ``tokenizer``, or with ``template`` instead of all of them."""
        if tokenizer is None:
            return cls(template, content_format=content_format, variables=variables)
        named = None
        if template is None:
            template, named = tokenizer.chat_template, tokenizer.chat_templates
        return cls(template, tokenizer.special_tokens, named, content_format, variables)

    @property
    def sources(self) -> str:
        """The text of every template, for what can be told from it."""
        return "\n".join(text for text in (self.template, *self.named.values()) if text is not None)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, special tokens included: encode it with ``add_special_tokens=False``.

        ``chat_template``, a text or a name, overrides the model's; never pass a text that a client sent. Raises
        `RequestError` for messages that are malformed or that the template refuses, and `ModelError` for a template
        that is broken.
        """
        template = self._template(chat_template, bool(tools))
        if template is None:
            raise RequestError(
                "this model has no chat template.",
                "Pass one (--chat-template FILE, or chat_template=… in Python), or use completions.",
                id="HF061",
            )
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "add_generation_prompt and continue_final_message are both true.",
                "Set one of them.",
                param="continue_final_message",
            )
        chat = _conversation(messages, template, self.content_format)
        plain_tools = None if tools is None else _plain(list(tools), "tools")
        if "tool_calls" not in template:
            chat = tool_prompt.spell_out(chat)
        if plain_tools and not takes_tools(template):
            chat = tool_prompt.describe(chat, plain_tools, role="system" if "system" in template else "user")
        marker = _mark(chat) if continue_final_message else None
        extra = _plain({**self.variables, **(template_kwargs or {})}, "chat_template_kwargs")
        if reserved := sorted(_RESERVED & extra.keys()):
            raise RequestError(
                f"chat_template_kwargs holds {reserved[0]!r}, which is not a variable of templates.",
                "Remove it.",
                param="chat_template_kwargs",
            )
        variables = {
            **self._special_tokens,
            **extra,
            "messages": chat,
            "tools": plain_tools,
            "documents": None if documents is None else _plain(list(documents), "documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        text = _render(template, variables)
        return text if marker is None else _cut(text, marker)

    def _template(self, wanted: str | None, tools: bool) -> str | None:
        if wanted is not None:
            return self.named.get(wanted, wanted)
        return self.named.get("tool_use", self.template) if tools else self.template


def check_variables(variables: Mapping[str, Any]) -> None:
    """Raises `ConfigError` if one of ``variables`` has a name that is not free."""
    if reserved := sorted(_RESERVED & variables.keys()):
        cause = f"default_chat_template_kwargs holds {reserved[0]!r}, which is no variable of templates."
        raise ConfigError(cause, "Remove it.")


def load_template(source: str) -> str:
    """The template in the file ``source``; or ``source`` itself, if it holds a brace, as templates do."""
    shown = source if len(source) < MAX_SHOWN else f"{source[:MAX_SHOWN]}…"
    try:
        text = source if "{" in source else Path(source).read_text(encoding="utf-8")
        sandbox.compile_template(text)
    except (OSError, UnicodeDecodeError) as error:
        cause = f"the chat template {shown} cannot be read: {error}."
        raise ConfigError(cause, "Give a Jinja file in UTF-8.") from None
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template {shown} is broken: {error.message}, line {error.lineno}.") from None
    return text


def _conversation(messages: Sequence[Message], template: str, wanted: WantedFormat) -> list[dict[str, Any]]:
    """Checked copies of the messages, in the shape that the template reads."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise _bad("messages", f"is of type {type(messages).__name__}")
    if not messages:
        raise RequestError("messages is empty.", "Send at least one message.", param="messages")
    form, asks = content_format(template)
    if wanted != "auto":
        form, asks = ("openai" if wanted == "openai" else "string"), False
    as_text = wants_arguments_as_text(template)
    chat = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise _bad(where, f"is of type {type(message).__name__}")
        one = _plain(dict(message), where)
        role = one.get("role")
        if not isinstance(role, str) or not role:
            raise _bad(where, f"has the role {role!r}")
        if role == "developer" and "developer" not in template:
            one["role"] = "system"
        one["content"] = _content(one, where, form, asks)
        _tool_calls(one, where, as_text=as_text)
        reasoning = next((one[name] for name in _REASONING if one.get(name) is not None), None)
        if reasoning is not None:
            one = {"thinking": reasoning, **one, "reasoning_content": reasoning}
        chat.append(one)
    return chat


def _content(message: dict[str, Any], where: str, form: ContentFormat, asks: bool) -> Any:
    content = message.get("content")
    if content is None:
        if message["role"] == "assistant":
            return None if "content" in message else ""
        raise _bad(where, "has no content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if form == "openai" and not asks else content
    if not isinstance(content, list):
        raise _bad(where, f"has a content of type {type(content).__name__}")
    texts = []
    for part in content:
        kind = "text" if isinstance(part, str) else part.get("type") if isinstance(part, dict) else None
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise RequestError(
                f"{where} has a content part of type {kind!r}.",
                'Only text is read: {"type": "text", "text": …}.',
                param="messages",
            )
        texts.append(text)
    return "\n".join(texts) if form == "string" else [{"type": "text", "text": text} for text in texts]


def _tool_calls(message: dict[str, Any], where: str, *, as_text: bool) -> None:
    """Arguments of earlier calls come as JSON text in OpenAI's format; most templates want what it means."""
    calls = message.get("tool_calls")
    if calls is None:
        return
    if not isinstance(calls, list):
        raise _bad(where, "has tool_calls that are no list")
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise _bad(where, "has a tool call without a function")
        if (arguments := function.get("arguments")) is None:
            continue
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments else {}
            except (ValueError, RecursionError):
                raise _bad(where, "has a tool call whose arguments are not JSON") from None
        function["arguments"] = json.dumps(arguments, ensure_ascii=False) if as_text else arguments


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy made of plain data only: the sandbox must not see objects with methods of their own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > MAX_DEPTH:
        raise _bad(where, f"is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    raise _bad(where, f"holds a value of type {type(value).__name__}")


def _bad(where: str, what: str) -> RequestError:
    return RequestError(f"{where} {what}.", "See the format of OpenAI's chat messages.", param=where.split("[")[0])


def _mark(chat: list[dict[str, Any]]) -> str:
    """Appends a unique mark to the last message, so that its end can be found in the rendered text."""
    marker = f"<{secrets.token_hex(16)}> "
    last = chat[-1]
    content = last["content"]
    if isinstance(content, str):
        last["content"] = content + marker
    elif content:
        content[-1]["text"] += marker
    else:
        raise RequestError(
            "continue_final_message is true, but the last message has no text.",
            "End with a message that has some, or use add_generation_prompt.",
            param="continue_final_message",
        )
    return marker


def _cut(text: str, marker: str) -> str:
    """The text up to the mark; a template that trimmed the mark's space would have trimmed the message's too."""
    at = text.rfind(marker.strip())
    if at < 0:
        raise RequestError(
            "the chat template does not show the end of the last message, so it cannot be continued.",
            "Use add_generation_prompt instead of continue_final_message.",
            param="continue_final_message",
        )
    return text[:at] if text.startswith(marker, at) else text[:at].rstrip()


def _render(template: str, variables: dict[str, Any]) -> str:
    try:
        return sandbox.render(template, variables)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            f"the chat template is broken: {error.message}, line {error.lineno}.",
            "Pass another one (--chat-template FILE, or chat_template=… in Python).",
            id="HF061",
        ) from None
    except sandbox.LimitReached as error:
        raise RequestError(
            f"the chat template was stopped: {error}.", "Send fewer or shorter messages.", param="messages"
        ) from None
    except jinja2.TemplateError as error:
        raise RequestError(
            f"the chat template refuses the messages: {error}.", "Change the messages.", param="messages"
        ) from None
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise RequestError(
            f"the chat template fails on these messages: {type(error).__name__}: {error}.",
            "Check that they have the fields it reads.",
            param="messages",
        ) from None
