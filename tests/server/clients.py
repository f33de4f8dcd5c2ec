"""The real clients of OpenAI and Anthropic, over an application in this process, and a model that says one text."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai

from octavo.types import Request, TokenOutput
from tests.frontend.fakes import prompt_of
from tests.server.fake import Server, speak

# httpx, or httpx2 in later versions of the client, which then takes no client of httpx.
_ANTHROPIC_HTTP: Any = importlib.import_module(
    anthropic.DefaultAsyncHttpxClient.__mro__[1].__module__.partition(".")[0]
)


class Said:
    """A server whose model says ``text`` and then ends (``finish="stop"``), and clients of it without retries."""

    def __init__(self, text: str, *, finish: str = "stop", key: str = "none", **options: Any) -> None:
        self.server = Server(**{"max_model_len": 4096, **options})
        tokens = self.server.tokenizer.encode(text)
        if finish == "stop":
            tokens = [*tokens, self.server.tokenizer.eos_id or 0]
        self.server.fake.script = speak(tokens, finish=finish)
        http = httpx.AsyncClient(transport=httpx.ASGITransport(self.server.app), base_url="http://test")
        self.openai = openai.AsyncOpenAI(api_key=key, base_url="http://test/v1", http_client=http, max_retries=0)
        own = _ANTHROPIC_HTTP.AsyncClient(transport=_ANTHROPIC_HTTP.ASGITransport(self.server.app))
        self.anthropic = anthropic.AsyncAnthropic(api_key=key, base_url="http://test", http_client=own, max_retries=0)

    def breaks(self) -> None:
        """From now on the engine dies after the first token of an answer."""
        script = self.server.fake.script

        def broken(request: Request) -> Iterator[TokenOutput]:
            outputs = iter(script(request))
            yield next(outputs)
            self.server.die()
            yield next(outputs)

        self.server.fake.script = broken

    def prompt(self) -> str:
        """What the model saw last."""
        ids = prompt_of(self.server.fake.requests[-1])
        return self.server.tokenizer.decode(ids, skip_special_tokens=False)
