"""Several engines in child processes with the blocking face of one in this process, for `LLM`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import zmq

from octavo.config import EngineConfig
from octavo.errors import EngineDead
from octavo.frontend.core_process import Core, decode_output, spawn
from octavo.frontend.devices import shares
from octavo.frontend.routing import router_for, together
from octavo.types import (
    Abort,
    CoreOutput,
    Dead,
    Outputs,
    Pong,
    Request,
    ResetPrefixCache,
    Stats,
    Submit,
    TokenOutput,
)

POLL_MS = 200  # between looks whether all engines are alive


class SeveralCores:
    """The methods of `core.process.Engine`; a step is whatever comes next from any of the engines.

    The death of one ends all: a batch of prompts has nobody to answer meanwhile. Raises what keeps one from starting.
    """

    def __init__(self, config: EngineConfig, hash_key: bytes, worker: Literal["real", "stub"] = "real") -> None:
        self._cores: list[Core] = []
        try:
            for share in shares(config):
                started = spawn(share.config, worker, log_level="warning", hash_key=hash_key.hex(), env=share.env)
                self._cores.append(started)
            infos = [core.wait_ready() for core in self._cores]
        except BaseException:
            for core in self._cores:
                core.cancel()
            self.close()
            raise
        self.info = together(infos)
        self._router = router_for(infos[0])
        self._owners: dict[str, int] = {}  # of each request that has not ended
        self._loads = [0] * len(self._cores)  # how many these are
        self._stats = [Stats() for _ in self._cores]
        self._poller = zmq.Poller()
        for core in self._cores:
            self._poller.register(core.socket, zmq.POLLIN)

    def add(self, request: Request) -> TokenOutput | None:
        """Sends the request to an engine; a refusal comes with a later step."""
        index = self._router.pick(request.page_hashes, self._loads)
        if index is None:
            raise EngineDead("no engine runs.", "Make a new LLM.")
        self._owners[request.id] = index
        self._loads[index] += 1
        self._cores[index].send(Submit([request]))
        return None

    def abort(self, ids: Sequence[str]) -> list[TokenOutput]:
        """Ends requests; nothing of them comes any more."""
        known = {id: self._ended(id) for id in ids if id in self._owners}
        for index, core in enumerate(self._cores):
            mine = [id for id, owner in known.items() if owner == index]
            if mine:
                core.send(Abort(mine))
        return [TokenOutput(id=id, finish_reason="abort") for id in known]

    def has_work(self) -> bool:
        """Whether a request has not ended."""
        return bool(self._owners)

    def step(self) -> list[TokenOutput]:
        """Waits for outputs of any engine; raises `EngineDead` if one ends."""
        outputs: list[TokenOutput] = []
        while not outputs and self._owners:
            for message in self._receive():
                if isinstance(message, Outputs):
                    outputs += [output for output in message.outputs if output.id in self._owners]
        for output in outputs:
            if output.finish_reason is not None:
                self._ended(output.id)
        return outputs

    def stats(self) -> Stats:
        """Sums; ``waiting`` is of the engine that has most to do, and counts all that it has."""
        return msgspec.structs.replace(Stats.sum(self._stats), waiting=max(self._loads))

    def reset_prefix_cache(self) -> None:
        """Forgets all cached prefixes."""
        self._router.forget()
        for core in self._cores:
            core.send(ResetPrefixCache(0))
        pongs = 0
        while pongs < len(self._cores):
            pongs += sum(isinstance(message, Pong) for message in self._receive())

    def close(self) -> None:
        """Ends the engines. May be called twice."""
        for core in self._cores:
            core.stop()

    def _ended(self, id: str) -> int:
        """Forgets a request; returns the engine that had it."""
        index = self._owners.pop(id)
        self._loads[index] -= 1
        return index

    def _receive(self) -> list[CoreOutput]:
        """What has come, one message of each engine at most; waits for the first, not without end."""
        ready = dict(self._poller.poll(POLL_MS))
        messages: list[CoreOutput] = []
        for index, core in enumerate(self._cores):
            if core.socket in ready:
                message = decode_output(core.socket.recv())
                if isinstance(message, Dead):
                    raise message.error()
                if isinstance(message, Outputs | Pong):
                    self._stats[index] = message.stats or self._stats[index]
                messages.append(message)
            elif not ready and not core.alive() and not core.socket.poll(core.last_words_ms()):
                raise core.death()
        return messages
