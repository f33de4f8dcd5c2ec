from __future__ import annotations

from octavo.frontend.floor import bytes_read, floor_share
from octavo.types import Stats
from tests.frontend.fakes import info


def test_the_share_is_the_least_time_for_the_bytes_over_the_time_taken() -> None:
    engine = info(weight_bytes=1000, kv_bytes=10)
    stats = Stats(steps=5, slots_filled=100, busy_seconds=2.0)
    assert bytes_read(engine, stats) == 6000
    assert floor_share(engine, stats, bandwidth=6000.0) == 0.5


def test_before_the_first_step_the_share_is_zero() -> None:
    assert floor_share(info(weight_bytes=1000), Stats(), bandwidth=1.0) == 0.0
