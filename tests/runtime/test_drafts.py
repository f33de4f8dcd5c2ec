"""Engines with drafts answer as those without: a real worker in float32, of a model that repeats itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from octavo.core.engine import EngineCore
from octavo.platforms.cpu import FEW_TOKENS, CpuPlatform
from octavo.types import CompletionOutput, TokenOutput
from tests.core.stub_engine import NGRAM, make_request, run
from tests.runtime.test_worker import engine, prompts
from tools import tiny

DRAWN = {"temperature": 0.7, "top_k": 3, "seed": 5}
REPEATED = [17, 44, 99, 23, 200] * 6
WISHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "logprobs": {"logprobs": 2},
    "drawn": {**DRAWN, "logprobs": 0},
    "top_p": {"temperature": 0.5, "top_p": 0.3, "seed": 9},
    "biased": {"logit_bias": {17: 2.0, 44: 1.5}},
    "restricted": {**DRAWN, "allowed_token_ids": (17, 44, 99)},
    "patient": {"allowed_token_ids": (17, 44), "min_tokens": 6, "masked_until_min": (44,), "end_ids": (44,)},
    "ended": {"allowed_token_ids": tuple(range(20, 28)), "end_ids": (20, 21, 22)},
    "penalised": {"repetition_penalty": 1.2},
    "avoiding": {"bad_words": ((17, 44),)},
    "scored": {"prompt_logprobs": 1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny") / "llama", "llama")


def answers(core: EngineCore) -> dict[str, Any]:
    """By request: tokens, reason for the end, log-probabilities."""
    requests = {f"{name}-{i}": (REPEATED[i:], wish) for i, (name, wish) in enumerate(WISHES.items())}
    requests |= {id: (tokens, {}) for id, tokens in prompts(4).items()}
    for number, (id, (tokens, wish)) in enumerate(requests.items()):
        wish = {"temperature": 0.0, "max_tokens": 20 + number, **wish}
        assert core.add(make_request(core, id, tokens, **wish)) is None
    found: dict[str, list[TokenOutput]] = {}
    for output in run(core):
        found.setdefault(output.id, []).append(output)
    return {id: _answer(outputs) for id, outputs in found.items()}


def _answer(outputs: list[TokenOutput]) -> dict[str, Any]:
    entries = [entry for output in outputs for entry in (*output.prompt_logprobs, *output.logprobs)]
    return {
        "tokens": [token for output in outputs for token in output.token_ids],
        "end": outputs[-1].finish_reason,
        "scored": [(entry.token, entry.top_ids) for entry in entries],
        "scores": [score for entry in entries for score in (entry.logprob, *entry.top_logprobs)],
    }


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="batched"),
        pytest.param({"max_num_seqs": 1}, id="alone"),
        pytest.param({"max_num_batched_tokens": 13}, id="chunked"),
        pytest.param({"max_model_len": 112, "kv_cache_memory_bytes": 1 << 17}, id="preempted"),
    ],
)
def test_drafts_change_no_answer(folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuPlatform, "few_tokens", 32)
    core = engine(folder, speculative_config=NGRAM, **options)
    found, wanted = answers(core), answers(engine(folder, **options))
    for id, answer in wanted.items():
        assert found[id].pop("scores") == pytest.approx(answer.pop("scores"), abs=1e-4)
        assert found[id] == answer, id
    stats = core.stats()
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    assert ("kv_cache_memory_bytes" in options) == (stats.preemptions > 0)


@pytest.mark.parametrize("options", [{}, {"quantization": "int8", "max_num_seqs": 1}], ids=str)
def test_drafts_change_no_bit_where_a_row_does_not_feel_others(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in bfloat16 in C++. Each draft is attended to by itself, as it would be without drafts."""
    pytest.importorskip("octavo._cpu")
    monkeypatch.setattr(CpuPlatform, "few_tokens", 32)
    wide = tiny.make(tmp_path, "llama", hidden_size=256, num_hidden_layers=4)  # heads of 64: one query has a kernel
    core = engine(wide, dtype="bfloat16", speculative_config=NGRAM, **options)
    assert answers(core) == answers(engine(wide, dtype="bfloat16", **options))
    assert core.stats().accepted_tokens > 0


@pytest.mark.parametrize(("options", "most"), [({"dtype": "bfloat16"}, FEW_TOKENS), ({"quantization": "int8"}, 4)])
def test_a_step_has_fewer_drafts_where_weights_are_blocks(folder: Path, options: dict[str, Any], most: int) -> None:
    core = engine(folder, speculative_config=NGRAM, **options)
    assert core.scheduler.limits.draft_tokens == most < core.scheduler.limits.max_tokens


def test_a_stop_string_inside_a_draft_ends_the_text_there(folder: Path) -> None:
    options = {"device": "cpu", "dtype": "float32", "max_num_seqs": 2}
    with LLM(folder, **options) as plain, LLM(folder, speculative_config=NGRAM, **options) as drafting:

        def ask(llm: LLM, stop: str | None) -> CompletionOutput:
            few = plain.get_tokenizer().encode("abc")  # of which a model repeats itself soon
            params = SamplingParams(max_tokens=50, temperature=0, stop=stop, logprobs=1, allowed_token_ids=few)
            return llm.generate("abcabc", params, use_tqdm=False)[0].outputs[0]

        text = ask(plain, None).text
        for stop in (text[place : place + 6] for place in range(4, 40, 9)):
            wanted, found = ask(plain, stop), ask(drafting, stop)
            assert (found.text, found.token_ids, found.stop_reason) == (wanted.text, wanted.token_ids, stop)
            assert found.logprobs is not None and len(found.logprobs) == len(found.token_ids)
        assert drafting._engine().stats().accepted_tokens > 0
