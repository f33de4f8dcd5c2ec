"""One of several API processes: ``python -m octavo.server.api_process``, started by `server.supervisor`.

One line of JSON on standard input says what to serve (`Start`). Standard output carries one line of JSON: `Up` once
requests are taken, or `octavo.types.Dead` with what prevented it. Standard input stays open and is the tie to the
supervisor: its end ends this process at once.
"""

from __future__ import annotations

import os
import socket
from typing import Literal

import msgspec

from octavo import log
from octavo.config import EngineConfig, ServerConfig
from octavo.errors import OctavoError
from octavo.frontend.fleet import Addresses, Source
from octavo.parent import end_with_parent, run_child
from octavo.server.run import Session, run
from octavo.types import Dead


class Start(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the supervisor writes."""

    config: EngineConfig
    server: ServerConfig
    worker: Literal["real", "stub"]
    engines: list[str]  # their addresses; on a Ray cluster the names of their actors
    cluster: str  # the address of the Ray cluster, if there is one
    listener: int  # file descriptor of the bound socket


class Up(msgspec.Struct, frozen=True, tag="up"):
    """Requests are taken; ``banner`` says which."""

    banner: str


Report = Up | Dead


def _engines(start: Start) -> Source:
    if not start.cluster:
        return Addresses(start.engines)
    from octavo.frontend.ray_engines import RayActors

    return RayActors(start.cluster, start.engines)


def main(start: Start) -> int:
    end_with_parent()
    reports = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is log, not a report
    log.configure(start.server.log_level)

    def report(message: Report) -> None:
        reports.write(msgspec.json.encode(message) + b"\n")
        reports.flush()

    try:
        with socket.socket(fileno=start.listener) as listener:
            engines = _engines(start)
            announce = lambda banner: report(Up(banner))  # noqa: E731
            return run(Session(start.config, start.server, start.worker, listener, engines=engines, announce=announce))
    except OctavoError as error:
        report(Dead.of(error))
        return error.exit_code


if __name__ == "__main__":
    run_child(Start, main)
