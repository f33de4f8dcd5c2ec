from __future__ import annotations

import pytest

from octavo.errors import OutOfMemory
from octavo.types import StepPlan
from tests.core.stub_engine import collect, expected, make_engine, make_request, run


def test_a_full_queue_refuses_and_the_rest_is_served() -> None:
    core = make_engine(max_waiting=1)
    assert core.add(make_request(core, "a", [1, 2])) is None
    refusal = core.add(make_request(core, "b", [1, 2]))
    assert refusal is not None and refusal.status == 503 and refusal.finish_reason == "error"
    assert list(collect(run(core))) == ["a"]


def test_an_id_in_use_is_refused() -> None:
    core = make_engine()
    core.add(make_request(core, "a", [1]))
    refusal = core.add(make_request(core, "a", [2]))
    assert refusal is not None and refusal.status == 400 and "'a'" in refusal.error


@pytest.mark.parametrize("length", [0, 256, 1000])
def test_a_prompt_that_cannot_fit_is_refused_by_the_core_too(length: int) -> None:
    core = make_engine(max_len=256)
    refusal = core.add(make_request(core, "a", [1] * length))
    assert refusal is not None and refusal.status == 400 and "[1, 255]" in refusal.error


def test_abort_answers_once_and_frees_everything() -> None:
    core = make_engine()
    core.add(make_request(core, "a", [1] * 40, max_tokens=100))
    core.add(make_request(core, "b", [2] * 40, max_tokens=100))
    core.step()
    outputs = core.abort(["a", "a", "unknown"])
    assert [(o.id, o.finish_reason) for o in outputs] == [("a", "abort")]
    core.abort(["b"])
    run(core)
    assert core.stats().pages_used == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_out_of_memory_in_a_step_fails_its_requests_and_the_next_ones_work(overlap: bool) -> None:
    core = make_engine(overlap=overlap)
    worker, step = core._worker, core._worker.step
    core.add(make_request(core, "a", [1, 2, 3], max_tokens=20))
    core.step()

    def fail(plan: StepPlan) -> None:
        worker.step = step
        raise MemoryError("none left")

    worker.step = fail
    outputs = core.step()
    assert [(o.id, o.finish_reason, o.status) for o in outputs] == [("a", "error", 503)]
    core.scheduler.check()
    core.add(make_request(core, "b", [1, 2, 3], max_tokens=4))
    assert collect(run(core))["b"] == expected([1, 2, 3], 4)


@pytest.mark.parametrize(
    ("restriction", "status", "words"),
    [
        ({}, 500, "The model produced logits"),
        ({"allowed_token_ids": (5,)}, 400, "No token is left"),
        ({"bad_words": ((5,),)}, 400, "No token is left"),
    ],
)
def test_a_row_with_bad_logits_ends_alone(restriction: dict[str, object], status: int, words: str) -> None:
    core = make_engine()
    worker, sample = core._worker, core._worker.sample
    core.add(make_request(core, "a", [1, 2, 3], max_tokens=4, **restriction))
    core.add(make_request(core, "b", [4, 5], max_tokens=4))

    def poisoned(mask: object) -> object:
        worker.sample = sample
        done = sample()
        done.result().bad.append(0)
        return done

    worker.sample = poisoned
    outputs = run(core)
    (failed,) = [o for o in outputs if o.finish_reason == "error"]
    assert (failed.id, failed.status) == ("a", status)
    assert failed.error.startswith(words)
    assert collect(outputs)["b"] == expected([4, 5], 4)


def test_a_cache_smaller_than_one_sequence_is_refused_at_start_with_both_numbers() -> None:
    with pytest.raises(OutOfMemory, match=r"8 pages of 16 tokens.*256"):
        make_engine(pages=8, max_len=256)
