from __future__ import annotations

from collections.abc import Iterator

import pytest

from octavo import log


@pytest.fixture
def logger() -> Iterator[None]:
    one = log.get_logger()
    before = (one.handlers[:], one.propagate, one.level)
    yield
    one.handlers[:], one.propagate = before[0], before[1]
    one.setLevel(before[2])


@pytest.mark.usefixtures("logger")
def test_an_exception_is_logged_with_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    log.configure("info")
    try:
        raise ZeroDivisionError("why it failed")
    except ZeroDivisionError:
        log.get_logger().exception("request 1 failed")
    said = capsys.readouterr().err
    assert "error: request 1 failed" in said
    assert "why it failed" in said
    assert "test_log.py" in said
