"""Tables of cosines and sines against Transformers' own rotary modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from octavo.config import LayerSpec, RopeSpec
from octavo.errors import ModelError
from octavo.kernels import reference
from octavo.layers.rotary import Rotary, shared_rotaries

DIM = 16
LONGROPE = {
    "short_factor": [1.0 + 0.1 * i for i in range(DIM // 2)],
    "long_factor": [1.0 + 1.5 * i for i in range(DIM // 2)],
    "original_max_position_embeddings": 32,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}

# (kind, parameters, max_position, theta, max_len)
CASES = [
    ("default", {}, 64, 10000.0, 64),
    ("default", {}, 64, 500000.0, 200),
    ("linear", {"factor": 4.0}, 64, 10000.0, 256),
    ("dynamic", {"factor": 2.0}, 64, 10000.0, 64),
    ("dynamic", {"factor": 2.0}, 64, 10000.0, 160),
    ("llama3", LLAMA3, 512, 10000.0, 512),
    ("llama3", {**LLAMA3, "factor": 32.0}, 512, 500000.0, 512),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 64}, 256, 10000.0, 256),
    ("yarn", {"factor": None, "original_max_position_embeddings": 64}, 256, 10000.0, 256),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3}, 256, 10000.0, 256),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 64, "truncate": False}, 256, 10000.0, 256),
    ("yarn", {"factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 4, "beta_slow": 2}, 32, 100.0, 32),
    (
        "yarn",
        {"factor": 4.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 1.2},
        256,
        10000.0,
        256,
    ),
    ("longrope", LONGROPE, 32, 10000.0, 32),
    ("longrope", LONGROPE, 128, 10000.0, 32),
    ("longrope", LONGROPE, 128, 10000.0, 128),
    ("longrope", {**LONGROPE, "factor": 3.0}, 128, 10000.0, 128),
    ("longrope", {**LONGROPE, "attention_factor": 1.7}, 128, 10000.0, 33),
]


def spec(kind: Any = "default", params: dict[str, Any] | None = None, **changes: Any) -> RopeSpec:
    fields: dict[str, Any] = {"theta": 10000.0, "dim": DIM, "max_position": 64, "params": params or {}, **changes}
    return RopeSpec(kind=kind, **fields)


def table(rope: RopeSpec, max_len: int) -> torch.Tensor:
    rotary = Rotary(rope, max_len)
    rotary.materialise(torch.device("cpu"))
    return rotary.cos_sin


@pytest.mark.parametrize(("kind", "params", "max_position", "theta", "max_len"), CASES)
def test_table_equals_transformers(
    kind: str, params: dict[str, Any], max_position: int, theta: float, max_len: int
) -> None:
    config = LlamaConfig(
        hidden_size=4 * DIM,
        num_attention_heads=4,
        max_position_embeddings=max_position,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **params},
    )
    positions = torch.arange(max_len).unsqueeze(0)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    got = table(spec(kind, params, max_position=max_position, theta=theta), max_len)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[:, : DIM // 2], cos[0, :, : DIM // 2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[:, DIM // 2 :], sin[0, :, : DIM // 2], atol=1e-5, rtol=1e-5)


def test_longrope_is_long_exactly_when_sequences_may_pass_the_original_length() -> None:
    rope = spec("longrope", LONGROPE, max_position=128)
    short, long = table(rope, 32), table(rope, 33)
    assert not torch.allclose(short, long[:32])
    assert torch.equal(table(rope, 128)[:33], long)


def test_dynamic_is_frozen_at_the_longest_sequence() -> None:
    rope = spec("dynamic", {"factor": 2.0})
    assert torch.equal(table(rope, 32), table(spec(), 32))
    assert not torch.allclose(table(rope, 128)[:32], table(spec(), 32))


def test_partial_rotation_leaves_the_other_dimensions() -> None:
    rotary = Rotary(spec(dim=8), 32)
    rotary.materialise(torch.device("cpu"))
    q, k = torch.randn(3, 4, DIM), torch.randn(3, 2, DIM)
    positions = torch.tensor([5, 0, 31], dtype=torch.int32)
    rotated_q, rotated_k = (reference.rotary(x, rotary.cos_sin, positions) for x in (q, k))
    assert torch.equal(rotated_q[..., 8:], q[..., 8:])
    assert torch.equal(rotated_k[1], k[1])
    assert not torch.allclose(rotated_q[0, :, :8], q[0, :, :8])
    torch.testing.assert_close(rotated_q.norm(dim=-1), q.norm(dim=-1))


def test_layers_with_equal_specs_share_one_table() -> None:
    def layer(rope: RopeSpec | None) -> LayerSpec:
        return LayerSpec(heads=4, kv_heads=2, head_dim=DIM, rope=rope)

    yarn = {"factor": 4.0, "original_max_position_embeddings": 64}
    first, second, none, third = shared_rotaries(
        [layer(spec("yarn", yarn)), layer(spec("yarn", dict(yarn))), layer(None), layer(spec())], 64
    )
    assert first is second
    assert none is None
    assert third is not None
    assert third is not first


@pytest.mark.parametrize(
    ("bad", "key"),
    [
        (spec("linear"), "factor"),
        (spec("linear", {"factor": "4"}), "factor"),
        (spec("linear", {"factor": -1.0}), "factor"),
        (spec("llama3", {**LLAMA3, "high_freq_factor": None}), "high_freq_factor"),
        (spec("yarn", {"factor": 4.0}), "original_max_position_embeddings"),
        (spec("longrope", {**LONGROPE, "short_factor": [1.0]}, max_position=64), "short_factor"),
        (spec("yarn", {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": "x"}), "beta_fast"),
        (spec("longrope", {**LONGROPE, "attention_factor": float("nan")}, max_position=64), "attention_factor"),
        (spec(theta=0.0), "rope_theta"),
        (spec(dim=7), "7"),
    ],
)
def test_malformed_parameters_are_named(bad: RopeSpec, key: str) -> None:
    with pytest.raises(ModelError) as error:
        Rotary(bad, 16)
    assert error.value.id == "HF020"
    assert key in error.value.cause
