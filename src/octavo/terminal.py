"""``octavo generate`` and ``octavo chat``: text as it comes, in colour where a terminal shows it."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, TextIO

import msgspec

from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig
from octavo.errors import RequestError
from octavo.frontend.inputs import Prepared
from octavo.types import RequestOutput, SamplingParams

DEFAULT_MAX_TOKENS = 512  # of an answer when --max-tokens is not given; at most half of the context
ANSWER, FAINT, RESET = "\x1b[36m", "\x1b[2m", "\x1b[0m"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a model writes must not drive the terminal


def generate(config: EngineConfig, sampling: Mapping[str, Any], prompt: str | None, log_level: str = "warning") -> int:
    """Continues ``prompt`` (None: standard input) and prints what comes."""
    text = sys.stdin.read() if prompt is None else prompt
    with _Session(config, sampling, log_level) as session:
        session.show(session.prepare(text))
    return 0


def chat(
    config: EngineConfig,
    sampling: Mapping[str, Any],
    message: str | None,
    system: str | None,
    log_level: str = "warning",
) -> int:
    """Answers ``message``; without one, each line of standard input until it ends, remembering what was said.

    On a terminal a request that fails (a conversation that has grown too long) is told and can be followed by another.
    """
    history = [{"role": "system", "content": system}] if system else []
    interactive = message is None and sys.stdin.isatty()
    with _Session(config, sampling, log_level) as session:
        for line in _lines(interactive) if message is None else [message]:
            turn = [*history, {"role": "user", "content": line}]
            try:
                output = session.show(session.prepare_chat(turn))
            except RequestError as error:
                if not interactive:
                    raise
                print(f"{error.cause} {error.remedy}", file=sys.stderr)
                continue
            history = [*turn, {"role": "assistant", "content": output.outputs[0].text}]
    return 0


def _lines(interactive: bool) -> Iterator[str]:
    """Messages, one a line; empty lines are skipped."""
    if interactive:
        with contextlib.suppress(ImportError):  # a Python built without it still chats
            importlib.import_module("readline")  # importing it gives `input` line editing and the arrow keys
        print("An empty line is skipped; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return
        if line.strip():
            yield line


class _Session:
    """A running engine and an event loop that turns only while something is asked of it."""

    def __init__(self, config: EngineConfig, sampling: Mapping[str, Any], log_level: str) -> None:
        self._config = config
        self._sampling = sampling
        self._log_level = log_level

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            print(f"loading {os.path.basename(self._config.model.model)} …", file=sys.stderr)
        self._runner = asyncio.Runner()
        try:
            self._llm = self._runner.run(AsyncLLM.start(self._config, log_level=self._log_level))
            self._params = self._make_params()
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._runner.run(self._llm.close())
        finally:
            self._runner.close()

    def prepare(self, text: str) -> Prepared:
        return self._runner.run(self._llm.prepare(text, self._params))

    def prepare_chat(self, messages: Sequence[Mapping[str, Any]]) -> Prepared:
        return self._runner.run(self._llm.prepare_chat(messages, self._params))

    def show(self, prepared: Prepared) -> RequestOutput:
        """Runs a request and prints its answer as it comes; several answers one after the other."""
        if prepared.params.n == 1:
            output = self._runner.run(self._stream(prepared))
        else:
            output = self._runner.run(self._llm.collect(prepared))
            for one in output.outputs:
                print(_faint(f"[{one.index + 1}]", sys.stdout), _answer(one.text), flush=True)
        print(_faint(speed(output), sys.stderr), file=sys.stderr, flush=True)
        return output

    async def _stream(self, prepared: Prepared) -> RequestOutput:
        generation = self._llm.run(prepared)
        try:
            async for deltas in generation:
                print(_answer("".join(delta.text for delta in deltas)), end="", flush=True)
        finally:
            await generation.aclose()
            print(flush=True)
        return generation.state.snapshot()

    def _make_params(self) -> SamplingParams:
        longest = min(DEFAULT_MAX_TOKENS, max(1, self._llm.info.max_model_len // 2))
        given = {"max_tokens": longest, **self._sampling}
        return msgspec.structs.replace(self._llm.default_params(), **given)


def speed(output: RequestOutput) -> str:
    """How many tokens came how fast, in words: the rate is that after the first token."""
    tokens, metrics = sum(len(one.token_ids) for one in output.outputs), output.metrics
    if metrics.first_token_time is None or metrics.finished_time is None:
        return f"{tokens} tokens"
    first = metrics.first_token_time - metrics.arrival_time
    rest = metrics.finished_time - metrics.first_token_time
    rate = f"{(tokens - 1) / rest:.1f} tokens/s, " if tokens > 1 and rest > 0 else ""
    return f"{tokens} tokens, {rate}first after {first:.2f} s"


def _answer(text: str) -> str:
    """Text of the model: without control characters, and in colour, on a terminal; untouched elsewhere."""
    if not sys.stdout.isatty():
        return text
    text = CONTROL.sub("", text)
    return f"{ANSWER}{text}{RESET}" if _colours(sys.stdout) else text


def _faint(text: str, stream: TextIO) -> str:
    return f"{FAINT}{text}{RESET}" if _colours(stream) else text


def _colours(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal with colours; NO_COLOR (no-color.org) turns them off."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
