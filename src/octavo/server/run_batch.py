"""``octavo run-batch``: answers the lines of a batch file without a server, and shows how far it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import uvloop
from tqdm import tqdm

from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.server.app import ROUTES
from octavo.server.batches.lines import BadLine, Line, LineAnswer, read_lines, work
from octavo.server.route import endpoints_of
from octavo.server.service import Service, served_names


def run_batch(config: EngineConfig, source: Path, target: Path, *, name: str | None = None, log_level: str) -> int:
    """Answers every line of ``source`` into ``target``, in the order in which they are done; 1 if one failed.

    The format of both is OpenAI's; ``name`` is what lines may call the model besides its own name. Raises
    `ConfigError`, before anything is loaded, for a file that cannot be read or written and for a line that is no
    request.
    """
    batch = _Batch(source)
    try:
        with target.open("wb") as sink:
            return uvloop.run(batch.run(config, sink.write, name, log_level))
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}.", "Give another -o.") from None


class _Batch:
    def __init__(self, source: Path) -> None:
        self._endpoints = endpoints_of(ROUTES)
        self._source = source
        self._failed = 0
        self._total = sum(1 for _ in self._lines())

    def _lines(self) -> Iterator[Line]:
        try:
            with self._source.open("rb") as source:
                for _, line in read_lines(source, self._endpoints):
                    yield line
        except OSError as error:
            raise ConfigError(f"cannot read {self._source}: {error.strerror}.", "Give another -i.") from None
        except BadLine as bad:
            raise ConfigError(f"{self._source}, line {bad.number}: {bad.error.cause}", bad.error.remedy) from None

    async def run(
        self, config: EngineConfig, write: Callable[[bytes], object], name: str | None, log_level: str
    ) -> int:
        async with await AsyncLLM.start(config, log_level=log_level) as llm:
            service = Service(llm, served_names(config.model, name))
            service.routes = ROUTES
            with tqdm(total=self._total, unit="request", file=sys.stderr, dynamic_ncols=True) as bar:

                def done(answer: LineAnswer) -> None:
                    self._failed += not answer.good
                    write(msgspec.json.encode(answer) + b"\n")
                    bar.set_postfix_str(f"{self._failed} failed" if self._failed else "", refresh=False)
                    bar.update()

                try:
                    await work(service, self._lines(), done)
                except* OSError as group:  # the disk is full
                    raise group.exceptions[0] from None
        good = self._total - self._failed
        print(f"{good} requests answered, {self._failed} failed", file=sys.stderr)
        return 1 if self._failed else 0
