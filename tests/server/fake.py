"""The whole application over a fake engine: HTTP in, HTTP out, no process and no model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import httpx

from octavo.async_llm import AsyncLLM
from octavo.errors import EngineDead
from octavo.frontend.inputs import pack
from octavo.frontend.loading import TextModel
from octavo.hub.pooling import Pooler
from octavo.server.app import build_app
from octavo.server.keys import Keys
from octavo.server.service import Service
from octavo.types import Request, TokenLogprobs, TokenOutput
from tests.frontend.fakes import FakeClient, byte_level, info, prompt_of
from tests.waiting import PATIENCE

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
)
SPOKEN = "hello world, this is a longer text"
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hello", "max_tokens": 5}


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs ``work`` in an event loop of its own, and not without end."""
    asyncio.run(asyncio.wait_for(work(), PATIENCE))


async def until(condition: Callable[[], bool]) -> None:
    """Lets the others in the event loop go on until ``condition`` holds, which the time limit of `run` bounds."""
    while not condition():  # noqa: ASYNC110 (what is waited for knows of no event)
        await asyncio.sleep(0.001)


def events(text: str) -> list[dict[str, Any]]:
    """The JSON of a stream's events; checks its frame and its end."""
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def speak(tokens: Sequence[int], *, ends: bool = True, finish: str = "length") -> Any:
    """A script for `FakeClient`: one of ``tokens`` a step, up to the request's max_tokens."""

    def script(request: Request) -> list[TokenOutput]:
        count = min(len(tokens), request.sampling.max_tokens)
        top = request.sampling.logprobs
        prompt = request.sampling.prompt_logprobs
        outputs = []
        for i in range(count):
            last = ends and i == count - 1
            outputs.append(
                TokenOutput(
                    id=request.id,
                    token_ids=[tokens[i]],
                    logprobs=[] if top is None else [scores(tokens[i], top)],
                    prompt_logprobs=[] if prompt is None or i else prompt_scores(request, prompt),
                    finish_reason=finish if last else None,
                    cached=4 if i == 0 else 0,
                    queued=0.25 if i == 0 else 0.0,
                )
            )
        return outputs

    return script


POOLER = Pooler("last", normalize=True, size=4, nested=True, dimensions=None, reason="")


def embed(request: Request) -> list[TokenOutput]:
    """A script for the `FakeClient` of a server with `POOLER`: numbers that depend on the prompt."""
    ids, pooling = prompt_of(request), request.sampling.pooling
    assert pooling is not None
    numbers = [float(len(ids)), float(sum(ids)), 0.1, 2.0 if pooling.normalize else 3.0][: pooling.dimensions]
    return [TokenOutput(id=request.id, embedding=pack(numbers, "f"), finish_reason="stop", queued=0.25)]


def prompt_scores(request: Request, top: int) -> list[TokenLogprobs]:
    """One for each token of the prompt but the first."""
    return [scores(token, top) for token in prompt_of(request)[1:]]


def scores(token: int, top: int) -> TokenLogprobs:
    """Rank 1 for ``token``; the next best are the ids below it."""
    ids = [token - i for i in range(top)]
    return TokenLogprobs(token, -0.5, 1, ids, [-0.5 - i for i in range(top)])


class Server:
    """An application and a client for it; ``fake`` is the engine behind."""

    def __init__(
        self,
        script: Any = None,
        *,
        names: tuple[str, ...] = ("m", "alias"),
        template: str = TEMPLATE,
        max_model_len: int = 128,
        special: tuple[str, ...] = (),
        pooler: Pooler | None = None,
        **options: Any,
    ) -> None:
        self.tokenizer = byte_level(chat_template=template)
        self.tokenizer.lib.add_special_tokens(list(special))
        self.tokenizer.special_ids |= {self.tokenizer.lib.token_to_id(token) for token in special}
        self.fake = FakeClient(script or speak(self.tokenizer.encode(SPOKEN)), info(max_model_len=max_model_len))
        self.llm = AsyncLLM(self.fake, TextModel(self.tokenizer, pooler=pooler))
        self.service = Service(self.llm, names)
        keys = Keys.of(options.pop("api_key", None), options.pop("admin_api_key", None))
        self.app = build_app(self.service, keys=keys, **options)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")

    async def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        return await self.http.post(path, json=body, **kwargs)

    def die(self) -> None:
        self.fake.dead = EngineDead("the engine process was killed by signal 9.", "Restart it.")
