"""``octavo serve`` through the clients of OpenAI and Anthropic beyond completions, and ``octavo run-batch``."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.e2e.serving import STUB, Server, running
from tests.waiting import PATIENCE, until
from tools import tiny

OPTIONS = ("--dtype", "float32", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "16M", "--device", "cpu")
ASK: Any = {"model": "tiny-llama", "input": "Hi", "max_output_tokens": 24, "temperature": 0}
TURN: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("apis") / "tiny-llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("serve") / "log"
    with running(["-m", "octavo", "serve", str(model), "--port", "0", *OPTIONS], log) as made:
        yield made


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_every_api_gives_the_same_greedy_text(server: Server, client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(model="tiny-llama", messages=TURN, max_tokens=24, temperature=0)
    text = chat.choices[0].message.content
    response = client.responses.create(**ASK)
    assert response.output_text == text
    *_, last = client.responses.create(**ASK, stream=True)
    assert last.response.output_text == text
    rendered = server.post("/render", {"body": {"messages": TURN}}).json()["prompts"][0]
    assert len(rendered["token_ids"]) == response.usage.input_tokens
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as claude:
        turn: Any = {"model": "tiny-llama", "messages": TURN}
        greedy: Any = {"max_tokens": 24, "extra_body": {"temperature": 0}}
        message = claude.messages.create(**turn, **greedy)
        assert "".join(block.text for block in message.content if block.type == "text") == text
        with claude.messages.stream(**turn, **greedy) as events:
            assert "".join(events.text_stream) == text
        assert claude.messages.count_tokens(**turn).input_tokens == response.usage.input_tokens


def test_a_response_continues_what_was_said(server: Server, client: openai.OpenAI) -> None:
    first = client.responses.create(**ASK)
    second = client.responses.create(**ASK | {"input": "more"}, previous_response_id=first.id)
    said = [*TURN, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "more"}]
    whole = client.responses.create(**ASK | {"input": said})
    assert second.output_text == whole.output_text
    assert second.usage.input_tokens == whole.usage.input_tokens
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.create(**ASK, previous_response_id=first.id)


def test_a_schema_holds_in_every_api(server: Server, client: openai.OpenAI) -> None:
    schema: Any = {"type": "object", "properties": {"way": {"enum": ["up", "down"]}}, "required": ["way"]}
    schema["additionalProperties"] = False
    form: Any = {"format": {"type": "json_schema", "name": "way", "schema": schema}}
    made = client.responses.create(**ASK | {"temperature": 1.5, "max_output_tokens": 200}, text=form)
    assert json.loads(made.output_text)["way"] in ("up", "down")
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as claude:
        output: Any = {"format": {"type": "json_schema", "schema": schema}}
        message = claude.messages.create(model="tiny-llama", max_tokens=200, messages=TURN, output_config=output)
        assert message.stop_reason == "end_turn"
        assert json.loads("".join(b.text for b in message.content if b.type == "text"))["way"] in ("up", "down")
        tools: Any = [{"name": "go", "input_schema": schema}]
        choice: Any = {"type": "tool", "name": "go"}
        message = claude.messages.create(
            model="tiny-llama", max_tokens=200, messages=TURN, tools=tools, tool_choice=choice
        )
        (call,) = [block for block in message.content if block.type == "tool_use"]
        assert call.input["way"] in ("up", "down")


def requests(count: int) -> bytes:
    bodies = [{"prompt": f"Once {i}", "max_tokens": 12, "temperature": 0} for i in range(count)]
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": b} for i, b in enumerate(bodies)
    ]
    return b"\n".join(json.dumps(line).encode() for line in lines)


def run_batch(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "octavo", "run-batch", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE, check=False)


def test_a_batch_runs_while_others_are_served(client: openai.OpenAI) -> None:
    file = client.files.create(file=("in.jsonl", requests(60)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    assert client.responses.create(**ASK).status in ("completed", "incomplete")
    until(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed"), 2 * PATIENCE)
    batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed", batch
    assert batch.output_file_id is not None
    assert client.files.content(batch.output_file_id).text.count('"status_code":200') == 60


def test_files_lie_in_a_private_folder_until_the_server_ends(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with running(["-c", STUB, str(model), "0"], tmp_path / "log") as stub:
        assert not list(tmp_path.glob("octavo-files-*"))
        form = {"files": {"file": ("in.jsonl", requests(1))}, "data": {"purpose": "batch"}}
        assert httpx.post(f"{stub.url}/v1/files", timeout=PATIENCE, **form).status_code == 200  # type: ignore[arg-type]
        (folder,) = tmp_path.glob("octavo-files-*")
        assert folder.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
        stub.process.terminate()
        assert stub.wait() == 0
        assert not list(tmp_path.glob("octavo-files-*"))


def test_run_batch_answers_a_file_as_the_server_does(model: Path, client: openai.OpenAI, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bad = {"custom_id": "bad", "url": "/v1/completions", "body": {"prompt": "x", "temperature": -1}}
    source.write_bytes(requests(5) + b"\n" + json.dumps(bad).encode())
    done = run_batch("-i", str(source), "-o", str(target), str(model), *OPTIONS)
    assert done.returncode == 1, done.stderr
    assert "5 requests answered, 1 failed" in done.stderr
    answers = {one["custom_id"]: one["response"] for one in map(json.loads, target.read_text().splitlines())}
    assert answers["bad"]["status_code"] == 400
    alone = client.completions.create(model="tiny-llama", prompt="Once 3", max_tokens=12, temperature=0)
    assert answers["r3"]["body"]["choices"][0]["text"] == alone.choices[0].text


def test_run_batch_tells_a_wrong_line_before_it_loads_anything(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(requests(2) + b"\n{")
    done = run_batch("-i", str(source), "-o", str(tmp_path / "out"), str(model))
    assert done.returncode == 2
    assert "line 3" in done.stderr
