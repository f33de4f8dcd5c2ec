from __future__ import annotations

from pathlib import Path

import pytest

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.frontend import devices
from octavo.log import PROCESS


def config(engines: int, ranks: int = 1, device: str = "auto") -> EngineConfig:
    return EngineConfig.of(model="m", data_parallel_size=engines, tensor_parallel_size=ranks, device=device)


def env_of(config: EngineConfig) -> list[dict[str, str]]:
    """Without the names in the log."""
    return [{key: value for key, value in share.env.items() if key != PROCESS} for share in devices.shares(config)]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The devices of one without GPUs, and with 8 threads."""
    monkeypatch.setattr(devices, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    return tmp_path


def test_one_engine_gets_what_there_is() -> None:
    assert devices.shares(config(1)) == [devices.Share(config(1))]


def test_the_log_of_each_of_several_engines_names_it(machine: Path) -> None:
    assert [share.env[PROCESS] for share in devices.shares(config(2))] == ["engine 0", "engine 1"]
    for i in range(2):
        (machine / f"nvidia{i}").touch()
    assert [share.env[PROCESS] for share in devices.shares(config(2))] == ["engine 0", "engine 1"]


def test_threads_are_divided_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env_of(config(3)) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert env_of(config(16)) == [{"OMP_NUM_THREADS": "1"}] * 16
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(6)))
    assert env_of(config(2)) == [{"OMP_NUM_THREADS": "3"}] * 2


def test_each_engine_gets_gpus_of_its_own_and_may_not_do_without(machine: Path) -> None:
    for name in ("nvidia2", "nvidia3", "nvidia5", "nvidia12", "nvidiactl", "nvidia-uvm"):
        (machine / name).touch()
    assert env_of(config(2)) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    assert env_of(config(2, 2)) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert {share.config.device.device for share in devices.shares(config(2))} == {"cuda"}
    assert env_of(config(2, device="cpu")) == [{"OMP_NUM_THREADS": "4"}] * 2
    with pytest.raises(ConfigError, match="takes 6 GPUs; 4 can be seen"):
        devices.shares(config(3, 2))


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("3,5", ["3", "5"]), ("GPU-a, GPU-b", ["GPU-a", "GPU-b"]), ("", []), ("-1", []), ("1,-1,2", ["1"])],
)
def test_what_the_user_made_visible_is_divided(
    visible: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.visible_gpus() == expected
