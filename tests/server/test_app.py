from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx
import pytest

from octavo.server.app import ROUTES
from octavo.types import Request, Stats, TokenOutput
from tests.frontend.fakes import info
from tests.server.fake import SPOKEN, Server, speak

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hello", "max_tokens": 5}


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(work(), 20))


def events(text: str) -> list[dict[str, Any]]:
    """The JSON of a stream's events; checks its frame and its end."""
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


# --- completions ----------------------------------------------------------------------------------------------


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


def test_a_stop_string_ends_the_text_and_the_request() -> None:
    async def work() -> None:
        server = Server()
        body = (await server.post("/v1/completions", TEXT | {"max_tokens": 60, "stop": ["zzz", ", th"]})).json()
        choice = body["choices"][0]
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hello world", "stop", ", th")
        assert len(server.fake.aborted) == 1

    run(work)


# --- chat -----------------------------------------------------------------------------------------------------


def test_chat_renders_the_template_and_answers_as_the_assistant() -> None:
    async def work() -> None:
        server = Server()
        parts = [{"type": "text", "text": "hi"}]
        body = (await server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": parts}]})).json()
        (choice,) = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": SPOKEN, "refusal": None}
        prompt = server.fake.requests[0].token_ids
        assert len(prompt) // 4 == len(server.tokenizer.encode("[user]hi[bot]"))
        assert body["usage"]["prompt_tokens"] == len(prompt) // 4
        assert body["object"] == "chat.completion"

    run(work)


def test_streamed_chat_greets_once_per_choice_and_adds_up() -> None:
    async def work() -> None:
        server = Server()
        response = await server.post("/v1/chat/completions", CHAT | {"stream": True, "n": 2})
        chunks = events(response.text)
        for index in (0, 1):
            deltas = [c["delta"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
            assert [d["role"] for d in deltas if "role" in d] == ["assistant"]
            assert deltas[0] == {"role": "assistant", "content": ""}
            assert "".join(d["content"] for d in deltas) == SPOKEN
        assert chunks[0]["object"] == "chat.completion.chunk"

    run(work)


def test_chat_logprobs_carry_tokens_bytes_and_the_best_rivals() -> None:
    async def work() -> None:
        server = Server()
        options = {"logprobs": True, "top_logprobs": 3, "max_completion_tokens": 2}
        body = (await server.post("/v1/chat/completions", CHAT | options)).json()
        content = body["choices"][0]["logprobs"]["content"]
        assert len(content) == 2
        assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
        assert [one["logprob"] for one in content[0]["top_logprobs"]] == [-0.5, -1.5, -2.5]
        plain = (await server.post("/v1/chat/completions", CHAT | {"logprobs": True, "max_tokens": 2})).json()
        assert plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []

    run(work)


# --- what is refused ------------------------------------------------------------------------------------------

BAD: list[tuple[str, dict[str, Any], str | None]] = [
    ("/v1/completions", TEXT | {"temprature": 0.5}, "temprature"),
    ("/v1/completions", TEXT | {"temperature": -1}, "temperature"),
    ("/v1/completions", TEXT | {"temperature": "hot"}, "temperature"),
    ("/v1/completions", TEXT | {"n": 100_000}, "n"),
    ("/v1/completions", TEXT | {"n": 0}, "n"),
    ("/v1/completions", TEXT | {"logprobs": 21}, "logprobs"),
    ("/v1/completions", TEXT | {"stop": ["x"] * 65}, "stop"),
    ("/v1/completions", TEXT | {"stop": "x" * 2000}, "stop"),
    ("/v1/completions", TEXT | {"stop": [""]}, "stop"),
    ("/v1/completions", TEXT | {"max_tokens": 0}, "max_tokens"),
    ("/v1/completions", TEXT | {"max_tokens": 100_000}, "max_tokens"),
    ("/v1/completions", TEXT | {"min_tokens": 9}, "min_tokens"),
    ("/v1/completions", TEXT | {"logit_bias": {"5": 1000}}, "logit_bias[5]"),
    ("/v1/completions", TEXT | {"logit_bias": {"99999": 1}}, "logit_bias"),
    ("/v1/completions", TEXT | {"stop_token_ids": [-1]}, "stop_token_ids"),
    ("/v1/completions", TEXT | {"prompt": ""}, "prompt"),
    ("/v1/completions", TEXT | {"prompt": []}, "prompt"),
    ("/v1/completions", TEXT | {"prompt": ["a", ""]}, "prompt"),
    ("/v1/completions", TEXT | {"prompt": [5, "a"]}, "prompt"),
    ("/v1/completions", TEXT | {"prompt": [99_999]}, "prompt"),
    ("/v1/completions", TEXT | {"prompt": [-1]}, "prompt"),
    ("/v1/completions", TEXT | {"prompt": "ab " * 200}, "prompt"),
    ("/v1/completions", TEXT | {"prompt": ["a"] * 1025}, "prompt"),
    ("/v1/completions", TEXT | {"prompt": ["a"] * 9, "n": 128}, "n"),
    ("/v1/completions", TEXT | {"prompt": "a" * 100_000}, "prompt"),
    ("/v1/completions", TEXT | {"repetition_penalty": 1e-300}, "repetition_penalty"),
    ("/v1/completions", {"model": "m"}, "prompt"),
    ("/v1/completions", TEXT | {"suffix": "end"}, "suffix"),
    ("/v1/completions", TEXT | {"best_of": 3}, "best_of"),
    ("/v1/completions", TEXT | {"stream_options": {"include_usage": True}}, "stream_options"),
    ("/v1/completions", TEXT | {"stream": True, "stream_options": {"frobnicate": 1}}, "stream_options.frobnicate"),
    ("/v1/completions", TEXT | {"stream": True, "echo": True, "logprobs": 1}, "echo"),
    ("/v1/chat/completions", {"model": "m", "messages": []}, "messages"),
    ("/v1/chat/completions", {"model": "m", "messages": "hi"}, "messages"),
    ("/v1/chat/completions", CHAT | {"tools": [{"type": "function"}]}, "tools"),
    ("/v1/chat/completions", CHAT | {"tool_choice": "required"}, "tool_choice"),
    ("/v1/chat/completions", CHAT | {"response_format": {"type": "xml"}}, "response_format"),
    ("/v1/chat/completions", CHAT | {"top_logprobs": 3}, "top_logprobs"),
    ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
    ("/v1/chat/completions", CHAT | {"chat_template": "{{ 1 }}"}, "chat_template"),
    ("/v1/chat/completions", CHAT | {"guided_decoding_backend": "x"}, "guided_decoding_backend"),
    ("/tokenize", {"model": "m"}, "prompt"),
    ("/detokenize", {"tokens": [99_999]}, "tokens"),
]


@pytest.mark.parametrize(("path", "body", "param"), BAD, ids=lambda value: str(value)[-40:])
def test_a_bad_field_is_refused_by_name_and_the_next_request_works(path: str, body: Any, param: str | None) -> None:
    async def work() -> None:
        server = Server()
        response = await server.post(path, body)
        error = response.json()["error"]
        assert response.status_code == 400
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
        assert error["message"]
        assert error["code"]
        assert (await server.post("/v1/completions", TEXT)).status_code == 200

    run(work)


async def post_near_the_end(**fields: Any) -> httpx.Response:
    return await Server().post("/v1/completions", {"prompt": [1] * 124, **fields})


def test_only_a_max_tokens_that_is_given_is_refused_for_want_of_room() -> None:
    answer = asyncio.run(post_near_the_end())
    assert answer.json()["usage"]["completion_tokens"] == 4
    refusal = asyncio.run(post_near_the_end(max_tokens=16))
    assert (refusal.status_code, refusal.json()["error"]["param"]) == (400, "max_tokens")


def test_bookkeeping_fields_and_nulls_are_accepted() -> None:
    async def work() -> None:
        server = Server()
        extra = {
            "user": "u",
            "metadata": {"a": "b"},
            "store": False,
            "service_tier": "auto",
            "stop": None,
            "seed": None,
        }
        assert (await server.post("/v1/completions", TEXT | extra)).status_code == 200
        none = {"tools": None, "tool_choice": "none", "response_format": {"type": "text"}, "logprobs": None}
        assert (await server.post("/v1/chat/completions", CHAT | extra | none)).status_code == 200

    run(work)


@pytest.mark.parametrize("body", [b"{", b"", b"\xff\xfe", b'{"prompt": "a"} x', b'{"messages":' + b"[" * 20_000])
def test_broken_json_is_refused(body: bytes) -> None:
    async def work() -> None:
        server = Server()
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            response = await server.http.post(path, content=body)
            assert response.status_code == 400
            assert response.json()["error"]["type"] == "invalid_request_error"

    run(work)


def test_another_model_is_404_and_every_served_name_works() -> None:
    async def work() -> None:
        server = Server()
        response = await server.post("/v1/completions", TEXT | {"model": "gpt-4"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
        assert (await server.post("/v1/completions", TEXT | {"model": "alias"})).json()["model"] == "alias"
        assert (await server.http.get("/v1/models/gpt-4")).status_code == 404
        assert (await server.http.get("/v1/models/m")).json()["id"] == "m"

    run(work)


def test_unknown_paths_and_methods_get_json_errors() -> None:
    async def work() -> None:
        server = Server()
        missing = await server.http.get("/v1/nothing")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
        wrong = await server.http.get("/v1/completions")
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
        assert wrong.headers["allow"] == "POST"
        assert (await server.http.put("/v1/files")).headers["allow"] == "GET, HEAD, POST"
        assert "allow" not in missing.headers
        assert (await server.http.head("/v1/models")).status_code == 200

    run(work)


@pytest.mark.parametrize(
    ("body", "param", "text"),
    [
        ({"max_tokens": 3}, "prompt", "prompt is missing. Send it."),
        (TEXT | {"logit_bias": {"x": 1}}, "logit_bias", "logit_bias: Expected `int`, got `str`."),
        (TEXT | {"response_format": {}}, "response_format.type", "response_format.type is missing."),
        (TEXT | {"max_tokens": 0}, "max_tokens", "max_tokens is 0, outside [1, 2147483647]."),
        (TEXT | {"seed": 2**63}, "seed", f"outside [{-(2**63)}, {2**63 - 1}]."),
        (TEXT | {"temperature": -0.5}, "temperature", "temperature is -0.5, outside [0, 100]."),
        (TEXT | {"priority": 2**31}, "priority", "outside [-2147483647, 2147483647]."),
        ({"prompt": []}, "prompt", "prompt holds 0 prompts, outside [1, 1024]. Send at least one"),
    ],
)
def test_an_error_names_the_field_and_its_bounds_as_they_are(body: dict[str, Any], param: str, text: str) -> None:
    async def work() -> None:
        answer = await Server().post("/v1/completions", body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert text in answer.json()["error"]["message"]

    run(work)


def test_a_body_over_the_limit_is_413_announced_or_not() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 100

    async def work() -> None:
        server = Server(max_body=1000)
        announced = await server.http.post("/v1/completions", content=b"x" * 2000)
        streamed = await server.http.post("/v1/completions", content=pieces())
        lying = await server.http.post("/v1/completions", content=pieces(), headers={"content-length": "x"})
        assert [r.status_code for r in (announced, streamed, lying)] == [413, 413, 413]
        assert (await server.post("/v1/completions", TEXT)).status_code == 200

    run(work)


# --- the guard ------------------------------------------------------------------------------------------------


def test_the_key_guards_every_route_but_health_ping_and_empty_pages() -> None:
    async def work() -> None:
        server = Server(api_key="secret")
        for method, path in [(route.method, route.path) for route in ROUTES]:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
                response = await server.http.request(method, path, headers=headers)
                assert (response.status_code == 401) == (path not in ("/health", "/ping", "/", "/dashboard")), path
        assert (await server.http.get("/v1/nothing")).status_code == 401
        good = {"authorization": "Bearer secret"}
        assert (await server.post("/v1/completions", TEXT, headers=good)).status_code == 200
        assert (await server.post("/reset_prefix_cache", {}, headers=good)).status_code == 200
        assert (await server.http.get("/metrics", headers=good)).status_code == 200

    run(work)


def test_an_unexpected_exception_is_500_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    def script(request: Request) -> list[TokenOutput]:
        raise ZeroDivisionError("secret internals")

    async def work() -> None:
        server = Server(script)
        response = await server.post("/v1/completions", TEXT)
        assert response.status_code == 500
        assert "secret internals" not in response.text
        assert response.headers["x-request-id"] in response.text
        assert response.headers["x-request-id"] in caplog.text

    run(work)


# --- the engine's refusals and end ----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("status", "header"), [(503, "1"), (400, None)])
def test_a_refusal_of_the_core_has_its_status_streamed_or_not(stream: bool, status: int, header: str | None) -> None:
    def script(request: Request) -> list[TokenOutput]:
        return [TokenOutput(id=request.id, finish_reason="error", error="No room.", status=status)]

    async def work() -> None:
        server = Server(script)
        response = await server.post("/v1/completions", TEXT | {"stream": stream})
        assert response.status_code == status
        assert response.json()["error"]["message"].startswith("No room.")
        assert response.headers.get("retry-after") == header

    run(work)


def test_an_error_in_the_middle_of_a_stream_is_its_last_event() -> None:
    def script(request: Request) -> list[TokenOutput]:
        token = TokenOutput(id=request.id, token_ids=[70])
        return [token, token, TokenOutput(id=request.id, finish_reason="error", error="Broke.", status=500)]

    async def work() -> None:
        server = Server(script)
        response = await server.post("/v1/completions", TEXT | {"stream": True, "max_tokens": 9})
        chunks = events(response.text)
        assert [len(chunk.get("choices", ())) for chunk in chunks] == [1, 1, 0]
        assert chunks[-1]["error"]["message"].startswith("Broke.")
        assert chunks[-1]["error"]["type"] == "server_error"

    run(work)


def test_one_failing_prompt_ends_its_siblings() -> None:
    def script(request: Request) -> list[TokenOutput]:
        if request.token_ids[0] == 66:
            return [TokenOutput(id=request.id, finish_reason="error", error="No room.", status=503)]
        return speak([70] * 50, ends=False)(request)

    async def work() -> None:
        server = Server(script)
        response = await server.post("/v1/completions", {"prompt": [[65], [66], [67]], "max_tokens": 60})
        assert response.status_code == 503
        assert {id[-1] for id in server.fake.aborted} >= {"0", "2"}

    run(work)


def test_a_dead_engine_is_500_for_requests_and_503_for_health() -> None:
    async def work() -> None:
        server = Server()
        assert (await server.http.get("/health")).status_code == 200
        server.die()
        response = await server.post("/v1/completions", TEXT)
        assert (response.status_code, response.json()["error"]["code"]) == (500, "ENG001")
        assert (await server.http.get("/health")).status_code == 503
        assert (await server.http.get("/ping")).status_code == 200
        assert (await server.http.get("/metrics")).status_code == 200

    run(work)


def test_a_server_that_is_shutting_down_refuses_and_lets_running_requests_end() -> None:
    async def work() -> None:
        server = Server(speak([70] * 50, ends=False))
        running = asyncio.create_task(server.post("/v1/completions", TEXT | {"max_tokens": 60}))
        await asyncio.sleep(0.05)
        assert await server.service.drained(0.01) is False
        late = await server.post("/v1/completions", TEXT)
        assert (late.status_code, late.headers["retry-after"]) == (503, "1")
        assert (await server.http.get("/health")).status_code == 503
        await server.fake.abort([r.id for r in server.fake.requests])
        answer = (await running).json()
        assert answer["choices"][0]["finish_reason"] == "abort"
        assert await server.service.drained(1) is True

    run(work)


# --- the client's leaving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_aborts_all_its_requests(stream: bool) -> None:
    async def work() -> None:
        server = Server(speak([70] * 50, ends=False))
        body = json.dumps({"prompt": ["a", "b"], "n": 2, "max_tokens": 60, "stream": stream}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        left = asyncio.Event()

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            pass

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
        task = asyncio.create_task(server.app(scope, receive, send))  # type: ignore[arg-type]
        await asyncio.sleep(0.1)
        assert len(server.fake.requests) == 4
        assert not server.fake.aborted
        left.set()
        await task
        assert sorted(server.fake.aborted) == sorted(r.id for r in server.fake.requests)
        assert await server.service.drained(0.1)

    run(work)


# --- the rest -------------------------------------------------------------------------------------------------


def test_tokenize_and_detokenize_are_inverse() -> None:
    async def work() -> None:
        server = Server()
        body = (await server.post("/tokenize", {"prompt": "hello wörld", "return_token_strs": True})).json()
        assert body["tokens"] == server.tokenizer.encode("hello wörld")
        assert (body["count"], body["max_model_len"]) == (len(body["tokens"]), 128)
        assert len(body["token_strs"]) == body["count"]
        assert (await server.post("/detokenize", {"tokens": body["tokens"]})).json() == {"prompt": "hello wörld"}
        chat = (await server.post("/tokenize", {"messages": CHAT["messages"]})).json()
        assert server.tokenizer.decode(chat["tokens"]) == "[user]hi[bot]"

    run(work)


def test_models_version_and_reset() -> None:
    async def work() -> None:
        server = Server()
        card, alias = (await server.http.get("/v1/models")).json()["data"]
        assert alias == card | {"id": "alias"}
        assert (await server.http.get("/v1/models/alias")).json() == alias
        assert (card["id"], card["object"], card["max_model_len"]) == ("m", "model", 128)
        assert (await server.http.get("/version")).json()["version"]
        assert (await server.post("/reset_prefix_cache", None)).json() == {"success": True}

    run(work)


def test_metrics_tell_the_share_of_the_floor_where_it_is_known() -> None:
    async def work() -> None:
        server = Server()
        assert "floor_share" not in (await server.http.get("/metrics")).text
        server.fake.info = info(weight_bytes=1000, kv_bytes=10, bandwidth=6000.0)
        server.fake.stats = Stats(steps=5, slots_filled=100, busy_seconds=2.0)
        text = (await server.http.get("/metrics")).text
        assert 'octavo:floor_share{engine="0",model_name="m"} 0.5' in text
        assert 'octavo:bytes_read_total{engine="0",model_name="m"} 6000.0' in text

    run(work)


def test_metrics_use_the_names_that_dashboards_know() -> None:
    async def work() -> None:
        server = Server()
        await server.post("/v1/completions", TEXT | {"n": 2})
        text = (await server.http.get("/metrics")).text
        samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        label, of_engine = '{model_name="m"}', '{engine="0",model_name="m"}'
        for name in (
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_perc",
            "prompt_tokens_total",
            "generation_tokens_total",
            "prefix_cache_hits_total",
        ):
            assert f"vllm:{name}{of_engine}" in samples
        for name in (
            "time_to_first_token_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
            "request_inference_time_seconds",
        ):
            assert samples[f"vllm:{name}_count{label}"] == "1.0"
        names = ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time")
        whole, *parts = [float(samples[f"vllm:{name}_seconds_sum{label}"]) for name in names]
        assert sum(parts) == pytest.approx(whole)
        assert min(parts[0], parts[2]) > 0
        assert samples[f"vllm:request_params_n_sum{label}"] == "2.0"
        assert samples[f"vllm:request_params_max_tokens_sum{label}"] == "5.0"
        assert samples['vllm:request_success_total{finished_reason="length",model_name="m"}'] == "2.0"
        assert samples[f"vllm:request_generation_tokens_sum{label}"] == "10.0"

    run(work)
