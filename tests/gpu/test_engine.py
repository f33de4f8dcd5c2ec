"""The engine on a card: greedy tokens equal those of Transformers, however a request was served."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.config import EngineConfig
from octavo.core.engine import EngineCore
from octavo.runtime.worker import Worker
from tests.core.stub_engine import collect, make_request, run
from tools import tiny

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

NEW = 24
FAMILIES = ("llama", "qwen3", "mistral", "qwen2", "smollm3")
Oracle = Callable[[list[int]], list[int]]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("tiny")
    return cache(lambda family: tiny.make(root / family, family))


@pytest.fixture(scope="module")
def oracles(folder_of: Callable[[str], Path]) -> Callable[[str], Oracle]:
    from transformers import AutoModelForCausalLM

    models: dict[str, Any] = {}

    def of(family: str) -> Oracle:
        if family not in models:
            models[family] = AutoModelForCausalLM.from_pretrained(folder_of(family), dtype=torch.float32).eval()
            models[family].generation_config.eos_token_id = None

        def generate(tokens: list[int]) -> list[int]:
            ids = torch.tensor([tokens])
            out = models[family].generate(ids, attention_mask=ids > -1, max_new_tokens=NEW, do_sample=False)
            return out[0, len(tokens) :].tolist()

        return generate

    return of


def engine(folder: Path, **options: Any) -> EngineCore:
    flat = {"device": "cuda", "dtype": "float32", "max_num_seqs": 8, "kv_cache_memory_bytes": 16 << 20, **options}
    return EngineCore(EngineConfig.of(model=str(folder), **flat), Worker())


def prompts(count: int = 8) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(1)
    lengths = [1, 7, 16, 33, 64, 100, 15, 48][:count]
    return {f"r{i}": torch.randint(4, 380, (n,), generator=generator).tolist() for i, n in enumerate(lengths)}


def serve(core: EngineCore, requests: dict[str, list[int]], **sampling: Any) -> dict[str, list[int]]:
    wishes = {"max_tokens": NEW, "temperature": 0.0, **sampling}
    for id, tokens in requests.items():
        assert core.add(make_request(core, id, tokens, **wishes)) is None
    return collect(run(core))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="whole"),
        pytest.param({"max_num_batched_tokens": 13}, id="chunked"),
        pytest.param({"max_num_seqs": 1}, id="alone"),
        pytest.param({"enforce_eager": True}, id="no graphs"),
    ],
)
def test_greedy_tokens_equal_transformers(
    folder_of: Callable[[str], Path], oracles: Callable[[str], Oracle], family: str, options: dict[str, Any]
) -> None:
    requests, oracle = prompts(), oracles(family)
    assert serve(engine(folder_of(family), **options), requests) == {id: oracle(x) for id, x in requests.items()}


def test_a_prefix_hit_changes_no_token(folder_of: Callable[[str], Path], oracles: Callable[[str], Oracle]) -> None:
    core, oracle = engine(folder_of("llama")), oracles("llama")
    base = prompts()["r5"]
    serve(core, {"first": base})
    again = {"same": base, "longer": [*base, 9, 8, 7], "fork": [*base[:50], 5, 6]}
    assert serve(core, again) == {id: oracle(tokens) for id, tokens in again.items()}
    assert core.stats().cached_tokens == 96 + 96 + 48


def test_a_preemption_changes_no_token(folder_of: Callable[[str], Path], oracles: Callable[[str], Oracle]) -> None:
    page_bytes = 3 * 2 * 2 * 16 * 16 * 4  # layers, K and V, heads, slots, head size, float32
    core, oracle = (
        engine(folder_of("llama"), max_model_len=128, kv_cache_memory_bytes=page_bytes * 13),
        oracles("llama"),
    )
    requests = {id: tokens for id, tokens in prompts().items() if id != "r0"}
    assert serve(core, requests) == {id: oracle(tokens) for id, tokens in requests.items()}
    assert core.stats().preemptions > 0


def test_sampling_does_not_depend_on_what_else_runs(folder_of: Callable[[str], Path]) -> None:
    requests, wishes = prompts(), {"temperature": 0.9, "top_p": 0.9, "seed": 7}
    batch = serve(engine(folder_of("qwen3")), requests, **wishes)
    alone = engine(folder_of("qwen3"), max_num_seqs=1, max_num_batched_tokens=17)
    for id in ("r2", "r4"):
        assert serve(alone, {id: requests[id]}, **wishes)[id] == batch[id]
    assert len({tuple(answer[:8]) for answer in batch.values()}) > 1


def test_greedy_and_sampled_requests_share_a_batch(
    folder_of: Callable[[str], Path], oracles: Callable[[str], Oracle]
) -> None:
    """A sampled row makes the step's own greedy choice void for that row alone."""
    core, requests, oracle = engine(folder_of("llama")), prompts(), oracles("llama")
    for id, tokens in requests.items():
        drawn = {"temperature": 5.0, "seed": 3} if id in ("r1", "r6") else {"temperature": 0.0}
        assert core.add(make_request(core, id, tokens, max_tokens=NEW, **drawn)) is None
    answers = collect(run(core))
    greedy = {id: tokens for id, tokens in requests.items() if id not in ("r1", "r6")}
    assert {id: answers[id] for id in greedy} == {id: oracle(tokens) for id, tokens in greedy.items()}
    assert answers["r1"] != oracle(requests["r1"])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_repeats_itself(folder_of: Callable[[str], Path], family: str) -> None:
    core = engine(folder_of(family), dtype="bfloat16")
    first = serve(core, prompts())
    core.reset_prefix_cache()
    assert serve(core, prompts()) == first


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The kernels that Triton compiles or loads from disk while the test runs."""
    import triton

    from octavo.kernels import attn_triton, linear_triton, triton_ops

    for module in (attn_triton, linear_triton, triton_ops):
        for kernel in vars(module).values():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.clear()  # other tests ran before
    names: list[str] = []
    runtime = triton.knobs.runtime
    old, runtime.jit_post_compile_hook = runtime.jit_post_compile_hook, lambda **d: names.append(str(d["repr"]))
    yield names
    runtime.jit_post_compile_hook = old


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_no_request_waits_for_a_compiler(
    folder_of: Callable[[str], Path], family: str, eager: bool, compiled: list[str]
) -> None:
    core = engine(
        folder_of(family), dtype="bfloat16", enforce_eager=eager, max_num_batched_tokens=40, max_model_len=200
    )
    assert compiled, "the hook sees nothing"
    compiled.clear()
    requests = prompts()
    serve(core, requests)
    for id in ("r0", "r3"):
        serve(core, {id: requests[id]})
    core.reset_prefix_cache()
    serve(core, {id: requests[id] for id in ("r5", "r1", "r2", "r4", "r7")})
    assert compiled == []
