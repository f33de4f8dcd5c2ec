"""A folder in the layout of sentence-transformers, served, through the client of OpenAI: what Transformers computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch

from tests.e2e.serving import Server, running
from tools import tiny

OPTIONS = ("--dtype", "float32", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "16M", "--device", "cpu")
TEXTS = ["the quick brown fox", "What is the capital of France? " * 9, "a", "def add(a, b): return a + b"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.make(tmp_path_factory.mktemp("embeds") / "tiny-qwen3", "qwen3", is_matryoshka=True)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "log"
    command = ["-m", "octavo", "serve", str(model), "--port", "0", "--max-num-batched-tokens", "32", *OPTIONS]
    with running(command, log) as made:
        yield made


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_embeddings_are_those_of_transformers(model: Path, client: openai.OpenAI) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    theirs = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    made = client.embeddings.create(model="tiny-qwen3", input=TEXTS)
    short = client.embeddings.create(model="tiny-qwen3", input=TEXTS, dimensions=16)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    assert made.usage.total_tokens == sum(map(len, ids))
    for one, cut, tokens in zip(made.data, short.data, ids, strict=True):
        with torch.inference_mode():
            mean = theirs(torch.tensor([tokens])).last_hidden_state[0].mean(0)
        for found, wanted in ((one, mean), (cut, mean[:16])):
            wanted = torch.nn.functional.normalize(wanted, dim=0)
            torch.testing.assert_close(torch.tensor(found.embedding), wanted, atol=2e-6, rtol=1e-5)


def test_a_server_that_embeds_generates_nothing(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="--runner generate"):
        client.completions.create(model="tiny-qwen3", prompt="a")
    assert f"curl {server.url}/v1/embeddings" in server.log()
    before = server.metric("prompt_tokens_total")
    tokens = client.embeddings.create(model="tiny-qwen3", input="the quick brown fox").usage.prompt_tokens
    assert server.metric("prompt_tokens_total") - before == tokens
    assert server.metric("generation_tokens_total") == 0
