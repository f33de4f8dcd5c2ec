from __future__ import annotations

import pytest

from octavo.types import Request, TokenOutput
from tests.server.fake import SPOKEN, TEXT, Server, events, run, speak


def test_a_completion_has_text_reason_and_usage() -> None:
    async def work() -> None:
        server = Server()
        response = await server.post("/v1/completions", TEXT)
        body = response.json()
        assert response.status_code == 200
        assert body["object"] == "text_completion"
        assert body["model"] == "m"
        tokens = server.tokenizer.encode(SPOKEN)[:5]
        assert body["choices"] == [
            {
                "index": 0,
                "text": server.tokenizer.decode(tokens),
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ]
        prompt = len(server.tokenizer.encode("hello"))
        assert body["usage"] == {
            "prompt_tokens": prompt,
            "completion_tokens": 5,
            "total_tokens": prompt + 5,
            "prompt_tokens_details": {"cached_tokens": 4},
        }
        assert response.headers["x-request-id"] in body["id"]

    run(work)


def test_streamed_text_equals_the_whole_and_usage_comes_last_when_asked_for() -> None:
    async def work() -> None:
        server = Server()
        whole = (await server.post("/v1/completions", TEXT)).json()
        body = TEXT | {"stream": True, "stream_options": {"include_usage": True}}
        response = await server.post("/v1/completions", body)
        assert response.headers["content-type"].startswith("text/event-stream")
        chunks = events(response.text)
        assert "".join(c["text"] for chunk in chunks for c in chunk["choices"]) == whole["choices"][0]["text"]
        assert chunks[-2]["choices"][0]["finish_reason"] == "length"
        assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])
        without = await server.post("/v1/completions", TEXT | {"stream": True})
        assert all(chunk["usage"] is None for chunk in events(without.text))

    run(work)


@pytest.mark.parametrize("stream", [False, True])
def test_several_prompts_with_n_answers_each_are_numbered_in_order(stream: bool) -> None:
    def script(request: Request) -> list[TokenOutput]:
        last = request.token_ids[-4]
        return [TokenOutput(id=request.id, token_ids=[last], finish_reason="length")]

    async def work() -> None:
        server = Server(script)
        prompts = ["abc", server.tokenizer.encode("xyz"), "123"]
        response = await server.post("/v1/completions", {"prompt": prompts, "n": 2, "max_tokens": 1, "stream": stream})
        pieces = events(response.text) if stream else [response.json()]
        texts = {c["index"]: c["text"] for piece in pieces for c in piece["choices"]}
        assert texts == {0: "c", 1: "c", 2: "z", 3: "z", 4: "3", 5: "3"}

    run(work)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_first(stream: bool) -> None:
    async def work() -> None:
        server = Server()
        response = await server.post("/v1/completions", TEXT | {"echo": True, "n": 2, "stream": stream})
        pieces = events(response.text) if stream else [response.json()]
        for index in (0, 1):
            text = "".join(c["text"] for piece in pieces for c in piece["choices"] if c["index"] == index)
            assert text == "hello" + server.tokenizer.decode(server.tokenizer.encode(SPOKEN)[:5])

    run(work)


def test_logprobs_name_each_token_its_rivals_and_its_place() -> None:
    async def work() -> None:
        server = Server()
        body = (await server.post("/v1/completions", TEXT | {"logprobs": 2})).json()
        scores = body["choices"][0]["logprobs"]
        assert "".join(scores["tokens"]) == body["choices"][0]["text"]
        assert scores["token_logprobs"] == [-0.5] * 5
        assert [len(top) for top in scores["top_logprobs"]] == [2] * 5
        starts = [sum(len(t) for t in scores["tokens"][:i]) for i in range(5)]
        assert scores["text_offset"] == starts

    run(work)


def test_an_answer_that_the_server_s_end_cuts_off_before_its_first_token_is_still_one() -> None:
    def script(request: Request) -> list[TokenOutput]:
        return [TokenOutput(id=request.id, finish_reason="abort")]

    async def work() -> None:
        response = await Server(script).post("/v1/completions", TEXT | {"echo": True, "logprobs": 1})
        (choice,) = response.json()["choices"]
        assert (response.status_code, choice["finish_reason"], choice["text"]) == (200, "abort", "hello")
        assert choice["logprobs"]["token_logprobs"] == [None]

    run(work)


def test_echo_with_zero_tokens_scores_the_prompt_as_evaluation_harnesses_ask() -> None:
    async def work() -> None:
        server = Server()
        request = {"prompt": "hello you", "echo": True, "max_tokens": 0, "logprobs": 1}
        body = (await server.post("/v1/completions", request)).json()
        (choice,) = body["choices"]
        assert choice["text"] == "hello you"
        assert "".join(choice["logprobs"]["tokens"]) == "hello you"
        assert choice["logprobs"]["token_logprobs"][0] is None
        assert set(choice["logprobs"]["token_logprobs"][1:]) == {-0.5}
        assert body["usage"]["completion_tokens"] == 0

    run(work)


def test_what_is_only_echoed_is_streamed_as_it_is_answered_whole() -> None:
    async def work() -> None:
        server = Server(speak([2], finish="stop"))
        request = {"prompt": "hello you", "echo": True, "max_tokens": 0, "return_token_ids": True}
        (whole,) = (await server.post("/v1/completions", request)).json()["choices"]
        usage = {"include_usage": True, "continuous_usage_stats": True}
        response = await server.post("/v1/completions", request | {"stream": True, "stream_options": usage})
        piece, last = events(response.text)
        assert piece["choices"] == [whole]
        assert (whole["text"], whole["finish_reason"], whole["token_ids"]) == ("hello you", "length", [])
        assert piece["usage"]["completion_tokens"] == last["usage"]["completion_tokens"] == 0

    run(work)


def test_a_stop_string_ends_the_text_and_the_request() -> None:
    async def work() -> None:
        server = Server()
        body = (await server.post("/v1/completions", TEXT | {"max_tokens": 60, "stop": ["zzz", ", th"]})).json()
        choice = body["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hello world", "stop", ", th")
        assert len(server.fake.aborted) == 1

    run(work)
