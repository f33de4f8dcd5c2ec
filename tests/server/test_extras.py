"""Parameters of completions beyond OpenAI's, as vLLM names them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.frontend.fakes import prompt_of
from tests.server.fake import SPOKEN, TEMPLATE, Server, run

TEXT: Any = {"prompt": "hello", "max_tokens": 4}
CHAT: Any = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
BOTH = [("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)]


async def chunks(server: Server, path: str, body: Any) -> list[Any]:
    response = await server.post(path, {**body, "stream": True})
    assert response.status_code == 200, response.text
    return [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize(("path", "body"), BOTH)
def test_token_ids_are_returned_whole_and_in_pieces(path: str, body: Any) -> None:
    async def work() -> None:
        server = Server()
        ask = {**body, "return_token_ids": True}
        whole = (await server.post(path, ask)).json()
        prompt = prompt_of(server.fake.requests[-1])
        made = server.tokenizer.encode(SPOKEN)[:4]
        assert whole["choices"][0]["token_ids"] == made
        assert whole.get("prompt_token_ids", whole["choices"][0].get("prompt_token_ids")) == prompt
        pieces = await chunks(server, path, ask)
        assert [id for piece in pieces for choice in piece["choices"] for id in choice.get("token_ids", ())] == made
        assert pieces[0].get("prompt_token_ids", pieces[0]["choices"][0].get("prompt_token_ids")) == prompt
        assert all("prompt_token_ids" not in json.dumps(piece) for piece in pieces[1:])
        plain = (await server.post(path, body)).text
        assert "token_ids" not in plain

    run(work)


@pytest.mark.parametrize(("path", "body"), BOTH)
def test_tokens_of_log_probabilities_can_be_named_by_their_ids(path: str, body: Any) -> None:
    async def work() -> None:
        server = Server()
        scores = {"logprobs": True, "top_logprobs": 1} if "messages" in body else {"logprobs": 1, "echo": True}
        choice = (await server.post(path, {**body, **scores, "return_tokens_as_token_ids": True})).json()["choices"][0]
        made = [f"token_id:{token}" for token in server.tokenizer.encode(SPOKEN)[:4]]
        if "messages" in body:
            names = [one["token"] for one in choice["logprobs"]["content"]]
            assert bytes(choice["logprobs"]["content"][0]["bytes"]).decode() == "hello"
        else:
            names = choice["logprobs"]["tokens"]
            made = [f"token_id:{token}" for token in prompt_of(server.fake.requests[-1])] + made
        assert names == made

    run(work)


@pytest.mark.parametrize(("path", "body"), BOTH)
def test_usage_comes_with_every_piece_when_asked_for(path: str, body: Any) -> None:
    async def work() -> None:
        server = Server()
        options = {"include_usage": True, "continuous_usage_stats": True}
        *pieces, last = await chunks(server, path, {**body, "stream_options": options})
        used = [piece["usage"]["completion_tokens"] for piece in pieces if piece["usage"]]
        assert used == [1, 2, 3, 4]
        assert last["usage"]["completion_tokens"] == 4
        assert {piece["usage"]["prompt_tokens"] for piece in pieces if piece["usage"]} == {
            last["usage"]["prompt_tokens"]
        }

    run(work)


def test_streamed_log_probabilities_have_their_place_in_the_whole_text() -> None:
    async def work() -> None:
        server = Server()
        ask = {**TEXT, "logprobs": 1}
        whole = (await server.post("/v1/completions", ask)).json()["choices"][0]["logprobs"]["text_offset"]
        pieces = await chunks(server, "/v1/completions", ask)
        found = [
            offset for piece in pieces for choice in piece["choices"] for offset in choice["logprobs"]["text_offset"]
        ]
        assert found == whole

    run(work)


def test_documents_and_variables_reach_the_template() -> None:
    async def work() -> None:
        server = Server(
            template=TEMPLATE
            + "{% for d in documents or [] %}<{{ d.text }}>{% endfor %}{{ tone }}{{ reasoning_effort }}"
        )
        extras = {"documents": [{"text": "one"}], "chat_template_kwargs": {"tone": "calm"}, "reasoning_effort": "low"}
        await server.post("/v1/chat/completions", {**CHAT, **extras})
        assert server.tokenizer.decode(prompt_of(server.fake.requests[-1])).endswith("[bot]<one>calmlow")

    run(work)


def test_prefixes_are_shared_within_one_salt_and_one_key() -> None:
    async def work() -> None:
        server = Server()
        for salt in (None, "a", "b", "a"):
            await server.post("/v1/chat/completions", {**CHAT, "cache_salt": salt})
        none, a, b, again = [request.page_hashes for request in server.fake.requests]
        assert a == again
        assert len({none, a, b}) == 3
        guarded = Server(api_key="k")
        await guarded.post("/v1/chat/completions", CHAT, headers={"authorization": "Bearer k"})
        assert guarded.fake.requests[0].salt != server.fake.requests[0].salt

    run(work)


@pytest.mark.parametrize(
    "extra",
    [
        {"verbosity": "low"},
        {"cache_salt": "x" * 2000},
        {"web_search_options": {}},
        {"audio": {}},
    ],
)
def test_what_would_change_the_answer_and_cannot_be_done_is_refused(extra: Any) -> None:
    async def work() -> None:
        refused = await Server().post("/v1/chat/completions", {**CHAT, **extra})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, next(iter(extra)))

    run(work)


@pytest.mark.parametrize(("keep", "left"), [(5, 5), (-1, 124), (1000, 139)])
def test_the_end_of_a_prompt_is_kept(keep: int, left: int) -> None:
    async def work() -> None:
        server = Server(max_model_len=128 if keep != 1000 else 1000)
        ask = {**CHAT, "messages": [{"role": "user", "content": "x" * 128}], "truncate_prompt_tokens": keep}
        assert (await server.post("/v1/chat/completions", ask)).status_code == 200
        prompt = prompt_of(server.fake.requests[-1])
        assert len(prompt) == left
        assert "[user]xxx[bot]".endswith(server.tokenizer.decode(prompt)[-5:])
        refused = await server.post("/v1/chat/completions", {**ask, "truncate_prompt_tokens": 0})
        assert refused.json()["error"]["param"] == "truncate_prompt_tokens"

    run(work)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_timings_come_with_the_whole_and_with_the_last_chunk_when_asked_for(path: str) -> None:
    async def work() -> None:
        server = Server()
        ask = {**(CHAT if "chat" in path else {"prompt": "hello"}), "max_tokens": 5}
        assert "timings" not in (await server.post(path, ask)).json()
        whole = (await server.post(path, {**ask, "return_timings": True})).json()["timings"]
        text = (await server.post(path, {**ask, "return_timings": True, "stream": True})).text
        *earlier, last = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert not any("timings" in chunk for chunk in earlier)
        for timings in (whole, last["timings"]):
            assert (timings["predicted_n"], timings["cached_n"]) == (5, 4)
            assert 0 < timings["prompt_ms"] <= timings["total_ms"] < 20_000
            rest = timings["total_ms"] - timings["prompt_ms"]
            assert timings["predicted_per_token_ms"] == pytest.approx(rest / 4)
        assert last["choices"] == []

    run(work)
