"""The command line of octavo as a user of a Hub on loopback runs it, with a cache of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, Self

from tests.e2e.serving import START_SECONDS
from tests.hub_server import Hub

SMALL = ("--device", "cpu", "--max-num-seqs", "2", "--kv-cache-memory-bytes", "4M")
PROMPT = ("-p", "hello", "--max-tokens", "2", "--ignore-eos", "--temperature", "0")

# Several commands in one process: the imports of the first do for all. Engines are processes of their own, so what they
# say is caught at the descriptors.
SEVERAL = """
import json, os, sys, tempfile
from octavo.cli import main
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    files = [tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")]
    for number, file in enumerate(files, 1):
        os.dup2(file.fileno(), number)
    try:
        code = main(json.loads(line))
    except SystemExit as ended:
        code = ended.code
    sys.stdout.flush()
    texts = [file.seek(0) or file.read() for file in files]
    print(json.dumps([code, *texts]), file=answers, flush=True)
"""


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


class Shell:
    """Runs octavo as a user of ``hub`` does, with a cache of its own."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home = hub, home

    def env(self, **more: str) -> dict[str, str]:
        hidden = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE"}
        base = {key: value for key, value in os.environ.items() if key not in hidden}
        return {**base, **self.hub.env(self.home), "OMP_NUM_THREADS": "1", **more}

    def start(self, *argv: str, **env: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "octavo", *argv]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.env(**env), stdout=pipe, stderr=pipe, text=True, cwd=self.home)

    def run(self, *argv: str, **env: str) -> Outcome:
        process = self.start(*argv, **env)
        out, err = process.communicate(timeout=START_SECONDS)
        return Outcome(process.returncode, out, err)

    def generate(self, name: str, *argv: str, **env: str) -> Outcome:
        return self.run("generate", name, *PROMPT, *SMALL, *argv, **env)

    def plan(self, name: str, *argv: str, **env: str) -> dict[str, Any]:
        code, out, err = self.run("plan", name, "--json", "--gpu", "l4", *argv, **env)
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found


class Terminal:
    """Commands one after the other in one process, and so in one environment. Use it as a context."""

    def __init__(self, shell: Shell, **env: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", SEVERAL],
            env=shell.env(**env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=shell.home,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=START_SECONDS)  # the end of its input ends it

    def run(self, *argv: str) -> Outcome:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(argv) + "\n")
        self._process.stdin.flush()
        return Outcome(*json.loads(self._process.stdout.readline()))

    def generate(self, name: str, *argv: str) -> Outcome:
        """A short text, with the log on standard error. It takes seconds: the engine imports torch."""
        return self.run("generate", name, *PROMPT, *SMALL, "--log-level", "info", *argv)

    def plan(self, name: str, *argv: str) -> Outcome:
        """As JSON for a GPU, so that this machine does not matter. It takes a tenth of a second."""
        return self.run("plan", name, "--json", "--gpu", "l4", *argv)
