"""Files and batches through the real client of OpenAI, and what keeps them within their limits."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from octavo.errors import RequestError
from octavo.server.batches import lines, routes
from octavo.server.batches import store as batch_store
from octavo.server.batches.store import BatchStore
from octavo.server.errors import ApiError
from octavo.server.files.multipart import parse
from octavo.server.files.store import FileStore
from octavo.types import Request, TokenOutput
from tests.server.clients import Said
from tests.server.fake import run, until
from tests.waiting import PATIENCE

FIELD = b"\r\n--x\r\ncontent-disposition: form-data; name=a\r\n\r\n1"
CHAT = "/v1/chat/completions"


def line(id: str, url: str = CHAT, **body: Any) -> bytes:
    given = {"model": "m", "messages": [{"role": "user", "content": id}]} | body
    return json.dumps({"custom_id": id, "method": "POST", "url": url, "body": given}).encode() + b"\n"


class Batches:
    """A server with files in ``folder``, whose model says hello."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.said = Said("hello")
        self.client = self.said.openai
        self.service = self.said.server.service
        self.service.files = FileStore(folder / "files", **limits)

    async def start(self, content: bytes, endpoint: Any = CHAT) -> Any:
        file = await self.client.files.create(file=("in.jsonl", content), purpose="batch")
        return await self.client.batches.create(
            input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"k": "v"}
        )

    async def end(self, batch: Any) -> Any:
        await asyncio.gather(*self.service.batches.values())
        return await self.client.batches.retrieve(batch.id)

    async def lines(self, file_id: str) -> dict[str, Any]:
        text = (await self.client.files.content(file_id)).text
        return {one["custom_id"]: one for one in map(json.loads, text.splitlines())}


def test_a_batch_answers_every_line_at_the_lowest_priority(tmp_path: Path) -> None:
    async def work() -> None:
        setup = Batches(tmp_path)
        many = [line(f"r{i}", priority=2**31 - 1) for i in range(40)]
        batch = await setup.start(b"\n".join([*many, line("bad", temperature=-1), line("no", model="gpt")]))
        assert (batch.status, batch.metadata) == ("validating", {"k": "v"})
        batch = await setup.end(batch)
        assert batch.status == "completed"
        assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (42, 40, 2)
        good, bad = await setup.lines(batch.output_file_id), await setup.lines(batch.error_file_id)
        assert good.keys() == {f"r{i}" for i in range(40)}
        body = good["r7"]["response"]["body"]
        assert good["r7"]["response"]["status_code"] == 200
        assert body["choices"][0]["message"]["content"] == "hello"
        assert {id: one["response"]["status_code"] for id, one in bad.items()} == {"bad": 400, "no": 404}
        assert "temperature" in bad["bad"]["response"]["body"]["error"]["message"]
        await setup.client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], extra_body={"priority": 2**31 - 1}
        )
        *batched, online = setup.said.server.fake.requests
        assert min(request.priority for request in batched) > online.priority

    run(work)


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        ("/v1/completions", {"prompt": "x", "max_tokens": 2}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}),
    ],
)
def test_every_endpoint_that_generates_can_be_asked_in_batches(tmp_path: Path, endpoint: str, body: Any) -> None:
    async def work() -> None:
        setup = Batches(tmp_path)
        text = json.dumps({"custom_id": "a", "method": "POST", "url": endpoint, "body": body}).encode()
        batch = await setup.end(await setup.start(text, endpoint))
        assert batch.request_counts.completed == 1
        answer = (await setup.lines(batch.output_file_id))["a"]["response"]["body"]
        assert "hello" in json.dumps(answer)
        assert len(setup.service.responses) == 0

    run(work)


@pytest.mark.parametrize(
    ("content", "number", "message"),
    [
        (line("a") + b"{", 2, "no request"),
        (line("a") + b"\n" + line("a"), 3, "twice"),
        (line("a", url="/v1/embeddings"), 1, "url"),
        (line("a") + line("b", url="/v1/completions"), 2, "Split"),
        (b"\n\n", 1, "no lines"),
        (b'{"custom_id": "", "url": "/v1/completions", "body": {}}', 1, "custom_id"),
        (b'{"custom_id": "a", "method": "GET", "url": "/v1/completions", "body": {}}', 1, "POST"),
        (b"\xff\xfe", 1, "no request"),
    ],
)
def test_a_file_with_a_wrong_line_fails_the_batch_before_any_work(
    tmp_path: Path, content: bytes, number: int, message: str
) -> None:
    async def work() -> None:
        setup = Batches(tmp_path)
        batch = await setup.end(await setup.start(content))
        assert batch.status == "failed"
        (error,) = batch.errors.data
        assert error.line == number
        assert message in error.message
        assert not setup.said.server.fake.requests

    run(work)


def test_a_batch_is_cancelled_and_keeps_what_was_done(tmp_path: Path) -> None:
    async def work() -> None:
        setup = Batches(tmp_path)
        script = setup.said.server.fake.script
        setup.said.server.fake.script = lambda request: script(request) if len(request.token_ids) < 150 else []
        batch = await setup.start(line("short") + line("long" + "x" * 60))
        while not setup.said.server.fake.requests or batch.status != "in_progress":
            await asyncio.sleep(0.01)
            batch = await setup.client.batches.retrieve(batch.id)
        assert (await setup.client.batches.cancel(batch.id)).status == "cancelling"
        batch = await setup.end(batch)
        assert batch.status == "cancelled"
        assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 0)
        assert (await setup.lines(batch.output_file_id)).keys() == {"short"}
        assert len(setup.said.server.fake.aborted) == 1
        assert (await setup.client.batches.cancel(batch.id)).status == "cancelled"

    run(work)


def test_a_batch_ends_when_the_server_does(tmp_path: Path) -> None:
    async def work() -> None:
        setup = Batches(tmp_path)
        setup.said.server.fake.script = lambda request: []
        batch = await setup.start(line("a"))
        await until(lambda: setup.said.server.fake.requests != [])
        assert await setup.service.drained(PATIENCE)
        await asyncio.gather(*setup.service.batches.values())
        found = BatchStore(tmp_path / "files").get(b"", batch.id)
        assert (found.status, found.request_counts.failed) == ("failed", 0)

    run(work)


def test_a_batch_whose_server_was_killed_is_told_as_failed(tmp_path: Path) -> None:
    async def work() -> None:
        setup = Batches(tmp_path)
        setup.said.server.fake.script = lambda request: []
        batch = await setup.start(line("a"))
        await until(lambda: setup.said.server.fake.requests != [])
        (task,) = setup.service.batches.values()
        task.cancel()
        await asyncio.wait((task,))
        path = tmp_path / "files" / f"{batch.id}.json"
        path.write_text(path.read_text().replace('"status":"failed"', '"status":"in_progress"'))
        assert (await setup.client.batches.retrieve(batch.id)).status == "in_progress"
        os.utime(path, (0, time.time() - batch_store.STALE_SECONDS - 1))
        assert (await setup.client.batches.retrieve(batch.id)).status == "failed"

    run(work)


def test_streams_and_background_work_have_no_place_in_a_batch(tmp_path: Path) -> None:
    async def work() -> None:
        setup = Batches(tmp_path)
        batch = await setup.end(await setup.start(line("a", stream=True)))
        assert (await setup.lines(batch.error_file_id))["a"]["response"]["status_code"] == 400

    run(work)


def test_a_line_is_tried_again_while_the_engine_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "RETRY_SECONDS", 0.0)

    async def work() -> None:
        setup = Batches(tmp_path)
        script, refusals = setup.said.server.fake.script, iter(range(5))

        def full_at_first(request: Request) -> list[TokenOutput]:
            if next(refusals, None) is not None:
                return [TokenOutput(id=request.id, finish_reason="error", error="full.", status=503)]
            return list(script(request))

        setup.said.server.fake.script = full_at_first
        batch = await setup.end(await setup.start(line("a") + line("b")))
        assert (batch.status, batch.request_counts.completed, batch.request_counts.failed) == ("completed", 2, 0)
        assert len(setup.said.server.fake.requests) == 5 + 2

    run(work)


def test_a_batch_that_takes_too_long_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "WINDOW_SECONDS", -1)

    async def work() -> None:
        setup = Batches(tmp_path)
        setup.said.server.fake.script = lambda request: []
        batch = await setup.end(await setup.start(line("a")))
        assert batch.status == "expired"
        assert batch.expired_at is not None
        assert len(setup.said.server.fake.aborted) == 1

    run(work)


def test_a_batch_without_room_for_its_answers_fails(tmp_path: Path) -> None:
    async def work() -> None:
        setup = Batches(tmp_path, max_bytes=3000)
        batch = await setup.end(await setup.start(b"".join(line(str(i)) for i in range(18))))
        assert batch.status == "failed"
        assert "left for files" in batch.errors.data[0].message
        assert batch.request_counts.completed < 18

    run(work)


def test_batches_and_files_are_listed_page_by_page(tmp_path: Path) -> None:
    async def work() -> None:
        setup = Batches(tmp_path)
        made = {(await setup.start(line("a"))).id for _ in range(5)}
        await asyncio.gather(*setup.service.batches.values())
        assert {batch.id async for batch in setup.client.batches.list(limit=2)} == made
        files = [file async for file in setup.client.files.list(limit=3)]
        assert len(files) == len({file.id for file in files}) == 10
        assert len([file async for file in setup.client.files.list(purpose="batch")]) == 5
        with pytest.raises(openai.BadRequestError, match="limit"):
            await setup.client.batches.list(limit=1000)
        with pytest.raises(openai.BadRequestError, match="after"):
            await setup.client.batches.list(after="batch_of_nobody")

    run(work)


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_is_kept_as_it_came_until_it_is_deleted(tmp_path: Path) -> None:
    async def work() -> None:
        setup = Batches(tmp_path)
        content = bytes(range(256)) * 5000 + b"\r\n--x\r\n"
        file = await setup.client.files.create(file=('a "name".jsonl', content), purpose="batch")
        assert (file.bytes, file.purpose) == (len(content), "batch")
        assert (await setup.client.files.retrieve(file.id)).filename == file.filename
        assert (await setup.client.files.content(file.id)).read() == content
        await setup.client.files.delete(file.id)
        with pytest.raises(openai.NotFoundError):
            await setup.client.files.content(file.id)
        assert not list((tmp_path / "files").iterdir())
        assert (tmp_path / "files").stat().st_mode & 0o777 == 0o700

    run(work)


def test_files_are_bounded_in_count_and_bytes(tmp_path: Path) -> None:
    async def work() -> None:
        setup = Batches(tmp_path, max_count=2, max_bytes=10_000)
        with pytest.raises(openai.APIStatusError, match="left for files"):
            await setup.client.files.create(file=b"x" * 20_000, purpose="batch")
        assert not list((tmp_path / "files").iterdir())
        for _ in range(2):
            await setup.client.files.create(file=b"x" * 100, purpose="batch")
        with pytest.raises(openai.APIStatusError, match="limit"):
            await setup.client.files.create(file=b"x", purpose="batch")

    run(work)


@pytest.mark.parametrize("id", ["file-x", "..%2f..%2fetc%2fpasswd", "file-" + "0" * 32, "batch_" + "0" * 32])
def test_an_id_that_is_none_leads_nowhere(tmp_path: Path, id: str) -> None:
    async def work() -> None:
        setup = Batches(tmp_path)
        for path in ("/v1/files/", "/v1/batches/"):
            assert (await setup.said.server.http.get(path + id)).status_code == 404

    run(work)


def test_other_keys_see_neither_files_nor_batches(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    file = store.add(b"mine", "a", "batch", b"x")
    assert store.get(b"mine", file.id) == file
    assert store.all(b"yours") == []
    for use in (store.get, store.path, store.delete):
        with pytest.raises(ApiError):
            use(b"yours", file.id)


def test_a_file_of_another_purpose_or_form_is_refused(tmp_path: Path) -> None:
    async def work() -> None:
        setup = Batches(tmp_path)
        with pytest.raises(openai.BadRequestError, match="purpose"):
            await setup.client.files.create(file=b"x", purpose="vision")
        with pytest.raises(openai.BadRequestError, match="not a field"):
            await setup.client.files.create(file=b"x", purpose="batch", extra_body={"colour": "red"})
        assert (await setup.said.server.post("/v1/files", {"file": "x"})).status_code == 400

    run(work)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text/plain", b""),
        ("multipart/form-data", b"--x--"),
        ("multipart/form-data; boundary=" + "x" * 71, b""),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"--x\r\ncontent-disposition: form-data; name=a\r\n\r\n1"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\n1\r\n--x--"),
        ("multipart/form-data; boundary=x", FIELD * 2 + b"\r\n--x--"),
        ("multipart/form-data; boundary=x", FIELD * 20 + b"\r\n--x--"),
    ],
)
def test_a_form_that_is_none_is_refused(kind: str, body: bytes) -> None:
    with pytest.raises(RequestError):
        parse(kind, body)


def test_a_form_has_its_fields() -> None:
    body = (
        b'preamble\r\n--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n2\r\n--x\r\nX-Other: y\r\n'
        b'content-disposition: form-data; name="f"; filename="q\\"r.txt"\r\n\r\n\r\n--x--\r\nafter'
    )
    fields = parse('multipart/form-data; boundary="x"', body)
    assert {name: (field.filename, field.data) for name, field in fields.items()} == {
        "a": (None, b"1\r\n2"),
        "f": ('q"r.txt', b""),
    }
