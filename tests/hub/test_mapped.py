from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from octavo.hub.mapped import MappedFile

SIZE = 8 << 20


def resident(path: Path) -> int:
    """Bytes of the file that count as this process's memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    found = 0
    for line in lines:
        if line.endswith(str(path)):
            found += next(int(entry.split()[1]) << 10 for entry in lines if entry.startswith("Rss:"))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_read_can_be_forgotten_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    values = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    path.write_bytes(values.tobytes())
    file = MappedFile(path)
    assert np.array_equal(file.data, values)
    assert resident(path) > SIZE // 2  # the system may take pages back
    file.forget()
    assert resident(path) < SIZE // 4
    assert np.array_equal(file.data, values)


def test_an_empty_or_missing_file_cannot_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty"):
        MappedFile(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        MappedFile(tmp_path / "missing")
