"""Memory on large pages, where the system gives them to who asks: what is read from end to end, or all over, then waits
less for the tables that say where a page lies."""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch

LARGE = 1 << 21  # bytes
_CHUNK = 16 * LARGE
_SMALL = 1 << 18


def zeros(nbytes: int) -> torch.Tensor:
    """uint8 ``[nbytes]``, more than 0; the system takes memory for it as it is written."""
    area = mmap.mmap(-1, -(-nbytes // LARGE) * LARGE + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            area.madvise(mmap.MADV_HUGEPAGE)
    start = torch.frombuffer(area, dtype=torch.uint8, count=1).data_ptr()
    return torch.frombuffer(area, dtype=torch.uint8, count=nbytes, offset=-start % LARGE)


class Arena:
    """Hands out parts of large areas to many tensors that live about as long as one another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = torch.empty(0, dtype=torch.uint8)

    def empty(self, nbytes: int) -> torch.Tensor:
        """uint8 ``[nbytes]``, at a multiple of 64 bytes; an area is given back with the last of its tensors."""
        if nbytes < _SMALL:
            return torch.empty(nbytes, dtype=torch.uint8)
        if nbytes > _CHUNK:
            return zeros(nbytes)
        taken = -(-nbytes // 64) * 64
        with self._lock:
            if taken > len(self._rest):
                self._rest = zeros(_CHUNK)
            part, self._rest = self._rest[:nbytes], self._rest[taken:]
        return part
