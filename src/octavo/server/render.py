"""``POST /render``: what a request to another endpoint becomes, without running it."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from octavo.errors import RequestError
from octavo.sampling_params import SamplingParams
from octavo.server.answers import json_response
from octavo.server.decoding import decode
from octavo.server.endpoint import Origin
from octavo.server.protocol import Sampled
from octavo.server.service import Service


class RenderRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``body`` is what would be sent to ``endpoint``, a path such as ``/v1/chat/completions``."""

    endpoint: str = "/v1/chat/completions"
    body: msgspec.Raw


class RenderedPrompt(msgspec.Struct, kw_only=True):
    """``text`` is null for a prompt that came as token ids."""

    text: str | None
    token_ids: list[int]


class Rendered(msgspec.Struct, kw_only=True):
    """An answer to ``/render``. ``max_tokens`` are those that the first prompt leaves room for.

    ``sampling`` has what differs from the defaults: temperature 1, top_p 1, and so on.
    """

    model: str
    prompts: list[RenderedPrompt]
    max_tokens: int
    sampling: SamplingParams


async def render(service: Service, request: Request) -> Response:
    """The exact prompts, as text and as token ids, and how they would be sampled."""
    body = decode(await request.body(), RenderRequest)
    generating = {path: one for path, one in service.endpoints.items() if issubclass(one.body, Sampled)}
    endpoint = generating.get(body.endpoint)
    if endpoint is None:
        known = ", ".join(generating)
        raise RequestError(f"endpoint is {body.endpoint[:100]!r}.", f"Give one of {known}.", param="endpoint")
    job = await endpoint.open(service, bytes(body.body), Origin.of(request))
    made = Rendered(
        model=job.model,
        prompts=[RenderedPrompt(text=one.prompt, token_ids=one.prompt_token_ids) for one in job.prepared],
        max_tokens=job.prepared[0].requests[0].sampling.max_tokens,
        sampling=job.prepared[0].params,
    )
    return json_response(made)
