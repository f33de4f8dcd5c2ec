"""The work on a batch: checks every line, then answers them, after whatever else the engine has to do."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Coroutine, Iterator
from pathlib import Path

import msgspec

from octavo.errors import OctavoError, Overloaded, RequestError
from octavo.log import get_logger
from octavo.server.answers import now
from octavo.server.batches.lines import BadLine, Line, LineAnswer, read_lines, work
from octavo.server.batches.store import Batch, BatchStore
from octavo.server.files.store import FileStore, Writer
from octavo.server.service import Service

MAX_LINES = 50_000
SAVE_SECONDS = 0.5  # between two looks at whether it should end; its state is written too
DELAY = 2**32  # beyond every priority that a request can have: lower ones run first


class BatchRun:
    """One batch under way. `run` ends it in one of the states of `store.ENDED`, whatever happens."""

    def __init__(self, service: Service, files: FileStore, batches: BatchStore, owner: bytes, batch: Batch) -> None:
        self._service, self._files, self._batches = service, files, batches
        self._owner, self._batch = owner, batch
        self._source: Path | None = None
        self._error: OctavoError | None = None

    async def run(self) -> None:
        """See the class."""
        batch = self._batch
        try:
            self._source = await asyncio.to_thread(self._files.path, self._owner, batch.input_file_id)
            await asyncio.to_thread(self._check)
            if batch.status == "validating":
                batch.become("in_progress")
                self._save()
                await self._answer()
        except OctavoError as error:
            batch.fail(str(error))
        except asyncio.CancelledError:
            batch.fail("the server was stopped.")
        except Exception:
            get_logger().exception("batch %s failed", batch.id)
            batch.fail("the server failed on this batch; its log says why.")
        self._save()

    def _check(self) -> None:
        """In a thread. Fails the batch for the first line that is no request to its endpoint, as OpenAI does."""
        seen: set[str] = set()
        try:
            for number, line in self._lines():
                self._accept(number, line, seen)
            if not seen:
                raise BadLine(1, RequestError("the file has no lines."))
        except BadLine as bad:
            self._batch.fail(str(bad.error), line=bad.number, param=bad.error.param)
        self._batch.request_counts.total = len(seen)

    def _accept(self, number: int, line: Line, seen: set[str]) -> None:
        if line.url != self._batch.endpoint:
            cause = f"url is {line.url[:100]!r}, but the batch is for {self._batch.endpoint}."
            raise BadLine(number, RequestError(cause, "Split the file.", param="url"))
        if line.custom_id in seen:
            cause = f"custom_id {line.custom_id[:100]!r} occurs twice."
            raise BadLine(number, RequestError(cause, param="custom_id"))
        if len(seen) == MAX_LINES:
            raise BadLine(number, RequestError(f"there are more than {MAX_LINES} lines.", "Split the file."))
        seen.add(line.custom_id)

    def _lines(self) -> Iterator[tuple[int, Line]]:
        assert self._source is not None
        with self._source.open("rb") as source:
            yield from read_lines(source, self._service.endpoints)

    async def _answer(self) -> None:
        batch, name = self._batch, self._batch.id
        with contextlib.ExitStack() as stack:
            good = stack.enter_context(self._files.write(self._owner, f"{name}_output.jsonl", "batch_output"))
            bad = stack.enter_context(self._files.write(self._owner, f"{name}_error.jsonl", "batch_output"))
            lines = (line for _, line in self._lines())
            done = functools.partial(self._done, good, bad)
            await self._watched(work(self._service, lines, done, owner=self._owner, delay=DELAY))
            batch.become("cancelling" if self._batches.cancelled(batch.id) else "finalizing")
        batch.output_file_id = self._keep(good)
        batch.error_file_id = self._keep(bad)
        self._end()

    async def _watched(self, work: Coroutine[None, None, None]) -> None:
        """Runs ``work``, which ends early when there is a reason for that; its requests are aborted then."""
        working = asyncio.create_task(work)
        try:
            while not working.done():
                await asyncio.wait((working,), timeout=SAVE_SECONDS)
                self._save()
                if self._stopped():
                    working.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                working.result()
        finally:
            working.cancel()

    def _end(self) -> None:
        batch, counts = self._batch, self._batch.request_counts
        if self._error is not None:
            batch.fail(str(self._error))
        elif counts.completed + counts.failed == counts.total:
            batch.become("completed")
        elif self._batches.cancelled(batch.id):
            batch.become("cancelled")
        elif self._service.closing:
            batch.fail("the server was stopped.")
        else:
            batch.become("expired")

    def _keep(self, writer: Writer) -> str | None:
        """The id of a file that has something in it; an empty one is deleted."""
        if writer.file.bytes:
            return writer.file.id
        self._files.delete(self._owner, writer.file.id)
        return None

    def _done(self, good: Writer, bad: Writer, answer: LineAnswer) -> None:
        if self._service.closing and answer.response.status_code == Overloaded.status:
            return  # refused because the server ends: this line was not worked on
        counts = self._batch.request_counts
        try:
            (good if answer.good else bad).write(msgspec.json.encode(answer) + b"\n")
        except OctavoError as error:
            self._error = error
            return
        if answer.good:
            counts.completed += 1
        else:
            counts.failed += 1

    def _stopped(self) -> bool:
        ended = self._error is not None or self._service.closing or now() > self._batch.expires_at
        return ended or self._batches.cancelled(self._batch.id)

    def _save(self) -> None:
        self._batches.save(self._owner, self._batch)
