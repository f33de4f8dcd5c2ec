from __future__ import annotations

import random
from array import array

from octavo.cache.prefix import page_hashes
from octavo.frontend.routing import Router

PAGE = 4


def keys(*tokens: int) -> bytes:
    return page_hashes(b"secret", b"", array("i", tokens).tobytes(), PAGE)


def test_requests_without_a_common_prefix_go_to_the_least_busy_engine_and_in_turn_among_equals() -> None:
    router = Router(2, 64)
    assert [router.pick(b"", [0, 0, 0]) for _ in range(4)] == [0, 1, 2, 0]
    assert router.pick(b"", [3, 1, 2]) == 1


def test_an_equal_beginning_goes_where_it_went_before() -> None:
    router = Router(2, 64)
    first = router.pick(keys(*range(16)), [0, 0])
    assert [router.pick(keys(*range(12), 99, 98, 97, 96), [0, 0]) for _ in range(4)] == [first] * 4


def test_the_longest_common_prefix_decides() -> None:
    router = Router(10, 256)
    system = list(range(8))
    assert router.pick(keys(*system, *range(100, 108)), [0, 9]) == 0
    assert router.pick(keys(*system, *range(200, 208)), [11, 0]) == 1  # too busy: the other one
    assert router.pick(keys(*system, *range(100, 108), 1, 2, 3, 4), [5, 5]) == 0
    assert router.pick(keys(*system, *range(200, 208), 1, 2, 3, 4), [5, 5]) == 1


def test_affinity_yields_to_load_and_both_engines_have_the_prefix_then() -> None:
    router = Router(2, 256)
    prompt = keys(*range(8))
    assert router.pick(prompt, [0, 0]) == 0
    assert router.pick(prompt, [2, 0]) == 0
    assert router.pick(prompt, [3, 0]) == 1
    assert router.pick(prompt, [1, 0, 0]) == 1
    assert router.pick(prompt, [0, 1, 0]) == 0


def test_a_short_prefix_is_worth_less_than_a_long_one() -> None:
    router = Router(16, 64)  # two pages for one request
    assert router.pick(keys(*range(16)), [0, 5]) == 0
    assert router.pick(keys(*range(16), 20, 21, 22, 23), [2, 0]) == 0
    router.forget()
    assert router.pick(keys(*range(16)), [0, 5]) == 0
    assert router.pick(keys(*range(8), 20, 21, 22, 23), [2, 0]) == 1


def test_what_all_share_does_not_keep_requests_on_one_engine() -> None:
    router, system = Router(16, 16), list(range(64))  # 256 tokens: two requests
    counts, loads = [0, 0, 0], [0.0, 0.0, 0.0]
    for i in range(300):
        picked = router.pick(keys(*system, *range(1000 + 8 * i, 1008 + 8 * i)), loads)
        assert picked is not None
        counts[picked] += 1
        loads[picked] += 1
        loads = [max(0.0, load - 0.3) for load in loads]
    assert max(counts) - min(counts) <= 6


def test_engines_that_do_not_run_get_nothing() -> None:
    router = Router(100, 1024)
    prompt = keys(*range(8))
    assert router.pick(prompt, [0, None]) == 0
    assert router.pick(prompt, [None, 50]) == 1
    assert router.pick(prompt, [None, None]) is None


def test_an_engine_whose_cache_is_gone_is_forgotten() -> None:
    router = Router(100, 1024)
    prompt = keys(*range(8))
    assert router.pick(prompt, [0, 1]) == 0
    router.forget(0)
    assert router.pick(prompt, [1, 0]) == 1


def test_the_table_is_bounded_and_keeps_what_was_used_last() -> None:
    router = Router(100, 1024, table_size=3)
    kept = keys(*range(4))
    assert router.pick(kept, [0, 1]) == 0
    for i in range(100, 110):
        assert router.pick(keys(i, i, i, i), [1, 0]) == 1
        assert router.pick(kept, [1, 0]) == 0
    assert len(router._table) == 3


def test_conversations_stay_where_they_began_while_the_load_is_even() -> None:
    rng, router = random.Random(1), Router(8, 64)
    system = list(range(64))
    loads = [0.0] * 4
    homes: dict[int, int] = {}
    history = {i: system + [1000 + i] * 8 for i in range(40)}
    hits = 0
    for turn in range(400):
        one = turn if turn < 40 else rng.randrange(40)
        picked = router.pick(keys(*history[one]), loads)
        assert picked is not None
        hits += homes.get(one) == picked
        homes[one] = picked
        history[one] += [turn] * 8
        loads = [max(0.0, load - 0.5) for load in loads]
        loads[picked] += 1
    assert hits > 0.9 * 360
    assert max(loads) - min(loads) <= 9
