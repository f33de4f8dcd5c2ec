"""Mixtral and Qwen3-MoE: Llama's layers with mixtures of experts in the place of MLPs.

A router chooses ``num_experts_per_tok`` experts of each token: those of its greatest logits, whose softmax over all
experts gives the weights. Qwen3-MoE may have layers with one MLP, as in Llama.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from octavo.config import ModelConfig
from octavo.errors import ModelError
from octavo.layers.experts import Experts
from octavo.layers.linear import Linear
from octavo.layers.norm import RMSNorm
from octavo.layers.rotary import Rotary
from octavo.models.llama import DecoderLayer, LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaModel

MAX_COUNT = 1 << 20  # of experts, and of values between an expert's products


@dataclass(frozen=True)
class Mixture:
    """A family's names, and what config.json says of its experts."""

    block: str  # in a layer
    parts: tuple[str, str, str]  # of an expert: gate, up, down
    inner: str  # key of the size between an expert's products
    experts: int
    chosen: int
    sums_to_one: bool  # the weights of the chosen ones, so that what others had does not count


def mixture_of(config: ModelConfig) -> Mixture:
    """What ``config`` says of its experts, the rest from the defaults of Transformers' class; raises `ModelError` HF002
    for a number that cannot be."""
    if config.architecture == "MixtralForCausalLM":
        names = ("block_sparse_moe", ("w1", "w3", "w2"), "intermediate_size")
        found = Mixture(*names, _count(config, "num_local_experts", 8), _count(config, "num_experts_per_tok", 2), True)
    else:
        key = "num_experts" if config.hf.get("num_experts") else "num_local_experts"  # Transformers 5 writes the latter
        names = ("mlp", ("gate_proj", "up_proj", "down_proj"), "moe_intermediate_size")
        sums_to_one = bool(config.hf.get("norm_topk_prob", False))
        found = Mixture(*names, _count(config, key, 128), _count(config, "num_experts_per_tok", 8), sums_to_one)
    if found.chosen > found.experts:
        raise ModelError(
            f"num_experts_per_tok is {found.chosen}, of {found.experts} experts.", "Correct config.json.", id="HF002"
        )
    return found


def _count(config: ModelConfig, key: str, default: int) -> int:
    value = config.hf.get(key) or default
    if type(value) is not int or not 1 <= value <= MAX_COUNT:
        raise ModelError(f"{key} is {value!r}, not a number from 1 to {MAX_COUNT}.", "Correct config.json.", id="HF002")
    return value


def inner_size(config: ModelConfig) -> int:
    """Values between an expert's products."""
    return _count(config, mixture_of(config).inner, 768)


def is_sparse(config: ModelConfig, layer: int) -> bool:
    """Whether this layer has experts: `decoder_sparse_step` and `mlp_only_layers` are Qwen's."""
    plain = config.hf.get("mlp_only_layers") or []
    if not isinstance(plain, list):
        raise ModelError(f"mlp_only_layers is {plain!r}, not a list.", "Correct config.json.", id="HF002")
    if layer in plain:
        return False
    return (layer + 1) % _count(config, "decoder_sparse_step", 1) == 0


class SparseMLP(nn.Module):
    """A router and its experts."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        found, size = mixture_of(config), config.hidden_size
        self.chosen, self.sums_to_one = found.chosen, found.sums_to_one
        self.gate = Linear(size, {"gate": found.experts}, dtype=dtype)
        self.experts = Experts(found.experts, size, inner_size(config), config.hidden_act, found.parts, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, experts = self.gate(x).float().softmax(-1).topk(self.chosen)
        if self.sums_to_one:
            weights = weights / weights.sum(-1, keepdim=True)
        out: torch.Tensor = self.experts(x, experts, weights)
        return out


class SparseDecoderLayer(DecoderLayer):
    def __init__(self, config: ModelConfig, layer: int, rotary: Rotary | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.self_attn = LlamaAttention(config, config.layers[layer], layer, rotary, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.block = mixture_of(config).block
        self.add_module(self.block, SparseMLP(config, dtype))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = getattr(self, self.block)(x)
        return out


class MoeModel(LlamaModel):
    @staticmethod
    def make_layer(config: ModelConfig, layer: int, rotary: Rotary | None, dtype: torch.dtype) -> nn.Module:
        kind = SparseDecoderLayer if is_sparse(config, layer) else LlamaDecoderLayer
        return kind(config, layer, rotary, dtype)


class MoeForCausalLM(LlamaForCausalLM):
    decoder = MoeModel

    @staticmethod
    def inner_sizes(config: ModelConfig) -> dict[str, int]:
        return {"intermediate_size": config.intermediate_size, mixture_of(config).inner: inner_size(config)}
