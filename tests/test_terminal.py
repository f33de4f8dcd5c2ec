"""`octavo generate` and `octavo chat`: what is asked, what is printed where, when there is colour."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
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
