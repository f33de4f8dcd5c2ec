"""What the device remembers of each row between steps, so that a plan needs to carry only what changed."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from octavo.types import StepPlan

Ints = npt.NDArray[np.int32]


class Tables:
    """A request owns row r of every table from its start to its end.

    ``block_table[r, i]``: the page of its tokens i * page_size …; kept on the host to compute slots, and on the device
    for attention. ``last_token[r]``: its newest sampled token, on the device only. ``known[r]``: its tokens at its
    start, on the host.
    """

    def __init__(self, rows: int, max_pages: int, device: torch.device) -> None:
        self.host_table: Ints = np.zeros((rows, max_pages), np.int32)
        self.block_table = torch.zeros((rows, max_pages), dtype=torch.int32, device=device)
        self.last_token = torch.zeros(rows, dtype=torch.int32, device=device)
        self.known: dict[int, Ints] = {}

    def apply(self, plan: StepPlan) -> tuple[Ints, Ints]:
        """Takes the plan's deltas; returns (flat indices, values) of the block table for the device to take too."""
        for row in plan.ended:
            self.known.pop(row, None)
        changes = [(start.row, 0, start.pages) for start in plan.starts]
        changes += [(grant.row, grant.first, grant.ids) for grant in plan.pages]
        for start in plan.starts:
            self.known[start.row] = np.asarray(start.tokens, np.int32)
        if not changes:
            return _NONE, _NONE
        width = self.host_table.shape[1]
        for row, first, ids in changes:
            self.host_table[row, first : first + len(ids)] = ids
        at = [np.arange(row * width + first, row * width + first + len(ids)) for row, first, ids in changes]
        indices = np.concatenate(at).astype(np.int32)
        return indices, self.host_table.reshape(-1)[indices]


_NONE: Ints = np.zeros(0, np.int32)
