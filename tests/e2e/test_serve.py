"""``octavo serve`` with a tiny model, through the stock ``openai`` client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.e2e.serving import Server, running
from tests.waiting import PATIENCE, until
from tools import tiny

PROMPT = "There was a time"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    model = tiny.make(folder / "tiny-llama", max_position_embeddings=1024)
    command = ["-m", "octavo", "serve", str(model), "--port", "0", "--dtype", "float32", "--max-num-seqs", "16"]
    command += ["--kv-cache-memory-bytes", "16M", "--device", "cpu"]
    with running(command, folder / "log") as made:
        yield made


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_a_chat_is_answered_and_greedy_answers_repeat(client: openai.OpenAI) -> None:
    def ask() -> str:
        answer = client.chat.completions.create(
            model="tiny-llama", messages=[{"role": "user", "content": "Hi"}], max_tokens=12, temperature=0
        )
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 12
        return answer.choices[0].message.content or ""

    assert ask() == ask()


def test_a_stream_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    ask = {"model": "tiny-llama", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**ask)  # type: ignore[call-overload]
    stream = client.completions.create(**ask, stream=True, stream_options={"include_usage": True})  # type: ignore[call-overload]
    chunks = list(stream)
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == whole.choices[0].text
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (
        whole.usage.prompt_tokens,
        whole.usage.completion_tokens,
        whole.usage.total_tokens,
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_fits_its_schema_even_if_the_model_knows_nothing(client: openai.OpenAI, stream: bool) -> None:
    ways = {"type": "object", "properties": {"way": {"enum": ["up", "down"]}}, "required": ["way"]}
    ask: dict[str, Any] = {
        "model": "tiny-llama",
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [{"type": "function", "function": {"name": "go", "parameters": ways}}],
        "tool_choice": {"type": "function", "function": {"name": "go"}},
        "temperature": 1.5,
        "seed": 3,
        "max_tokens": 200,
    }
    answer: Any = client.chat.completions.create(**ask, stream=stream)
    if stream:
        choices = [chunk.choices[0] for chunk in answer]
        pieces = [call.function for choice in choices for call in choice.delta.tool_calls or ()]
        name, arguments, reason = pieces[0].name, "".join(p.arguments for p in pieces), choices[-1].finish_reason
    else:
        (call,) = answer.choices[0].message.tool_calls
        name, arguments, reason = call.function.name, call.function.arguments, answer.choices[0].finish_reason
    assert (name, reason) == ("go", "tool_calls")
    assert json.loads(arguments)["way"] in ("up", "down")


def test_a_seed_gives_the_same_text_alone_and_among_others(client: openai.OpenAI) -> None:
    def ask(n: int) -> list[str]:
        made = client.completions.create(model="tiny-llama", prompt=PROMPT, max_tokens=16, seed=7, n=n, temperature=0.8)
        return [choice.text for choice in made.choices]

    alone, three = ask(1), ask(3)
    assert alone[0] == three[0]
    assert len(set(three)) == 3


def test_stop_strings_end_the_text_before_them(client: openai.OpenAI) -> None:
    ask = {"model": "tiny-llama", "prompt": PROMPT, "max_tokens": 40, "temperature": 0}
    text = client.completions.create(**ask).choices[0].text  # type: ignore[call-overload]
    stop = text[5:8]
    cut = client.completions.create(**ask, stop=[stop]).choices[0]  # type: ignore[call-overload]
    assert cut.text == text[: text.index(stop)]
    assert cut.finish_reason == "stop"


def test_logprobs_of_greedy_tokens_are_the_best(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny-llama",
        messages=[{"role": "user", "content": "Hi"}],
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=4,
    )
    content = answer.choices[0].logprobs
    assert content is not None
    assert content.content
    for token in content.content:
        assert len(token.top_logprobs) == 4
        assert token.logprob == token.top_logprobs[0].logprob
        assert all(a.logprob >= b.logprob for a, b in zip(token.top_logprobs, token.top_logprobs[1:], strict=False))


def test_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    made = client.completions.create(model="tiny-llama", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    (choice,) = made.choices
    assert choice.text == PROMPT
    assert choice.logprobs is not None
    assert "".join(choice.logprobs.tokens or ()) == PROMPT
    scores = choice.logprobs.token_logprobs or []
    assert scores[0] is None
    assert all(score < 0 for score in scores[1:])


def test_64_streams_at_once_give_what_each_gives_alone(server: Server) -> None:
    prompts = [f"{PROMPT} {i % 8}" for i in range(64)]

    async def ask(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            model="tiny-llama", prompt=prompt, max_tokens=16, temperature=0, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def work() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            alone = [await ask(client, prompt) for prompt in prompts[:8]]
            together = await asyncio.gather(*(ask(client, prompt) for prompt in prompts))
        assert together == [alone[i % 8] for i in range(64)]

    asyncio.run(work())
    until(lambda: server.metric("num_requests_running") == server.metric("kv_cache_usage_perc") == 0)


def test_errors_arrive_as_the_clients_own_exceptions_and_the_next_request_works(client: openai.OpenAI) -> None:
    def ask(**options: object) -> object:
        return client.completions.create(**{"model": "tiny-llama", "prompt": PROMPT, "max_tokens": 2, **options})  # type: ignore[call-overload]

    with pytest.raises(openai.BadRequestError, match="max_model_len"):
        ask(prompt="a b c " * 400)
    with pytest.raises(openai.BadRequestError, match="token id"):
        ask(prompt=[1_000_000])
    with pytest.raises(openai.BadRequestError, match="not a field"):
        ask(extra_body={"guided_horoscope": "a+"})
    with pytest.raises(openai.NotFoundError):
        ask(model="gpt-4")
    assert ask()


def test_a_huge_body_and_a_huge_header_are_refused(server: Server) -> None:
    body = httpx.post(f"{server.url}/v1/completions", content=b"x" * (33 * 2**20), timeout=PATIENCE)
    assert body.status_code == 413
    assert body.json()["error"]["code"] == "body_too_large"
    with httpx.Client(timeout=PATIENCE) as client:
        try:
            status = client.get(f"{server.url}/ping", headers={"x-long": "x" * 2**20}).status_code
        except httpx.TransportError:  # the connection was closed while we were still sending
            status = 400
    assert status == 400
    assert server.get("/ping").status_code == 200


@pytest.mark.parametrize("size", [60_000, 70_000, 300_000, 3_000_000])
def test_a_body_below_the_limit_is_read_whatever_its_size(server: Server, size: int) -> None:
    with httpx.Client(timeout=PATIENCE) as client:
        for _ in range(2):  # the second on the same connection
            answer = client.post(f"{server.url}/detokenize", json={"tokens": [5], "user": "x" * size})
            assert answer.status_code == 200, answer.text


def test_models_tokens_and_health(server: Server, client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-llama"]
    tokens = server.post("/tokenize", {"prompt": PROMPT}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json()["prompt"] == PROMPT
    assert server.get("/health").status_code == 200


def test_the_api_process_holds_neither_torch_nor_transformers(server: Server) -> None:
    maps = Path(f"/proc/{server.process.pid}/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    assert "libtorch" not in maps.read_text()
    assert "libtorch" in Path(f"/proc/{server.core.pid}/maps").read_text()
    assert psutil.Process(server.process.pid).memory_info().rss < 300 * 2**20


def test_the_start_says_where_and_gives_a_line_to_paste(server: Server) -> None:
    assert f"serves tiny-llama at {server.url}/v1" in server.log()
    assert f"curl {server.url}/v1/chat/completions" in server.log()


CONTENT = """
import sys
from octavo.config import EngineConfig, ServerConfig
from octavo.server.run import serve
config = EngineConfig.of(model=sys.argv[1], max_num_seqs=8, max_num_batched_tokens=256)
server = ServerConfig(port=0, chat_template=sys.argv[2], chat_template_content_format=sys.argv[3])
from octavo import log
log.configure("info")
sys.exit(serve(config, server, worker="stub"))
"""


@pytest.mark.parametrize(("form", "shown"), [("auto", "ab"), ("openai", "[{'type': 'text', 'text': 'ab'}]")])
def test_the_template_and_how_it_reads_contents_are_the_server_s(form: str, shown: str, tmp_path: Path) -> None:
    model = tiny.make(tmp_path / "model")
    template = tmp_path / "template.jinja"
    template.write_text("<{{ messages[0].content }}>")
    with running(["-c", CONTENT, str(model), str(template), form], tmp_path / "log") as made:
        body = {"messages": [{"role": "user", "content": "ab"}], "return_token_strs": True}
        answer = made.post("/tokenize", body).json()
    assert "".join(answer["token_strs"]).replace("Ġ", " ") == f"<{shown}>"
