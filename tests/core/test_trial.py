"""Grammars that llguidance's own limits do not bound, and what becomes of them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import msgspec
import psutil
import pytest

from octavo.core import trial
from octavo.core.trial import Trial
from octavo.errors import OctavoError
from octavo.structured import GrammarSpec
from tests.waiting import PATIENCE, until

TOKENS = [bytes([i]) for i in range(256)] + [b"<end>"]
BOMBS = {
    "intersection": GrammarSpec("lark", "start: A\nA: " + " & ".join(f"/(.*a.{{{i}}}b.*)/" for i in range(1, 40))),
    "patterns": GrammarSpec(
        "json_schema",
        json.dumps({"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(1, 60)]}),
    ),
}
GOOD = GrammarSpec("regex", "[ab]{3}")


@pytest.fixture
def made() -> Iterator[Trial]:
    one = Trial(TOKENS, [256], [256])
    yield one
    one.close()


@pytest.mark.parametrize("name", BOMBS)
def test_a_grammar_that_would_take_hours_is_ended_in_time(
    made: Trial, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert made.refusal(GOOD) == ""
    process = made._process
    assert process is not None
    monkeypatch.setattr(trial, "COMPILE_SECONDS", 0.5)
    assert "more than 0.5 s" in made.refusal(BOMBS[name])  # or this test is ended
    assert process.returncode == -9
    monkeypatch.undo()
    assert made.refusal(GOOD) == ""


def test_a_grammar_that_takes_too_much_memory_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "MEMORY_BYTES", 1 << 20)
    made = Trial(TOKENS, [256], [256])
    assert made.refusal(GOOD) == ""
    assert "MiB" in made.refusal(GrammarSpec("regex", "a{1000000000}"))
    assert made.refusal(GOOD) == ""
    made.close()


def test_a_refusal_is_llguidances_own_word(made: Trial) -> None:
    assert "unclosed group" in made.refusal(GrammarSpec("regex", "("))
    assert made.refusal(GOOD) == ""


def test_the_process_does_not_outlive_the_engine_even_inside_of_a_bomb(made: Trial) -> None:
    assert made.refusal(GOOD) == ""
    process = made._process
    assert process is not None
    assert process.stdin is not None
    times = psutil.Process(process.pid).cpu_times
    before = times().user
    trial._write(process.stdin, msgspec.msgpack.encode(BOMBS["intersection"]))
    until(lambda: times().user > before + 0.1)  # it is at work
    process.stdin.close()  # as when the engine is killed
    assert process.wait(PATIENCE) == 0


def test_after_kill_every_grammar_is_refused(made: Trial) -> None:
    assert made.refusal(GOOD) == ""
    made.kill()
    assert made.refusal(GOOD) != ""
    assert made._process is None
    with pytest.raises(OctavoError, match="did not start"):
        made.refusal(GOOD)
