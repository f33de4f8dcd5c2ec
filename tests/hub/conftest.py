"""`resolve` against a Hub on loopback, for the tests of this folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import Hub
from tests.waiting import PATIENCE

Client = Callable[..., Any]

CLIENT = """
import json, os, sys
from octavo.errors import ModelError
from octavo.hub import repo, resolve as module
repo.RETRY_DELAYS = (0.0,) * len(repo.RETRY_DELAYS)
for line in sys.stdin:
    cwd, kwargs = json.loads(line)
    os.chdir(cwd)
    try:
        source = module.resolve(**kwargs)
        files = sorted(str(p.relative_to(source.path)) for p in source.path.rglob("*") if p.is_file())
        answer = {"kind": source.kind, "path": str(source.path), "commit": source.commit, "files": files}
    except ModelError as error:
        answer = {"id": error.id, "cause": error.cause, "remedy": error.remedy}
    print(json.dumps(answer), flush=True)
"""


class Clients:
    """Processes that run `resolve` and know no Hub but ``hub``: one for each environment, as it is read at import."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub = hub
        self.home = home
        self._running: dict[tuple[tuple[str, str], ...], subprocess.Popen[str]] = {}

    def ask(self, cwd: Path, env: dict[str, str], kwargs: dict[str, Any]) -> Any:
        key = tuple(sorted(env.items()))
        if key not in self._running:
            self._running[key] = self._start(env)
        process = self._running[key]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([str(cwd), kwargs]) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    def _start(self, env: dict[str, str]) -> subprocess.Popen[str]:
        hidden = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"}
        base = {key: value for key, value in os.environ.items() if key not in hidden}
        return subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env={**base, **self.hub.env(self.home), **env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def close(self) -> None:
        for process in self._running.values():
            process.communicate(timeout=PATIENCE)  # the end of its input ends it


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    with Hub() as hub:
        clients = Clients(hub, tmp_path_factory.mktemp("home"))
        yield clients
        clients.close()


@pytest.fixture
def hub(clients: Clients) -> Hub:
    hub = clients.hub
    hub.repos.clear()
    hub.renamed.clear()
    hub.requests.clear()
    hub.fail_with, hub.failures = None, 1 << 30
    hub.cdn, hub.cuts, hub.plain = False, 0, False
    hub.rate, hub.retry_after = None, "0"
    return hub


@pytest.fixture
def client(clients: Clients, tmp_path: Path) -> Client:
    """`resolve` of ``owner/name`` with a cache of this test's own; the result or the error as a dict."""

    def call(name: str = "owner/name", *, env: dict[str, str] | None = None, **kwargs: Any) -> Any:
        return clients.ask(tmp_path, env or {}, {"name": name, "download_dir": str(tmp_path / "cache"), **kwargs})

    return call
