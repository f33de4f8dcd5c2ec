"""``octavo generate`` and ``octavo chat``: text as it comes, in colour where a terminal shows it."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

import msgspec

from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig
from octavo.errors import RequestError
from octavo.frontend.inputs import Prepared
from octavo.frontend.parse.events import Content, Event, Reasoning
from octavo.frontend.parse.message import MessageParser
from octavo.frontend.parse.registry import Formats, special_ids
from octavo.sampling_params import SamplingParams
from octavo.types import RequestOutput

DEFAULT_MAX_TOKENS = 512  # of an answer when --max-tokens is not given; at most half of the context
MAX_LINES = 1000  # kept for the arrow keys
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
    *,
    show_reasoning: bool = True,
) -> int:
    """Answers ``message``; without one, each line of standard input until it ends, remembering what was said.

    What the model thinks goes to standard error. On a terminal a request that fails (a conversation that has grown too
    long) is told and can be followed by another, Ctrl-C ends an answer, and lines that begin with / are commands.
    """
    interactive = message is None and sys.stdin.isatty()
    with _Session(config, sampling, log_level) as session:
        talk = _Chat(session, system, show_reasoning=show_reasoning, interactive=interactive)
        for line in _lines(interactive) if message is None else [message]:
            talk.take(line)
    return 0


class _Chat:
    """A conversation and what can be done with it."""

    def __init__(self, session: _Session, system: str | None, *, show_reasoning: bool, interactive: bool) -> None:
        self._session = session
        self._start = [{"role": "system", "content": system}] if system else []
        self._said: list[dict[str, Any]] = []  # a user's message and an answer in turn
        self._show_reasoning = show_reasoning
        self._interactive = interactive
        self._commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/new": ("forget the conversation", self._new),
            "/undo": ("forget the last message and its answer", self._undo),
            "/retry": ("answer the last message again", self._retry),
            "/history": ("show the conversation", self._history),
            "/save": ("FILE: write the conversation there, as JSON", self._save),
            "/reasoning": ("show what the model thinks, or hide it", self._reasoning),
            "/help": ("this list; Ctrl-C ends an answer, Ctrl-D the conversation", self._help),
        }

    def take(self, line: str) -> None:
        """A message, or, on a terminal, a command; // begins a message with one /."""
        if not self._interactive or not line.startswith("/") or line.startswith("//"):
            self._say(line[1:] if self._interactive and line.startswith("//") else line)
            return
        name, _, rest = line.partition(" ")
        if name in self._commands:
            self._commands[name][1](rest.strip())
        else:
            _tell(f"{name} is no command; /help lists them.")

    def _say(self, text: str) -> None:
        self._answer([*self._said, {"role": "user", "content": text}])

    def _answer(self, said: list[dict[str, Any]]) -> None:
        """The conversation is ``said`` and the answer to it, if there is one; else it stays as it was."""
        view = _View()
        try:
            prepared = self._session.prepare_chat([*self._start, *said])
            view = self._session.view(prepared, show_reasoning=self._show_reasoning)
            self._session.show(prepared, view)
        except RequestError as error:
            if not self._interactive:
                raise
            _tell(f"{error.cause} {error.remedy}")
            return
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            _tell("stopped")
        self._said = [*said, view.message()]

    def _new(self, rest: str) -> None:
        self._said = []

    def _undo(self, rest: str) -> None:
        self._said = self._said[:-2]

    def _retry(self, rest: str) -> None:
        if self._said:
            self._answer(self._said[:-1])

    def _history(self, rest: str) -> None:
        for message in [*self._start, *self._said]:
            _tell(f"{message['role']}: {CONTROL.sub('', message['content'])}")

    def _save(self, rest: str) -> None:
        try:
            text = json.dumps({"messages": [*self._start, *self._said]}, ensure_ascii=False, indent=1)
            Path(rest or "chat.json").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            _tell(f"not saved: {error}")

    def _reasoning(self, rest: str) -> None:
        self._show_reasoning = not self._show_reasoning
        _tell("reasoning is shown" if self._show_reasoning else "reasoning is hidden")

    def _help(self, rest: str) -> None:
        for name, (text, _) in self._commands.items():
            _tell(f"{name:11} {text}")


class _View:
    """Prints an answer as it comes: what is thought to standard error, if that is shown, and the rest."""

    def __init__(self, parser: MessageParser | None = None, *, show: bool = True) -> None:
        """Without a ``parser`` there are no thoughts."""
        self._parser, self._show = parser, show
        self._content: list[str] = []
        self._thoughts: list[str] = []

    def feed(self, text: str, *, final: bool = False) -> None:
        """A piece of it."""
        if self._parser is None:
            events: list[Event] = [Content(text)]
        else:
            events = self._parser.feed(text) + (self._parser.finish() if final else [])
        for event in events:
            if isinstance(event, Reasoning):
                self._think(event.text)
            elif isinstance(event, Content):
                self._write(event.text)

    def message(self) -> dict[str, Any]:
        """The answer as a message."""
        message = {"role": "assistant", "content": "".join(self._content)}
        return message | ({"reasoning_content": "".join(self._thoughts)} if self._thoughts else {})

    def _think(self, text: str) -> None:
        self._thoughts.append(text)
        if self._show:
            print(_faint(CONTROL.sub("", text), sys.stderr), end="", file=sys.stderr, flush=True)

    def _write(self, text: str) -> None:
        if self._thoughts and self._show and not self._content:
            print("\n", file=sys.stderr, flush=True)
        self._content.append(text)
        print(_answer(text), end="", flush=True)


def _tell(text: str) -> None:
    print(_faint(text, sys.stderr), file=sys.stderr, flush=True)


def _lines(interactive: bool) -> Iterator[str]:
    """Messages, one a line; empty lines are skipped."""
    if interactive:
        _remember_lines()
        print("/help lists commands; Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            return
        if line.strip():
            yield line


def _remember_lines() -> None:
    """Line editing, and the lines of earlier conversations under the arrow keys, in a file for this user alone."""
    try:
        readline = importlib.import_module("readline")
    except ImportError:  # a Python built without it still chats
        return
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "octavo"
    path = folder / "chat_history"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.read_history_file(path)
        readline.set_history_length(MAX_LINES)
        atexit.register(readline.write_history_file, path)


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
            self._formats = Formats.of(self._llm.renderer.sources, self._llm.architecture)
            self._kept_ids = special_ids(self._llm.tokenizer, self._formats.markers(tools=False))
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
        prepared = self._runner.run(self._llm.prepare_chat(messages, self._params))
        return dataclasses.replace(prepared, kept_ids=self._kept_ids)

    def view(self, prepared: Prepared, *, show_reasoning: bool) -> _View:
        """For an answer to ``prepared``."""
        return _View(self._formats.parser(prepared.prompt or "", {}), show=show_reasoning)

    def show(self, prepared: Prepared, view: _View | None = None) -> RequestOutput:
        """Runs a request and prints its answer as it comes; several answers one after the other."""
        if prepared.params.n == 1:
            output = self._runner.run(self._stream(prepared, view or _View()))
        else:
            output = self._runner.run(self._llm.collect(prepared))
            for one in output.outputs:
                print(_faint(f"[{one.index + 1}]", sys.stdout), end=" ", flush=True)
                (view if view is not None and one.index == 0 else _View()).feed(one.text, final=True)
                print(flush=True)
        print(_faint(speed(output), sys.stderr), file=sys.stderr, flush=True)
        return output

    async def _stream(self, prepared: Prepared, view: _View) -> RequestOutput:
        generation = self._llm.run(prepared)
        try:
            async for deltas in generation:
                view.feed("".join(delta.text for delta in deltas), final=deltas[-1].finish_reason is not None)
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
