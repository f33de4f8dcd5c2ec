"""Experts of Transformers' models by the engine's grouped products: taken where they are the same, and only there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from octavo.models.hf import experts
from tools import sweep

transformers = pytest.importorskip("transformers")

CPU = torch.device("cpu")
FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "nemotron_h"]


def module_of(model_type: str, dtype: torch.dtype) -> Any:
    """The first module of experts in a tiny random model."""
    config = sweep.tiny_config(model_type)
    model = sweep.reference(config).to(dtype)
    return next(m for m in model.modules() if type(m).__name__.endswith("Experts"))


def arguments(module: Any, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Hidden states, ids and weights for a module that still has its own parameters."""
    generator = torch.Generator().manual_seed(7)
    up = module.gate_up_proj if module.has_gate else module.up_proj
    hidden = torch.randn(11, up.shape[1 if module.is_transposed else 2], generator=generator)
    ids = torch.rand(11, len(up), generator=generator).topk(2).indices
    return hidden.to(dtype), ids, torch.rand(11, 2, generator=generator).to(dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_in_float32_give_what_transformers_does(family: str) -> None:
    module = module_of(family, torch.float32)
    given = arguments(module, torch.float32)
    with torch.inference_mode():
        expected = module(*given)
        told = experts.adopt(nn.ModuleList([module]), torch.float32, CPU)
        found = module(*given)
    assert told == "experts: 1 layer by octavo's grouped product"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_in_bfloat16_hold_one_packed_copy_of_their_weights(family: str) -> None:
    pytest.importorskip("octavo._cpu", reason="the C++ extension is not built")
    module = module_of(family, torch.bfloat16)
    nbytes = sum(p.nbytes for p in module.parameters(recurse=False))
    given = arguments(module, torch.bfloat16)
    with torch.inference_mode():
        expected = copy.deepcopy(module).float()(*(x.float() if x.is_floating_point() else x for x in given))
        assert "1 layer by octavo" in experts.adopt(nn.ModuleList([module]), torch.bfloat16, CPU)
        found = module(*given).float()
    assert not list(module.parameters(recurse=False))
    assert 0 < getattr(module, experts.ATTRIBUTE).nbytes <= nbytes
    assert (found - expected).norm() <= 1e-2 * expected.norm()


def test_an_activation_that_the_registry_does_not_see_keeps_transformers_code() -> None:
    module = module_of("mixtral", torch.float32)

    own: Any = type(module)

    class Doubled(own):  # type: ignore[misc]
        pass

    def forward(self: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = 2 * own.forward.__wrapped__(self, hidden, ids, weights)
        return out

    dispatching = Doubled.forward

    def dispatch(self: Any, *args: Any) -> Any:
        return dispatching(self, *args)

    dispatch.__wrapped__ = forward  # type: ignore[attr-defined]
    Doubled.forward = dispatch
    module.__class__ = Doubled
    told = experts.adopt(nn.ModuleList([module]), torch.float32, CPU)
    assert told == "experts: 1 by Transformers' own code, since Doubled computes something else"
    assert not hasattr(module, experts.ATTRIBUTE)


def test_experts_with_a_loop_of_their_own_are_left_as_they_are() -> None:
    module = module_of("dbrx", torch.float32)
    told = experts.adopt(nn.ModuleList([module]), torch.float32, CPU)
    assert told == "experts: 1 by Transformers' own code, since DbrxExperts does not use Transformers' registry"


def test_weights_of_another_type_than_the_models_keep_transformers_code() -> None:
    module = module_of("mixtral", torch.float32)
    told = experts.adopt(nn.ModuleList([module]), torch.bfloat16, CPU)
    assert "its weights are torch.float32 in a model of torch.bfloat16" in told


def test_a_model_without_experts_says_nothing() -> None:
    assert experts.adopt(nn.Linear(2, 2), torch.float32, CPU) == ""
