"""From a body to an answer, the same for every endpoint that asks the model.

An `Endpoint` says how its body is read into `Prompts` or a `Conversation` and how its answer is written; everything
between is here.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import msgspec
from starlette.requests import Request
from starlette.types import ASGIApp

from octavo.errors import OctavoError, RequestError
from octavo.frontend.beams import check_only_meant
from octavo.frontend.inputs import Prepared, Prompt
from octavo.frontend.outputs import Delta
from octavo.sampling_params import SamplingParams
from octavo.server.answers import json_response, now
from octavo.server.blocks import Blocks
from octavo.server.decoding import decode
from octavo.server.protocol import EmbeddingRequest, Sampled
from octavo.server.runs import Runs
from octavo.server.service import Service
from octavo.server.sse import EventStream, while_connected
from octavo.server.tools import ToolUse
from octavo.types import RequestOutput

Body = TypeVar("Body", bound=Sampled | EmbeddingRequest)


@dataclass(frozen=True)
class Origin:
    """Where a request comes from. ``owner`` keeps what belongs to different keys apart; ``delay`` is added to its
    priority: what has a greater one waits until nothing else wants to run."""

    id: str
    owner: bytes = b""
    delay: int = 0
    traceparent: str = ""  # the header: the span that this request is part of

    @classmethod
    def of(cls, request: Request) -> Origin:
        """Of an HTTP request that has passed the guard."""
        traceparent = request.headers.get("traceparent", "")
        return cls(request.scope["request_id"], request.scope["owner"], traceparent=traceparent)


# --- what a body asks for ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Texts or token ids, to be continued or embedded.

    With ``clamp_max_tokens`` an answer that would outgrow the context is cut at its end instead of refused.
    """

    prompts: Sequence[Prompt]
    add_special_tokens: bool = True
    clamp_max_tokens: bool = False


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


async def prepare(
    service: Service, body: Sampled | EmbeddingRequest, asked: Prompts | Conversation, id: str, origin: Origin
) -> list[Prepared]:
    """Renders, encodes and checks every prompt that ``body`` asks for; raises `RequestError`. Nothing is sent yet."""
    params = body.pooling_params() if isinstance(body, EmbeddingRequest) else _params(service, body)
    priority, salt = (body.priority or 0) + origin.delay, _salt(origin.owner, body.cache_salt or "")
    if isinstance(asked, Prompts):
        return await service.llm.prepare_all(
            {f"{id}-{i}": prompt for i, prompt in enumerate(asked.prompts)},
            params,
            add_special_tokens=asked.add_special_tokens,
            priority=priority,
            salt=salt,
            clamp_max_tokens=asked.clamp_max_tokens,
        )
    assert isinstance(params, SamplingParams)
    use = asked.use
    prepared = await service.llm.prepare_chat(
        asked.messages,
        use.constrained(params),
        id,
        priority=priority,
        salt=salt,
        add_generation_prompt=asked.add_generation_prompt and not asked.continue_final_message,
        continue_final_message=asked.continue_final_message,
        tools=use.shown or None,
        documents=asked.documents,
        template_kwargs=asked.template_kwargs,
    )
    prepared = use.guided(service.formats, prepared)
    if prepared.requests[0].sampling.guide is not None and body.beams(params) is not None:
        cause = "the answer is held to a grammar, which a beam search does not know."
        raise RequestError(cause, "Leave use_beam_search out, or the tools.", param="use_beam_search")
    return [dataclasses.replace(prepared, kept_ids=service.kept_ids(tools=bool(use.schemas)))]


def _params(service: Service, body: Sampled) -> SamplingParams:
    """A beam search takes nothing from the model's own defaults, since most have no effect on it."""
    service.llm.inputs.check_generates()
    params = body.sampling_params(service.llm.default_params())
    if (beams := body.beams(params)) is None:
        return params
    beams.validate(service.llm.info.max_logprobs, width="n")
    params = body.sampling_params(SamplingParams())
    check_only_meant(params)
    return params


def _salt(owner: bytes, given: str) -> bytes:
    """Pages of the prefix cache are shared within one salt."""
    if not owner and not given:
        return b""
    return blake2b(given.encode(errors="surrogatepass"), key=owner[:64], digest_size=16).digest()


# --- running it -------------------------------------------------------------------------------------------------------


class Answer(Protocol):
    """Writes one answer."""

    def whole(self, results: list[RequestOutput]) -> msgspec.Struct:
        """The answer from all that came, a result for each prompt."""
        ...


@runtime_checkable
class StreamedAnswer(Answer, Protocol):
    """Writes one whole or in events, which come from `piece` for each delta and then from `end`."""

    def piece(self, number: int, delta: Delta) -> Iterable[bytes]:
        """What a delta of prompt ``number`` adds to the stream."""
        ...

    def end(self, results: list[RequestOutput]) -> Iterable[bytes]:
        """The last events of a stream that went well."""
        ...

    def broken(self, error: OctavoError) -> Iterable[bytes]:
        """The last events of a stream that did not."""
        ...


@dataclass(frozen=True)
class Job(Generic[Body]):
    """A request that is ready to run. ``model`` is the name to answer with."""

    service: Service
    origin: Origin
    body: Body
    model: str
    asked: Prompts | Conversation
    id: str
    prepared: list[Prepared]
    created: int = field(default_factory=now)

    @property
    def conversation(self) -> Conversation:
        """What is ``asked`` of an endpoint that reads conversations."""
        assert isinstance(self.asked, Conversation)
        return self.asked

    def runs(self) -> Runs:
        """What is to be run."""
        beams = self.body.beams(self.prepared[0].params)
        return Runs(self.service, self.prepared, self.origin.traceparent, beams)

    def blocks(self) -> list[Blocks]:
        """To read each of the answers to a conversation."""
        (prepared,), use = self.prepared, self.conversation.use
        return [
            Blocks(
                self.service.formats.parser(prepared.prompt or "", use.schemas, forced_calls=use.forced),
                parallel_calls=use.parallel,
                include_reasoning=self.conversation.include_reasoning,
            )
            for _ in prepared.requests
        ]


@dataclass(frozen=True)
class Endpoint(Generic[Body]):
    """``prefix`` begins the ids of its answers. ``read`` gets a body that is checked; it raises `RequestError`."""

    body: type[Body]
    prefix: str
    read: Callable[[Service, Body, Origin], Prompts | Conversation]
    answer: Callable[[Job[Body]], Answer]

    async def handle(self, service: Service, request: Request) -> ASGIApp:
        """Handles one HTTP request."""
        return await self.respond(await self.open(service, await request.body(), Origin.of(request)), request)

    async def open(self, service: Service, body: bytes, origin: Origin) -> Job[Body]:
        """Decodes and checks; raises `RequestError`."""
        given = decode(body, self.body)
        given.check()
        model = service.model(given.model)
        asked, id = self.read(service, given, origin), f"{self.prefix}{origin.id}"
        prepared = await prepare(service, given, asked, id, origin)
        return Job(service, origin, given, model, asked, id, prepared)

    async def respond(self, job: Job[Body], request: Request) -> ASGIApp:
        """Runs ``job`` and answers in the way that it asks for."""
        answer = self.answer(job)
        if job.body.stream and isinstance(answer, StreamedAnswer):
            return EventStream(_events(job, answer), answer.broken)
        whole = await while_connected(request.receive, _whole(job, answer))
        return json_response(whole)

    async def whole(self, job: Job[Body]) -> msgspec.Struct:
        """Runs ``job`` to its end."""
        return await _whole(job, self.answer(job))


async def _whole(job: Job[Any], answer: Answer) -> msgspec.Struct:
    return answer.whole(await job.runs().finish())


async def _events(job: Job[Any], answer: StreamedAnswer) -> AsyncGenerator[bytes, None]:
    runs = job.runs()
    async with contextlib.aclosing(runs.batches()) as batches:
        async for number, deltas in batches:
            events = b"".join([event for delta in deltas for event in answer.piece(number, delta)])
            if events:
                yield events
    yield b"".join(answer.end(runs.results))
