"""``octavo serve`` with a tiny model whose engines are of two ranks each, and what a dead rank means to clients."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from octavo import LLM, SamplingParams
from tests.e2e.serving import Server, running
from tests.e2e.test_scale_out_faults import health
from tests.waiting import PATIENCE, children, ended, until
from tools import tiny

PROMPTS = ["There was a time", "Once", "And then", "He said that"]
OPTIONS = ["--device", "cpu", "--dtype", "float32", "--max-num-seqs", "8", "--kv-cache-memory-bytes", "16M"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("ranks") / "tiny-llama", max_position_embeddings=1024)


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = ["-m", "octavo", "serve", str(model), "--port", "0", *OPTIONS]
    command += ["--tensor-parallel-size", "2", "--data-parallel-size", "2"]
    with running(command, tmp_path_factory.mktemp("server") / "log") as made:
        yield made


def answers(server: Server) -> list[str]:
    ask = {"prompt": PROMPTS, "max_tokens": 20, "temperature": 0}
    reply = server.post("/v1/completions", ask)
    assert reply.status_code == 200, reply.text
    return [choice["text"] for choice in reply.json()["choices"]]


def ranks(server: Server) -> list[psutil.Process]:
    """Processes of ranks other than the first, each a child of its engine."""
    cores = server.children("octavo.core.process")
    return [child for core in cores for child in children(core, "octavo.runtime.follower")]


def test_two_engines_of_two_ranks_say_what_one_process_says(server: Server, model: Path) -> None:
    assert len(ranks(server)) == 2
    with LLM(model, device="cpu", dtype="float32", kv_cache_memory_bytes=1 << 24) as llm:
        wanted = llm.generate(PROMPTS, SamplingParams(max_tokens=20, temperature=0), use_tqdm=False)
    assert answers(server) == [output.outputs[0].text for output in wanted]


def test_an_engine_whose_rank_is_killed_comes_back_and_the_other_goes_on(server: Server) -> None:
    before, (victim, other) = answers(server), ranks(server)
    engine = victim.parent()
    assert engine is not None
    victim.kill()
    assert answers(server) == before
    assert ended(engine)
    until(lambda: health(server) == "ok" and len(ranks(server)) == 2)
    assert other in ranks(server)
    assert answers(server) == before


def test_the_end_of_a_server_is_the_end_of_all_ranks(server: Server) -> None:
    found = ranks(server)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(PATIENCE) == 0
    assert all(ended(rank) for rank in found)


def test_the_bench_takes_several_ranks(model: Path, tmp_path: Path) -> None:
    sizes = ["--num-prompts", "2", "--input-len", "8", "--output-len", "4", "--json", str(tmp_path / "rows")]
    command = [sys.executable, "-m", "octavo", "bench", "throughput", str(model), *OPTIONS, *sizes]
    subprocess.run([*command, "--tensor-parallel-size", "2"], check=True, timeout=2 * PATIENCE)
    assert json.loads((tmp_path / "rows").read_text())
