"""The engine on a card: greedy tokens equal those of Transformers, however a request was served."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu_reference import joined, judge
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
        pytest.param({"model_impl": "transformers"}, id="adopted"),
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


def test_the_transformers_backend_replays_graphs(folder_of: Callable[[str], Path]) -> None:
    worker = Worker()
    options = {"device": "cuda", "model_impl": "transformers", "kv_cache_memory_bytes": 16 << 20}
    core = EngineCore(EngineConfig.of(model=str(folder_of("qwen3")), **options), worker)
    launched: list[int] = []
    forward = worker.model.forward
    worker.model.forward = lambda *args: launched.append(1) or forward(*args)  # type: ignore[method-assign]
    serve(core, prompts())
    assert 0 < len(launched) < 8  # prompts alone, of NEW steps and more


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("impl", ["native", "transformers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_tokens_of_any_batch_are_those_of_transformers_up_to_ties(
    folder_of: Callable[[str], Path], family: str, impl: str, rows: int
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder_of(family), dtype=torch.bfloat16).cuda().eval()
    requests = prompts()
    answers = serve(engine(folder_of(family), dtype="bfloat16", model_impl=impl, max_num_seqs=rows), requests)
    verdict = joined([judge(model, tokens, answers[id]) for id, tokens in requests.items()])
    assert verdict.passed, verdict
    assert verdict.equal > 0.9 * verdict.tokens, verdict


def test_an_order_of_requests_changes_no_token(folder_of: Callable[[str], Path]) -> None:
    requests = prompts()
    first = serve(engine(folder_of("llama")), requests)
    assert serve(engine(folder_of("llama"), max_num_seqs=3), dict(reversed(requests.items()))) == first


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_cache_of_8_bits_holds_more_and_its_tokens_do_not_depend_on_the_batch(
    folder_of: Callable[[str], Path], family: str
) -> None:
    """Another order of sums may move a key to the next that 8 bits can hold, hence one request may differ."""
    small = {"kv_cache_memory_bytes": 1 << 18, "max_model_len": 128, "max_num_seqs": 64}
    requests, wide = prompts(), engine(folder_of(family), **small)
    core = engine(folder_of(family), kv_cache_dtype="fp8", **small)
    assert core.info.num_pages >= 4 * wide.info.num_pages  # of float32
    answers = serve(core, requests)
    for options in ({"max_num_seqs": 1}, {"max_num_batched_tokens": 13}, {"enforce_eager": True}):
        again = serve(engine(folder_of(family), kv_cache_dtype="fp8", **options), requests)
        assert sum(again[id] != answers[id] for id in requests) <= 1
    plain = serve(wide, requests)
    assert sum(plain[id][0] == answers[id][0] for id in requests) >= 4


def test_a_step_out_of_memory_fails_its_requests_and_later_ones_are_served(
    folder_of: Callable[[str], Path], oracles: Callable[[str], Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker()
    options = {"device": "cuda", "dtype": "float32", "kv_cache_memory_bytes": 16 << 20}
    core = EngineCore(EngineConfig.of(model=str(folder_of("llama")), **options), worker)
    for place in ("forward", "logits"):
        with monkeypatch.context() as patch:
            patch.setattr(worker.model, place, lambda *_: torch.empty(1 << 46, device="cuda"))
            for id, tokens in prompts(3).items():
                core.add(make_request(core, id, tokens, max_tokens=NEW, temperature=0.0))
            ended = [output for output in run(core) if output.finish_reason is not None]
        assert sorted((o.id, o.finish_reason, o.status) for o in ended) == [(f"r{i}", "error", 503) for i in range(3)]
        requests = prompts(3)
        assert serve(core, requests) == {id: oracles("llama")(tokens) for id, tokens in requests.items()}


CUDA_ERROR = """
import sys, torch
from octavo.config import EngineConfig
from octavo.core.engine import EngineCore
from octavo.core.process import run
from octavo.runtime.worker import Worker
from octavo.types import Dead, Hello, Outputs, Ready, Submit
from tests.core.memory_channel import MemoryChannel
from tests.core.stub_engine import make_request

class Failing(Worker):
    def step(self, plan):
        torch.zeros(1, device="cuda")[torch.tensor([9], device="cuda")]
        super().step(plan)

config = EngineConfig.of(model=sys.argv[1], device="cuda", kv_cache_memory_bytes=16 << 20)
core, channel = EngineCore(config, Failing()), MemoryChannel()
channel.put(Hello())
channel.put(Submit([make_request(core, id, [5, 6, 7], max_tokens=8) for id in "abc"]))
code = run(lambda: core, channel)
messages = []
while not channel.outbox.empty():
    messages.append(channel.outbox.get())
assert isinstance(messages[0], Ready) and isinstance(messages[-1], Dead), messages
assert not any(isinstance(m, Outputs) and any(o.finish_reason for o in m.outputs) for m in messages), messages
print("code", code, "dead", messages[-1].cause)
"""


def test_a_cuda_error_ends_the_engine_with_one_word_to_all_who_wait(folder_of: Callable[[str], Path]) -> None:
    """`Dead` is what clients answer every request with that is running (tests/core/test_process.py)."""
    done = subprocess.run([sys.executable, "-c", CUDA_ERROR, str(folder_of("llama"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("code ") and "code 0" not in done.stdout
    assert "device-side assert" in done.stdout or "CUDA error" in done.stdout


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

    for name, module in list(sys.modules.items()):
        for kernel in vars(module).values() if name.startswith("octavo.kernels.") else ():
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
    serve(core, requests, temperature=0.7)
    serve(core, {"r2": requests["r2"]}, temperature=0.7, frequency_penalty=0.1)
    serve(core, requests, temperature=0.7, top_p=0.8, logprobs=3)
    serve(core, {"r4": requests["r4"]}, temperature=0.7, top_k=5, presence_penalty=0.3, repetition_penalty=1.1)
    assert compiled == []
