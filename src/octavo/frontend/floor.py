"""How near the engine comes to what the memory allows: the bytes that its steps had to read, over its bandwidth.

A step reads the weights once and the K and V of the tokens that its sequences have. What prompts compute is not
counted, so where they take most of the time the share is low although the machine is busy.
"""

from __future__ import annotations

from functools import cache

from octavo.types import EngineInfo, Stats


@cache
def bandwidth_here() -> float:
    """Bytes a second of this machine's memory, measured once (0.2 s); low if the engine computes meanwhile."""
    from octavo.hub.machines import measure_bandwidth  # and numpy, which the start does without

    return measure_bandwidth()


def bytes_read(info: EngineInfo, stats: Stats) -> int:
    """What all steps so far had to read."""
    return info.weight_bytes * stats.steps + info.kv_bytes * stats.slots_filled


def floor_share(info: EngineInfo, stats: Stats, bandwidth: float) -> float:
    """The least time for that as a share of the time that steps took; 0 before the first one."""
    return bytes_read(info, stats) / bandwidth / stats.busy_seconds if stats.busy_seconds else 0.0
