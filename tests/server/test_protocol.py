from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.server.fake import CHAT, TEXT, Server, run

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
    ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 1025}, "top_logprobs"),
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
        (TEXT | {"max_new_tokens": 3}, "max_new_tokens", "Leave it out, or send max_tokens."),
        (TEXT | {"repetition_penalti": 2}, "repetition_penalti", "or send repetition_penalty."),
        (
            TEXT | {"stream_options": {"x": None}},
            "stream_options.x",
            "'stream_options.x' is not a field of this request.",
        ),
    ],
)
def test_an_error_names_the_field_and_its_bounds_as_they_are(body: dict[str, Any], param: str, text: str) -> None:
    async def work() -> None:
        answer = await Server().post("/v1/completions", body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param
        assert text in answer.json()["error"]["message"]

    run(work)


def test_a_field_that_is_null_says_nothing_whatever_its_name() -> None:
    async def work() -> None:
        server = Server()
        body = TEXT | {"prompt_embeds": None, "kv_transfer_params": None, "logit_bias": {"5": 1.0}, "seed": 4}
        assert (await server.post("/v1/completions", body)).status_code == 200
        sampling = server.fake.requests[-1].sampling
        assert (sampling.logit_bias, sampling.seed) == ({5: 1.0}, 4)
        refused = await server.post("/v1/completions", body | {"kv_transfer_params": {}})
        assert refused.json()["error"]["param"] == "kv_transfer_params"

    run(work)
