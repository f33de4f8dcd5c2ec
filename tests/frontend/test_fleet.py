from __future__ import annotations

import pytest

from octavo.frontend import fleet
from octavo.frontend.fleet import Patience


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_pauses_grow_up_to_a_limit_and_tries_are_counted(clock: list[float]) -> None:
    patience = Patience(10)
    pauses = [patience.pause() for _ in range(12)]
    assert pauses[:4] == [0.2, 0.4, 0.8, 1.6]
    assert pauses[8:] == [fleet.LONGEST_PAUSE_SECONDS] * 2 + [None, None]


def test_what_has_lasted_begins_anew(clock: list[float]) -> None:
    patience = Patience(2)
    assert [patience.pause(), patience.pause(), patience.pause()] == [0.2, 0.4, None]
    patience.started()
    clock[0] += fleet.LASTING_SECONDS - 1
    assert patience.pause() is None
    patience.started()
    clock[0] += fleet.LASTING_SECONDS + 1
    assert patience.pause() == 0.2


def test_a_start_that_takes_long_and_fails_has_not_lasted(clock: list[float]) -> None:
    patience = Patience(1)
    patience.started()
    assert patience.pause() == 0.2
    clock[0] += 10 * fleet.LASTING_SECONDS
    assert patience.pause() is None


def test_without_a_limit_it_never_gives_up(clock: list[float]) -> None:
    patience = Patience(None)
    assert all(patience.pause() is not None for _ in range(1000))
    assert Patience(0).pause() is None
