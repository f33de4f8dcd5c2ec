"""Memory on large pages is memory like any other."""

from __future__ import annotations

import gc

import pytest
import torch

from octavo.platforms.pages import LARGE, Arena, zeros


@pytest.mark.parametrize("nbytes", [1, LARGE - 1, LARGE + 5])
def test_zeros_begin_at_a_large_page_and_can_be_written_to_their_end(nbytes: int) -> None:
    area = zeros(nbytes)
    assert area.dtype is torch.uint8 and len(area) == nbytes
    assert area.data_ptr() % LARGE == 0
    assert not area.any()
    assert int(area.fill_(7)[-1]) == 7


def test_parts_of_an_arena_do_not_overlap_and_outlive_it() -> None:
    arena = Arena()
    sizes = [1, 100_000, 300_001, LARGE, 300_000, 20 * LARGE, 17 * LARGE - 3, *[5 * LARGE] * 8]
    parts = [arena.empty(size) for size in sizes]
    assert [len(part) for part in parts] == sizes
    for value, part in enumerate(parts):
        part.fill_(value + 1)
    del arena
    gc.collect()
    for value, part in enumerate(parts):
        assert part[0] == part[-1] == part[len(part) // 2] == value + 1
    assert all(part.data_ptr() % 64 == 0 for part in parts if len(part) > LARGE)
