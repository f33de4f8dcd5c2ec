"""Transformers models divided among processes, against the same models, unmodified, with eager attention."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.errors import ConfigError, UnsupportedModel
from octavo.hub.checkpoint import SafetensorsCheckpoint
from octavo.hub.configs import model_config, read_hf_dict
from octavo.hub.resolve import resolve
from octavo.models import registry
from octavo.parallel.group import Group
from octavo.runtime import loader
from tests.models.test_hf_backend import saved
from tests.parallel.ranks import Ranks
from tests.parallel.test_native import Counting
from tools import sweep

pytestmark = pytest.mark.filterwarnings("ignore")  # of Transformers' own code

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {},  # an embedding that scales, four norms
    "phi3": {},  # gathered and split again
    "olmo2": {},  # norms over whole queries
    "glm4": {},
    "gpt_neox": {},  # fused query, key and value
    "starcoder2": {"sliding_window": 12},  # biases
    "cohere": {},
    "stablelm": {},  # a derived plan
    "mixtral": {},
    "qwen3_moe": {},
    "olmoe": {},
    "deepseek_v2": {},
    "deepseek_v3": {},
    "qwen3_next": {},  # recurrent layers
}


MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "qwen3_next")
REPLICATED = (
    "norm",
    "dense.bias",
    "dense_4h_to_h.bias",
    "gate.",
    "kv_a_proj",
    "q_a_proj",
    "correction_bias",
)  # whole on each rank


def divergence(group: Group, folder: Path, model_type: str, overrides: dict[str, Any]) -> tuple[float, str, str]:
    model = sweep.adopted(folder)
    wanted = sweep.reference(sweep.tiny_config(model_type, **overrides))
    return *sweep.divergence(model, wanted), model.experts


# With four, there are two heads of K and V.
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("model_type", CASES)
def test_logits_and_greedy_tokens_equal_eager(model_type: str, size: int, ranks: Ranks, tmp_path: Path) -> None:
    saved(tmp_path, model_type, **CASES[model_type])
    for error, case, experts in ranks.call(size, divergence, tmp_path, model_type, CASES[model_type]):
        assert error < 2e-5, case
        assert ("layers by octavo's grouped product" in experts) == (model_type in MIXTURES)


def bytes_read(group: Group, folder: Path) -> Counter[str]:
    config = model_config(read_hf_dict(resolve(str(folder)), {}), dtype="float32", generation={}, traced=True)
    model_class, _ = registry.choose(config, "transformers")
    checkpoint = Counting((folder / "model.safetensors",))
    loader.load(model_class(config, 128), checkpoint, torch.device("cpu"))
    return checkpoint.read_bytes


@pytest.mark.parametrize("model_type", ["phi3", "gpt_neox", "mixtral", "qwen3_moe"])
def test_two_ranks_read_fused_tensors_and_experts_once(model_type: str, ranks: Ranks, tmp_path: Path) -> None:
    saved(tmp_path, model_type, **CASES[model_type])
    total = sum((found for found in ranks.call(2, bytes_read, tmp_path)), Counter[str]())
    tensors = SafetensorsCheckpoint((tmp_path / "model.safetensors",)).tensors()
    times = {name: total[name] / info.nbytes for name, info in tensors.items()}
    assert times == {name: 2 if any(word in name for word in REPLICATED) else 1 for name in tensors}


def adopt(group: Group, folder: Path) -> None:
    sweep.adopted(folder)


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_oss"])
def test_a_model_that_cannot_be_divided_is_refused(model_type: str, ranks: Ranks, tmp_path: Path) -> None:
    saved(tmp_path, model_type)
    with pytest.raises(UnsupportedModel) as error:
        ranks.call(2, adopt, tmp_path)
    assert error.value.id == "HF033"
    assert "no plan" in error.value.cause


def test_sizes_that_do_not_divide_are_named_with_what_would_work(ranks: Ranks, tmp_path: Path) -> None:
    saved(tmp_path, "gemma2", intermediate_size=90)
    with pytest.raises(ConfigError) as error:
        ranks.call(4, adopt, tmp_path)
    assert "mlp.gate_proj.weight" in error.value.cause
    assert "90" in error.value.cause
    assert error.value.remedy == "Give one of 1, 2."
