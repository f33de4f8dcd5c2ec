"""`AsyncLLM`: the engine for services, one async iterator per request.

The engine core runs in a process of its own; text is made here. A request that is no longer wanted is aborted when its
iterator is closed or its task cancelled, so a client that hangs up frees its memory within a step.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self, TypeVar

import msgspec

from octavo.config import EngineConfig
from octavo.errors import OctavoError, RequestError
from octavo.frontend.beams import BeamSearchParams, Search, output_of
from octavo.frontend.chat import ChatRenderer, Message, WantedFormat
from octavo.frontend.client import EngineClient
from octavo.frontend.detokenize import TextDecoder
from octavo.frontend.inputs import InputProcessor, Params, Prepared, Prompt
from octavo.frontend.loading import TextModel, load_text_model
from octavo.frontend.outputs import Delta, Logprobs, RequestState
from octavo.hub.tokenizer import Tokenizer
from octavo.sampling_params import PoolingParams, SamplingParams
from octavo.types import EmbeddingRequestOutput, EngineInfo, Request, RequestOutput, Stats, TokenOutput

if TYPE_CHECKING:
    from octavo.frontend.fleet import Source

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
INLINE_SIZE = 4096  # characters or ids of prompts that are encoded in the event loop, faster than a thread could start


class Generation:
    """A request in flight: an async iterator of what came since the turn before, and in ``state`` all so far.

    Made by `AsyncLLM.run`. It starts when it is first iterated, and only one may iterate it. No turn is empty.
    """

    def __init__(self, state: RequestState, batches: AsyncGenerator[list[Delta], None]) -> None:
        self.state = state
        self._batches = batches

    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        return self._batches

    async def aclose(self) -> None:
        """Aborts what has not ended."""
        await self._batches.aclose()


class AsyncLLM:
    """Generates, or embeds, for many callers at once. Made by `start`, or over any `EngineClient`."""

    def __init__(
        self,
        client: EngineClient,
        text: TextModel,
        *,
        chat_template: str | None = None,
        content_format: WantedFormat = "auto",
        template_variables: Mapping[str, Any] | None = None,
        seeds: random.Random | None = None,
    ) -> None:
        self.client = client
        self.tokenizer: Tokenizer | None = text.tokenizer
        self.architecture = text.architecture
        self.inputs = InputProcessor(
            text.tokenizer,
            client.info,
            eos_ids=text.eos_ids,
            defaults=text.defaults,
            seeds=seeds,
            pooler=text.pooler,
        )
        self.renderer = ChatRenderer.of(text.tokenizer, chat_template, content_format, template_variables)
        self._decoder = TextDecoder(text.tokenizer) if text.tokenizer is not None else None
        self._running: dict[str, RequestState] = {}

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        chat_template: str | None = None,
        content_format: WantedFormat = "auto",
        template_variables: Mapping[str, Any] | None = None,
        worker: Literal["real", "stub"] = "real",
        log_level: str = "info",
        on_death: Callable[[OctavoError], None] | None = None,
        engines: Source | None = None,
    ) -> AsyncLLM:
        """Starts the engine processes and waits until they are ready; the tokenizer is loaded meanwhile.

        ``chat_template`` is a template's text; ``content_format`` and ``template_variables`` are those of
        `ChatRenderer`. ``on_death`` is called once, when no engine is left. ``engines`` are those that another process
        looks after, instead. Raises what kept an engine from starting, as `LLM` does.
        """
        from octavo.frontend.balancer import open_engines, own_engines

        async def start() -> EngineClient:
            source = engines or await own_engines(config, worker, log_level=log_level)
            size = config.parallel.data_parallel_size
            return await open_engines(source, size, shared=engines is not None, on_death=on_death)

        opening = asyncio.create_task(start())
        try:
            text = await asyncio.to_thread(load_text_model, config)
            client = await opening
        except BaseException:
            opening.cancel()
            await asyncio.wait([opening])
            if not opening.cancelled() and opening.exception() is None:
                await opening.result().close()
            raise
        seeds = random.Random(config.model.seed)
        return cls(
            client,
            text,
            chat_template=chat_template,
            content_format=content_format,
            template_variables=template_variables,
            seeds=seeds,
        )

    @property
    def info(self) -> EngineInfo:
        """What the engine says of itself."""
        return self.client.info

    def default_params(self) -> SamplingParams:
        """Sampling parameters of requests that bring none."""
        return self.inputs.default_params()

    # --- requests ---------------------------------------------------------------------------------------------------

    async def prepare(
        self,
        prompt: Prompt,
        params: Params | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> Prepared:
        """Checks and encodes a request without sending it; raises `RequestError`."""
        (prepared,) = await self.prepare_all({request_id or new_id(): prompt}, params, priority=priority)
        return prepared

    async def prepare_all(
        self,
        prompts: Mapping[str, Prompt],
        params: Params | None = None,
        *,
        add_special_tokens: bool = True,
        **options: Any,
    ) -> list[Prepared]:
        """As `prepare`, of several prompts by their ids; ``options`` are those of `InputProcessor.process_ids`."""

        def work() -> list[Prepared]:
            encoded = self.inputs.encode_prompts(prompts.values(), add_special_tokens=add_special_tokens)
            return [
                self.inputs.process_ids(id, ids, params, text=text, **options)
                for id, (text, ids) in zip(prompts, encoded, strict=True)
            ]

        return work() if _size(prompts) <= INLINE_SIZE else await asyncio.to_thread(work)

    async def prepare_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        salt: bytes = b"",
        **rendering: Any,
    ) -> Prepared:
        """As `prepare`, from messages; ``rendering`` are the options of `ChatRenderer.render`."""

        def work() -> Prepared:
            text = self.renderer.render(messages, **rendering)
            (ids,) = self.inputs.encode_texts([text], add_special_tokens=False)
            id = request_id or new_id()
            return self.inputs.process_ids(id, ids, sampling_params, text=text, priority=priority, salt=salt)

        return await asyncio.to_thread(work)  # a template may take its time

    def run(self, prepared: Prepared) -> Generation:
        """Sends a prepared request when iterated. Raises, then, what ended it: `Overloaded`, `EngineDead`, …"""
        state = RequestState(prepared, self._decoder, self.inputs.eos_ids)
        return Generation(state, self._batches(state))

    def search(self, prepared: Prepared, params: BeamSearchParams) -> Generation:
        """As `run`, by beam search: the outputs of ``prepared`` are the best beams, which all come at the end."""
        state = RequestState(prepared, self._decoder, self.inputs.eos_ids)
        return Generation(state, self._searched(state, params))

    async def collect(self, prepared: Prepared) -> RequestOutput:
        """Runs a prepared request to its end."""
        generation = self.run(prepared)
        async with aclosing(generation):
            async for _ in generation:
                pass
        return generation.state.snapshot()

    async def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[Delta, None]:
        """What each step adds."""
        generation = self.run(await self.prepare(prompt, sampling_params, request_id, priority=priority))
        async with aclosing(generation):
            async for batch in generation:
                for delta in batch:
                    yield delta

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Everything so far, after each step."""
        return self._snapshots(lambda: self.prepare(prompt, sampling_params, request_id, priority=priority))

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        **rendering: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """As `generate`, from messages; ``rendering`` are the options of `ChatRenderer.render`."""
        return self._snapshots(
            lambda: self.prepare_chat(messages, sampling_params, request_id, priority=priority, **rendering)
        )

    async def encode(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[EmbeddingRequestOutput, None]:
        """The embedding of a prompt, the one thing that comes; for a model that embeds."""
        params = pooling_params or PoolingParams()
        result = await self.collect(await self.prepare(prompt, params, request_id, priority=priority))
        yield result.embedded()

    async def abort(self, request_id: str) -> None:
        """Ends a request early; its iterator ends with ``finish_reason="abort"``. Unknown ids are ignored."""
        state = self._running.get(request_id)
        if state is not None:
            await self.client.abort(state.unfinished_ids())

    # --- the engine -------------------------------------------------------------------------------------------------

    async def health(self) -> Stats:
        """Proof that the engine's loop turns; raises `EngineDead`."""
        return await self.client.health()

    async def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; always True, where vLLM's can refuse."""
        await self.client.reset_prefix_cache()
        return True

    async def close(self) -> None:
        """Ends the engine; requests in flight end with ``finish_reason="abort"``."""
        await self.client.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    # --- inside -----------------------------------------------------------------------------------------------------

    async def _snapshots(self, prepare: Callable[[], Awaitable[Prepared]]) -> AsyncGenerator[RequestOutput, None]:
        generation = self.run(await prepare())
        async with aclosing(generation):
            async for _ in generation:
                yield generation.state.snapshot()

    async def _batches(self, state: RequestState) -> AsyncGenerator[list[Delta], None]:
        id = state.prepared.id
        if id in self._running:
            raise RequestError(f"a request with id {id!r} is running.", "Use another id.", param="request_id")
        self._running[id] = state
        try:
            sources = [await self.client.submit(request) for request in state.prepared.requests]
            async with aclosing(merged(sources)) as outputs:
                async for _, batch in outputs:
                    deltas: list[Delta] = []
                    try:
                        for output in batch:
                            delta = state.process(output)
                            if delta is None:
                                continue
                            deltas.append(delta)
                            if delta.finish_reason is not None and output.finish_reason is None:
                                await self.client.abort([output.id])  # a stop string
                    except OctavoError:
                        if deltas:
                            yield deltas
                        raise
                    if deltas:
                        yield deltas
                    if state.finished:
                        return
        finally:
            del self._running[id]
            if unfinished := state.unfinished_ids():
                await self.client.abort(unfinished)

    async def _searched(self, state: RequestState, params: BeamSearchParams) -> AsyncGenerator[list[Delta], None]:
        prepared = state.prepared
        requests, wanted = prepared.requests, prepared.params.logprobs
        step = msgspec.structs.replace(params.step(wanted or 0), detokenize=False)
        search = Search(prepared.prompt_token_ids, params, self.inputs.eos_ids, requests[0].sampling.max_tokens)
        for number in itertools.count():
            prompts = search.prompts()
            if not prompts:
                break
            found = await self._scored(f"{prepared.id}-{number}", prompts, step, requests[0])
            if len(found) < len(prompts):  # the engine is closed
                yield _deltas(state, [TokenOutput(id=one.id, finish_reason="abort") for one in requests])
                return
            search.take(found)
        best = zip(requests, search.best(), strict=True)
        yield _deltas(state, [output_of(one.id, beam, wanted) for one, beam in best])

    async def _scored(self, id: str, prompts: list[list[int]], params: SamplingParams, like: Request) -> list[Logprobs]:
        """The candidates for the next token of each prompt, run side by side with priority and salt as ``like`` has."""
        runs = [
            self.inputs.process_ids(f"{id}-{i}", ids, params, priority=like.priority, salt=like.salt)
            for i, ids in enumerate(prompts)
        ]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self.collect(one)) for one in runs]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [found for task in tasks for found in task.result().outputs[0].logprobs or []]


def _deltas(state: RequestState, outputs: list[TokenOutput]) -> list[Delta]:
    return [delta for delta in map(state.process, outputs) if delta is not None]


class Closable(Protocol[T_co]):
    """An async iterator that can be closed, such as an async generator."""

    def __aiter__(self) -> AsyncIterator[T_co]: ...

    async def aclose(self) -> None: ...


async def merged(sources: Sequence[Closable[T]]) -> AsyncGenerator[tuple[int, T], None]:
    """(number of its source, item), as they come, until all sources have ended or one has failed; all are closed."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as items:
            async for item in items:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | int] = asyncio.Queue()  # an item, or the number of a source that has ended

    async def feed(number: int) -> None:
        try:
            async with aclosing(sources[number]) as items:
                async for item in items:
                    queue.put_nowait((number, item))
        finally:
            queue.put_nowait(number)

    tasks = [asyncio.create_task(feed(number)) for number in range(len(sources))]
    try:
        left = len(tasks)
        while left:
            came = await queue.get()
            if isinstance(came, int):
                left -= 1
                await tasks[came]  # raises what ended it
            else:
                yield came
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def new_id() -> str:
    """An id that no other request has."""
    return uuid.uuid4().hex


def _size(prompt: object) -> int:
    """Characters or ids of a prompt of any form, even a wrong one, or of all that a mapping holds."""
    if isinstance(prompt, Mapping):
        return sum(map(_size, prompt.values()))
    return len(prompt) if isinstance(prompt, Sequence) else 0
