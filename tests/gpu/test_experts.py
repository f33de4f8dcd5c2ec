"""Triton kernels of experts against the reference; on a card, or in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.config import EngineConfig
from octavo.core.engine import EngineCore
from octavo.kernels import reference
from octavo.kernels.metadata import Groups
from octavo.runtime.worker import Worker
from tests.core.stub_engine import collect, make_request, run
from tools import tiny

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU, and TRITON_INTERPRET is not 1"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
DTYPES = [torch.float32, torch.float16] if DEVICE == "cpu" else [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# tokens, experts of a token, experts, inputs, outputs
SMALL = [(1, 2, 4, 64, 48), (7, 3, 5, 70, 33), (40, 2, 3, 128, 64)]
LARGE = [(1, 8, 128, 2048, 1536), (64, 8, 128, 2048, 1536), (1000, 2, 8, 1024, 768), (300, 4, 17, 768, 2050)]
SHAPES = SMALL if DEVICE == "cpu" else SMALL + LARGE


def normal(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def chosen(tokens: int, each: int, experts: int) -> torch.Tensor:
    """Some of the ids are of no expert: one past the last, and -1."""
    return torch.randint(-1, experts + 1, (tokens, each), generator=torch.Generator().manual_seed(3)).to(DEVICE)


def same_groups(found: Groups, wanted: Groups) -> None:
    known = int(wanted.starts[-1])
    assert torch.equal(found.starts, wanted.starts)
    assert torch.equal(found.places, wanted.places)
    assert torch.equal(found.rows[:known], wanted.rows[:known])


@pytest.mark.parametrize("pairs", [(1, 1, 3), (5, 4, 130), (700, 2, 9)], ids=str)
def test_pairs_are_sorted_by_expert_and_then_by_token(pairs: tuple[int, int, int]) -> None:
    from octavo.kernels import experts_triton

    tokens, each, experts = pairs
    ids = chosen(tokens, each, experts)
    same_groups(experts_triton.group(ids, experts), reference.group(ids, experts))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
def test_grouped_products_equal_the_reference(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, turned: bool
) -> None:
    from octavo.kernels import experts_triton

    tokens, each, experts, size, out = shape
    weight = normal(experts, out, size, dtype=dtype, seed=1) * size**-0.5
    weight = weight.mT.contiguous().mT if turned else weight
    bias = normal(experts, out, dtype=dtype, seed=2) if turned else None
    groups = reference.group(chosen(tokens, each, experts), experts)
    known = int(groups.starts[-1])
    for by_token in (True, False):
        x = normal(tokens if by_token else tokens * each, size, dtype=dtype, seed=4)
        found = experts_triton.grouped_linear(x, weight, bias, groups, by_token=by_token)
        wide = None if bias is None else bias.double()
        wanted = reference.grouped_linear(x.double(), weight.double(), wide, groups, by_token=by_token)
        close(found[:known], wanted[:known], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [48, 2050])
def test_sums_by_weight_equal_the_reference(size: int, dtype: torch.dtype) -> None:
    from octavo.kernels import experts_triton

    groups = reference.group(chosen(6, 3, 4), 4)
    x, weights = normal(18, size, dtype=dtype, seed=0), normal(6, 3, dtype=torch.float32, seed=1)
    x[int(groups.starts[-1]) :] = float("nan")  # which are no expert's
    close(experts_triton.combine(x, weights, groups), reference.combine(x.double(), weights, groups), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_alone_gets_what_it_gets_among_others(dtype: torch.dtype) -> None:
    from octavo.kernels import experts_triton

    tokens, experts, size = (20, 4, 64) if DEVICE == "cpu" else (900, 16, 1024)
    x, weight = normal(tokens, size, dtype=dtype, seed=0), normal(experts, 96, size, dtype=dtype, seed=1) * size**-0.5
    ids = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(2)).topk(2).indices.to(DEVICE)

    def products(own: slice) -> torch.Tensor:
        groups = experts_triton.group(ids[own], experts)
        out = experts_triton.grouped_linear(x[own], weight, None, groups, by_token=True)
        return out[groups.places.long()]

    among = products(slice(None))
    for token in range(0, tokens, tokens // 5):
        torch.testing.assert_close(products(slice(token, token + 1))[0], among[token], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.skipif(DEVICE == "cpu", reason="only a card has graphs")
def test_a_captured_mixture_follows_the_router() -> None:
    """The choice of experts is read on the card, so that a graph gives what plain launches give for another choice."""
    from octavo.kernels.select import ops
    from octavo.layers.experts import GroupedProduct, mixture
    from octavo.platforms.cuda import CudaPlatform

    dtype, platform = torch.bfloat16, CudaPlatform()
    chosen_ops = ops(platform.device, dtype)
    up = GroupedProduct(chosen_ops.experts, normal(32, 2 * 96, 128, dtype=dtype, seed=0) * 0.1, None)
    down = GroupedProduct(chosen_ops.experts, normal(32, 128, 96, dtype=dtype, seed=1) * 0.1, None)
    x, weights = normal(8, 128, dtype=dtype, seed=2), normal(8, 4, dtype=dtype, seed=3)
    ids = torch.zeros(8, 4, dtype=torch.int64, device=DEVICE)

    def run() -> torch.Tensor:
        return mixture(chosen_ops.experts, x, ids, weights, 32, up, chosen_ops.silu_and_mul, down)

    replay: Callable[[], torch.Tensor] = platform.capture(run)
    for seed in range(3):
        noise = torch.rand(8, 32, generator=torch.Generator().manual_seed(seed))
        ids.copy_(noise.topk(4).indices)
        found = replay().clone()
        assert torch.equal(found, run())


@pytest.mark.skipif(DEVICE == "cpu", reason="the engine takes no interpreter")
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 13}, {"enforce_eager": True}], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_greedy_tokens_of_native_mixtures_equal_transformers(
    family: str, options: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny.make(tmp_path / family, family)
    flat = {"device": "cuda", "dtype": "float32", "max_num_seqs": 4, "kv_cache_memory_bytes": 16 << 20, **options}
    core = EngineCore(EngineConfig.of(model=str(folder), **flat), Worker())
    generator = torch.Generator().manual_seed(1)
    prompts = {f"r{n}": torch.randint(4, 380, (n,), generator=generator).tolist() for n in (1, 7, 33, 64, 16)}
    for id, tokens in prompts.items():
        assert core.add(make_request(core, id, tokens, max_tokens=16, temperature=0.0)) is None
    answers = collect(run(core))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for id, tokens in prompts.items():
        with torch.inference_mode():
            logits = model(torch.tensor([[*tokens, *answers[id][:-1]]])).logits[0, len(tokens) - 1 :]
        assert answers[id] == logits.argmax(-1).tolist(), id


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), wanted.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
