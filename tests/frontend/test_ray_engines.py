from __future__ import annotations

import asyncio
import sys

import pytest

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.frontend.balancer import own_engines
from octavo.frontend.ray_engines import bundle_of


def config(engines: int, ranks: int = 1, device: str = "auto") -> EngineConfig:
    return EngineConfig.of(
        model="m",
        data_parallel_size=engines,
        tensor_parallel_size=ranks,
        device=device,
        distributed_executor_backend="ray",
    )


def test_without_ray_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError) as error:
        asyncio.run(own_engines(config(2), "stub", log_level="info"))
    assert "pip install 'octavo[ray]'" in error.value.remedy


@pytest.mark.parametrize(
    ("engines", "cpus", "share"),
    [(1, [8], 8), (2, [8], 4), (2, [8, 8], 8), (3, [8, 4], 4), (3, [8, 8], 4), (2, [1, 1], 1)],
)
def test_without_gpus_an_engine_takes_as_many_cpus_as_leave_room_for_all(
    engines: int, cpus: list[int], share: int
) -> None:
    assert bundle_of(config(engines), [{"CPU": float(count)} for count in cpus]) == {"CPU": share}


def test_the_gpus_of_an_engine_are_on_one_machine() -> None:
    machines = [{"CPU": 8.0, "GPU": 3.0}, {"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}]
    assert bundle_of(config(2, 2), machines) == {"CPU": 1, "GPU": 2}
    assert bundle_of(config(5), machines) == {"CPU": 1, "GPU": 1}
    assert bundle_of(config(3, device="cpu"), machines) == {"CPU": 8}
    with pytest.raises(ConfigError, match=r"2 engines of 3 GPUs.*\[3, 2, 0\]"):
        bundle_of(config(2, 3), machines)
    with pytest.raises(
        ConfigError, match=r"is 4, but no machine .* more than 3 GPUs: all ranks .* on one machine"
    ) as error:
        bundle_of(config(1, 4), machines)
    assert error.value.remedy == "Lower it to 3, or add a machine with 4 GPUs."


def test_more_engines_than_cpus_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"3 engines do not fit on machines with \[1, 1\] CPUs"):
        bundle_of(config(3), [{"CPU": 1.0}, {"CPU": 1.0}])
