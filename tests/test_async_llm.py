"""`AsyncLLM` over a fake engine: streams, cancellation, faults."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from octavo.async_llm import AsyncLLM
from octavo.errors import EngineDead, Overloaded, RequestError
from octavo.frontend.loading import TextModel
from octavo.sampling_params import SamplingParams
from octavo.types import Request, TokenOutput
from tests.frontend.fakes import FakeClient, byte_level, info
from tests.waiting import PATIENCE

TOKENIZER = byte_level(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
EOS = TOKENIZER.eos_id


def says(text: str, finish: Any = "length") -> Callable[[Request], list[TokenOutput]]:
    """A script that sends ``text`` a token at a time, the last with ``finish``; None: it hangs after it."""

    def script(request: Request) -> list[TokenOutput]:
        ids = TOKENIZER.encode(text)
        ends = [None] * (len(ids) - 1) + [finish]
        return [TokenOutput(id=request.id, token_ids=[i], finish_reason=e) for i, e in zip(ids, ends, strict=True)]

    return script


def make(script: Callable[[Request], list[TokenOutput]], **facts: Any) -> tuple[AsyncLLM, FakeClient]:
    client = FakeClient(script, info(**facts))
    return AsyncLLM(client, TextModel(TOKENIZER, frozenset({EOS}))), client


def run(work: Awaitable[Any]) -> Any:
    async def main() -> Any:
        return await asyncio.wait_for(work, PATIENCE)

    return asyncio.run(main())


def test_generate_yields_everything_so_far() -> None:
    async def work() -> None:
        llm, _ = make(says("wabc"))
        outputs = [o async for o in llm.generate("he")]
        assert [o.outputs[0].text for o in outputs] == ["w", "wa", "wab", "wabc"]
        assert [o.finished for o in outputs] == [False, False, False, True]
        assert len(outputs[0].outputs[0].token_ids) == 1  # a later step does not change it

    run(work())


def test_stream_yields_what_each_step_adds() -> None:
    async def work() -> None:
        llm, _ = make(says("wabc"))
        deltas = [d async for d in llm.stream("he")]
        assert [d.text for d in deltas] == list("wabc")
        assert deltas[-1].finish_reason == "length"

    run(work())


def test_a_stop_string_ends_the_stream_and_aborts_the_rest() -> None:
    async def work() -> None:
        llm, client = make(says("wabcdef", None))
        deltas = [d async for d in llm.stream("he", SamplingParams(stop="bc"), "r")]
        assert "".join(d.text for d in deltas) == "wa"
        assert client.aborted == ["r"]

    run(work())


def test_several_outputs_are_merged() -> None:
    async def work() -> None:
        llm, client = make(lambda r: says("ab" if r.id.endswith("_0") else "cdef")(r))
        result = await llm.collect(await llm.prepare("he", SamplingParams(n=2)))
        assert [o.text for o in result.outputs] == ["ab", "cdef"]
        assert client.aborted == []

    run(work())


def test_closing_the_iterator_aborts_the_request() -> None:
    async def work() -> None:
        llm, client = make(says("wabc", None))
        async with aclosing(llm.generate("he", request_id="r")) as outputs:
            async for _ in outputs:
                break
        assert client.aborted == ["r"]
        assert llm._running == {}

    run(work())


@pytest.mark.parametrize("n", [1, 2])
def test_cancelling_the_task_aborts_every_output(n: int) -> None:
    async def work() -> None:
        llm, client = make(says("a", None))

        async def consume() -> None:
            async for _ in llm.stream("he", SamplingParams(n=n), "r"):
                pass

        task = asyncio.create_task(consume())
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(client.requests) == n
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(client.aborted) == (["r"] if n == 1 else ["r_0", "r_1"])

    run(work())


def test_abort_by_id_ends_the_stream() -> None:
    async def work() -> None:
        llm, _ = make(says("ab", None))
        reasons = []
        async for delta in llm.stream("he", request_id="r"):
            reasons.append(delta.finish_reason)
            if len(reasons) == 2:
                await llm.abort("r")
        assert reasons == [None, None, "abort"]
        await llm.abort("unknown")

    run(work())


def test_a_refusal_by_the_engine_is_raised_and_siblings_are_aborted() -> None:
    def script(request: Request) -> list[TokenOutput]:
        if request.id == "r_1":
            return [TokenOutput(id=request.id, finish_reason="error", error="the queue is full.", status=503)]
        return says("ab", None)(request)

    async def work() -> None:
        llm, client = make(script)
        with pytest.raises(Overloaded, match="queue is full"):
            await llm.collect(await llm.prepare("he", SamplingParams(n=2), "r"))
        assert "r_0" in client.aborted

    run(work())


def test_the_death_of_the_engine_reaches_every_stream() -> None:
    async def work() -> None:
        llm, client = make(says("abcdef"))
        stream = llm.stream("he")
        await anext(stream)
        client.dead = EngineDead("it died.")
        with pytest.raises(EngineDead, match="it died"):
            await anext(stream)
        with pytest.raises(EngineDead):
            await llm.health()
        with pytest.raises(EngineDead):
            await anext(llm.stream("he"))

    run(work())


def test_a_bad_request_is_refused_before_anything_is_sent() -> None:
    async def work() -> None:
        llm, client = make(says("ab"))
        with pytest.raises(RequestError, match="max_model_len"):
            await llm.prepare([1] * 60, SamplingParams(max_tokens=10))
        with pytest.raises(RequestError):
            await llm.prepare({"prompt": 5})
        assert client.requests == []

    run(work())


def test_an_id_that_is_running_is_refused() -> None:
    async def work() -> None:
        llm, _ = make(says("ab", None))
        first = llm.stream("he", request_id="r")
        await anext(first)
        with pytest.raises(RequestError, match="'r' is running"):
            await anext(llm.stream("he", request_id="r"))
        await first.aclose()
        second = llm.stream("he", request_id="r")
        await anext(second)
        await second.aclose()

    run(work())


def test_many_prompts_of_one_request_do_not_hold_up_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def encode_all(texts: Sequence[str], **options: Any) -> list[list[int]]:
        threads.append(threading.current_thread())
        return [TOKENIZER.encode(text) for text in texts]

    monkeypatch.setattr(TOKENIZER, "encode_all", encode_all)

    async def work() -> None:
        llm, _ = make(says("ab"))
        few = await llm.prepare_all({"a": "he", "b": [1, 2], "c": "w"})
        assert [(one.id, one.prompt) for one in few] == [("a", "he"), ("b", None), ("c", "w")]
        many = await llm.prepare_all({str(i): "he w" for i in range(2000)})
        assert [one.id for one in many] == [str(i) for i in range(2000)]

    run(work())
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


def test_chat_and_long_prompts_are_prepared_in_threads() -> None:
    async def work() -> None:
        llm, client = make(says("ab"), max_model_len=100_000)
        outputs = [o async for o in llm.chat([{"role": "user", "content": "hey"}])]
        assert outputs[-1].prompt == "hey"
        assert len((await llm.prepare("w" * 10_000)).prompt_token_ids) == 10_000
        async with llm:
            pass
        assert client.closed

    run(work())
