"""Memory that the GPUs of one host write to each other, for sums that do without NCCL. Nothing is multicast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import torch

if TYPE_CHECKING:
    from octavo.kernels.peers_triton import PeerMemory


def peer_memory(store: Any, rank: int, ranks: int, device: torch.device) -> PeerMemory:
    """Shares a buffer with each other rank, through ``store``; a collective call.

    Raises RuntimeError or ImportError where the GPUs cannot reach each other's memory, or without Triton.
    """
    from octavo.kernels.peers_triton import PeerMemory, buffer_bytes

    for other in range(torch.cuda.device_count()):
        if other != device.index and not torch.cuda.can_device_access_peer(device, other):
            raise RuntimeError(f"GPU {device.index} cannot reach the memory of GPU {other}")
    memory = torch.zeros(buffer_bytes(ranks), dtype=torch.uint8, device=device)
    torch.cuda.synchronize(device)  # it is zero before any rank sees it
    mapped = [memory if other == rank else None for other in range(ranks)]
    storage: Any = memory.untyped_storage()  # of its methods for sharing there are no stubs
    _, *shared = storage._share_cuda_()
    store.set(str(rank), msgspec.msgpack.encode((shared, memory.storage_offset())))
    for other in range(ranks):
        if other != rank:
            theirs, offset = msgspec.msgpack.decode(store.get(str(other)))
            # Opened on this rank's GPU, which then writes over the link; the number in front is that of the device.
            storage = type(storage)._new_shared_cuda(device.index, *theirs)
            mapped[other] = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)[offset:]
    starts = [tensor.data_ptr() for tensor in mapped if tensor is not None]
    return PeerMemory(rank, torch.tensor(starts, dtype=torch.int64, device=device), mapped)
