"""The one request that every endpoint makes of its body, and how it gets to the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from starlette.requests import Request as HttpRequest

from octavo.frontend.inputs import Prepared, Prompt
from octavo.sampling_params import SamplingParams
from octavo.server.message import ChoiceReader
from octavo.server.service import Service
from octavo.server.tools import ToolUse


@dataclass(frozen=True)
class Origin:
    """Where a request comes from. ``owner`` keeps what belongs to different keys apart; ``delay`` is added to its
    priority: what has a greater one waits until nothing else wants to run."""

    id: str
    owner: bytes = b""
    delay: int = 0
    traceparent: str = ""  # the header: the span that this request is part of

    @classmethod
    def of(cls, request: HttpRequest) -> Origin:
        """Of an HTTP request that has passed the guard."""
        traceparent = request.headers.get("traceparent", "")
        return cls(request.scope["request_id"], request.scope["owner"], traceparent=traceparent)


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages in OpenAI's form, and what becomes of the answer."""

    messages: Sequence[Mapping[str, Any]]
    use: ToolUse = field(default_factory=ToolUse)
    include_reasoning: bool = True
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    documents: Sequence[Mapping[str, Any]] | None = None


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A checked body. It has ``prompts`` or a ``conversation``; ``model`` is the name to answer with.

    With ``clamp_max_tokens`` an answer that would outgrow the context is cut at its end instead of refused.
    ``add_special_tokens`` is of ``prompts``.
    """

    model: str
    params: SamplingParams
    prompts: Sequence[Prompt] = ()
    conversation: Conversation | None = None
    priority: int = 0
    cache_salt: str = ""
    add_special_tokens: bool = True
    clamp_max_tokens: bool = False
    stream: bool = False


async def prepare(service: Service, ask: Ask, id: str, origin: Origin) -> list[Prepared]:
    """Renders, encodes and checks every prompt of ``ask``; raises `RequestError`. Nothing is sent yet."""
    priority, salt = ask.priority + origin.delay, _salt(origin.owner, ask.cache_salt)
    if ask.conversation is not None:
        return [await _prepare_chat(service, ask, ask.conversation, id, priority, salt)]
    return await service.llm.prepare_all(
        {f"{id}-{i}": prompt for i, prompt in enumerate(ask.prompts)},
        ask.params,
        add_special_tokens=ask.add_special_tokens,
        priority=priority,
        salt=salt,
        clamp_max_tokens=ask.clamp_max_tokens,
    )


def readers(service: Service, conversation: Conversation, prepared: Prepared) -> list[ChoiceReader]:
    """One for each of the answers to ``prepared``."""
    use = conversation.use
    return [
        ChoiceReader(
            service.formats.parser(prepared.prompt or "", use.schemas, forced_calls=use.forced),
            parallel_calls=use.parallel,
            include_reasoning=conversation.include_reasoning,
        )
        for _ in prepared.requests
    ]


async def _prepare_chat(
    service: Service, ask: Ask, conversation: Conversation, id: str, priority: int, salt: bytes
) -> Prepared:
    use = conversation.use
    prepared = await service.llm.prepare_chat(
        conversation.messages,
        use.constrained(ask.params),
        id,
        priority=priority,
        salt=salt,
        add_generation_prompt=conversation.add_generation_prompt and not conversation.continue_final_message,
        continue_final_message=conversation.continue_final_message,
        tools=use.shown or None,
        documents=conversation.documents,
        template_kwargs=conversation.template_kwargs,
    )
    prepared = use.guided(service.formats, prepared)
    return dataclasses.replace(prepared, kept_ids=service.kept_ids(tools=bool(use.schemas)))


def _salt(owner: bytes, given: str) -> bytes:
    """Pages of the prefix cache are shared within one salt."""
    if not owner and not given:
        return b""
    return blake2b(given.encode(errors="surrogatepass"), key=owner[:64], digest_size=16).digest()
