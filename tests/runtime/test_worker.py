"""The real worker under the real scheduler: greedy tokens equal those of Transformers, however a request was served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.config import EngineConfig
from octavo.core.engine import EngineCore
from octavo.errors import OutOfMemory
from octavo.models.llama import LlamaForCausalLM
from octavo.platforms.cpu import CpuPlatform
from octavo.runtime.worker import Worker
from tests.core.stub_engine import collect, make_request, run
from tools import tiny

NEW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Callable[[list[int]], list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    known: dict[tuple[int, ...], list[int]] = {}

    def generate(tokens: list[int]) -> list[int]:
        key = tuple(tokens)
        if key not in known:
            out = model.generate(
                torch.tensor([tokens]), attention_mask=torch.ones(1, len(tokens)), max_new_tokens=NEW, do_sample=False
            )
            known[key] = out[0, len(tokens) :].tolist()
        return known[key]

    return generate


def engine(folder: Path, *, overlap: bool = False, **options: Any) -> EngineCore:
    flat = {"model": str(folder), "device": "cpu", "dtype": "float32", "max_num_seqs": 8, **options}
    return EngineCore(EngineConfig.of(**flat), Worker(), overlap=overlap)


def prompts(count: int) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 7, 16, 33, 64, 100, 15, 48][:count]
    return {f"r{i}": torch.randint(4, 380, (n,), generator=generator).tolist() for i, n in enumerate(lengths)}


def serve(core: EngineCore, requests: dict[str, list[int]], **sampling: Any) -> dict[str, list[int]]:
    for id, tokens in requests.items():
        assert core.add(make_request(core, id, tokens, max_tokens=NEW, temperature=0.0, **sampling)) is None
    return collect(run(core))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="batched"),
        pytest.param({"max_num_seqs": 1}, id="alone"),
        pytest.param({"max_num_batched_tokens": 13}, id="chunked"),
        pytest.param({"block_size": 32, "enable_prefix_caching": False}, id="large pages"),
    ],
)
def test_greedy_tokens_equal_transformers(
    folder: Path, oracle: Callable[[list[int]], list[int]], options: dict[str, Any], overlap: bool
) -> None:
    requests = prompts(8)
    answers = serve(engine(folder, overlap=overlap, **options), requests)
    assert answers == {id: oracle(tokens) for id, tokens in requests.items()}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("max_tokens", [13, 2048])
def test_captured_steps_change_no_token(
    folder: Path,
    oracle: Callable[[list[int]], list[int]],
    overlap: bool,
    max_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CpuPlatform, "captures", True)  # "replays" by running the work again on the same memory
    requests = prompts(7)
    core = engine(folder, overlap=overlap, max_num_seqs=7, max_num_batched_tokens=max_tokens)
    assert core._worker._runner._graphs is not None
    monkeypatch.setattr("octavo.runtime.runner.send", None)  # an eager step fails
    assert serve(core, requests) == {id: oracle(tokens) for id, tokens in requests.items()}


@pytest.mark.parametrize("overlap", [False, True])
def test_a_prefix_hit_changes_no_token(folder: Path, oracle: Callable[[list[int]], list[int]], overlap: bool) -> None:
    core = engine(folder, overlap=overlap)
    base = prompts(6)["r5"]
    serve(core, {"first": base})
    again = {"same": base, "longer": [*base, 9, 8, 7], "fork": [*base[:50], 5, 6]}
    assert serve(core, again) == {id: oracle(tokens) for id, tokens in again.items()}
    assert core.stats().cached_tokens == 96 + 96 + 48


@pytest.mark.parametrize("overlap", [False, True])
def test_a_preemption_changes_no_token(folder: Path, oracle: Callable[[list[int]], list[int]], overlap: bool) -> None:
    page_bytes = 3 * 2 * 2 * 16 * 16 * 4  # layers, K and V, heads, slots, head size, float32
    core = engine(folder, overlap=overlap, max_model_len=128, kv_cache_memory_bytes=page_bytes * 13)
    requests = {id: tokens for id, tokens in prompts(8).items() if id != "r0"}
    assert serve(core, requests) == {id: oracle(tokens) for id, tokens in requests.items()}
    assert core.stats().preemptions > 0


def test_sampling_does_not_depend_on_what_else_runs(folder: Path) -> None:
    requests = prompts(8)
    together = engine(folder)
    for id, tokens in requests.items():
        together.add(make_request(together, id, tokens, max_tokens=NEW, temperature=0.9, top_p=0.9, seed=7))
    batch = collect(run(together))
    alone = engine(folder, max_num_seqs=1, max_num_batched_tokens=17)
    alone.add(make_request(alone, "r4", requests["r4"], max_tokens=NEW, temperature=0.9, top_p=0.9, seed=7))
    assert collect(run(alone))["r4"] == batch["r4"]
    assert len({tuple(answer[:8]) for answer in batch.values()}) > 1


@pytest.mark.parametrize("budget", [2048, 11])
def test_prompt_logprobs_equal_a_forward_over_the_prompt(folder: Path, budget: int) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = prompts(5)["r4"]
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    core = engine(folder, max_num_batched_tokens=budget)
    core.add(make_request(core, "a", tokens, max_tokens=1, temperature=0.0, prompt_logprobs=2))
    entries = [entry for output in run(core) for entry in output.prompt_logprobs]
    assert [entry.token for entry in entries] == tokens[1:]
    for position, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(wanted[position, tokens[position + 1]].item(), abs=1e-3)
        assert entry.top_ids == wanted[position].topk(2).indices.tolist()


def test_prompt_logprobs_arrive_once_each_despite_preemption(folder: Path) -> None:
    page_bytes = 3 * 2 * 2 * 16 * 16 * 4
    core = engine(folder, max_model_len=128, kv_cache_memory_bytes=page_bytes * 13, max_num_batched_tokens=16)
    requests = prompts(8)
    for id, tokens in requests.items():
        core.add(make_request(core, id, tokens, max_tokens=NEW, temperature=0.0, prompt_logprobs=0))
    outputs = run(core)
    assert core.stats().preemptions > 0
    for id, tokens in requests.items():
        scored = [entry.token for output in outputs if output.id == id for entry in output.prompt_logprobs]
        assert scored == tokens[1:]


def test_no_memory_for_one_sequence_is_refused_with_the_arithmetic(folder: Path) -> None:
    with pytest.raises(OutOfMemory, match=r"one sequence of 128 tokens needs 8"):
        engine(folder, max_model_len=128, kv_cache_memory_bytes=30_000)


def test_no_memory_for_one_page_is_refused(folder: Path) -> None:
    with pytest.raises(OutOfMemory, match="kv-cache-memory-bytes"):
        engine(folder, kv_cache_memory_bytes=100)


def test_the_longest_sequence_shrinks_to_the_cache_unless_the_user_fixed_it(folder: Path) -> None:
    page_bytes = 3 * 2 * 2 * 16 * 16 * 4
    assert engine(folder, kv_cache_memory_bytes=page_bytes * 5).info.max_model_len == 64


def test_dummy_weights_generate_varied_tokens(folder: Path) -> None:
    core = engine(folder, load_format="dummy", seed=3)
    answers = serve(core, prompts(4))
    assert len({token for answer in answers.values() for token in answer}) > 4


def test_a_step_without_memory_fails_its_requests_and_no_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = engine(folder)

    def allocate(*_: Any) -> torch.Tensor:
        return torch.empty(1 << 62, dtype=torch.uint8)  # what torch says then is its own

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "forward", allocate)
        core.add(make_request(core, "a", [5, 6, 7]))
        (failed,) = run(core)
    assert failed.finish_reason == "error"
    assert failed.status == 503
    core.add(make_request(core, "b", [5, 6, 7]))
    assert len(collect(run(core))["b"]) == 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_a_step_reads_is_known_and_counted(dtype: str, tied: bool, tmp_path: Path) -> None:
    made = tiny.make(tmp_path / "m", "llama", tie_word_embeddings=tied)
    core = engine(made, dtype=dtype)
    sizes = {name: p.numel() for name, p in tiny.build("llama", tie_word_embeddings=tied).named_parameters()}
    read = sum(count for name, count in sizes.items() if tied or "embed_tokens" not in name)
    width = 4 if dtype == "float32" else 2
    assert read * width <= core.info.weight_bytes <= 1.2 * read * width  # panels are filled up to 16 outputs
    assert core.info.kv_bytes == core.model_config.kv_bytes_per_token
    assert core.stats().busy_seconds == 0
    serve(core, prompts(2))
    assert core.stats().busy_seconds > 0
