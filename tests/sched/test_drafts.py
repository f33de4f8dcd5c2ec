"""Drafts: what is supposed to come next, and what becomes of it in a step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from octavo.core.engine import EngineCore
from octavo.runtime.stub import StubWorker
from octavo.sched import scheduler
from octavo.sched.drafts import Lookup, may_draft
from octavo.speculation import Speculation
from octavo.structured import Guide
from octavo.types import FinishReason, Sampling, StepPlan, TokenOutput
from tests.core.stub_engine import NGRAM, Guesses, collect, expected, make_engine, make_request, run

FIVE = Speculation(num_speculative_tokens=5, prompt_lookup_max=4, prompt_lookup_min=2)
PROMPT = [(i * 31) % 251 for i in range(20)]


# --- the index --------------------------------------------------------------------------------------------------------


def test_a_draft_is_what_followed_the_longest_n_gram_where_it_stood_last() -> None:
    text = [1, 2, 3, 7, 7, 2, 3, 8, 8, 1, 2, 3]
    assert Lookup(FIVE).propose(text, 4) == [7, 7, 2, 3]  # after 1 2 3, though 2 3 stood later, too
    assert Lookup(FIVE).propose([*text[3:9], 2, 3], 4) == [8, 8, 2, 3]
    assert Lookup(FIVE).propose([2, 3, 5, 2, 3, 6, 2, 3], 1) == [6]


def test_a_text_that_goes_round_in_circles_goes_on() -> None:
    assert Lookup(FIVE).propose([4, 9, 9, 9], 5) == [9, 9, 9, 9, 9]
    assert Lookup(FIVE).propose([0, 1, 2, 3, 1, 2, 3, 1, 2], 5) == [3, 1, 2, 3, 1]


@pytest.mark.parametrize("text", [[1], [1, 2], [1, 2, 3, 4, 2], [3, 1, 2, 3]])
def test_a_text_without_repetition_of_enough_tokens_has_no_draft(text: list[int]) -> None:
    assert Lookup(FIVE).propose(text, 5) == []


def test_an_index_that_grows_with_its_text_is_that_of_the_whole_text() -> None:
    text, grown = [(i * i) % 7 for i in range(120)], Lookup(FIVE)
    for length in range(1, len(text)):
        assert grown.propose(text[:length], 5) == Lookup(FIVE).propose(text[:length], 5)


def test_a_draft_is_about_twice_as_long_as_what_held_of_the_last_one() -> None:
    lookup, lengths = Lookup(Speculation(8, 2, 2)), []
    for accepted in (8, 0, 1, 3, 5):
        lookup.judge(0, accepted)
        lengths.append(len(lookup.propose([9] * 20, 8)))
    assert lengths == [8, 1, 3, 7, 8]


def test_after_drafts_of_which_nothing_holds_there_are_none_for_longer_and_longer() -> None:
    lookup, drafted = Lookup(FIVE), []
    for length in range(4, 100):
        if lookup.propose([9] * length, 5):
            drafted.append(length)
            lookup.judge(length + 1, 0)
    assert [b - a for a, b in pairwise(drafted)] == [3, 5, 9, 17, 17, 17, 17]
    lookup.judge(100, 1)
    assert lookup.propose([9] * 100, 5)


@pytest.mark.parametrize(
    ("sampling", "may"),
    [
        ({}, True),
        ({"temperature": 0.0, "logprobs": 3, "logit_bias": {3: 1.0}, "allowed_token_ids": (1, 2)}, True),
        ({"repetition_penalty": 1.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": 0.1}, False),
        ({"bad_words": ((1, 2),)}, False),
        ({"guide": Guide()}, False),
        ({"prompt_logprobs": 0}, False),
        ({"min_tokens": 4}, True),
        ({"min_tokens": 4, "masked_until_min": (1,)}, False),
        ({"min_tokens": 3, "masked_until_min": (1,)}, True),
    ],
)
def test_only_requests_whose_logits_the_model_alone_decides_have_drafts(sampling: dict[str, Any], may: bool) -> None:
    assert may_draft(Sampling(max_tokens=9, **sampling), 3) is may


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "Lookup", Guesses)


def traced(core: EngineCore) -> list[StepPlan]:
    """The plans that ``core`` makes from now on."""
    plans, schedule = [], core.scheduler.schedule

    def tell() -> StepPlan | None:
        plan = schedule()
        plans.extend([plan] if plan is not None else [])
        return plan

    core.scheduler.schedule = tell  # type: ignore[method-assign]
    return plans


def speculating(**options: Any) -> EngineCore:
    return make_engine(speculative_config=NGRAM, **options)


def test_a_request_gets_the_tokens_it_would_get_without_drafts_in_fewer_steps() -> None:
    core = speculating()
    prompts = {f"r{i}": PROMPT[i:] for i in range(4)}
    for id, tokens in prompts.items():
        core.add(make_request(core, id, tokens, max_tokens=60))
    assert collect(run(core)) == {id: expected(tokens, 60) for id, tokens in prompts.items()}
    stats = core.stats()
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    assert stats.generation_tokens == 240 and stats.steps < 60


def test_what_is_counted_is_what_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Guesses, "wrong", (2,))
    core = speculating()
    core.add(make_request(core, "a", PROMPT, max_tokens=13))  # one with the prompt, then three steps of four
    outputs = run(core)
    assert [len(output.token_ids) for output in outputs] == [1, 4, 4, 4]
    stats = core.stats()
    assert (stats.draft_tokens, stats.accepted_tokens) == (5 + 5 + 3, 9)  # the last four end the answer


@pytest.mark.parametrize("max_tokens", range(1, 14))
def test_max_tokens_may_be_reached_inside_a_draft(max_tokens: int) -> None:
    core = speculating(max_len=20 + 11)
    core.add(make_request(core, "a", PROMPT, max_tokens=max_tokens))
    outputs = run(core)
    assert collect(outputs)["a"] == expected(PROMPT, min(max_tokens, 11))
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize("min_tokens", [0, 6, 30])
@pytest.mark.parametrize("place", range(8))
def test_an_end_token_inside_a_draft_ends_the_answer_there(place: int, min_tokens: int) -> None:
    answers = []
    for core in (make_engine(), speculating()):
        end = expected(PROMPT, 40)[place]
        core.add(make_request(core, "a", PROMPT, max_tokens=40, end_ids=(end,), min_tokens=min_tokens))
        outputs = run(core)
        answers.append((collect(outputs), outputs[-1].finish_reason))
    assert answers[0] == answers[1]


def test_drafts_take_neither_pages_nor_room_that_others_need() -> None:
    core = speculating(pages=16, max_len=200, max_num_batched_tokens=12)
    prompts = {f"r{i}": PROMPT[i:] for i in range(4)}
    for id, tokens in prompts.items():
        core.add(make_request(core, id, tokens, max_tokens=40))
    plans = traced(core)
    texts = collect(run(core))
    assert texts == {id: expected(tokens, 40) for id, tokens in prompts.items()}
    assert core.stats().preemptions == 0  # they end with 4 x 60 tokens in 4 x 4 pages of 16
    assert core.stats().accepted_tokens > 0
    assert all(plan.num_tokens <= 12 for plan in plans)


def test_no_draft_goes_into_a_page_that_is_not_free() -> None:
    core = speculating(pages=4, max_len=64)
    for id in "ab":  # of two pages each, which are all there are
        core.add(make_request(core, id, PROMPT, max_tokens=30))
    plans = traced(core)
    assert collect(run(core)) == {id: expected(PROMPT, 30) for id in "ab"}
    assert core.stats().preemptions > 0 and core.stats().accepted_tokens > 0
    assert any(plan.samples == [1, 1] and not plan.starts for plan in plans)


def test_a_prompt_of_a_full_step_has_the_step_for_itself() -> None:
    core = speculating(max_num_batched_tokens=16)
    core.add(make_request(core, "a", PROMPT, max_tokens=60))
    core.step()
    core.step()
    core.add(make_request(core, "b", list(range(100)), max_tokens=1))
    plans = traced(core)
    for _ in range(4):
        core.step()
    assert [(plan.counts, plan.samples) for plan in plans] == [([1, 15], [1, 0])] * 4


def test_requests_with_and_without_drafts_share_steps() -> None:
    core = speculating()
    core.add(make_request(core, "a", PROMPT, max_tokens=30))
    core.add(make_request(core, "b", PROMPT[3:], max_tokens=30, repetition_penalty=1.5))
    core.add(make_request(core, "c", PROMPT[5:], max_tokens=30, prompt_logprobs=1))
    plans = traced(core)
    texts = collect(run(core))
    assert texts == {"a": expected(PROMPT, 30), "b": expected(PROMPT[3:], 30), "c": expected(PROMPT[5:], 30)}
    assert any(plan.samples == [1, 1, 6] for plan in plans)


def test_a_page_with_a_draft_that_did_not_hold_is_not_offered() -> None:
    core = speculating()
    core.add(make_request(core, "a", PROMPT, max_tokens=60))
    run(core)
    turn = [*PROMPT, *expected(PROMPT, 60), 1]
    core.add(make_request(core, "b", turn, max_tokens=4))
    outputs = run(core)
    assert outputs[0].cached == 64 and collect(outputs)["b"] == expected(turn, 4)


@pytest.mark.parametrize(("place", "told"), [(0, []), (2, [None, "error"]), (5, [None, "error"])])
def test_logits_that_are_not_finite_end_an_answer_behind_what_held(
    place: int, told: list[FinishReason | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guesses, "wrong", (0,))
    core = speculating()
    core.add(make_request(core, "a", PROMPT, max_tokens=60))
    core.step()
    done = core._worker.sample

    def poisoned(mask: object = None) -> Any:
        pending = done()
        pending.result().bad.append(place)
        return pending

    monkeypatch.setattr(core._worker, "sample", poisoned)
    outputs: list[TokenOutput] = core.step()
    assert [output.finish_reason for output in outputs] == (told or ["error"])
    assert collect(outputs)["a"] == expected(PROMPT, 1 + place)[1:]
    core.scheduler.check()
    assert core.stats().pages_used == 0


def test_a_model_that_keeps_more_than_pages_has_no_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StubWorker, "shares_prefixes", False)  # what it keeps has taken a draft in for good
    core = speculating(overlap=True)
    core.add(make_request(core, "a", PROMPT, max_tokens=40))
    assert core.step() == []  # its steps overlap
    assert collect(run(core))["a"] == expected(PROMPT, 40)
    assert core.stats().draft_tokens == 0


def test_steps_are_read_at_once_whatever_the_worker_could_overlap() -> None:
    core = speculating(overlap=True)
    core.add(make_request(core, "a", PROMPT, max_tokens=40))
    assert collect(run(core))["a"] == expected(PROMPT, 40)
    assert core.stats().accepted_tokens > 0
