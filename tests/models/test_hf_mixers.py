"""Models of Transformers with recurrent layers, run in batches, against the same models without a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from octavo.models.base import OwnCache
from octavo.models.hf import pieces
from octavo.models.hf.states import States, StateShape, StateTable
from tests.core.stub_engine import collect as collected
from tests.core.stub_engine import make_request, run
from tests.models.harness import Paged
from tests.models.test_hf_backend import answers, core, saved
from tools import sweep, tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # of Transformers' own code


@pytest.mark.parametrize(
    ("model_type", "mixers"),
    [
        ("qwen3_next", "3 recurrent layers in batches, "),  # gated delta net
        ("kimi_linear", "2 recurrent layers in batches, "),
        ("lfm2", "2 recurrent layers in batches, "),  # short convolutions
        ("granitemoehybrid", "2 recurrent layers in batches, "),  # Mamba 2
        ("mamba2", "4 recurrent layers in batches, "),  # without attention
        ("falcon_h1", "4 recurrent layers in batches, "),  # both in each layer
        ("nemotron_h", "1 recurrent layer in batches, "),  # layers with neither
        ("jamba", "2 recurrent layers in batches (prompts token by token"),
        ("minimax", "2 recurrent layers in batches, "),  # a cache of its own
        ("zaya", "4 recurrent layers in batches, "),  # between projections and attention
    ],
)
def test_logits_and_greedy_tokens_equal_eager(model_type: str, mixers: str, tmp_path: Path) -> None:
    wanted = saved(tmp_path, model_type)
    model = sweep.adopted(tmp_path)
    error, case = sweep.divergence(model, wanted)
    assert error < 2e-5, case
    assert model.fused
    assert mixers in model.swapped


def generated(wanted: Any) -> dict[str, list[int]]:
    """What the unmodified model generates for the prompts of `answers`, by itself."""
    wanted.generation_config.eos_token_id = None
    generator, found = torch.Generator().manual_seed(3), {}
    for count in (1, 17, 40, 100, 33):
        tokens = torch.randint(4, 380, (1, count), generator=generator)
        text = wanted.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=20, do_sample=False)
        found[f"r{count}"] = text[0, count:].tolist()
    return found


@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2", "mamba"])
def test_an_engine_gives_the_tokens_of_generate_in_any_batch(model_type: str, tmp_path: Path) -> None:
    wanted = generated(saved(tmp_path, model_type))
    tiny.tokenizer(tmp_path)
    for budget in (2048, 13):  # whole prompts, and pieces beside others that decode; the fifth takes a used row
        assert answers(core(tmp_path, max_num_batched_tokens=budget)) == wanted


def test_a_preempted_request_is_computed_again(tmp_path: Path) -> None:
    saved(tmp_path, "lfm2")
    tiny.tokenizer(tmp_path)
    roomy = core(tmp_path)
    model = roomy._worker._model
    room = 4 * model.own_cache.per_row + 14 * 16 * model.config.kv_bytes_per_token  # the longest sequence has 12 pages
    tight = core(tmp_path, kv_cache_memory_bytes=room)
    assert answers(tight) == answers(roomy)
    assert tight.stats().preemptions > 0


def test_states_are_counted_and_no_prefix_is_reused(tmp_path: Path) -> None:
    saved(tmp_path, "lfm2")
    tiny.tokenizer(tmp_path)
    engine = core(tmp_path, enable_prefix_caching=True)
    assert engine._worker._model.own_cache == OwnCache(per_row=2 * 64 * 3 * 4, per_token=0)  # layers, width, taps
    assert not engine.info.prefix_caching
    for id in ("a", "b"):
        assert engine.add(make_request(engine, id, list(range(4, 60)), max_tokens=4, temperature=0.0)) is None
        collected(run(engine))
    assert engine.stats().cached_tokens == 0


def test_all_rows_that_decode_are_one_call_of_a_mixer(tmp_path: Path) -> None:
    saved(tmp_path, "lfm2")
    model = sweep.adopted(tmp_path)
    shapes = []
    convolution = model.body.get_submodule("layers.0.conv.inner")
    convolution.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["hidden_states"].shape)), with_kwargs=True
    )
    paged = Paged(model)
    a, b, c = (paged.start() for _ in range(3))
    paged.step({a: [4, 5, 6], b: [7, 8]})
    paged.step({a: [9], b: [10], c: [11, 12, 13, 14]})
    assert shapes == [(1, 3, 64), (1, 2, 64), (2, 1, 64), (1, 4, 64)]


class Forgetful:
    """A cache that forgets at the end of a call what is in ``lost``."""

    def __init__(self, cache: Any, lost: str) -> None:
        self._cache, self._lost = cache, lost

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Any:
        return None if self._lost == "all" else self._cache.get_conv_state(layer_idx, state_idx)

    def update_conv_state(self, states: torch.Tensor, layer_idx: int, **rest: Any) -> torch.Tensor:
        found: torch.Tensor = self._cache.update_conv_state(states, layer_idx, **rest)
        return found[..., -states.shape[-1] :]


@pytest.mark.parametrize(
    ("lost", "way"),
    [
        ("in pieces", "prompts token by token after their first piece"),
        ("all", "its states do not carry over from one piece of a sequence to the next"),  # slow
    ],
)
def test_what_states_are_good_for_is_found_out(
    lost: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    own = Lfm2ShortConv.forward

    def forward(self: nn.Module, hidden_states: torch.Tensor, past_key_values: Any = None, **rest: Any) -> Any:
        cache = None if past_key_values is None else Forgetful(past_key_values, lost)
        return own(self, hidden_states, cache, **rest)

    wanted = saved(tmp_path, "lfm2")
    monkeypatch.setattr(Lfm2ShortConv, "forward", forward)
    model = sweep.adopted(tmp_path)
    assert model.fused == (lost != "all")
    assert way in model.swapped
    error, case = sweep.divergence(model, wanted)
    assert error < 2e-5, case


def test_experts_take_no_memory_in_the_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trials: list[nn.Module] = []
    own = pieces.with_random_weights

    def kept(*args: Any, **kwargs: Any) -> nn.Module:
        trials.append(own(*args, **kwargs))
        return trials[-1]

    monkeypatch.setattr(pieces, "with_random_weights", kept)
    saved(tmp_path, "lfm2_moe")
    assert sweep.adopted(tmp_path).fused
    (trial,) = trials
    experts = {name for name, parameter in trial.named_parameters() if ".experts." in name}
    assert experts
    assert {name for name, parameter in trial.named_parameters() if parameter.is_meta} == experts


KEYS = (("conv", 0, 0), ("recurrent", 0, 0))
SHAPES = {KEYS[0]: StateShape((2, 3), torch.bfloat16), KEYS[1]: StateShape((5,), torch.float32)}


@torch.inference_mode()
def test_a_table_keeps_rows_apart_and_clears_them() -> None:
    table = StateTable(SHAPES)
    table.reserve(4, torch.device("cpu"))
    rows = torch.tensor([3, 1])
    states = table.gather(KEYS, rows)
    assert all(not state.any() for state in states.values())
    states = {key: torch.arange(float(state.numel())).view(state.shape) for key, state in states.items()}
    table.scatter(states, rows)
    table.put_row({KEYS[1]: torch.full((1, 5), 7.0)}, 0)
    table.reserve(6, torch.device("cpu"))  # what there is stays
    again = table.gather(KEYS, rows)
    assert {key: state.tolist() for key, state in again.items()} == {key: s.tolist() for key, s in states.items()}
    table.clear(3)
    assert all(not state.any() for state in table.of_row(KEYS, 3).values())
    assert all(table.of_row(KEYS, 1)[key][0].equal(again[key][1]) for key in KEYS)
    assert [table.of_row(KEYS, 0)[key].unique().tolist() for key in KEYS] == [[0.0], [7.0]]


def test_inputs_of_a_convolution_are_those_of_transformers_own_cache() -> None:
    from transformers.cache_utils import LinearAttentionLayer

    theirs, ours, generator = LinearAttentionLayer(), States({}), torch.Generator().manual_seed(0)
    for count in (2, 1, 5, 3):
        inputs = torch.randn(1, 2, count, generator=generator)
        found = ours.update_conv_state(inputs, 0, conv_kernel_size=3)
        assert torch.equal(found, theirs.update_conv_state(inputs, conv_kernel_size=3))
        assert torch.equal(ours.get_conv_state(0), theirs.conv_states[0])
