from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo import LLM
from octavo.cache.prefix import page_hashes
from octavo.config import EngineConfig
from octavo.errors import EngineDead, ModelError
from octavo.frontend.core_process import CoreProcess
from octavo.frontend.loading import TextModel
from octavo.frontend.offline import SeveralCores
from octavo.sampling_params import SamplingParams
from octavo.types import Request, Sampling
from tests.core.stub_engine import collect, expected
from tests.waiting import children

CONFIG = EngineConfig.of(model="stub", max_num_seqs=4, max_num_batched_tokens=64, data_parallel_size=2, device="cpu")
KEY = b"k" * 32


@pytest.fixture
def cores() -> Iterator[SeveralCores]:
    before = set(children())
    made = SeveralCores(CONFIG, KEY, "stub")
    yield made
    made.close()
    assert set(children()) <= before


def request(id: str, tokens: list[int], max_tokens: int = 8) -> Request:
    raw = array("i", tokens).tobytes()
    return Request(
        id=id, token_ids=raw, page_hashes=page_hashes(KEY, b"", raw, 16), sampling=Sampling(max_tokens=max_tokens)
    )


def test_requests_are_shared_out_and_answered_rightly(cores: SeveralCores) -> None:
    prompts = {f"r{i}": list(range(i + 1, i + 20)) for i in range(32)}
    for id, prompt in prompts.items():
        assert cores.add(request(id, prompt)) is None
    outputs = []
    while cores.has_work():
        outputs += cores.step()
    assert collect(outputs) == {id: expected(prompt, 8) for id, prompt in prompts.items()}
    assert sorted(stats.generation_tokens for stats in cores._stats) == [128, 128]
    assert cores.stats().generation_tokens == 256
    cores.reset_prefix_cache()


def test_what_was_aborted_is_not_heard_of_again(cores: SeveralCores) -> None:
    for i in range(4):
        cores.add(request(f"r{i}", [i + 1], 2000 if i < 2 else 8))
    cores.step()
    assert {output.id for output in cores.abort(["r0", "r1", "unknown"])} == {"r0", "r1"}
    outputs = []
    while cores.has_work():
        outputs += cores.step()
    assert {output.id for output in outputs} <= {"r2", "r3"}


def test_the_death_of_an_engine_ends_the_batch(cores: SeveralCores) -> None:
    for i in range(4):
        cores.add(request(f"r{i}", [i + 1], 2000))
    first = cores._cores[0]
    assert isinstance(first, CoreProcess)
    first.process.kill()
    with pytest.raises(EngineDead, match="killed by signal 9"):
        list(iter(cores.step, []))


def test_llm_takes_them_as_one_engine(cores: SeveralCores) -> None:
    llm = LLM.over(cores, TextModel(None), CONFIG)
    params = SamplingParams(max_tokens=5, detokenize=False)
    results = llm.generate([[7, i] for i in range(1, 20)], params, use_tqdm=False)
    assert [r.outputs[0].token_ids for r in results] == [expected([7, i], 5) for i in range(1, 20)]


def test_a_start_that_fails_leaves_no_process(tmp_path: Path) -> None:
    before = set(children())
    with pytest.raises(ModelError):
        SeveralCores(EngineConfig.of(model=str(tmp_path), data_parallel_size=2, device="cpu"), KEY, "real")
    assert set(children()) <= before
