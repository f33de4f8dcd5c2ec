"""A file in memory as it is read, without counting as this process's memory for longer than it is looked at."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt


class MappedFile:
    """``data`` is the whole file. Raises OSError or, for an empty file, ValueError."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.data: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)

    def forget(self) -> None:
        """Gives back the pages that were read; who looks at them again reads them from the system's cache."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
