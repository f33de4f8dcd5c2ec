"""Divides what a machine has among several engines on it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.log import PROCESS

DEVICES = Path("/dev")


@dataclass(frozen=True)
class Share:
    """What one of several engines is started with: its config, and what is added to its environment."""

    config: EngineConfig
    env: Mapping[str, str] = field(default_factory=dict)


def visible_gpus() -> list[str]:
    """The GPUs that a process started now would see, as ``CUDA_VISIBLE_DEVICES`` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        names = [name.strip() for name in named.split(",")]
        return names[: names.index("-1")] if "-1" in names else [name for name in names if name]
    return [str(i) for i in range(len(list(DEVICES.glob("nvidia[0-9]*"))))]


def shares(config: EngineConfig) -> list[Share]:
    """For each engine of ``config`` its GPUs, or its part of the threads.

    An engine that was given GPUs does not fall back to the CPU. Raises `ConfigError` if there are not enough GPUs.
    """
    engines, ranks = config.parallel.data_parallel_size, config.parallel.tensor_parallel_size
    if engines == 1:
        return [Share(config)]
    gpus = [] if config.device.device == "cpu" else visible_gpus()
    if not gpus:
        threads = str(max(1, _threads() // engines))
        return _named(config, [{"OMP_NUM_THREADS": threads}] * engines)
    if len(gpus) < engines * ranks:
        raise ConfigError(
            f"data_parallel_size {engines} x tensor_parallel_size {ranks} takes {engines * ranks} GPUs; "
            f"{len(gpus)} can be seen.",
            "Lower one of the two, or set CUDA_VISIBLE_DEVICES to more.",
        )
    config = replace(config, device=replace(config.device, device="cuda"))
    slices = (gpus[i * ranks : (i + 1) * ranks] for i in range(engines))
    return _named(config, [{"CUDA_VISIBLE_DEVICES": ",".join(names)} for names in slices])


def _named(config: EngineConfig, added: list[dict[str, str]]) -> list[Share]:
    """With the names that the engines have in the log."""
    return [Share(config, {**env, PROCESS: f"engine {i}"}) for i, env in enumerate(added)]


def _threads() -> int:
    """Threads of one engine that has the machine to itself."""
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return int(told) if told.isdigit() and int(told) else len(os.sched_getaffinity(0))
