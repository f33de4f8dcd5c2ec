"""The scheduler, through the engine core and a worker whose answers reveal any fault in the paging."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.core.engine import EngineCore
from octavo.sched import scheduler
from octavo.types import Pooling, PoolingKind, StepResult, TokenOutput
from tests.core.stub_engine import NGRAM, Guesses, collect, expected, make_engine, make_request, run


def prompt(seed: int, length: int) -> list[int]:
    return [(seed * 7919 + i * 31) % 251 for i in range(length)]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_gets_the_tokens_it_would_get_alone(overlap: bool) -> None:
    core = make_engine(overlap=overlap)
    prompts = {f"r{i}": prompt(i, 5 + 11 * i) for i in range(7)}
    for id, tokens in prompts.items():
        assert core.add(make_request(core, id, tokens, max_tokens=20)) is None
    texts = collect(run(core))
    assert texts == {id: expected(tokens, 20) for id, tokens in prompts.items()}


def test_a_decode_is_not_stalled_by_a_long_prompt() -> None:
    core = make_engine(max_num_batched_tokens=16)
    core.add(make_request(core, "short", prompt(1, 3), max_tokens=50))
    core.step()
    core.add(make_request(core, "long", prompt(2, 200), max_tokens=1))
    for _ in range(5):
        assert [o.id for o in core.step()] == ["short"]


def test_a_step_holds_at_most_the_token_budget_and_single_tokens_come_first() -> None:
    core = make_engine(max_num_batched_tokens=16)
    for i in range(4):
        core.add(make_request(core, f"r{i}", prompt(i, 20), max_tokens=30))
    for _ in range(20):
        plan = core.scheduler.schedule()
        assert plan is not None and plan.num_tokens <= 16
        assert plan.counts == sorted(plan.counts, key=lambda n: n > 1)
        core._worker.step(plan)
        core.scheduler.commit(core._worker.sample().result())


def test_a_step_with_enough_of_prompts_admits_nobody_else() -> None:
    core = make_engine(max_num_batched_tokens=128, max_num_seqs=8, enough_tokens=32)
    prompts = {f"r{i}": prompt(i, 20) for i in range(5)} | {"long": prompt(9, 100)}
    for id, tokens in prompts.items():
        core.add(make_request(core, id, tokens, max_tokens=30))
    steps = [core.step() for _ in range(3)]
    assert [{output.id for output in step} for step in steps] == [
        {"r0", "r1"},
        {"r0", "r1", "r2", "r3"},
        {"r0", "r1", "r2", "r3", "r4", "long"},  # whoever is admitted gets all the room there is
    ]
    texts = collect([output for step in steps for output in step] + run(core))
    assert texts == {id: expected(tokens, 30) for id, tokens in prompts.items()}


def test_a_shared_prefix_is_computed_once() -> None:
    core = make_engine()
    shared = prompt(3, 64)
    core.add(make_request(core, "a", [*shared, 1], max_tokens=2))
    run(core)
    core.add(make_request(core, "b", [*shared, 2], max_tokens=2))
    outputs = run(core)
    assert outputs[0].cached == 64
    assert collect(outputs)["b"] == expected([*shared, 2], 2)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("budget", [32, 512])
def test_a_burst_with_one_prefix_computes_it_once(budget: int, overlap: bool) -> None:
    core = make_engine(pages=128, max_num_batched_tokens=budget, overlap=overlap)
    shared = prompt(3, 64)
    for i in range(4):
        core.add(make_request(core, f"r{i}", [*shared, i], max_tokens=2))
    assert collect(run(core)) == {f"r{i}": expected([*shared, i], 2) for i in range(4)}
    assert core.stats().cached_tokens == 3 * 64


def test_a_crowd_that_waits_for_one_prefix_costs_a_step_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_engine(max_num_batched_tokens=512, overlap=True)
    shared = prompt(3, 160)
    for i in range(100):
        core.add(make_request(core, f"r{i}", [*shared, i], max_tokens=2))
    looks, match = [], core.scheduler.pool.match
    monkeypatch.setattr(core.scheduler.pool, "match", lambda keys: looks.append(keys) or match(keys))
    outputs = core.step()
    assert len(looks) == 100 and core.stats().waiting == 99
    outputs += core.step()  # scheduled before the first step is read
    assert len(looks) == 100
    assert collect(outputs + run(core)) == {f"r{i}": expected([*shared, i], 2) for i in range(100)}
    assert core.stats().cached_tokens == 99 * 160


@pytest.mark.parametrize("why", ["abort", "reset"])
def test_who_waits_for_a_prefix_computes_it_when_nobody_does_any_more(why: str) -> None:
    core = make_engine(max_num_batched_tokens=16)
    shared = prompt(3, 160)
    for i in range(4):
        core.add(make_request(core, f"r{i}", [*shared, i], max_tokens=2))
    for _ in range(3):
        core.step()
    assert core.stats().waiting == 3
    core.abort(["r0", "r2"])
    if why == "reset":
        core.reset_prefix_cache()
    texts = collect(run(core))
    assert {id: texts[id] for id in ("r1", "r3")} == {f"r{i}": expected([*shared, i], 2) for i in (1, 3)}
    assert_idle(core)


def test_a_prompt_that_is_wholly_cached_still_computes_its_last_token() -> None:
    core = make_engine()
    for id in ("a", "b"):
        core.add(make_request(core, id, prompt(5, 32), max_tokens=3))
        outputs = run(core)
        assert collect(outputs)[id] == expected(prompt(5, 32), 3)
    assert outputs[0].cached == 16


def test_a_follow_up_turn_reuses_pages_that_generation_filled() -> None:
    core = make_engine()
    core.add(make_request(core, "a", prompt(6, 16), max_tokens=40))
    answer = collect(run(core))["a"]
    turn = [*prompt(6, 16), *answer, 1, 2, 3]
    core.add(make_request(core, "b", turn, max_tokens=2))
    outputs = run(core)
    assert outputs[0].cached == 48
    assert collect(outputs)["b"] == expected(turn, 2)


def test_reset_forgets_every_prefix() -> None:
    core = make_engine()
    core.add(make_request(core, "a", prompt(5, 64), max_tokens=1))
    run(core)
    core.reset_prefix_cache()
    core.add(make_request(core, "b", prompt(5, 64), max_tokens=1))
    assert run(core)[0].cached == 0


def test_pages_of_a_request_that_runs_through_a_reset_are_not_offered_later() -> None:
    core = make_engine()
    core.add(make_request(core, "a", prompt(5, 40), max_tokens=20))
    core.step()
    core.reset_prefix_cache()
    run(core)
    assert core.scheduler.pool.match([*core.scheduler.pool._by_key]) == []


@pytest.mark.parametrize("overlap", [False, True])
def test_preemption_changes_no_token(overlap: bool) -> None:
    core = make_engine(pages=16, max_len=200, overlap=overlap)
    prompts = {f"r{i}": prompt(i, 40) for i in range(4)}
    for id, tokens in prompts.items():
        core.add(make_request(core, id, tokens, max_tokens=60))
    texts = collect(run(core))
    assert core.stats().preemptions > 0
    assert texts == {id: expected(tokens, 60) for id, tokens in prompts.items()}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("scarce", ["rows", "pages"])
def test_a_request_of_higher_priority_takes_the_place_of_lower_ones_that_run(scarce: str, overlap: bool) -> None:
    limits = {"max_num_seqs": 2} if scarce == "rows" else {"pages": 16}
    core = make_engine(overlap=overlap, **limits)
    prompts = {f"late{i}": prompt(i, 40 if scarce == "rows" else 100) for i in range(2)}
    for id, tokens in prompts.items():
        core.add(make_request(core, id, tokens, max_tokens=60, priority=9))
    outputs = [output for _ in range(5) for output in core.step()]
    prompts["now"] = prompt(7, 100)
    core.add(make_request(core, "now", prompts["now"], max_tokens=20))
    for _ in range(32):  # 5 for its prompt, 20 for its answer
        outputs += core.step()
    assert [output.id for output in outputs if output.finish_reason is not None] == ["now"]
    assert core.stats().preemptions > 0
    lengths = {"late0": 60, "late1": 60, "now": 20}
    assert collect(outputs + run(core)) == {id: expected(prompts[id], count) for id, count in lengths.items()}


def test_a_request_of_equal_priority_waits_for_those_that_run() -> None:
    core = make_engine(max_num_seqs=2)
    for i in range(3):
        core.add(make_request(core, f"r{i}", prompt(i, 20), max_tokens=20))
    run(core)
    assert core.stats().preemptions == 0


def test_higher_priority_is_served_first() -> None:
    core = make_engine(max_num_seqs=1)
    for id, priority in (("late", 5), ("soon", 1), ("now", 0)):
        core.add(make_request(core, id, prompt(1, 8), max_tokens=1, priority=priority))
    assert [o.id for o in run(core)] == ["now", "soon", "late"]


@pytest.mark.parametrize("overlap", [False, True])
def test_generation_stops_at_an_end_token_but_not_before_min_tokens(overlap: bool) -> None:
    core = make_engine(overlap=overlap)
    answer = expected(prompt(9, 10), 30)
    core.add(make_request(core, "a", prompt(9, 10), max_tokens=30, end_ids=(answer[4],)))
    core.add(make_request(core, "b", prompt(9, 10), max_tokens=30, end_ids=(answer[4],), min_tokens=6))
    outputs = run(core)
    assert collect(outputs)["a"] == answer[: answer.index(answer[4]) + 1]
    assert len(collect(outputs)["b"]) >= 6


@pytest.mark.parametrize("overlap", [False, True])
def test_generation_ends_at_the_longest_sequence(overlap: bool) -> None:
    core = make_engine(max_len=40, overlap=overlap)
    core.add(make_request(core, "a", prompt(1, 35), max_tokens=100))
    outputs = run(core)
    assert len(collect(outputs)["a"]) == 5
    assert outputs[-1].finish_reason == "length"


def test_waste_counts_allocated_slots_without_a_token() -> None:
    core = make_engine()
    core.add(make_request(core, "a", prompt(1, 8), max_tokens=1))
    run(core)
    assert (core.stats().slots_allocated, core.stats().slots_filled) == (16, 8)


def test_a_request_that_is_put_aside_does_not_end_by_what_it_sampled_without_its_mask() -> None:
    core = make_engine()
    core.add(make_request(core, "a", prompt(1, 5), max_tokens=4))
    assert core.scheduler.schedule() is not None
    core.scheduler.defer(0)
    assert core.scheduler.commit(StepResult(tokens=[0], bad=[0])) == []
    core.scheduler.check()
    core.scheduler.resume("a")
    assert collect(run(core)) == {"a": expected(prompt(1, 5), 4)}


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_random_traffic_keeps_the_invariants_and_the_answers(data: st.DataObject) -> None:
    with patch.object(scheduler, "Lookup", Guesses):
        random_traffic(data)


def random_traffic(data: st.DataObject) -> None:
    overlap = data.draw(st.booleans())
    drafts = data.draw(st.booleans())
    core = make_engine(
        pages=data.draw(st.integers(7, 24)),
        max_len=100,
        overlap=overlap,
        max_num_seqs=data.draw(st.integers(1, 6)),
        max_num_batched_tokens=data.draw(st.sampled_from([8, 16, 33])),
        enable_prefix_caching=data.draw(st.booleans()),
        enough_tokens=data.draw(st.sampled_from([None, 1, 12])),
        speculative_config=NGRAM if drafts else None,
    )
    prompts: dict[str, tuple[list[int], int]] = {}
    outputs: list[TokenOutput] = []
    aborted: set[str] = set()
    for number in range(data.draw(st.integers(1, 25))):
        for _ in range(data.draw(st.integers(0, 3))):
            outputs += core.step()
            core.scheduler.check()
        action = data.draw(st.sampled_from(["add", "add", "add", "abort", "reset"]))
        if action == "add":
            tokens = [*prompt(data.draw(st.integers(0, 2)), data.draw(st.integers(1, 70))), number]
            count = data.draw(st.integers(1, 25))
            prompts[f"r{number}"] = (tokens, count)
            core.add(make_request(core, f"r{number}", tokens, max_tokens=count, priority=data.draw(st.integers(0, 1))))
        elif action == "abort" and prompts:
            victim = data.draw(st.sampled_from(sorted(prompts)))
            aborted |= {o.id for o in core.abort([victim])}
        else:
            core.reset_prefix_cache()
        core.scheduler.check()
    outputs += run(core)
    texts = collect(outputs)
    for id, (tokens, count) in prompts.items():
        whole = expected(tokens, min(count, 100 - len(tokens)))
        assert texts.get(id, []) == whole[: len(texts.get(id, []))]
        assert id in aborted or texts[id] == whole
    assert_idle(core)


def assert_idle(core: EngineCore) -> None:
    assert core.stats().pages_used == 0
    assert core.stats().running == core.stats().waiting == 0
    assert not core.scheduler._prefixes._claims


@pytest.mark.parametrize("kind", ["last", "mean"])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_to_embed_ends_with_its_prompt_whatever_its_length(kind: PoolingKind, overlap: bool) -> None:
    core = make_engine(pages=16, overlap=overlap, runner="pooling")
    shared = prompt(1, 40)
    prompts = {f"r{i}": [*shared[: 8 * i], *prompt(i, n)] for i, n in enumerate((1, 33, 16, 100, 216, 31, 32))}
    assert len(prompts["r4"]) < core.info.max_model_len
    prompts["whole"] = prompt(8, core.info.max_model_len)
    for id, tokens in prompts.items():
        request = make_request(core, id, tokens, max_tokens=0, pooling=Pooling(kind))
        assert core.add(request) is None
    outputs = run(core)
    assert {output.id: output.embedding for output in outputs} == {
        id: np.float32(expected(tokens, 1)[0]).tobytes() for id, tokens in prompts.items()
    }
    assert all(output.finish_reason == "stop" and not output.token_ids for output in outputs)
    assert core.stats().generation_tokens == 0


def test_only_what_is_pooled_from_the_last_token_takes_a_prefix_that_is_known() -> None:
    core = make_engine(runner="pooling")
    tokens = prompt(1, 64)
    cached = []
    for kind in ("mean", "last", "last", "mean", "cls"):
        core.add(make_request(core, kind, tokens, max_tokens=0, pooling=Pooling(kind)))
        cached += [output.cached for output in run(core)]
    assert cached == [0, 48, 48, 0, 0]


def test_embedding_survives_preemption_and_ends_when_aborted() -> None:
    core = make_engine(pages=16, max_num_seqs=3, max_num_batched_tokens=16, runner="pooling")
    prompts = {id: prompt(i, 150) for i, id in enumerate("abc")}
    for id, tokens in prompts.items():
        core.add(make_request(core, id, tokens, max_tokens=0, pooling=Pooling("mean")))
    early = [output for _ in range(6) for output in core.step()]
    core.add(make_request(core, "first", prompt(7, 200), max_tokens=0, pooling=Pooling("mean"), priority=-1))
    early += core.step()
    assert core.stats().preemptions > 0
    (aborted,) = core.abort(["b"])
    found = {output.id: output.embedding for output in [*early, *run(core)]}
    assert aborted.finish_reason == "abort" and not aborted.embedding
    assert found == {
        id: np.float32(expected(tokens, 1)[0]).tobytes()
        for id, tokens in {**prompts, "first": prompt(7, 200)}.items()
        if id != "b"
    }


def test_an_engine_refuses_what_the_other_kind_does() -> None:
    generates, embeds = make_engine(), make_engine(runner="pooling")
    pooled = {"max_tokens": 0, "pooling": Pooling("last")}
    for core, sampling in ((generates, pooled), (embeds, {})):
        refusal = core.add(make_request(core, "a", [1], **sampling))
        assert refusal is not None and refusal.status == 400
        assert not core.has_work()
