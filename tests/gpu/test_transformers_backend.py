"""The Transformers backend on a card: its slow path, and models that keep some modules of Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.config import EngineConfig
from octavo.core.engine import EngineCore
from octavo.runtime.worker import Worker
from tests.core.stub_engine import collect, make_request, run
from tools import sweep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore"),  # of Transformers' own code
]

DEVICE = "cuda"
NEW = 12
TIE = 1e-4  # two logits closer than this share of the largest are a tie

SLOW = ("mamba", "mamba2", "rwkv", "qwen3_next", "bamba", "jamba", "lfm2", "bloom", "mpt", "llama4_text", "openai-gpt")
KEPT = ("gemma2", "mixtral", "gpt_oss", "deepseek_v3", "gpt_neox", "opt")  # over pages, in part with their own modules


def saved(folder: Path, model_type: str) -> Any:
    """The unmodified tiny model of a type on the card, also written to ``folder``."""
    wanted = sweep.reference(sweep.tiny_config(model_type))
    wanted.config.architectures = [type(wanted).__name__]
    wanted.save_pretrained(folder)
    return wanted.to(DEVICE)


def worker_and_engine(folder: Path, **options: Any) -> tuple[Worker, EngineCore]:
    flat = {"device": DEVICE, "dtype": "float32", "max_num_seqs": 4, "kv_cache_memory_bytes": 16 << 20, **options}
    worker = Worker()
    core = EngineCore(EngineConfig.of(model=str(folder), model_impl="transformers", max_model_len=128, **flat), worker)
    return worker, core


def prompts() -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(1)
    return {f"r{n}": torch.randint(4, 380, (n,), generator=generator).tolist() for n in (1, 7, 29, 64, 16)}


def serve(core: EngineCore) -> dict[str, list[int]]:
    for id, tokens in prompts().items():
        assert core.add(make_request(core, id, tokens, max_tokens=NEW, temperature=0.0)) is None
    return collect(run(core))


@torch.inference_mode()
def check_greedy(wanted: Any, answers: dict[str, list[int]]) -> None:
    """Each token of ``answers`` is what ``wanted``, computed anew without a cache, takes for the likeliest."""
    for id, tokens in prompts().items():
        assert len(answers[id]) == NEW
        ids = torch.tensor([tokens + answers[id]], device=DEVICE)
        logits = wanted(ids, use_cache=False).logits[0].float()[len(tokens) - 1 : -1]
        chosen = logits.gather(1, ids[0, len(tokens) :].unsqueeze(1)).squeeze(1)
        lacking = (logits.max(1).values - chosen) / logits.abs().max()
        assert float(lacking.max()) < TIE, id


@pytest.mark.parametrize("model_type", SLOW)
def test_the_slow_path_gives_the_tokens_of_the_unmodified_model(model_type: str, tmp_path: Path) -> None:
    wanted = saved(tmp_path, model_type)
    worker, core = worker_and_engine(tmp_path)
    assert worker.model.own_cache is not None
    answers = serve(core)
    check_greedy(wanted, answers)
    # In other steps, by pieces and one at a time; compared again since two of its logits may tie.
    check_greedy(wanted, serve(worker_and_engine(tmp_path, max_num_batched_tokens=13, max_num_seqs=2)[1]))


@pytest.mark.parametrize("model_type", ["mamba", "qwen3_next"])
def test_the_slow_path_in_bfloat16_ends_each_answer(model_type: str, tmp_path: Path) -> None:
    saved(tmp_path, model_type)
    answers = serve(worker_and_engine(tmp_path, dtype="bfloat16")[1])
    assert {id: len(tokens) for id, tokens in answers.items()} == dict.fromkeys(prompts(), NEW)


@pytest.mark.parametrize("model_type", KEPT)
def test_models_over_pages_give_the_tokens_of_the_unmodified_one(model_type: str, tmp_path: Path) -> None:
    wanted = saved(tmp_path, model_type)
    worker, core = worker_and_engine(tmp_path)
    assert worker.model.own_cache is None
    check_greedy(wanted, serve(core))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "phi3", "smollm3", "granite", "gemma"])
def test_a_decoder_as_llamas_is_native_in_every_type(model_type: str, dtype: str, tmp_path: Path) -> None:
    wanted = saved(tmp_path, model_type)
    worker, core = worker_and_engine(tmp_path, dtype=dtype)
    assert "1 decoder" in worker.model.swapped
    assert worker.model.capturable
    if dtype == "float32":
        check_greedy(wanted, serve(core))
