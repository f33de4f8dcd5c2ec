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
    "model, drain, engines, apis, port = [*sys.argv[1:], *['0.0', '1', '1', '0'][len(sys.argv) - 2:]];"
    "limits = dict(max_num_seqs=8, max_num_batched_tokens=256);"
    "config = EngineConfig.of(model=model, data_parallel_size=int(engines), **limits);"
    "server = ServerConfig(port=int(port), drain_seconds=float(drain), api_server_count=int(apis));"
    "sys.exit(serve(config, server, worker='stub'))"
)  # MODEL [DRAIN_SECONDS [ENGINES [API_PROCESSES [PORT]]]]
START_SECONDS = 60


class Server:
    """A running server. ``log()`` is what it has said so far."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        with log.open("wb") as sink:
            self.process = subprocess.Popen([sys.executable, *command], stdout=sink, stderr=sink, env=env)
        self.url = self._wait()
        self.core, *_ = self.cores = self.children("octavo.core.process")
        self.apis = self.children("octavo.server.api_process")

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return sum(map(float, re.findall(rf"^vllm:{name}{{.*}} (.*)$", text, re.MULTILINE)))

    def wait(self, seconds: float) -> int:
        """The exit code of a server that is to end within ``seconds``, its children with it."""
        children = self.children("")
        code = self.process.wait(seconds)
        assert all(ended(child, seconds) for child in [*self.cores, *self.apis, *children])
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
            found = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []
        return sorted((child for child in found if module in _command(child)), key=lambda child: child.pid)


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


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
        for child in [*server.cores, *server.apis]:
            ended(child, 5)
