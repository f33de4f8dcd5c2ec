"""Engines on the machines of a Ray cluster: Ray places them, looks after them and starts them again.

    this process ── ZeroMQ over TCP, encrypted ── engine core ─┐ child of its actor; they end together
         └───────── Ray ───────────────────────── EngineActor ─┘ one for each engine, in a placement group of its own

Ray carries no tokens: an actor tells where its engine listens and with which key. A connection that breaks is how an
engine's death is noticed; then the actor is asked again, and Ray answers once it has started it, perhaps elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.metadata
import logging
import os
import threading
import time
import uuid
from typing import Any, Literal

import msgspec

import octavo
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.frontend.core_process import Core, launch
from octavo.frontend.fleet import Gone
from octavo.log import get_logger

PLACE_SECONDS = 120.0  # for a cluster that has the resources, but is using them
VERSION_SECONDS = 60.0  # for a machine to start its first process
MAX_RESTARTS = 100  # of one engine, by Ray; ends of machines do not count
ASK_SECONDS = 2.0  # between questions whether an engine that is being started has been moved
LEAVE_SECONDS = 5.0
NAMESPACE = "octavo"


class EngineActor:
    """What Ray looks after: the parent of one engine core."""

    def __init__(self, start: bytes) -> None:
        """``start``: JSON of fields of `core.process.Start`."""
        import ray.util
        import zmq

        public, secret = zmq.curve_keypair()
        self._public_key = public.decode()
        told = {**msgspec.json.decode(start), "secret_key": secret.decode()}
        self._process, self._address = launch(f"tcp://{ray.util.get_node_ip_address()}:0", told)
        threading.Thread(target=self._end_with_engine, name="octavo-core-watch", daemon=True).start()

    def place(self) -> tuple[str, str]:
        """Address of the engine, and the public key to speak with it."""
        if self._process.poll() is not None:
            os._exit(1)
        return self._address, self._public_key

    def _end_with_engine(self) -> None:
        self._process.wait()
        os._exit(1)  # Ray starts this actor again


class RayActors:
    """A `Source`: engines on the cluster at ``cluster``, whose actors have ``names`` and are another process's."""

    owned = False
    tries: int | None = None

    def __init__(self, cluster: str, names: list[str]) -> None:
        self.cluster, self.names = cluster, names
        self._ray: Any = None
        self._actors: list[Any] = []
        self._joining = asyncio.Lock()

    async def open(self, index: int) -> Core:
        async with self._joining:
            if self._ray is None:
                await asyncio.to_thread(self._find)
        actor = self._actors[index]
        try:
            address, public_key = await actor.place.remote()
        except self._ray.exceptions.RayActorError as error:
            raise Gone(f"Ray does not start engine {index} again: {_first_line(error)}", "See Ray's logs.") from None
        return _RayCore(address, public_key, self._ray, actor)

    async def close(self) -> None:
        """Leaves the cluster. May be called twice."""
        ray, self._ray = self._ray, None
        if ray is not None:
            with contextlib.suppress(TimeoutError):  # a cluster that is gone does not answer
                await asyncio.wait_for(asyncio.to_thread(self._leave, ray), LEAVE_SECONDS)

    def _find(self) -> None:
        ray = _join(self.cluster)
        self._actors = [ray.get_actor(name, NAMESPACE) for name in self.names]
        self._ray = ray

    def _leave(self, ray: Any) -> None:
        ray.shutdown()


class RayEngines(RayActors):
    """Engines of this process's own, made by `start`; they end with it."""

    owned = True

    def __init__(self, ray: Any, actors: list[Any], names: list[str], groups: list[Any]) -> None:
        super().__init__(ray.get_runtime_context().gcs_address, names)
        self._ray, self._actors, self._groups = ray, actors, groups

    @classmethod
    async def start(
        cls, config: EngineConfig, worker: Literal["real", "stub"], *, log_level: str, hash_key: bytes
    ) -> RayEngines:
        """Joins the cluster and places the engines; raises `ConfigError` if Ray or machines are lacking or differ."""
        alone = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, data_parallel_size=1))
        start = {"config": alone, "worker": worker, "log_level": log_level, "hash_key": hash_key.hex()}
        return await asyncio.to_thread(_place, config, msgspec.json.encode(start))

    def _leave(self, ray: Any) -> None:
        """Ends the actors too, and gives their places back."""
        for actor in self._actors:
            ray.kill(actor)
        for group in self._groups:
            ray.util.remove_placement_group(group)
        ray.shutdown()


class _RayCore(Core):
    """A connection that, until the engine is ready, also notices that Ray has moved it."""

    def __init__(self, address: str, public_key: str, ray: Any, actor: Any) -> None:
        super().__init__(address, public_key=public_key)
        self._ray, self._actor = ray, actor
        self._asked = time.monotonic()
        self._answer: Any = None  # one that is awaited

    def kill(self) -> None:
        """Ray starts it again."""
        self._ray.kill(self._actor, no_restart=False)

    def alive(self) -> bool:
        return super().alive() and not self._moved()

    def _moved(self) -> bool:
        if self._answer is None and time.monotonic() - self._asked > ASK_SECONDS:
            self._asked, self._answer = time.monotonic(), self._actor.place.remote()
        if self._answer is None or not self._ray.wait([self._answer], timeout=0)[0]:
            return False
        answer, self._answer = self._answer, None
        try:
            return bool(self._ray.get(answer)[0] != self.address)
        except self._ray.exceptions.RayActorError:
            return True


def versions() -> dict[str, str]:
    """What must be equal on all machines."""
    return {"octavo": octavo.__version__, "torch": importlib.metadata.version("torch")}


def _place(config: EngineConfig, start: bytes) -> RayEngines:
    ray, engines = _join(None), config.parallel.data_parallel_size
    nodes = [node for node in ray.nodes() if node["Alive"]]
    _check_versions(ray, nodes)
    bundle = bundle_of(config, [node["Resources"] for node in nodes])
    groups = [ray.util.placement_group([bundle], strategy="STRICT_PACK") for _ in range(engines)]
    _, waiting = ray.wait([group.ready() for group in groups], num_returns=engines, timeout=PLACE_SECONDS)
    if waiting:
        ray.shutdown()
        raise ConfigError(
            f"{len(waiting)} of {engines} engines found no place within {PLACE_SECONDS:.0f} s; each takes {bundle}.",
            "The cluster is busy with something else: see ray status.",
        )
    make, run = ray.remote(EngineActor), uuid.uuid4().hex[:8]
    names = [f"octavo-{run}-{i}" for i in range(engines)]
    strategies = ray.util.scheduling_strategies
    actors = [
        make.options(
            name=name,
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_restarts=MAX_RESTARTS,
            max_task_retries=-1,
            scheduling_strategy=strategies.PlacementGroupSchedulingStrategy(group, 0),
        ).remote(start)
        for name, group in zip(names, groups, strict=True)
    ]
    get_logger().info("%d engines on a Ray cluster of %d machines, each with %s", engines, len(nodes), bundle)
    return RayEngines(ray, actors, names, groups)


def _join(cluster: str | None) -> Any:
    """The module ``ray``, connected to ``cluster``; None: that of ``RAY_ADDRESS``, of this machine, or a new one."""
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        raise ConfigError(
            "distributed_executor_backend is ray, and Ray is not installed.", "Run: pip install 'octavo[ray]'"
        ) from None
    try:
        ray.init(cluster, namespace=NAMESPACE, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"cannot join the Ray cluster: {_first_line(error)}", "See ray status.") from None
    return ray


def _check_versions(ray: Any, nodes: list[dict[str, Any]]) -> None:
    """Raises `ConfigError` if a machine has another octavo or torch than this one."""
    strategies = ray.util.scheduling_strategies
    asked = {
        node["NodeManagerAddress"] + " " + node["NodeID"][:8]: ray.remote(versions)
        .options(num_cpus=0, scheduling_strategy=strategies.NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote()
        for node in nodes
    }
    here = versions()
    for node, answer in asked.items():
        try:
            there = ray.get(answer, timeout=VERSION_SECONDS)
        except ray.exceptions.RayError as error:
            ray.shutdown()
            raise ConfigError(
                f"octavo does not run on node {node}: {_first_line(error)}", "Install it there."
            ) from None
        for package, version in here.items():
            if there[package] != version:
                ray.shutdown()
                raise ConfigError(
                    f"node {node} has {package} {there[package]}, this machine has {package} {version}.",
                    "Install the same version on every machine of the cluster.",
                )


def bundle_of(config: EngineConfig, machines: list[dict[str, float]]) -> dict[str, float]:
    """What one engine takes of a machine: its GPUs; without GPUs as many CPUs as leave room for all engines.

    ``machines``: the resources of each, as Ray names them. Raises `ConfigError` if they are not enough.
    """
    engines, ranks = config.parallel.data_parallel_size, config.parallel.tensor_parallel_size
    gpus = [int(machine.get("GPU", 0)) for machine in machines]
    if config.device.device != "cpu" and any(gpus):
        if max(gpus) < ranks:
            raise ConfigError(
                f"tensor_parallel_size is {ranks}, but no machine of the cluster has more than {max(gpus)} GPUs:"
                " all ranks of an engine are on one machine.",
                f"Lower it to {max(gpus)}, or add a machine with {ranks} GPUs.",
            )
        if sum(count // ranks for count in gpus) < engines:
            raise ConfigError(
                f"{engines} engines of {ranks} GPUs, each on one machine, do not fit on machines with {gpus} GPUs.",
                "Lower data_parallel_size or tensor_parallel_size, or add machines.",
            )
        return {"CPU": 1, "GPU": ranks}
    cpus = [int(machine.get("CPU", 0)) for machine in machines]
    for share in range(max(cpus, default=0), 0, -1):
        if sum(count // share for count in cpus) >= engines:
            return {"CPU": share}
    raise ConfigError(
        f"{engines} engines do not fit on machines with {cpus} CPUs.", "Lower data_parallel_size, or add machines."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1].rstrip(".") + "."
