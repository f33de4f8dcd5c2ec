"""Load formats of other packages read what octavo reads itself; skipped for packages that are not installed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from octavo.config import LOAD_PACKAGES, EngineConfig, package_version
from octavo.errors import ModelError
from octavo.hub.checkpoint import Checkpoint, SafetensorsCheckpoint, open_checkpoint
from octavo.hub.source import Source
from octavo.runtime import safetensors_packages
from octavo.runtime.safetensors_packages import safetensors_reader
from octavo.runtime.worker import Worker
from tools import tiny


@pytest.fixture(params=sorted(LOAD_PACKAGES))
def load_format(request: pytest.FixtureRequest) -> str:
    name = LOAD_PACKAGES[request.param].name
    if package_version(name) is None:
        pytest.skip(f"{name} is not installed")
    return str(request.param)


@pytest.fixture
def opened(load_format: str, tmp_path: Path) -> Callable[[], Checkpoint]:
    """Opens three files, of which the second begins its data at an odd address."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        {"a": torch.randn(60, 40, generator=generator), "b": torch.randn(8, 2, generator=generator).bfloat16()},
        {"byte": torch.ones(3, dtype=torch.uint8), "half": torch.randn(3, 5, 2, generator=generator).half()},
        {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "f8": torch.randn(4, 4).to(torch.float8_e4m3fn)},
    ]
    for i, part in enumerate(parts, 1):
        save_file(part, tmp_path / f"model-0000{i}-of-00003.safetensors")
    source = Source("m", "folder", tmp_path, None, "")
    return lambda: open_checkpoint(source, load_format, safetensors=safetensors_reader(load_format))


def plain(tmp_path: Path) -> SafetensorsCheckpoint:
    return SafetensorsCheckpoint(tuple(sorted(tmp_path.glob("*.safetensors"))))


def test_whole_tensors_and_slices_equal_those_that_octavo_reads(
    opened: Callable[[], Checkpoint], tmp_path: Path
) -> None:
    checkpoint, expected = opened(), plain(tmp_path)
    assert not isinstance(expected, type(checkpoint))
    assert checkpoint.tensors() == expected.tensors()
    slices = {
        "a": [(slice(7, 31),), (slice(0, 60), slice(3, 9)), (slice(59, 60),), (slice(5, 5),)],
        "b": [(slice(4, 8),), (slice(None), slice(1, 2))],
        "half": [(slice(1, 3),), (slice(1, 2), slice(0, 4), slice(1, 2))],
        "f8": [(slice(2, 4),)],
    }
    for name in expected.tensors():
        for part in (None, *slices.get(name, [])):
            found, wanted = checkpoint.read(name, part), expected.read(name, part)
            assert (found.dtype, found.data.dtype, found.data.shape) == (
                wanted.dtype,
                wanted.data.dtype,
                wanted.data.shape,
            )
            assert found.data.flags.aligned
            np.testing.assert_array_equal(found.data, wanted.data)


def test_arrays_stay_as_they_are_while_others_are_read_and_after_the_checkpoint(
    opened: Callable[[], Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_packages, "FILES", 1)
    checkpoint, expected = opened(), plain(tmp_path)
    names = [*expected.tensors()] * 5
    with ThreadPoolExecutor(4) as pool:
        arrays = list(pool.map(checkpoint.read, names))
    del checkpoint
    gc.collect()
    for name, array in zip(names, arrays, strict=True):
        np.testing.assert_array_equal(array.data, expected.read(name).data)


def test_a_file_that_is_cut_after_its_header_was_read_is_named(
    opened: Callable[[], Checkpoint], tmp_path: Path
) -> None:
    checkpoint = opened()
    path = tmp_path / "model-00001-of-00003.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 6000)
    with pytest.raises(ModelError, match=path.name) as caught:
        checkpoint.read("a")
    assert caught.value.id == "HF041"


def test_a_model_is_loaded_with_the_same_weights(load_format: str, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path / "llama", "llama")
    states = []
    for name in ("auto", load_format):
        worker = Worker()
        worker.init(EngineConfig.of(model=str(folder), device="cpu", dtype="float32", load_format=name))
        worker.load()
        states.append(worker.model.state_dict())
    assert states[0].keys() == states[1].keys()
    assert states[0]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
