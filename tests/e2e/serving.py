"""Starts ``octavo serve`` as its users do and waits until it answers."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.waiting import PATIENCE, children, ended

STUB = (
    "import sys; from octavo import log; from octavo.config import EngineConfig, ServerConfig;"
    "from octavo.server.run import serve; log.configure('info');"
    "model, drain, engines, apis, port = [*sys.argv[1:], *['0.0', '1', '1', '0'][len(sys.argv) - 2:]];"
    "limits = dict(max_num_seqs=8, max_num_batched_tokens=256);"
    "config = EngineConfig.of(model=model, data_parallel_size=int(engines), **limits);"
    "server = ServerConfig(port=int(port), drain_seconds=float(drain), api_server_count=int(apis));"
    "sys.exit(serve(config, server, worker='stub'))"
)  # MODEL [DRAIN_SECONDS [ENGINES [API_PROCESSES [PORT]]]]
START_SECONDS = 2 * PATIENCE

# For `Server(engines=…)`. Without it the stub makes 7,000 steps a second, and a client that has to wait for a processor
# finds all of its requests answered. Ten steps a second are so few that it finds none of the long ones answered.
PACED = """
import os, time
from octavo.runtime.stub import StubWorker
step = StubWorker.step
held = os.path.join(os.path.dirname(__file__), "held")
def paced(self, plan):
    time.sleep(0.1 if os.path.exists(held) else 0.001)
    step(self, plan)
StubWorker.step = paced
"""


class Server:
    """A running server. ``log()`` is what it has said so far.

    ``engines`` is code that the processes of its engines run first.
    """

    def __init__(self, command: list[str], log: Path, *, engines: str = "") -> None:
        self._log = log
        path = os.environ["PYTHONPATH"]
        (folder := log.with_suffix(".engines")).mkdir(exist_ok=True)  # a server may be started again
        self._held = folder / "held"
        if engines:
            first = f"import sys\nif 'octavo.core.process' in sys.orig_argv:\n{textwrap.indent(engines, '    ')}"
            (folder / "sitecustomize.py").write_text(first)
            path = os.pathsep.join((str(folder), path))
        env = {**os.environ, "PYTHONPATH": path}
        with log.open("wb") as sink:
            self.process = subprocess.Popen([sys.executable, *command], stdout=sink, stderr=sink, env=env)
        self.url = self._wait()
        self.core, *_ = self.cores = self.children("octavo.core.process")
        self.apis = self.children("octavo.server.api_process")

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def hold(self) -> None:
        """Engines that are `PACED` make ten steps a second until `release`."""
        self._held.touch()

    def release(self) -> None:
        self._held.unlink()

    def metric(self, name: str) -> float:
        """The sum over all labels."""
        return total(self.get("/metrics").text, name)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=PATIENCE)

    def post(self, path: str, body: object, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=PATIENCE, **options)

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code of a server that is to end within ``seconds``, its children with it."""
        children = self.children("")
        code = self.process.wait(seconds)
        assert all(ended(child) for child in [*self.cores, *self.apis, *children])
        return code

    def _wait(self) -> str:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            found = re.search(r"at (http://\S+)/v1", self.log())
            if found:
                return found[1]
            assert self.process.poll() is None, self.log()
            time.sleep(0.02)
        raise TimeoutError(self.log())

    def children(self, module: str) -> list[psutil.Process]:
        """Those children that run ``module``, in the order of their start; none once the server has ended."""
        try:
            return children(psutil.Process(self.process.pid), module)
        except psutil.NoSuchProcess:
            return []


def total(metrics: str, name: str) -> float:
    """The sum of one of ``metrics`` over all labels."""
    return sum(map(float, re.findall(rf"^vllm:{name}{{.*}} (.*)$", metrics, re.MULTILINE)))


@contextlib.contextmanager
def running(command: list[str], log: Path, *, engines: str = "") -> Iterator[Server]:
    server = Server(command, log, engines=engines)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        for child in [*server.cores, *server.apis]:
            ended(child)
