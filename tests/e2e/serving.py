"""Starts ``octavo serve`` as its users do and waits until it answers."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

STUB = (
    "import sys; from octavo import log; from octavo.config import EngineConfig, ServerConfig;"
    "from octavo.server.run import serve; log.configure('info');"
    "config = EngineConfig.of(model=sys.argv[1], max_num_seqs=8, max_num_batched_tokens=256);"
    "sys.exit(serve(config, ServerConfig(port=0, drain_seconds=float(sys.argv[2])), worker='stub'))"
)
START_SECONDS = 60


class Server:
    """A running server. ``log()`` is what it has said so far."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        with log.open("wb") as sink:
            self.process = subprocess.Popen([sys.executable, *command], stdout=sink, stderr=sink, env=env)
        self.url = self._wait()
        self.core = self._core()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return sum(map(float, re.findall(rf"^vllm:{name}{{.*}} (.*)$", text, re.MULTILINE)))

    def wait(self, seconds: float) -> int:
        """The exit code of a server that is to end within ``seconds``, its engine with it."""
        code = self.process.wait(seconds)
        assert ended(self.core, seconds)
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

    def _core(self) -> psutil.Process:
        (core,) = psutil.Process(self.process.pid).children()
        return core


def ended(process: psutil.Process, seconds: float) -> bool:
    """Whether ``process`` ends within ``seconds``. A zombie has ended: whoever inherited it reaps it at leisure."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.005)
    return False


@contextlib.contextmanager
def running(command: list[str], log: Path) -> Iterator[Server]:
    server = Server(command, log)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        ended(server.core, 5)
