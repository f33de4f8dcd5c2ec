"""Models of Transformers that keep their own caches, against the same models without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.core.engine import EngineCore
from octavo.errors import OutOfMemory, UnsupportedModel
from octavo.models.base import OwnCache
from octavo.runtime.memory import plan_cache
from tests.core.stub_engine import collect, make_request, run
from tests.models.harness import Paged
from tests.models.test_hf_backend import answers, core, saved
from tools import sweep, tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # of Transformers' own code


@pytest.mark.parametrize(
    ("model_type", "way"),
    [
        ("bloom", "attention interface"),  # ALiBi
        ("openai-gpt", "computed anew"),  # keeps nothing itself
        ("rwkv", "recurrent"),
        ("deepseek_v32", "passes indices"),
        ("llama4_text", "a mask depends on more"),  # attention in chunks
        ("diffllama", "calls attention twice"),
        ("falcon", "attention interface"),
        ("mpt", "attention interface"),
        ("gpt_neo", "attention interface"),
        ("bart", "takes no position_ids"),
        ("recurrent_gemma", "keep a state"),
        ("doge", "did not make"),
    ],
)
def test_logits_and_greedy_tokens_equal_eager(model_type: str, way: str, tmp_path: Path) -> None:
    wanted = saved(tmp_path, model_type)
    model = sweep.adopted(tmp_path)
    error, case = sweep.divergence(model, wanted)
    assert error < 2e-5, case
    assert "slow path" in model.swapped
    assert way in model.swapped


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("xlnet", "depends on later ones"),
        ("reformer", "draws random numbers"),  # of its hashes, once a prompt is longer than a chunk
    ],
)
def test_what_cannot_run_either_way_is_refused_with_both_reasons(model_type: str, reason: str, tmp_path: Path) -> None:
    saved(tmp_path, model_type)
    with pytest.raises(UnsupportedModel) as error:
        sweep.adopted(tmp_path)
    assert error.value.id == "HF031"
    assert "cannot run over pages" in error.value.cause
    assert reason in error.value.cause


def test_a_prompt_may_be_longer_than_those_that_change_the_attention_of_big_bird(tmp_path: Path) -> None:
    """It is full once a short sequence came; only a longer first one would make it sparse, by drawn blocks."""
    wanted = saved(tmp_path, "big_bird", block_size=16)
    paged = Paged(sweep.adopted(tmp_path, max_len=250))
    tokens = torch.randint(4, 380, (220,), generator=torch.Generator().manual_seed(0)).tolist()
    sweep.oracle(wanted, tokens[:8])
    row = paged.start()
    found = torch.cat([paged.step({row: tokens[:190]})[row], paged.step({row: tokens[190:]})[row]])
    assert torch.allclose(found, sweep.oracle(wanted, tokens), atol=1e-4)


def test_what_is_kept_is_measured_and_forgotten_with_the_row(tmp_path: Path) -> None:
    saved(tmp_path, "bloom")
    model = sweep.adopted(tmp_path)
    assert model.own_cache == OwnCache(per_row=0, per_token=2 * 64 * 2 * 4)  # K and V, width, layers, float32
    paged = Paged(model)
    row = paged.start()
    paged.step({row: list(range(4, 14))})
    paged.stop(row)
    with pytest.raises(RuntimeError, match=f"row {row} keeps nothing, not 10 tokens"):
        model._generic._advance(row, torch.tensor([4]), 10)


def test_a_step_that_does_not_follow_the_one_before_is_an_error(tmp_path: Path) -> None:
    saved(tmp_path, "bloom")
    paged = Paged(sweep.adopted(tmp_path))
    row = paged.start()
    paged.step({row: [5, 6, 7]})
    paged.lengths[row] -= 1
    with pytest.raises(RuntimeError, match="keeps 3, not 2 tokens"):
        paged.step({row: [8]})


def engine(folder: Path, **options: Any) -> EngineCore:
    tiny.tokenizer(folder)
    return core(folder, **options)


def greedy(wanted: Any, tokens: list[int], count: int) -> list[int]:
    found = list(tokens)
    for _ in range(count):
        found.append(int(sweep.oracle(wanted, found)[-1].argmax()))
    return found[len(tokens) :]


@pytest.mark.parametrize("model_type", ["bloom", "rwkv"])
def test_an_engine_gives_the_tokens_of_eager_in_any_batch(model_type: str, tmp_path: Path) -> None:
    wanted = saved(tmp_path, model_type)
    whole = answers(engine(tmp_path, max_num_batched_tokens=2048))
    assert whole == answers(engine(tmp_path, max_num_batched_tokens=13))
    generator = torch.Generator().manual_seed(3)
    for count in (1, 17):
        tokens = torch.randint(4, 380, (count,), generator=generator).tolist()
        assert whole[f"r{count}"] == greedy(wanted, tokens, 20)


def test_an_engine_reuses_no_prefix_of_such_a_model(tmp_path: Path) -> None:
    saved(tmp_path, "bloom")
    made = engine(tmp_path, enable_prefix_caching=True)
    assert not made.info.prefix_caching
    for id in ("a", "b"):
        assert made.add(make_request(made, id, list(range(4, 60)), max_tokens=4, temperature=0.0)) is None
        collect(run(made))
    assert made.stats().cached_tokens == 0


def test_a_preempted_request_is_computed_again(tmp_path: Path) -> None:
    saved(tmp_path, "bloom")
    roomy = engine(tmp_path)
    page_bytes = 16 * roomy._worker._model.own_cache.per_token
    tight = engine(tmp_path, kv_cache_memory_bytes=14 * page_bytes)  # the longest sequence takes 12 pages
    assert answers(tight) == answers(roomy)
    assert tight.stats().preemptions > 0


def test_room_for_states_is_counted_before_pages(tmp_path: Path) -> None:
    saved(tmp_path, "bloom")
    config = sweep.adopted(tmp_path).config
    sizes: dict[str, Any] = {"page_size": 16, "max_len": 64, "fixed_len": True, "max_rows": 8}
    plan = plan_cache(config, 100_000, "told", **sizes, own=OwnCache(per_row=10_000, per_token=100))
    assert plan.max_rows == 5  # half of the budget
    assert plan.num_pages == min(50_000 // 1600 - 1, 5 * 4)
    with pytest.raises(OutOfMemory):
        plan_cache(config, 10_000, "told", **sizes, own=OwnCache(per_row=10_000, per_token=100))


def test_a_model_with_pages_keeps_nothing_of_its_own(tmp_path: Path) -> None:
    saved(tmp_path, "gpt_neox")
    assert sweep.adopted(tmp_path).own_cache is None
