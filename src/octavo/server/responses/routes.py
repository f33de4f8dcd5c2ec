"""``/v1/responses``: make one, also in the background; look at it, cancel it, delete it."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response as HttpResponse
from starlette.types import ASGIApp

from octavo.errors import OctavoError, RequestError
from octavo.server import errors
from octavo.server.answers import Page, json_response
from octavo.server.endpoint import Job, Origin
from octavo.server.responses.answer import ENDPOINT, blank, given_items
from octavo.server.responses.body import Deleted, Response, ResponsesRequest
from octavo.server.service import Service


async def create(service: Service, request: Request) -> ASGIApp:
    """Answers items of input with items of output, on top of an earlier response if one is named."""
    job = await ENDPOINT.open(service, await request.body(), Origin.of(request))
    if not job.body.background:
        return await ENDPOINT.respond(job, request)
    response = blank(job)
    response.status = "queued"
    _put(job, response)
    service.background[job.id] = task = asyncio.create_task(_run(job))
    task.add_done_callback(lambda _: service.background.pop(job.id, None))
    await asyncio.sleep(0)  # a task that is cancelled before it has begun could not say so
    return json_response(response)


async def retrieve(service: Service, request: Request) -> HttpResponse:
    """A stored response."""
    if request.query_params.get("stream", "false") == "true":
        raise RequestError("a stored response is not streamed.", "Leave stream out.", param="stream")
    stored = service.responses.get(request.scope["owner"], request.path_params["id"])
    return HttpResponse(stored.response, media_type="application/json")


async def input_items(service: Service, request: Request) -> HttpResponse:
    """The input of a stored response, the last item first, as the client expects it."""
    stored = service.responses.get(request.scope["owner"], request.path_params["id"])
    data = msgspec.json.decode(stored.given)[::-1]
    ids = [item["id"] for item in data]
    return json_response(Page(data=data, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None))


async def delete(service: Service, request: Request) -> HttpResponse:
    """Forgets a stored response, and stops it if it is in progress."""
    id = request.path_params["id"]
    service.responses.get(request.scope["owner"], id)
    await _stop(service, id)
    service.responses.delete(request.scope["owner"], id)
    return json_response(Deleted(id))


async def cancel(service: Service, request: Request) -> HttpResponse:
    """Stops a response that is made in the background; one that has ended stays as it is."""
    owner, id = request.scope["owner"], request.path_params["id"]
    if not service.responses.get(owner, id).background:
        raise RequestError("the response was not made in the background.", "Close its connection.", param="id")
    await _stop(service, id)
    return HttpResponse(service.responses.get(owner, id).response, media_type="application/json")


async def _run(job: Job[ResponsesRequest]) -> None:
    """A response in the background; its last state is in the store, whatever happens."""
    response = blank(job)
    _put(job, response)
    try:
        await ENDPOINT.whole(job)
        return
    except asyncio.CancelledError:
        response.status = "cancelled"
    except OctavoError as error:
        response.fail(error)
    except Exception:
        response.fail(errors.unexpected(job.origin.id))
    _put(job, response)


async def _stop(service: Service, id: str) -> None:
    task = service.background.get(id)
    if task is not None:
        task.cancel()
        await asyncio.wait((task,))


def _put(job: Job[ResponsesRequest], response: Response) -> None:
    job.service.responses.put(job.origin.owner, response, [], given_items(job))
