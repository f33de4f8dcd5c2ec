from __future__ import annotations

import dataclasses

import torch

from octavo.kernels.select import REFERENCE
from octavo.layers.base import LoadRule
from octavo.layers.embedding import Embedding
from octavo.layers.linear import Linear

CPU = torch.device("cpu")


class Packed:
    """A packed product that counts its calls."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias, self.calls = weight.clone(), bias, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.weight[ids]


PACKING = dataclasses.replace(REFERENCE, pack_linear=Packed)


def qkv(bias: bool = True) -> Linear:
    linear = Linear(8, {"q_proj": 6, "k_proj": 2, "v_proj": 4}, bias=bias, shard="out", dtype=torch.float32)
    linear.materialise(CPU)
    for name in ("weight", "bias") if bias else ("weight",):
        linear.fill_dummy(name, torch.Generator().manual_seed(0))
    return linear


def test_a_layer_is_built_without_memory() -> None:
    assert Linear(8, {"q_proj": 6}, dtype=torch.float32).weight.is_meta


def test_rules_place_siblings_of_the_layer_one_below_the_other() -> None:
    assert qkv().load_rules("model.layers.0.self_attn.qkv_proj") == [
        LoadRule("model.layers.0.self_attn.q_proj.weight", "weight", 0, 6),
        LoadRule("model.layers.0.self_attn.q_proj.bias", "bias", 0, 6),
        LoadRule("model.layers.0.self_attn.k_proj.weight", "weight", 6, 2),
        LoadRule("model.layers.0.self_attn.k_proj.bias", "bias", 6, 2),
        LoadRule("model.layers.0.self_attn.v_proj.weight", "weight", 8, 4),
        LoadRule("model.layers.0.self_attn.v_proj.bias", "bias", 8, 4),
    ]


def test_the_bias_of_a_layer_cut_along_its_input_is_not_cut() -> None:
    linear = Linear(8, {"o_proj": 4}, bias=True, shard="in", dtype=torch.float32)
    assert [rule.cut for rule in linear.load_rules("o_proj")] == [None, None]
    assert linear.load_rules("o_proj")[0].source == "o_proj.weight"


def test_packing_keeps_the_product_and_drops_the_weight() -> None:
    linear, x = qkv(), torch.randn(3, 8)
    expected = linear(x)
    linear.finish(PACKING)
    assert torch.equal(linear(x), expected)
    assert list(linear.parameters()) == []


def test_a_tied_embedding_keeps_one_copy_when_packed() -> None:
    embedding = Embedding(10, 8, tied=True, dtype=torch.float32)
    embedding.materialise(CPU)
    embedding.fill_dummy("weight", torch.Generator().manual_seed(0))
    ids, hidden = torch.tensor([3, 9, 3]), torch.randn(2, 8)
    rows, logits = embedding(ids), embedding.logits(hidden)
    embedding.finish(PACKING)
    assert list(embedding.parameters()) == []
    assert torch.equal(embedding(ids), rows)
    assert torch.equal(embedding.logits(hidden), logits)


def test_an_embedding_that_is_no_head_is_not_packed() -> None:
    embedding = Embedding(10, 8, dtype=torch.float32)
    embedding.materialise(CPU)
    embedding.finish(PACKING)
    assert len(list(embedding.parameters())) == 1
