"""Everything but generation: models, health, version, metrics, tokens, the prefix cache."""

from __future__ import annotations

import asyncio

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

import octavo
from octavo.errors import EngineDead, Overloaded, RequestError
from octavo.server import errors
from octavo.server.answers import (
    Detokenized,
    Load,
    ModelCard,
    ModelList,
    Success,
    Tokenized,
    Version,
    json_response,
    now,
)
from octavo.server.decoding import decode
from octavo.server.metrics import bandwidth_here
from octavo.server.protocol import DetokenizeRequest, TokenizeRequest
from octavo.server.service import Service

_STARTED = now()


async def health(service: Service, request: Request) -> Response:
    """200 once the engine's loop has answered; 503 if it does not, or if the server is shutting down.

    With several engines one answer is enough; the body says ``degraded`` while one of them does not run, and why.
    """
    if service.closing:
        return Response(status_code=503)
    try:
        await service.llm.health()
    except EngineDead as error:
        return json_response(errors.body_of(error), 503)
    engines = service.llm.client.engines()
    if len(engines) == 1:
        return Response()
    status = "ok" if all(engine.running for engine in engines) else "degraded"
    listed = [{"engine": i, "running": one.running, "reason": one.reason} for i, one in enumerate(engines)]
    return json_response({"status": status, "engines": listed})


async def ready(service: Service, request: Request) -> Response:
    """200 if a request would be taken now; 503 if no engine answers, every queue is full, or all ends."""
    if service.closing:
        raise errors.shutting_down()
    try:
        await service.llm.health()
    except EngineDead as error:
        raise Overloaded(error.cause, error.remedy) from None
    waiting = min((one.stats.waiting for one in service.llm.client.engines() if one.running), default=0)
    if service.max_waiting is not None and waiting >= service.max_waiting:
        raise Overloaded(f"{waiting} requests are waiting, the limit.")
    return Response()


async def load(service: Service, request: Request) -> Response:
    """How much there is to do, from a turn of the engine's loop."""
    stats = await service.llm.health()
    made = Load(
        server_load=service.active, running=stats.running, waiting=stats.waiting, kv_cache_usage=stats.kv_cache_usage
    )
    return json_response(made)


async def ping(service: Service, request: Request) -> Response:
    """200: this process answers."""
    return Response()


async def version(service: Service, request: Request) -> Response:
    """The version of octavo."""
    return json_response(Version(octavo.__version__))


async def models(service: Service, request: Request) -> Response:
    """Every name that the model is shown under."""
    return json_response(ModelList(data=[_card(service, name) for name in service.shown]))


async def model(service: Service, request: Request) -> Response:
    """One of them."""
    return json_response(_card(service, service.model(request.path_params["name"])))


async def metrics(service: Service, request: Request) -> Response:
    """For Prometheus; the latest statistics if the engine does not answer in time."""
    await service.refresh_stats()
    info = service.llm.info
    bandwidth = info.bandwidth or (await asyncio.to_thread(bandwidth_here) if info.device == "cpu" else 0.0)
    text = service.metrics.text(service.llm.client.engines(), info, bandwidth)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


async def reset_prefix_cache(service: Service, request: Request) -> Response:
    """Forgets every cached prefix."""
    return json_response(Success(await service.llm.reset_prefix_cache()))


async def tokenize(service: Service, request: Request) -> Response:
    """Token ids of a ``prompt``, or of ``messages`` after the chat template."""
    body = decode(await request.body(), TokenizeRequest)
    service.model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("one of prompt and messages must be given.", "Send one of them.", param="prompt")
    llm = service.llm
    if body.messages is None:
        special = body.add_special_tokens if body.add_special_tokens is not None else True
        ids = await asyncio.to_thread(llm.inputs.encode, body.prompt or "", add_special_tokens=special)
    else:
        text = await asyncio.to_thread(
            llm.renderer.render,
            body.messages,
            add_generation_prompt=body.add_generation_prompt is not False and not body.continue_final_message,
            continue_final_message=bool(body.continue_final_message),
            tools=body.tools or None,
            template_kwargs=body.chat_template_kwargs,
        )
        ids = await asyncio.to_thread(llm.inputs.encode, text, add_special_tokens=bool(body.add_special_tokens))
    names = [llm.tokenizer.id_to_token(id) for id in ids] if body.return_token_strs and llm.tokenizer else None
    return json_response(Tokenized(count=len(ids), max_model_len=llm.info.max_model_len, tokens=ids, token_strs=names))


async def detokenize(service: Service, request: Request) -> Response:
    """The text of token ids, special tokens included."""
    body = decode(await request.body(), DetokenizeRequest)
    service.model(body.model)
    tokenizer, size = service.llm.tokenizer, service.llm.info.vocab_size
    if tokenizer is None:
        raise RequestError("the server runs without a tokenizer.", "Start it without --skip-tokenizer-init.")
    for token in body.tokens:
        if not 0 <= token < size:
            raise RequestError(f"tokens holds {token}, outside [0, {size - 1}].", "Remove it.", param="tokens")
    text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
    return json_response(Detokenized(text))


def _card(service: Service, name: str) -> ModelCard:
    return ModelCard(id=name, created=_STARTED, max_model_len=service.llm.info.max_model_len)
