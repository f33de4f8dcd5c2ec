"""The page pool: property test against a model of who holds what."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.cache.pages import PagePool


def test_freed_pages_are_found_again_until_they_are_taken() -> None:
    pool = PagePool(2)
    first, second = pool.take(2)
    pool.publish(first, b"a")
    pool.publish(second, b"b")
    pool.release([first, second])
    assert pool.match([b"a", b"b"]) == [first, second]
    assert pool.take(1) == [second], "the leaf of a prefix is evicted before its root"
    assert pool.match([b"a", b"b"]) == [first]


def test_pages_without_content_are_taken_before_pages_worth_keeping() -> None:
    pool = PagePool(3)
    pages = pool.take(3)
    pool.publish(pages[0], b"a")
    pool.release(pages)
    pool.take(2)
    assert pool.match([b"a"]) == [pages[0]]


def test_a_page_is_free_only_when_its_last_user_lets_go() -> None:
    pool = PagePool(1)
    pages = pool.take(1)
    pool.reuse(pages)
    pool.release(pages)
    assert pool.num_free == 0
    pool.release(pages)
    assert pool.num_free == 1


def test_match_ends_at_the_first_unknown_key() -> None:
    pool = PagePool(3)
    pages = pool.take(3)
    for page, key in zip(pages, (b"a", b"b", b"c"), strict=True):
        pool.publish(page, key)
    assert pool.match([b"a", b"x", b"c"]) == pages[:1]


def test_equal_content_computed_twice_is_findable_once() -> None:
    pool = PagePool(2)
    first, second = pool.take(2)
    pool.publish(first, b"a")
    pool.publish(second, b"a")
    assert pool.match([b"a"]) == [first]
    pool.check()


def test_taking_more_than_is_free_is_refused_and_changes_nothing() -> None:
    pool = PagePool(2)
    with pytest.raises(ValueError, match="3 pages wanted, 2 free"):
        pool.take(3)
    pool.check()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_invariants_hold_under_random_use(data: st.DataObject) -> None:
    pool = PagePool(12)
    held: list[list] = []
    for _ in range(data.draw(st.integers(1, 60))):
        action = data.draw(st.sampled_from(["take", "release", "share", "forget"]))
        if action == "take" and pool.num_free:
            pages = pool.take(data.draw(st.integers(1, pool.num_free)))
            for page in pages:
                if data.draw(st.booleans()):
                    pool.publish(page, bytes([data.draw(st.integers(0, 20))]))
            held.append(pages)
        elif action == "release" and held:
            pool.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        elif action == "share":
            hit = pool.match([bytes([data.draw(st.integers(0, 20))])])
            pool.reuse(hit)
            held.append(hit)
        elif action == "forget":
            pool.forget()
        pool.check()
        refs = [0] * 12
        for pages in held:
            for page in pages:
                refs[page.id] += 1
        assert refs == [page.refs for page in pool.pages]
