"""``octavo plan``: what a model would take on this machine or on another one, without loading it."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from octavo.config import EngineConfig, ModelConfig
from octavo.errors import ConfigError
from octavo.options import parse_size

if TYPE_CHECKING:
    from octavo.hub.machines import Machine
    from octavo.hub.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command beside the engine's."""
    group = parser.add_argument_group("plan")
    group.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    group.add_argument("--gpu", metavar="NAME", help="ask about such a GPU (h100, h200, l40s, ...)")
    group.add_argument("--memory", metavar="SIZE", help="ask about a machine with so much memory (24G)")


def run(config: EngineConfig, *, gpu: str | None, memory: str | None, json: bool) -> int:
    """Prints the plan; returns the exit status that serving would end with (0: it would run)."""
    from octavo.hub.plan import describe

    plan = _plan(config, _machine(config.device.device, gpu, memory))
    if json:
        import msgspec

        sys.stdout.write(msgspec.json.format(msgspec.json.encode(plan)).decode() + "\n")
    else:
        print(describe(plan))
    return plan.exit_code


def plan_here(config: EngineConfig) -> Plan:
    """The plan for this machine; raises `OctavoError`."""
    return _plan(config, _this_machine(config.device.device))


def _plan(config: EngineConfig, machine: Machine) -> Plan:
    from octavo.hub.peek import peek
    from octavo.hub.plan import make_plan

    config, machine = _joined(config, machine)
    options = config.model
    with peek(
        options.model,
        revision=options.revision,
        token=options.hf_token,
        download_dir=options.download_dir,
        load_format="auto" if options.load_format == "dummy" else options.load_format,
    ) as peeked:
        return make_plan(peeked, config, machine, Models())


def _joined(config: EngineConfig, machine: Machine) -> tuple[EngineConfig, Machine]:
    """Devices that share a model count as one of all their memory and bandwidth, of which each has its part of all."""
    ranks = config.parallel.tensor_parallel_size
    if ranks == 1:
        return config, machine
    if config.memory.kv_cache_memory_bytes is not None:  # of each device
        memory = dataclasses.replace(config.memory, kv_cache_memory_bytes=ranks * config.memory.kv_cache_memory_bytes)
        config = dataclasses.replace(config, memory=memory)
    if machine.device == "cpu":  # the ranks divide it
        return config, machine
    bandwidth = None if machine.bandwidth is None else ranks * machine.bandwidth
    name = f"{ranks} x {machine.name}"
    return config, dataclasses.replace(machine, name=name, memory=ranks * machine.memory, bandwidth=bandwidth)


class Models:
    """See `hub.plan.Models`."""

    def is_traced(self, hf: Mapping[str, Any], impl: str) -> bool:
        from octavo.models import registry

        return registry.is_traced(hf, impl)

    def choose(self, config: ModelConfig, impl: str, max_len: int) -> tuple[str, str, ModelConfig]:
        """Builds a model of Transformers without memory, which tells whether it can run and what its layers are."""
        from octavo.models import registry

        address, reason = registry.find(config, impl)
        if address in (registry.TRANSFORMERS, registry.OF_REPO):
            config = registry.choose(config, impl)[0](config, max_len).config
        return address, reason, config


def _machine(device: str, gpu: str | None, memory: str | None) -> Machine:
    from octavo.hub import machines

    if gpu is not None and device == "cpu":
        raise ConfigError("--gpu and --device cpu contradict each other.", "Give one of them.")
    machine = _this_machine(device) if gpu is None else machines.named(gpu)
    if memory is None:
        return machine
    count = parse_size(memory)
    if count <= 0:
        raise ConfigError(f"--memory is {memory!r}.", "Give a size such as 24G.")
    return dataclasses.replace(machine, memory=count)


def _this_machine(device: str) -> Machine:
    import torch

    from octavo import platforms
    from octavo.hub.machines import Machine, bandwidth_of, measure_bandwidth
    from octavo.platforms.cpu import KV_SHARE, total_memory

    platform = platforms.select(device)
    if platform.device.type == "cuda":
        card = torch.cuda.get_device_properties(platform.device)
        return Machine(card.name, "cuda", card.total_memory, bandwidth_of(card.name), platform.fast_bfloat16)
    return Machine("this CPU", "cpu", total_memory(), measure_bandwidth(), platform.fast_bfloat16, kv_share=KV_SHARE)
