"""From a repo id to text, through the command line and the real client of the Hub, against a Hub on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.serving import START_SECONDS, Server
from tests.e2e.shell import PROMPT, SMALL, Shell
from tests.gguf_files import tiny_metadata, tiny_tensors, write_gguf
from tests.hub_server import Hub
from tests.waiting import until
from tools import tiny

TOKEN = "hf_of_a_test"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("model") / "tiny", "llama", shards=2)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture
def shell(hub: Hub, tmp_path: Path) -> Shell:
    return Shell(hub, tmp_path)


def test_first_start_downloads_and_the_second_asks_the_hub_nothing(hub: Hub, shell: Shell, model: Path) -> None:
    commit = hub.push("owner/name", model)
    code, text, err = shell.generate("owner/name", "--log-level", "info")
    assert code == 0, err
    assert f"owner/name at {commit}" in err
    assert any("model-00002-of-" in request for request in hub.requests)
    assert [request for request in hub.requests if "/api/" in request] == ["GET /api/models/owner/name"]
    hub.requests.clear()
    hub.fail_with = 503
    code, again, err = shell.generate("owner/name", "--log-level", "info")
    assert (code, again) == (0, text), err
    assert "the Hub was not asked" in err
    assert shell.plan("owner/name")["downloads"] == []
    assert hub.requests == []


def test_a_server_starts_from_a_repo_id_and_again_while_the_hub_is_down_and_offline(
    hub: Hub, shell: Shell, model: Path
) -> None:
    hub.push("owner/name", model, branch="dev")
    runs: list[tuple[dict[str, str], int | None]] = [({}, None), ({}, 503), ({"HF_HUB_OFFLINE": "1"}, None)]
    for number, (env, down) in enumerate(runs):
        hub.fail_with = down
        with pytest.MonkeyPatch.context() as patch:
            for key, value in shell.env(**env).items():
                patch.setenv(key, value)
            argv = ["-m", "octavo", "serve", "owner/name", "--revision", "dev", "--port", "0", *SMALL]
            server = Server(argv, shell.home / "log")
        try:
            assert server.get("/health").status_code == 200
            (listed,) = server.get("/v1/models").json()["data"]
            assert listed["id"] == "owner/name"
            body = {"model": "owner/name", "prompt": "hello", "max_tokens": 2}
            assert server.post("/v1/completions", body).status_code == 200
        finally:
            server.process.terminate()
            assert server.wait() == 0
        asked, hub.requests = hub.requests, []
        if number == 0:
            asked = [request for request in asked if "/api/" in request]
            assert asked == ["GET /api/models/owner/name/revision/dev"]
        else:
            assert asked == []


def test_transformers_is_asked_for_by_a_command_and_in_python(hub: Hub, shell: Shell, model: Path) -> None:
    hub.push("owner/name", model)
    expected = shell.generate("owner/name").out.strip()
    wish = ("--task", "generate", "--model-impl", "transformers")
    with pytest.MonkeyPatch.context() as patch:
        for key, value in shell.env().items():
            patch.setenv(key, value)
        server = Server(["-m", "octavo", "serve", "owner/name", "--port", "0", *wish, *SMALL], shell.home / "log")
    try:
        body = {"model": "owner/name", "prompt": "hello", "max_tokens": 2, "temperature": 0, "ignore_eos": True}
        answer = server.post("/v1/completions", body).json()
    finally:
        server.process.terminate()
        server.wait()
    assert answer["choices"][0]["text"].strip() == expected
    program = (
        "from octavo import LLM, SamplingParams\n"
        "with LLM(model='owner/name', model_impl='transformers', device='cpu', kv_cache_memory_bytes=4 << 20) as llm:\n"
        "    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)\n"
        "    print(llm.generate(['hello'], params, use_tqdm=False)[0].outputs[0].text)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=shell.env(), capture_output=True, text=True, timeout=START_SECONDS
    )
    assert done.stdout.strip() == expected, done.stderr


def test_two_starts_at_once_share_one_download(hub: Hub, shell: Shell, model: Path) -> None:
    hub.push("owner/name", model)
    both = [shell.start("generate", "owner/name", *PROMPT, *SMALL) for _ in range(2)]
    ended = [process.communicate(timeout=START_SECONDS) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert ended[0][0] == ended[1][0] != ""
    blobs = [path for path in shell.home.rglob("blobs/*") if path.suffix != ".incomplete"]
    needed = [path for path in model.iterdir() if path.suffix in (".json", ".jinja", ".safetensors")]
    assert len(blobs) == len({path.read_bytes() for path in needed})


def _downloaded(shell: Shell) -> int:
    """Bytes of files that are not complete."""
    found = 0
    for path in shell.home.rglob("blobs/*.incomplete"):
        with contextlib.suppress(FileNotFoundError):  # it is complete meanwhile
            found += path.stat().st_size
    return found


def test_a_start_that_is_killed_is_taken_up_where_it_stopped(hub: Hub, shell: Shell, tmp_path: Path) -> None:
    large = tiny.make(tmp_path / "large", "llama", hidden_size=256, intermediate_size=1024)
    stored = (large / "model.safetensors").stat().st_size
    hub.push("owner/name", large)
    hub.cdn, hub.rate = True, stored / 10  # ten seconds
    first = shell.start("generate", "owner/name", *PROMPT, *SMALL)
    until(lambda: first.poll() is not None or _downloaded(shell) >= stored / 4, START_SECONDS)
    assert first.poll() is None
    first.kill()
    first.communicate()
    hub.rate = None
    parts = list(shell.home.rglob("blobs/*.incomplete"))
    before = max(path.stat().st_size for path in parts)
    for path in parts:
        os.utime(path, (time.time() - 60,) * 2)  # what was written to just now would be taken for somebody's
    hub.ranges.clear()
    code, text, err = shell.generate("owner/name")
    assert code == 0, err
    assert text == shell.generate(str(large)).out
    assert [span for path, span in hub.ranges if path.endswith(".safetensors")] == [range(before, stored)]
    assert list(shell.home.rglob("blobs/*.incomplete")) == []


def test_a_download_has_bars_and_the_cache_may_be_anywhere(hub: Hub, shell: Shell, model: Path, tmp_path: Path) -> None:
    hub.push("owner/private", model, private=True, token=TOKEN)
    env = {"HF_HUB_DISABLE_PROGRESS_BARS": "0", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "elsewhere")}
    code, _, err = shell.run("plan", "owner/private", "--gpu", "l4", HF_TOKEN="")
    assert (code, "HF004" in err) == (3, True)
    code, _, err = shell.generate("owner/private", "--load-format", "hf", **env)
    assert code == 0, err
    assert "Fetching" in err
    assert list((tmp_path / "elsewhere" / "hub" / "models--owner--private" / "snapshots").iterdir())


def test_a_gated_repo_wants_a_token(hub: Hub, shell: Shell, model: Path) -> None:
    hub.push("owner/gated", model, gated=True, token=TOKEN)
    code, _, err = shell.generate("owner/gated")
    assert code == 3
    assert "HF003: owner/gated is gated and no token was sent." in err
    assert "--hf-token" in err
    code, _, err = shell.generate("owner/gated", "--hf-token", TOKEN, "--log-level", "info")
    assert code == 0, err
    assert TOKEN not in err


@pytest.mark.parametrize(
    ("name", "argv", "env", "id"),
    [
        ("owner/nothing", (), {}, "HF004"),
        ("owner/name", ("--revision", "v9"), {}, "HF004"),
        ("owner/name", (), {"HF_HUB_OFFLINE": "1"}, "HF005"),
        ("owner/name", (), {"HF_ENDPOINT": "http://127.0.0.1:9"}, "HF006"),
        ("./nothing", (), {}, "HF001"),
    ],
)
def test_a_start_that_fails_ends_with_status_3_and_the_cause(
    name: str, argv: tuple[str, ...], env: dict[str, str], id: str, hub: Hub, shell: Shell
) -> None:
    hub.push("owner/name", {"config.json": b"{}"})
    code, out, err = shell.generate(name, *argv, **env)
    assert (code, out) == (3, "")
    assert f"octavo: {id}: " in err
    assert "Traceback" not in err


CODE = """
from transformers import PreTrainedTokenizerFast

class Tok(PreTrainedTokenizerFast):
    print("code of the repo, {revision}")
"""


def test_code_of_another_repo_is_fetched_and_run_when_trusted(hub: Hub, shell: Shell, model: Path) -> None:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    settings = json.loads(files["tokenizer_config.json"])
    files["tokenizer_config.json"] = json.dumps(
        {**settings, "auto_map": {"AutoTokenizer": [None, "o/c--tok.Tok"]}}
    ).encode()
    hub.push("owner/name", files)
    for revision in ("dev", "main"):
        hub.push("o/c", {"tok.py": CODE.format(revision=revision).encode()}, branch=revision)
    code, text, err = shell.generate("owner/name")  # tokenizer.json does without the code
    assert code == 0, err
    assert not any("/o/c/" in request for request in hub.requests)
    code, trusted, err = shell.generate("owner/name", "--trust-remote-code", "--code-revision", "dev")
    assert (code, trusted) == (0, "code of the repo, dev\n" + text), err


def test_a_plan_reads_headers_alone_and_leaves_nothing_behind(hub: Hub, shell: Shell, tmp_path: Path) -> None:
    large = tiny.make(tmp_path / "large", "llama", hidden_size=512, intermediate_size=2048)
    hub.cdn = True
    commit = hub.push("owner/name", large, gated=True, token=TOKEN)
    found = shell.plan("owner/name", "--hf-token", TOKEN)
    assert hub.leaked == 0
    assert commit in found["model"]
    stored = (large / "model.safetensors").stat().st_size
    assert found["weights"]["parameters"] == sum(p.numel() for p in _large().parameters())
    assert found["downloads"][0] == ["model.safetensors", stored]
    assert sum(count for _, count in found["downloads"]) > stored
    assert hub.sent < stored / 10
    assert [path for path in (shell.home / "hub").rglob("*") if path.is_file()] == []


def _large() -> Any:
    return tiny.build("llama", hidden_size=512, intermediate_size=2048)


@pytest.mark.parametrize("kind", ["branch", "tag", "commit"])
def test_a_plan_is_for_the_revision_that_is_named(kind: str, hub: Hub, shell: Shell, model: Path) -> None:
    commits = {"branch": hub.push("owner/name", model, branch="dev"), "tag": hub.push("owner/name", model, branch="v1")}
    commits["commit"] = commits["branch"]
    hub.push("owner/name", {"config.json": b"{}"})
    revision = {"branch": "dev", "tag": "v1", "commit": commits["commit"]}[kind]
    assert commits[kind] in shell.plan("owner/name", "--revision", revision)["model"]


def test_a_plan_of_a_gguf_file_in_a_repo(hub: Hub, shell: Shell, tmp_path: Path) -> None:
    factors = {"rope_freqs.weight": 1 + tiny_tensors()["output_norm.weight"][:4] ** 2}
    file = write_gguf(tmp_path / "m-F32.gguf", {**tiny_tensors(), **factors}, tiny_metadata())
    hub.push("owner/name", {"m-F32.gguf": file.read_bytes(), "m-Q8_0.gguf": b"GGUF"})
    found = shell.plan("owner/name:F32")
    assert found["quantisation"] == "GGUF F32 dequantised on loading"
    assert found["rope"] == ["longrope, theta 10000, 8 of 8 dimensions"]
    assert found["downloads"] == [["m-F32.gguf", file.stat().st_size]]


@pytest.mark.parametrize(("file", "method"), [("quantize_config.json", "gptq"), ("quant_config.json", "awq")])
def test_a_plan_knows_a_quantisation_that_a_file_of_its_own_tells(
    file: str, method: str, hub: Hub, shell: Shell, model: Path
) -> None:
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    hub.push("owner/name", {**files, file: json.dumps({"bits": 4, "group_size": 32}).encode()})
    assert method in shell.plan("owner/name")["quantisation"]
