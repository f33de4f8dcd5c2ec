"""Llama and the families that differ from it in a few data: Mistral, Qwen2, Qwen3, SmolLM2, SmolLM3.

    embed_tokens -> layers x [ norm, attention, add; norm, gated MLP, add ] -> norm -> lm_head

Hidden states are ``[T, C]`` over the flat token axis. Each addition is fused with the norm after it, so a layer takes
and returns a pair: its output, and the residual that this output has yet to be added to. Among several ranks the output
is each one's summand, and the norm sums, too. Window and rotary embedding
are per layer, in its `LayerSpec`; biases and the norm of heads are in `Wiring`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from octavo.config import LayerSpec, ModelConfig
from octavo.kernels.metadata import HeadChange
from octavo.kernels.sampling import VocabPart
from octavo.kernels.select import FusedDecoder, FusedLayer, LayerParts
from octavo.layers import context
from octavo.layers.activation import GatedActivation
from octavo.layers.attention import Attention
from octavo.layers.embedding import Embedding, equal_parts, gather_vocab, vocab_part
from octavo.layers.linear import Linear
from octavo.layers.norm import RMSNorm
from octavo.layers.rotary import Rotary, shared_rotaries
from octavo.models.base import Model
from octavo.parallel.group import current
from octavo.parallel.shards import check, heads_of_rank


@dataclass(frozen=True)
class Wiring:
    """Which optional parameters a family has."""

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of each query and key head


def wiring(config: ModelConfig) -> Wiring:
    """A flag of config.json counts only where Transformers' class of that architecture reads it."""
    attention_bias = bool(config.hf.get("attention_bias", False))
    mlp_bias = bool(config.hf.get("mlp_bias", False))
    match config.architecture:
        case "MistralForCausalLM" | "MixtralForCausalLM":
            return Wiring()
        case "Qwen2ForCausalLM":
            return Wiring(qkv_bias=True)
        case "Qwen3ForCausalLM" | "Qwen3MoeForCausalLM":
            return Wiring(qkv_bias=attention_bias, o_bias=attention_bias, qk_norm=True)
        case _:
            return Wiring(qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=mlp_bias)


class LlamaAttention(nn.Module):
    def __init__(
        self, config: ModelConfig, spec: LayerSpec, layer: int, rotary: Rotary | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        has = wiring(config)
        q_size, kv_size = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        self.head_dim = spec.head_dim
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        units = {"k_proj": spec.kv_heads, "v_proj": spec.kv_heads}
        self.qkv_proj = Linear(config.hidden_size, parts, bias=has.qkv_bias, shard="out", units=units, dtype=dtype)
        self.sizes = list(self.qkv_proj.parts.values())
        self.q_norm = RMSNorm(spec.head_dim, config.norm_eps, dtype=dtype) if has.qk_norm else None
        self.k_norm = RMSNorm(spec.head_dim, config.norm_eps, dtype=dtype) if has.qk_norm else None
        self.rotary_emb = rotary
        self.attn = Attention(spec, layer)
        self.o_proj = Linear(
            q_size, {"o_proj": config.hidden_size}, bias=has.o_bias, shard="in", sums=False, dtype=dtype
        )

    def forward(self, x: torch.Tensor, positions: torch.Tensor, wanted: context.Wanted | None = None) -> torch.Tensor:
        """``x[T, C]`` to ``[T, C]``, or to ``[S, C]`` of the ``wanted`` tokens."""
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in self.qkv_proj(x).split(self.sizes, dim=-1))
        out: torch.Tensor = self.o_proj(self.attn(q, k, v, positions, self.change, wanted).flatten(1))
        return out

    @cached_property
    def change(self) -> HeadChange:
        """What is done to query and key heads; asked for once the weights are loaded."""
        return HeadChange(
            q_norm=None if self.q_norm is None else self.q_norm.weight,
            k_norm=None if self.k_norm is None else self.k_norm.weight,
            eps=0.0 if self.q_norm is None else self.q_norm.eps,
            cos_sin=None if self.rotary_emb is None else self.rotary_emb.cos_sin,
        )


class LlamaMLP(nn.Module):
    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        bias, inner = wiring(config).mlp_bias, config.intermediate_size
        parts = {"gate_proj": inner, "up_proj": inner}
        self.gate_up_proj = Linear(config.hidden_size, parts, bias=bias, shard="out", dtype=dtype)
        self.act_fn = GatedActivation(config.hidden_act)
        self.down_proj = Linear(
            inner, {"down_proj": config.hidden_size}, bias=bias, shard="in", sums=False, dtype=dtype
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(self.act_fn.of_product(self.gate_up_proj, x))
        return out


class DecoderLayer(nn.Module):
    """Attention and what follows it, by the names that a family's checkpoints have for the latter."""

    input_layernorm: RMSNorm
    self_attn: LlamaAttention
    post_attention_layernorm: RMSNorm

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        wanted: context.Wanted | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``x[T, C]`` and its residual (None: zero) to such a pair; ``[S, C]`` of the ``wanted`` tokens, if given."""
        x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, positions, wanted)
        if wanted is not None:
            residual = residual[wanted.tokens]
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.feed_forward(x), residual


class LlamaDecoderLayer(DecoderLayer):
    def __init__(self, config: ModelConfig, layer: int, rotary: Rotary | None, dtype: torch.dtype) -> None:
        super().__init__()
        whole = config.layers[layer]
        self.spec = heads_of_rank(whole, current().size)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.self_attn = LlamaAttention(config, whole, layer, rotary, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype)
        self.mlp = LlamaMLP(config, dtype)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.mlp(x)
        return out

    def forward(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        positions: torch.Tensor,
        wanted: context.Wanted | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.fused is None:
            return super().forward(x, residual, positions, wanted)
        step = context.current()
        x, residual = self.fused(x, residual, positions, step.kv_cache[self.self_attn.attn.layer], step.attention)
        return (x, residual) if wanted is None else (x[wanted.tokens], residual[wanted.tokens])

    @cached_property
    def fused(self) -> FusedLayer | None:
        """This layer in one call, where the operators have that; asked for once the weights are loaded."""
        attention, mlp = self.self_attn, self.mlp
        if mlp.down_proj.in_cut is not None:
            return None  # between its products the ranks meet
        parts = LayerParts(
            qkv=attention.qkv_proj.packed,
            o=attention.o_proj.packed,
            gate_up=mlp.gate_up_proj.packed,
            down=mlp.down_proj.packed,
            input_norm=self.input_layernorm.weight,
            post_norm=self.post_attention_layernorm.weight,
            q_norm=attention.change.q_norm,
            k_norm=attention.change.k_norm,
            eps=self.input_layernorm.eps,
            activation=mlp.act_fn.operator,
            heads=self.spec.heads,
            kv_heads=self.spec.kv_heads,
            head_dim=self.spec.head_dim,
            scale=attention.attn.scale,
            window=self.spec.window,
            softcap=self.spec.softcap,
            cos_sin=attention.change.cos_sin,
        )
        return self.input_layernorm.ops.fuse_layer(parts)


class Decoder(nn.Module):
    """Embedding, decoder layers, norm."""

    def __init__(self, embedding: nn.Module, layers: Sequence[nn.Module], norm: RMSNorm) -> None:
        super().__init__()
        self.embed_tokens = embedding
        self.layers = nn.ModuleList(layers)
        self.norm = norm

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As `models.base.Model.forward`."""
        x, residual, step = self.embed_tokens(token_ids), None, context.current()
        if self.fused is not None and len(self.layers):
            wanted = None if step.wanted is None else step.wanted.tokens
            return self.fused(x, positions, step.kv_cache, step.attention, len(self.layers), wanted)
        last = len(self.layers) - 1
        for place, layer in enumerate(self.layers):
            x, residual = layer(x, residual, positions, step.wanted if place == last else None)
        x, _ = self.norm.add(x, residual)
        return x if len(self.layers) else step.of_wanted(x)

    @cached_property
    def fused(self) -> FusedDecoder | None:
        """All layers and the norm in one call, where the operators have that; asked for once the weights are loaded."""
        layers = [layer for layer in self.layers if isinstance(layer, LlamaDecoderLayer)]
        fused = [layer.fused for layer in layers if layer.fused is not None]
        in_order = all(layer.self_attn.attn.layer == place for place, layer in enumerate(layers))
        if not in_order or not len(fused) == len(layers) == len(self.layers):
            return None
        return self.norm.ops.fuse_decoder(fused, self.norm.weight, self.norm.eps)


class LlamaModel(Decoder):
    embed_tokens: Embedding

    def __init__(self, config: ModelConfig, max_len: int, dtype: torch.dtype) -> None:
        rotaries = shared_rotaries(config.layers, max_len)
        super().__init__(
            Embedding(config.vocab_size, config.hidden_size, tied=config.tie_embeddings, dtype=dtype),
            [self.make_layer(config, layer, rotary, dtype) for layer, rotary in enumerate(rotaries)],
            RMSNorm(config.hidden_size, config.norm_eps, dtype=dtype),
        )

    @staticmethod
    def make_layer(config: ModelConfig, layer: int, rotary: Rotary | None, dtype: torch.dtype) -> nn.Module:
        """Decoder layer number ``layer``."""
        return LlamaDecoderLayer(config, layer, rotary, dtype)


class LlamaForCausalLM(Model):
    """``max_len`` is the longest sequence that the engine will run; ``config.layers`` become those of this rank."""

    decoder: type[LlamaModel] = LlamaModel

    def __init__(self, config: ModelConfig, max_len: int) -> None:
        super().__init__(config, max_len)
        self.group = current()
        check(self.group.size, self.inner_sizes(config), config.layers)
        self.model = self.decoder(config, max_len, self.dtype)
        self.config = replace(config, layers=tuple(heads_of_rank(spec, self.group.size) for spec in config.layers))
        self.lm_head: Linear | None = None
        if config.tie_embeddings:
            self.tied = ("lm_head.weight", "model.embed_tokens.weight")
        elif config.has_head:
            self.untie()
        else:
            self.unused = (*self.unused, "lm_head.*")

    @staticmethod
    def inner_sizes(config: ModelConfig) -> dict[str, int]:
        """What ranks divide besides heads and vocabulary, by its name in config.json."""
        return {"intermediate_size": config.intermediate_size}

    def untie(self) -> None:
        self.tied = None
        self.model.embed_tokens.tied = False
        parts = {"lm_head": self.config.vocab_size}
        self.lm_head = Linear(self.config.hidden_size, parts, shard="out", dtype=self.dtype)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.model(token_ids, positions)
        return hidden

    def own_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        own = self.model.embed_tokens.own_logits(hidden) if self.lm_head is None else self.lm_head(hidden)
        return equal_parts(own, self.config.vocab_size, self.group)

    def whole_logits(self, own: torch.Tensor) -> torch.Tensor:
        return gather_vocab(own, self.config.vocab_size, self.group)

    @property
    def vocab_part(self) -> VocabPart:
        return vocab_part(self.config.vocab_size, self.group)
