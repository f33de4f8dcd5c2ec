"""``/v1/embeddings`` through the client of OpenAI, and what engines that embed refuse."""

from __future__ import annotations

import base64
import json
from array import array
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest

from octavo.server.batches.lines import Line, answer_line
from octavo.server.files.store import FileStore
from tests.frontend.fakes import prompt_of
from tests.server.fake import CHAT, POOLER, TEXT, Server, embed, run

PATH: Literal["/v1/embeddings"] = "/v1/embeddings"


def embedder(**options: Any) -> Server:
    return Server(embed, pooler=POOLER, **options)


def client_of(server: Server) -> openai.AsyncOpenAI:
    http: Any = httpx.AsyncClient(transport=httpx.ASGITransport(server.app), base_url="http://test")
    return openai.AsyncOpenAI(api_key="none", base_url="http://test/v1", http_client=http, max_retries=0)


def numbers(text: str, server: Server) -> list[float]:
    ids = server.tokenizer.encode(text)
    return array("f", [len(ids), sum(ids), 0.1, 2.0]).tolist()


def test_the_client_of_openai_gets_an_embedding_of_each_input_in_order() -> None:
    async def work() -> None:
        server = embedder()
        client: Any = client_of(server)
        texts = ["hello", "a longer text", "hello"]
        wanted = [numbers(text, server) for text in texts]
        for options in ({}, {"encoding_format": "float"}):
            made = await client.embeddings.create(model="alias", input=texts, user="u", **options)
            assert [one.embedding for one in made.data] == wanted
        raw = (await server.post(PATH, {"input": texts, "encoding_format": "base64"})).json()["data"]
        assert [array("f", base64.b64decode(one["embedding"])).tolist() for one in raw] == wanted
        assert [one.index for one in made.data] == [0, 1, 2]
        count = sum(len(server.tokenizer.encode(text)) for text in texts)
        assert (made.usage.prompt_tokens, made.usage.total_tokens, made.model) == (count, count, "alias")

    run(work)


def test_inputs_are_texts_or_token_ids_one_or_several() -> None:
    async def work() -> None:
        server = embedder()
        ids = server.tokenizer.encode("hello")
        for given, count in (("hello", 1), (["hello"], 1), (ids, 1), ([ids, ids], 2), (["hello", ids], 2)):
            answer = (await server.post(PATH, {"input": given})).json()
            assert [one["embedding"] for one in answer["data"]] == [numbers("hello", server)] * count

    run(work)


def test_options_reach_the_engine() -> None:
    async def work() -> None:
        server = embedder()
        body = {"input": "hello", "dimensions": 2, "priority": 3, "cache_salt": "s", "use_activation": False}
        assert len((await server.post(PATH, body)).json()["data"][0]["embedding"]) == 2
        asked = server.fake.requests[-1]
        assert (asked.priority, asked.sampling.max_tokens) == (3, 0)
        assert asked.salt and asked.sampling.pooling is not None and not asked.sampling.pooling.normalize
        await server.post(PATH, {"input": "hello", "truncate_prompt_tokens": 2})
        assert prompt_of(server.fake.requests[-1]) == server.tokenizer.encode("hello")[:2]

    run(work)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": [10**6]}, "prompt"),
        ({"input": "a" * 200}, "prompt"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 5}, "dimensions"),
        ({"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"input": "a", "stream": True}, "stream"),
        ({"input": "a", "temperature": 0}, "temperature"),
        ({"input": "a", "priority": 2**31}, "priority"),
        ({"input": "a", "model": "other"}, "model"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    async def work() -> None:
        server = embedder()
        refused = await server.post(PATH, body)
        assert refused.status_code == (404 if param == "model" else 400)
        assert refused.json()["error"]["param"] == param
        assert not server.fake.requests

    run(work)


def test_each_kind_of_engine_refuses_the_work_of_the_other_and_names_the_remedy() -> None:
    async def work() -> None:
        embeds, generates = embedder(template=""), Server()
        message = {"model": "m", "messages": CHAT["messages"], "max_tokens": 5}
        for path, body in (
            ("/v1/completions", TEXT),
            ("/v1/chat/completions", CHAT),
            ("/v1/responses", {"input": "hi"}),
            ("/v1/messages", message),
            ("/v1/messages/count_tokens", {"model": "m", "messages": CHAT["messages"]}),
            ("/render", {"endpoint": "/v1/completions", "body": TEXT}),
        ):
            refused = await embeds.post(path, body)
            assert refused.status_code == 400 and "--runner generate" in refused.json()["error"]["message"], path
        refused = await generates.post(PATH, {"input": "a"})
        assert refused.status_code == 400 and "--runner pooling" in refused.json()["error"]["message"]
        refused = await embeds.post("/render", {"endpoint": PATH, "body": {"input": "a"}})
        assert refused.status_code == 400 and PATH not in refused.json()["error"]["message"].partition("Give")[2]
        assert (await embeds.post("/tokenize", {"prompt": "a"})).status_code == 200
        for path in ("/v1/models", "/openapi.json"):
            assert (await embeds.http.get(path)).status_code == 200

    run(work)


def test_embeddings_are_counted() -> None:
    async def work() -> None:
        server = embedder()
        await server.post(PATH, {"input": ["hello", "a"]})
        text = (await server.http.get("/metrics")).text
        assert 'vllm:request_success_total{finished_reason="stop",model_name="m"} 2.0' in text
        assert 'vllm:e2e_request_latency_seconds_count{model_name="m"} 2.0' in text
        assert 'vllm:request_generation_tokens_sum{model_name="m"} 0.0' in text

    run(work)


def test_a_line_of_a_batch_may_ask_for_embeddings(tmp_path: Path) -> None:
    async def work() -> None:
        server = embedder()
        server.service.files = FileStore(tmp_path)
        raw: Any = json.dumps({"model": "m", "input": ["hello"]}).encode()
        answer = await answer_line(server.service, Line(custom_id="a", url=PATH, body=raw))
        assert answer.good
        assert answer.response.body.data[0].embedding == numbers("hello", server)
        client = client_of(server)
        line = json.dumps({"custom_id": "a", "method": "POST", "url": PATH, "body": {"input": "hello"}}).encode()
        file = await client.files.create(file=("in.jsonl", line), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint=PATH, completion_window="24h")
        for task in list(server.service.batches.values()):
            await task
        done = await client.batches.retrieve(batch.id)
        assert done.status == "completed" and done.output_file_id is not None
        text = (await client.files.content(done.output_file_id)).text
        assert json.loads(text)["response"]["body"]["usage"]["total_tokens"] == len(server.tokenizer.encode("hello"))

    run(work)
