"""The processes that hold parts of one model, a device each, and the collectives between them.

A layer takes `current` when it is built and calls it in its forward. Alone (`SINGLE`) every collective is the identity,
and torch.distributed is not imported. Ranks meet in a file in a private folder, so that no port is fixed and nothing
listens outside of the machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from octavo.kernels.select import Ops
from octavo.log import get_logger
from octavo.parallel.peer import peer_memory

if TYPE_CHECKING:
    from octavo.kernels.peers_triton import PeerMemory


class LostPeer(RuntimeError):
    """A collective failed: another rank ended, or did not come in time."""


class Group:
    """One process alone. Tensors are on the rank's device; every rank makes the same calls in the same order."""

    rank = 0
    size = 1
    name = "nothing"

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' ``x``; may be ``x`` itself, overwritten."""
        return x

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, ops: Ops
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`reference.add_rms_norm` of the sum of the ranks' ``x``."""
        return ops.add_rms_norm(self.all_reduce(x), residual, weight, eps)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """``x[..., N]`` of all ranks side by side: ``[..., size * N]``."""
        return x

    def broadcast_(self, x: torch.Tensor) -> None:
        """Overwrites ``x`` with that of rank 0."""

    def least(self, value: int) -> int:
        """The smallest ``value`` of all ranks."""
        return value

    def abort(self) -> None:
        """Lets go of collectives that wait on the device for a rank that is gone; may be called from any thread."""

    def close(self) -> None:
        """Ends the connections."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self


SINGLE = Group()

_current: Group = SINGLE


def current() -> Group:
    """The group that layers built now belong to."""
    return _current


@contextmanager
def use(group: Group) -> Iterator[None]:
    """Makes ``group`` the current one while a model is built."""
    global _current
    before, _current = _current, group
    try:
        yield
    finally:
        _current = before


class TorchGroup(Group):
    """Ranks joined by a process group of torch.distributed: gloo on CPUs, NCCL on NVIDIA GPUs."""

    def __init__(
        self, backend: Any, rank: int, size: int, device: torch.device, peers: PeerMemory | None = None
    ) -> None:
        from torch.distributed import distributed_c10d

        c10d: Any = distributed_c10d  # whose stubs lack some of its options
        self.rank, self.size, self._device = rank, size, device
        self._backend, self._peers = backend, peers
        self.name = str(backend.name()) + (", and peer memory" if peers is not None else "")
        self._sum, self._min = c10d.AllreduceOptions(), c10d.AllreduceOptions()
        self._min.reduceOp = c10d.ReduceOp(c10d.ReduceOp.MIN)
        self._from_first = c10d.BroadcastOptions()
        self._from_first.rootRank = 0
        self._gather = c10d.AllgatherOptions()
        for options in (self._sum, self._min, self._from_first, self._gather):
            options.asyncOp = False  # on the current stream, so that a graph captures it like any kernel

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        if self._peers is not None and self._peers.takes(x):
            return self._peers.sum(x)
        if not x.is_meta:  # a model is traced without memory
            self._wait(lambda: self._backend.allreduce([x], self._sum))
        return x

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, ops: Ops
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._peers is not None and self._peers.takes(x):
            return self._peers.add_rms_norm(x.contiguous(), residual.contiguous(), weight, eps)
        return super().add_rms_norm(x, residual, weight, eps, ops)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        if self._peers is not None and self._peers.takes(x):
            return self._peers.gather(x.contiguous())
        parts = x.new_empty(self.size * x.numel())
        if not x.is_meta:
            self._wait(lambda: self._backend._allgather_base(parts, x.reshape(-1), self._gather))
        return parts.view(self.size, *x.shape).movedim(0, -2).flatten(-2)

    def broadcast_(self, x: torch.Tensor) -> None:
        self._wait(lambda: self._backend.broadcast([x], self._from_first))

    def least(self, value: int) -> int:
        x = torch.tensor([value], dtype=torch.int64, device=self._device)
        self._wait(lambda: self._backend.allreduce([x], self._min))
        return int(x.item())

    def abort(self) -> None:
        if self._device.type == "cuda":
            self._backend.abort()

    def close(self) -> None:
        if self._device.type == "cuda":
            self._backend.abort()  # to be polite takes all ranks, and some may be gone
        else:
            self._backend.shutdown()

    def _wait(self, start: Callable[[], Any]) -> None:
        """On a GPU the stream waits, on a CPU this process."""
        try:
            work = start()
            if work is not None:
                work.wait()
        except RuntimeError as error:
            raise LostPeer(str(error)) from error


def connect(rank: int, size: int, device: torch.device, folder: Path, seconds: float) -> Group:
    """Joins the ranks that meet in ``folder``; blocks until all are there. Collectives fail after ``seconds``."""
    from torch import distributed

    made: Any = distributed  # whose stubs lack these classes
    limit = timedelta(seconds=seconds)
    store = made.FileStore(str(folder / "ranks"), size)
    store.set_timeout(limit)
    if device.type == "cuda":
        options = made.ProcessGroupNCCL.Options()
        options._timeout = limit
        backend = made.ProcessGroupNCCL(store, rank, size, options)
    else:
        options = made.ProcessGroupGloo._Options()
        options._devices = [made.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._timeout = limit
        backend = made.ProcessGroupGloo(store, rank, size, options)
    group = TorchGroup(backend, rank, size, device)
    group.least(0)  # connects now, not in the first step
    if device.type != "cuda":
        return group
    peers = _peers(made.PrefixStore("peers", store), rank, size, device)
    return TorchGroup(backend, rank, size, device, peers if group.least(int(peers is not None)) else None)


def _peers(store: Any, rank: int, size: int, device: torch.device) -> PeerMemory | None:
    try:
        return peer_memory(store, rank, size, device)
    except (RuntimeError, ImportError, AttributeError) as error:
        get_logger().warning("rank %d: sums go through NCCL alone: %s", rank, error)
        return None
