"""Native models against Transformers, in float32 on tiny random models: every family, every kind of RoPE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from octavo.kernels import select
from tests.models.harness import Paged, native
from tools import tiny

TOLERANCE = 2e-4  # of logits that are about ten in size
MAX_LEN = 64

# name -> (family, RoPE, overrides of config.json)
MODELS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "llama": ("llama", None, {}),
    "llama with biases": ("llama", None, {"attention_bias": True, "mlp_bias": True}),
    "llama of one head size": ("llama", None, {"head_dim": 24}),
    "llama without groups": ("llama", None, {"num_key_value_heads": 4}),
    "llama with tanh gelu": ("llama", None, {"hidden_act": "gelu_pytorch_tanh"}),
    "smollm2": ("llama", None, {"tie_word_embeddings": True, "num_attention_heads": 9, "num_key_value_heads": 3,
                                "hidden_size": 144}),
    "mistral": ("mistral", None, {}),
    "mistral without window": ("mistral", None, {"sliding_window": None}),
    "qwen2": ("qwen2", None, {}),
    "qwen2 tied": ("qwen2", None, {"tie_word_embeddings": True}),
    "qwen2 with window": (
        "qwen2", None, {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", None, {}),
    "qwen3 with biases": ("qwen3", None, {"attention_bias": True}),
    "mixtral": ("mixtral", None, {}),
    "mixtral with window": ("mixtral", None, {"sliding_window": 16, "num_experts_per_tok": 1}),
    "qwen3_moe": ("qwen3_moe", None, {}),
    "qwen3_moe, tied, with experts in every other layer": (
        "qwen3_moe", None, {"tie_word_embeddings": True, "norm_topk_prob": False, "decoder_sparse_step": 2,
                            "mlp_only_layers": [], "attention_bias": True},
    ),
    "smollm3": ("smollm3", None, {}),
    "smollm3 with biases": ("smollm3", None, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    **{f"{rope} rope": ("llama", rope, {}) for rope in tiny.ROPES},
    "yarn on qwen3": ("qwen3", "yarn", {}),
    "llama3 on smollm3": ("smollm3", "llama3", {}),
}  # fmt: skip


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, tiny.VOCAB_SIZE, (length,), generator=generator).tolist()


class Oracle:
    """Transformers on the same folder, one whole forward for every question: no cache to be wrong about."""

    def __init__(self, folder: Path) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32
        )

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0]

    def greedy(self, tokens: list[int], count: int) -> list[int]:
        for _ in range(count):
            tokens = [*tokens, int(self.logits(tokens)[-1].argmax())]
        return tokens[-count:]


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Oracle, Any]:
    family, rope, overrides = MODELS[request.param]
    folder = tiny.make(tmp_path_factory.mktemp("model"), family, rope=rope, **overrides)
    return Oracle(folder), native(folder, MAX_LEN)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_logits_of_a_whole_prompt_equal_transformers(pair: tuple[Oracle, Any]) -> None:
    oracle, model = pair
    tokens, pages = prompt(45), Paged(model)
    row = pages.start()
    close(pages.step({row: tokens})[row], oracle.logits(tokens))


def test_greedy_tokens_equal_transformers(pair: tuple[Oracle, Any]) -> None:
    oracle, model = pair
    tokens, pages = prompt(21, seed=1), Paged(model)
    assert pages.greedy(pages.start(), tokens, 12) == oracle.greedy(tokens, 12)


def test_ragged_chunks_over_scattered_pages(pair: tuple[Oracle, Any]) -> None:
    oracle, model = pair
    tokens, pages = prompt(50, seed=2), Paged(model, seed=3)
    row, got, start = pages.start(), [], 0
    for count in (1, 7, 8, 3, 17, 1, 1, 12):
        got.append(pages.step({row: tokens[start : start + count]})[row])
        start += count
    close(torch.cat(got), oracle.logits(tokens))


def test_batch_of_decodes_and_chunks_of_different_lengths(pair: tuple[Oracle, Any]) -> None:
    oracle, model = pair
    prompts = [prompt(length, seed=length) for length in (5, 18, 33, 47)]
    pages = Paged(model, seed=5)
    rows = [pages.start() for _ in prompts]
    firsts = pages.step({row: tokens[: len(tokens) // 2] for row, tokens in zip(rows, prompts, strict=True)})
    # The second step decodes the first two, and goes on with the others.
    counts = [1, 1, 9, 20]
    seconds = pages.step(
        {row: tokens[len(tokens) // 2 :][:count] for row, tokens, count in zip(rows, prompts, counts, strict=True)}
    )
    for row, tokens, count in zip(rows, prompts, counts, strict=True):
        expected = oracle.logits(tokens[: len(tokens) // 2 + count])
        close(torch.cat((firsts[row], seconds[row])), expected)


def test_a_model_asked_for_some_tokens_returns_those(pair: tuple[Oracle, Any]) -> None:
    oracle, model = pair
    _compare_last_tokens(oracle, Paged(model, seed=6))


def test_a_guest_on_the_pages_of_a_shared_prefix_gets_its_own_logits(pair: tuple[Oracle, Any]) -> None:
    oracle, model = pair
    pages = Paged(model, seed=7)
    first, second = prompt(40, seed=8), [*prompt(40, seed=8)[:24], *prompt(11, seed=9)]
    owner = pages.start()
    pages.step({owner: first})
    guest = pages.start(prefix_of=owner, pages=3)
    close(pages.step({guest: second[24:]})[guest], oracle.logits(second)[24:])


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "smollm3"])
def test_plain_torch_operators_give_the_same_answer(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run where the C++ extension does not."""
    monkeypatch.setattr(select, "ops", lambda device, dtype: select.REFERENCE)
    folder = tiny.make(tmp_path, family)
    tokens, pages = prompt(40), Paged(native(folder, MAX_LEN))
    row, oracle = pages.start(), Oracle(folder)
    got = torch.cat([pages.step({row: tokens[:17]})[row], pages.step({row: tokens[17:]})[row]])
    close(got, oracle.logits(tokens))
    _compare_last_tokens(oracle, pages)


def _compare_last_tokens(oracle: Oracle, pages: Paged) -> None:
    """Of a step with a token of one sequence, a chunk of another and the end of a third; the second is not asked for,
    and goes on in a step of its own, which reads the K and V that it left."""
    prompts = [prompt(length, seed=length) for length in (9, 40, 33)]
    rows = [pages.start() for _ in prompts]
    pages.step({rows[0]: prompts[0][:8], rows[2]: prompts[2][:4]})
    mixed = {rows[0]: prompts[0][8:], rows[1]: prompts[1][:25], rows[2]: prompts[2][4:]}
    got = pages.step(mixed, asking=[rows[0], rows[2]])
    got |= pages.step({rows[1]: prompts[1][25:]}, asking=[rows[1]])
    for row, tokens in zip(rows, prompts, strict=True):
        close(got[row], oracle.logits(tokens)[-1:])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_stays_near_float32(family: str, tmp_path: Path) -> None:
    """And as near as Transformers in bfloat16 does; with the C++ extension this is the packed product."""
    folder = tiny.make(tmp_path, family)
    tokens, pages = prompt(40), Paged(native(folder, MAX_LEN, dtype="bfloat16"))
    row, oracle = pages.start(), Oracle(folder)
    exact = oracle.logits(tokens)
    oracle.model.to(torch.bfloat16)
    theirs, ours = oracle.logits(tokens).float(), pages.step({row: tokens})[row]
    assert (ours - exact).norm() < 1.25 * (theirs - exact).norm()


@pytest.mark.parametrize(("rope", "length"), [("dynamic", 96), ("longrope", 70)])
def test_sequences_past_the_trained_length(rope: str, length: int, tmp_path: Path) -> None:
    """Where Transformers adapts to the longest sequence seen, the native tables are made for max_len from the start."""
    folder = tiny.make(tmp_path, "llama", rope=rope)
    tokens, pages = prompt(length), Paged(native(folder, 96))
    row = pages.start()
    got = torch.cat([pages.step({row: tokens[start : start + 32]})[row] for start in range(0, length, 32)])
    close(got, Oracle(folder).logits(tokens))


def test_extended_ropes_reach_the_end_of_their_length(tmp_path: Path) -> None:
    for rope in ("linear", "yarn", "llama3"):
        folder = tiny.make(tmp_path / rope, "llama", rope=rope)
        tokens, pages = prompt(256), Paged(native(folder, 256))
        row = pages.start()
        close(pages.step({row: tokens})[row], Oracle(folder).logits(tokens))


_OTHERS = {  # settings of other families, and other families' names of settings that this config leaves out
    "attn_logit_softcapping": 1.0,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "no_rope_layers": [1, 0, 1],
    "no_rope_layer_interval": 2,
    "mlp_only_layers": [1],
    "decoder_sparse_step": 2,
    "use_sliding_window": False,
    "sliding_window": 5,
    "activation_function": "gelu_new",
    "layer_norm_eps": 0.5,
}


@pytest.mark.parametrize(
    ("family", "read"),
    [
        ("llama", ()),
        ("mistral", ("layer_types",)),
        ("mixtral", ()),
        ("qwen2", ("layer_types", "use_sliding_window")),
        ("qwen3_moe", ("use_sliding_window", "mlp_only_layers", "decoder_sparse_step")),
    ],
)
def test_settings_that_a_family_does_not_read_change_nothing(
    family: str, read: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tiny.make(tmp_path, family)
    hf = json.loads((folder / "config.json").read_text())
    named = {**hf, **{key: value for key, value in _OTHERS.items() if key not in read}}
    left_out = {key: value for key, value in named.items() if key not in ("hidden_act", "rms_norm_eps")}
    (folder / "config.json").write_text(json.dumps(left_out))
    tokens, pages = prompt(30), Paged(native(folder, MAX_LEN))
    row = pages.start()
    close(pages.step({row: tokens})[row], Oracle(folder).logits(tokens))
