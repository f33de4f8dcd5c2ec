from __future__ import annotations

import io
import logging

import pytest

from octavo.runtime.progress import LoadProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_long_load_tells_its_rate_every_five_seconds(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "octavo")
    now = [100.0]
    with LoadProgress(10**10, clock=lambda: now[0], stream=io.StringIO()) as progress:
        for i in range(1, 13):
            now[0] += 1
            progress(i / 20)
    assert caplog.messages == [
        "weights: 25 %, 2.50 of 10.00 GB, 0.50 GB/s",
        "weights: 50 %, 5.00 of 10.00 GB, 0.50 GB/s",
    ]


def test_a_terminal_gets_a_bar_instead(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "octavo")
    terminal, now = Terminal(), [0.0]
    with LoadProgress(10**9, clock=lambda: now[0], stream=terminal) as progress:
        now[0] = 10.0
        progress(0.5)
        progress(1.0)
    assert caplog.messages == []
    assert "weights" in terminal.getvalue()
    assert "/1.00G" in terminal.getvalue()


@pytest.mark.parametrize(("level", "shown"), [(logging.WARNING, True), (logging.INFO, False)])
def test_a_quiet_log_and_all_ranks_but_one_are_kept_quiet(
    level: int, shown: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(level, "octavo")
    terminal = Terminal()
    with LoadProgress(1, shown=shown, stream=terminal) as progress:
        progress(1.0)
    assert (caplog.messages, terminal.getvalue()) == ([], "")
