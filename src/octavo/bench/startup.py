"""``octavo bench startup``: the way from the start of this process to a first token, by phase, in both processes.

It goes as with ``octavo serve``: the engine starts in a process of its own while this one, the API process, imports the
server and reads config and tokenizer; then it waits. Both processes are fresh, so these are cold starts of Python; the
files are as warm as the system's cache has them.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from typing import Literal, TypeVar

from octavo.bench import offline, report
from octavo.config import EngineConfig
from octavo.core.process import seconds_since_start
from octavo.frontend.core_process import Core, decode_output, spawn
from octavo.hub.configs import model_config
from octavo.hub.files import ModelFiles, find_files
from octavo.options import add_engine_options, engine_config
from octavo.types import Dead, EngineInfo, Outputs, Submit

T = TypeVar("T")
COLUMNS = {"process": "process", "phase": "phase", "seconds": "seconds"}
POLL_MS = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add_engine_options(parser)
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Starts the engine once and prints what took how long."""
    report.show(measure(engine_config(args)), COLUMNS, args.json)
    return 0


def measure(config: EngineConfig, worker: Literal["real", "stub"] = "real") -> list[report.Row]:
    """A row for each phase; those of the API process add up to "ready". Raises what keeps the engine from starting."""
    offline.check_single(config)
    phases = {"python": seconds_since_start()}
    core = spawn(config, worker, log_level="warning")
    try:
        _timed(phases, "import", lambda: importlib.import_module("octavo.server.run"))
        files = _timed(phases, "config", lambda: _read_config(config))
        if not config.model.skip_tokenizer_init:
            _timed(phases, "tokenizer", files.load_tokenizer)
        info = _timed(phases, "wait for the engine", core.wait_ready)
        phases["ready"] = sum(phases.values())
        _timed(phases, "first token", lambda: _first_token(core, info))
    finally:
        core.stop()
    rows = [("api", *phase) for phase in phases.items()] + [("engine", *phase) for phase in info.phases.items()]
    return [{"process": process, "phase": name, "seconds": seconds} for process, name, seconds in rows]


def _timed(phases: dict[str, float], name: str, call: Callable[[], T]) -> T:
    start = time.perf_counter()
    value = call()
    phases[name] = time.perf_counter() - start
    return value


def _read_config(config: EngineConfig) -> ModelFiles:
    files = find_files(config.model, weights=False)
    model_config(files.hf_dict(), generation=files.generation, traced=True)
    return files


def _first_token(core: Core, info: EngineInfo) -> None:
    prompt = list(range(1, min(9, info.vocab_size)))
    core.send(Submit([offline.make_request(info, "first", prompt, 1)]))
    while core.alive():
        if core.socket.poll(POLL_MS):
            message = decode_output(core.socket.recv())
            if isinstance(message, Dead):
                raise message.error()
            if isinstance(message, Outputs):
                return
    raise core.death()
