"""`octavo generate` and `octavo chat`: what is asked, what is printed where, when there is colour."""

from __future__ import annotations

import atexit
import io
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo import terminal
from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig
from octavo.errors import RequestError
from octavo.frontend.loading import TextModel
from octavo.types import Request, TokenOutput
from tests.frontend.fakes import FakeClient, FakeTokenizer, byte_level, info, prompt_of

CONFIG = EngineConfig.of(model="fake")
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
Fake = Callable[..., FakeClient]


@pytest.fixture
def tokenizer() -> FakeTokenizer:
    return byte_level(chat_template=TEMPLATE)


@pytest.fixture
def fake(tokenizer: FakeTokenizer, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Lets the commands talk to an engine that answers every request with the same text, a token at a time."""

    def install(answer: str, **facts: Any) -> FakeClient:
        ids = tokenizer.encode(answer)

        def script(request: Request) -> list[TokenOutput]:
            last = TokenOutput(id=request.id, token_ids=ids[-1:], finish_reason="length")
            return [TokenOutput(id=request.id, token_ids=[i]) for i in ids[:-1]] + [last]

        client = FakeClient(script, info(max_model_len=512, **facts))

        async def start(config: EngineConfig, **options: Any) -> AsyncLLM:
            return AsyncLLM(client, TextModel(tokenizer, frozenset([tokenizer.eos_id])))

        monkeypatch.setattr(AsyncLLM, "start", start)
        return client

    return install


def prompts(client: FakeClient, tokenizer: FakeTokenizer) -> list[str]:
    return [tokenizer.decode(prompt_of(request)) for request in client.requests]


def test_generate_prints_the_text_and_then_the_speed(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    client = fake(" world, hello")
    assert terminal.generate(CONFIG, {}, "hello") == 0
    out, err = capsys.readouterr()
    assert out == " world, hello\n"
    assert "tokens/s, first after" in err
    assert client.closed


def test_generate_reads_standard_input(fake: Fake, tokenizer: FakeTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    client = fake("x")
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert terminal.generate(CONFIG, {}, None) == 0
    assert prompts(client, tokenizer) == ["from a pipe"]


def test_sampling_options_reach_the_engine(fake: Fake) -> None:
    client = fake("x")
    terminal.generate(CONFIG, {"temperature": 0.0, "seed": 7, "max_tokens": 3}, "hello")
    sampling = client.requests[0].sampling
    assert (sampling.temperature, sampling.seed, sampling.max_tokens) == (0.0, 7, 3)


def test_an_answer_may_take_half_of_the_context_when_nothing_is_said(fake: Fake) -> None:
    client = fake("x")
    terminal.generate(CONFIG, {}, "hello")
    assert client.requests[0].sampling.max_tokens == 256


def test_several_answers_are_printed_one_after_the_other(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake("same")
    terminal.generate(CONFIG, {"n": 2}, "hello")
    assert capsys.readouterr().out == "[1] same\n[2] same\n"


def test_a_message_is_answered_with_the_template(
    fake: Fake, tokenizer: FakeTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    client = fake("yes")
    assert terminal.chat(CONFIG, {}, "ready?", "be short") == 0
    assert prompts(client, tokenizer) == ["[system]be short[user]ready?"]
    assert capsys.readouterr().out == "yes\n"


def test_each_line_of_input_is_a_turn_that_remembers_the_ones_before(
    fake: Fake, tokenizer: FakeTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = fake("ok")
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    assert terminal.chat(CONFIG, {}, None, None) == 0
    assert prompts(client, tokenizer) == ["[user]one", "[user]one[assistant]ok[user]two"]


def test_a_message_that_does_not_fit_is_an_error(fake: Fake) -> None:
    client = fake("x")
    with pytest.raises(RequestError, match="max_model_len"):
        terminal.chat(CONFIG, {}, "z" * 600, None)
    assert client.closed


THINKING = TEMPLATE + "{# <think> #}"


@pytest.mark.parametrize("show", [True, False])
def test_what_the_model_thinks_is_no_part_of_the_answer(
    fake: Fake, tokenizer: FakeTokenizer, capsys: pytest.CaptureFixture[str], show: bool
) -> None:
    tokenizer.chat_template = THINKING
    fake("<think>\nhm, well\n</think>\n\nhello")
    assert terminal.chat(CONFIG, {}, "hi", None, show_reasoning=show) == 0
    out, err = capsys.readouterr()
    assert out == "hello\n"
    assert ("hm, well" in err) == show


def test_thoughts_whose_markers_are_special_tokens_are_found_too(
    fake: Fake, tokenizer: FakeTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.chat_template = THINKING
    tokenizer.lib.add_special_tokens(["<think>", "</think>"])
    tokenizer.special_ids |= {tokenizer.token_to_id(one) for one in ("<think>", "</think>")}
    fake("<think>hm</think>hello")
    terminal.chat(CONFIG, {}, "hi", None)
    out, err = capsys.readouterr()
    assert out == "hello\n"
    assert "hm\n" in err


@pytest.fixture
def type_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Makes standard input a terminal at which somebody types."""

    def typed(*lines: str) -> None:
        left = iter(lines)

        def read(question: str) -> str:
            line = next(left, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys, "stdin", _Screen())
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        monkeypatch.setattr(atexit, "register", lambda *args: None)

    return typed


def test_commands_of_a_conversation(
    fake: Fake,
    tokenizer: FakeTokenizer,
    type_lines: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    client, saved = fake("ok"), tmp_path / "talk.json"
    type_lines("one", "two", "/undo", "three", "/retry", f"/save {saved}", "/history", "/new", "//four", "/no", "/help")
    assert terminal.chat(CONFIG, {}, None, "s") == 0
    one = "[system]s[user]one"
    assert prompts(client, tokenizer) == [
        one,
        f"{one}[assistant]ok[user]two",
        f"{one}[assistant]ok[user]three",
        f"{one}[assistant]ok[user]three",
        "[system]s[user]/four",
    ]
    messages = json.loads(saved.read_text(encoding="utf-8"))["messages"]
    assert [message["content"] for message in messages] == ["s", "one", "ok", "three", "ok"]
    err = capsys.readouterr().err
    assert "user: three\nassistant: ok" in err
    assert "/no is no command" in err
    assert "/retry" in err
    assert (tmp_path / "octavo").stat().st_mode & 0o777 == 0o700


def test_reasoning_can_be_hidden_and_shown_again(
    fake: Fake, tokenizer: FakeTokenizer, type_lines: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.chat_template = THINKING
    fake("<think>hm</think>ok")
    type_lines("/reasoning", "one")
    terminal.chat(CONFIG, {}, None, None)
    hidden = capsys.readouterr().err
    type_lines("/reasoning", "/reasoning", "one")
    terminal.chat(CONFIG, {}, None, None)
    assert "hm" not in hidden
    assert "hm" in capsys.readouterr().err


def test_a_message_whose_second_answer_fails_keeps_its_first(
    fake: Fake, tokenizer: FakeTokenizer, type_lines: Callable[..., None]
) -> None:
    client = fake("ok")
    answer = client.script

    def script(request: Request) -> list[TokenOutput]:
        if len(client.requests) == 2:
            return [TokenOutput(id=request.id, finish_reason="error", error="No room.", status=400)]
        return answer(request)

    client.script = script
    type_lines("one", "/retry", "two")
    assert terminal.chat(CONFIG, {}, None, None) == 0
    assert prompts(client, tokenizer)[-1] == "[user]one[assistant]ok[user]two"


def test_a_conversation_goes_on_after_a_message_that_does_not_fit(
    fake: Fake, tokenizer: FakeTokenizer, type_lines: Callable[..., None]
) -> None:
    client = fake("ok")
    type_lines("z" * 600, "one")
    assert terminal.chat(CONFIG, {}, None, None) == 0
    assert prompts(client, tokenizer) == ["[user]one"]


def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_came(
    fake: Fake, tokenizer: FakeTokenizer, type_lines: Callable[..., None]
) -> None:
    client = fake("hello world")
    script = client.script

    def interrupted(request: Request) -> Any:
        yield from script(request)[:3]
        client.script = script
        os.kill(os.getpid(), signal.SIGINT)
        yield TokenOutput(id=request.id)

    client.script = interrupted  # type: ignore[assignment]
    type_lines("one", "two")
    assert terminal.chat(CONFIG, {}, None, None) == 0
    said = tokenizer.decode(tokenizer.encode("hello world")[:3])
    assert prompts(client, tokenizer)[1] == f"[user]one[assistant]{said}[user]two"


class _Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(monkeypatch: pytest.MonkeyPatch, **environ: str) -> _Screen:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    out = _Screen()
    monkeypatch.setattr(sys, "stdout", out)
    return out


def test_a_terminal_gets_colour(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("a")
    out = screen(monkeypatch)
    terminal.generate(CONFIG, {}, "hello")
    assert out.getvalue() == f"{terminal.ANSWER}a{terminal.RESET}\n"


@pytest.mark.parametrize("environ", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_colour_can_be_turned_off(fake: Fake, monkeypatch: pytest.MonkeyPatch, environ: dict[str, str]) -> None:
    fake("ab")
    out = screen(monkeypatch, **environ)
    terminal.generate(CONFIG, {}, "hello")
    assert out.getvalue() == "ab\n"


def test_a_model_cannot_send_commands_to_the_terminal(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("a\x1b]0;title\x07\n\tb")
    out = screen(monkeypatch, NO_COLOR="1")
    terminal.generate(CONFIG, {}, "hello")
    assert out.getvalue() == "a]0;title\n\tb\n"
