"""The engine as on a card, without one: its own kernels in Triton's interpreter, its graphs as plain calls.

What a card adds (real launches, captures, streams) is in `test_engine`.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from triton.runtime.interpreter import InterpretedFunction

from octavo import platforms
from octavo.config import EngineConfig, MemoryOptions
from octavo.core.engine import EngineCore
from octavo.kernels import attn_triton, experts_triton, linear_triton, select, triton_ops
from octavo.platforms.base import NOTHING_CAPTURED, Captured, T
from octavo.platforms.cpu import CpuPlatform
from octavo.runtime import graphs
from octavo.runtime.worker import Worker
from tests.core.stub_engine import collect, make_request, run
from tools import tiny

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on a card here"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter divides where a card would mask
]

NEW = 3
CASES = [
    pytest.param("llama", {}, id="graphs"),
    pytest.param("qwen3", {"model_impl": "transformers"}, id="adopted"),
    pytest.param("mixtral", {"enforce_eager": True}, id="experts, no graphs"),
]


class Card(CpuPlatform):
    """The CPU in the part of a card."""

    overlaps = captures = True

    def __init__(self) -> None:
        super().__init__()
        self.enough_tokens = None


class ThoroughCard(Card):
    """Does before the first request what a card does then, too: the largest step, and each step that is captured."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs = 0  # bytes of what captured steps leave

    def capture(self, work: Callable[[], T]) -> Callable[[], T]:
        left = work()
        self.outputs += (left[0] if isinstance(left, tuple) else left).nbytes  # type: ignore[attr-defined]
        return work

    def kv_budget(
        self, memory: MemoryOptions, measure: Callable[[], None], captured: Captured = NOTHING_CAPTURED
    ) -> tuple[int, str]:
        measure()
        self.captured = captured
        return super().kv_budget(memory, measure)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few sizes of graphs, keys hardly split: the interpreter takes a hundredth of a second for a program."""
    as_on_a_card(monkeypatch, Card)
    monkeypatch.setattr(attn_triton, "_processors", lambda device: 2)
    monkeypatch.setattr(graphs, "SIZES", (1, 3))
    monkeypatch.setattr(graphs, "TOKENS", (8, 24))


def as_on_a_card(monkeypatch: pytest.MonkeyPatch, kind: Callable[[], Card]) -> None:
    triton = select._triton()
    assert isinstance(triton, select.Ops), triton
    operators = dataclasses.replace(triton, rehearse=lambda work: None)  # nothing is compiled
    monkeypatch.setattr(select, "ops", lambda device, dtype: operators)
    monkeypatch.setattr(platforms, "select", lambda *_: kind())


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("tiny")
    return cache(lambda family: tiny.make(root / family, family, num_hidden_layers=2))


def engine(folder: Path, **options: Any) -> EngineCore:
    flat = {"dtype": "float32", "max_num_seqs": 3, "max_num_batched_tokens": 32, "max_model_len": 64}
    return EngineCore(
        EngineConfig.of(model=str(folder), kv_cache_memory_bytes=1 << 20, **{**flat, **options}), Worker()
    )


def prompts() -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(1)
    return {f"r{i}": torch.randint(4, 380, (n,), generator=generator).tolist() for i, n in enumerate((1, 7, 40))}


def serve(core: EngineCore, requests: dict[str, list[int]], **sampling: Any) -> dict[str, list[int]]:
    for id, tokens in requests.items():
        assert core.add(make_request(core, id, tokens, **{"max_tokens": NEW, "temperature": 0.0, **sampling})) is None
    return collect(run(core))


def oracle(folder: Path, tokens: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([tokens])
    return model.generate(ids, attention_mask=ids > -1, max_new_tokens=NEW, do_sample=False)[0, len(tokens) :].tolist()


@pytest.mark.parametrize(("family", "options"), CASES)
def test_greedy_tokens_equal_transformers(
    card: None, folder_of: Callable[[str], Path], family: str, options: dict[str, Any]
) -> None:
    """Of prompts in steps that fit a graph and in one that does not, beside others' tokens; then of a known prefix."""
    core, folder = engine(folder_of(family), **options), folder_of(family)
    assert serve(core, prompts()) == {id: oracle(folder, tokens) for id, tokens in prompts().items()}
    longer = [*prompts()["r2"], 5]
    assert serve(core, {"again": longer}) == {"again": oracle(folder, longer)}
    assert core.stats().cached_tokens == 32


def test_sampled_tokens_and_log_probabilities_equal_those_of_a_cpu(
    request: pytest.FixtureRequest, folder_of: Callable[[str], Path]
) -> None:
    wishes = {"temperature": 0.8, "seed": 5, "top_p": 0.9, "frequency_penalty": 0.5, "logprobs": 2}

    def answers() -> dict[str, tuple[list[int], list[list[int]]]]:
        core = engine(folder_of("llama"))
        for id, tokens in prompts().items():
            core.add(make_request(core, id, tokens, **{"max_tokens": NEW, **wishes, "top_k": 9 * (id == "r1")}))
        found: dict[str, tuple[list[int], list[list[int]]]] = {id: ([], []) for id in prompts()}
        for output in run(core):
            found[output.id][0].extend(output.token_ids)
            found[output.id][1].extend(entry.top_ids for entry in output.logprobs)
        return found

    plain = answers()
    request.getfixturevalue("card")
    assert answers() == plain


class Launches:
    """The variants of kernels that are launched. What is slow here computes nothing, and its results are zeros."""

    RUN = ("_peaks_kernel", "_greedy_kernel")  # of `triton_ops`

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: set[tuple[Any, ...]] = set()
        idle = {module.__name__ for module in (attn_triton, experts_triton, linear_triton, triton_ops)}
        interpret, empty = InterpretedFunction.run, torch.empty

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
            self.seen.add(variant(kernel, args, options))
            if kernel.fn.__module__ not in idle or kernel.__name__ in self.RUN:
                interpret(kernel, *args, grid=grid, warmup=warmup, **options)

        monkeypatch.setattr(InterpretedFunction, "run", run)
        monkeypatch.setattr(torch, "empty", lambda *sizes, **kind: empty(*sizes, **kind).zero_())
        monkeypatch.setattr(attn_triton, "_processors", lambda device: 132)


def variant(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton compiles a kernel of its own for: constants, types, numbers that are 1 or multiples of 16."""
    plain = kernel.kwargs.get("do_not_specialize") or ()
    unaligned = kernel.kwargs.get("do_not_specialize_on_alignment") or ()
    parameters = inspect.signature(kernel.fn).parameters
    found: list[Any] = [kernel.__name__, tuple(sorted(options.items()))]
    for (name, parameter), value in zip(parameters.items(), args, strict=True):
        if "constexpr" in str(parameter.annotation) or value is None:
            found.append(value)
        elif isinstance(value, torch.Tensor):
            found.append((value.dtype, name in (*plain, *unaligned) or value.data_ptr() % 16 == 0))
        elif isinstance(value, int):
            found.append((value.bit_length() > 31, name not in plain and (value == 1, value % 16 == 0)))
        else:
            found.append(type(value))
    return tuple(found)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("qwen3", {"enforce_eager": True}), ("mixtral", {"enforce_eager": True, "max_num_seqs": 40})],
    ids=str,
)
def test_no_request_launches_what_was_not_launched_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, options: dict[str, Any]
) -> None:
    """Or else it would wait for a compiler. Sizes are those of tensor-core products, as in models that are not tiny."""
    as_on_a_card(monkeypatch, ThoroughCard)
    launches = Launches(monkeypatch)
    folder = tiny.make(tmp_path, family, num_hidden_layers=2, hidden_size=128, intermediate_size=256)
    core = engine(folder, dtype="bfloat16", max_num_batched_tokens=100, max_model_len=200, **options)
    before = set(launches.seen)
    lengths = (1, 7, 16, 33, 64, 99, 130, 15, 48, 101, 3)
    requests = {f"r{i}": [5 + i] * length for i, length in enumerate(lengths)}
    serve(core, requests)
    for id in ("r5", "r6"):
        serve(core, {id: [4, *requests[id]]})
    serve(core, {id: [6, *requests[id]] for id in ("r1", "r9", "r3")}, logprobs=2)
    serve(core, requests, temperature=0.7)
    serve(core, requests, temperature=0.7, top_p=0.8, frequency_penalty=0.1, logprobs=3)
    serve(core, {"r4": requests["r4"]}, temperature=0.7, top_k=5, repetition_penalty=1.1)
    assert launches.seen - before == set()


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 40, "max_num_seqs": 6}], ids=str)
def test_memory_is_set_aside_for_what_captured_steps_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    cards: list[ThoroughCard] = []
    as_on_a_card(monkeypatch, lambda: cards.append(ThoroughCard()) or cards[0])
    Launches(monkeypatch)
    engine(tiny.make(tmp_path, num_hidden_layers=1), **{"max_num_batched_tokens": 300, "max_num_seqs": 20, **options})
    (card,) = cards
    assert card.captured.outputs == card.outputs
    assert card.captured.share == (256 / 300 if not options else 1.0)
