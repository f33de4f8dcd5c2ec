"""Four processes that stay for the whole run of the tests; in groups of two or four they call a function together."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MOST = 4
SECONDS = 240.0
PRELOADED = [
    "octavo._cpu",
    "octavo.models.hf.backend",
    "octavo.models.llama",
    "tools.sweep",
    "transformers.conversion_mapping",
    "transformers.core_model_loading",
    "transformers.models.auto.modeling_auto",
]


def _serve(rank: int, folder: Path, commands: Connection) -> None:
    import torch

    from octavo.parallel.group import Group, connect, use

    torch.set_num_threads(1)
    groups: dict[int, Group] = {}
    while True:
        size, function, args = commands.recv()
        try:
            if size not in groups:
                home = folder / str(size)
                home.mkdir(exist_ok=True)
                groups[size] = connect(rank, size, torch.device("cpu"), home, SECONDS)
            with use(groups[size]):
                commands.send((function(groups[size], *args), None))
        except BaseException as error:
            commands.send((error, traceback.format_exc()))


class Ranks:
    """``call(size, function, *args)``: what ``function(group, *args)`` returns on each of ``size`` ranks.

    The group is the current one meanwhile. What rank 0 raises is raised.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        server = multiprocessing.get_context("forkserver")  # which imports once for all
        server.set_forkserver_preload(PRELOADED)
        self._commands: list[Connection] = []
        self._processes = []
        for rank in range(MOST):
            ours, theirs = server.Pipe()
            process = server.Process(target=_serve, args=(rank, Path(self._folder.name), theirs), daemon=True)
            process.start()
            self._commands.append(ours)
            self._processes.append(process)

    def call(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        for commands in self._commands[:size]:
            commands.send((size, function, args))
        answers = []
        for commands in self._commands[:size]:
            assert commands.poll(SECONDS), "a rank does not answer"
            answers.append(commands.recv())
        for value, trace in answers:
            if trace is not None:
                value.add_note(trace)
                raise value
        return [value for value, _ in answers]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()
