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
    for attention (one table where both are the same). ``last_token[r]``: its newest sampled token, on the device only.
    ``known[r]``: its tokens at its start, on the host. One more row, the dummy, belongs to nobody: padding uses it; its
    pages are all ``dummy_page``.
    """

    def __init__(self, rows: int, max_len: int, page_size: int, dummy_page: int, device: torch.device) -> None:
        self.max_len = max_len
        self.dummy_row, self.dummy_page = rows, dummy_page
        max_pages = -(-max_len // page_size)
        self.dummy_entry = rows * max_pages  # the dummy row's first entry of the flat table
        self.host_table: Ints = np.full((rows + 1, max_pages), dummy_page, np.int32)
        self._shared = device.type == "cpu"
        self.block_table = torch.from_numpy(self.host_table).to(device)
        self.last_token = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self.known: dict[int, Ints] = {}
        self._known_len: Ints = np.zeros(rows + 1, np.int32)

    def apply(self, plan: StepPlan) -> tuple[Ints, Ints]:
        """Takes the plan's deltas; returns (flat indices, values) of the block table for the device to take too."""
        for row in plan.ended:
            self.known.pop(row, None)
        changes = [(start.row, 0, start.pages) for start in plan.starts]
        changes += [(grant.row, grant.first, grant.ids) for grant in plan.pages]
        for start in plan.starts:
            self.known[start.row] = np.asarray(start.tokens, np.int32)
            self._known_len[start.row] = len(start.tokens)
        if not changes:
            return NONE, NONE
        width = self.host_table.shape[1]
        for row, first, ids in changes:
            self.host_table[row, first : first + len(ids)] = ids
        if self._shared:
            return NONE, NONE
        at = [np.arange(row * width + first, row * width + first + len(ids)) for row, first, ids in changes]
        indices = np.concatenate(at).astype(np.int32)
        return indices, self.host_table.reshape(-1)[indices]

    def have_sampled(self, rows: Ints, computed: Ints) -> npt.NDArray[np.bool_]:
        """Whether the token at ``computed`` of each of ``rows`` is one that was sampled since its start."""
        return computed >= self._known_len[rows]

    def feed(self, plan: StepPlan, rows: Ints, computed: Ints, token_ids: Ints, fed_rows: Ints) -> None:
        """For single tokens at ``computed`` of ``rows``, the first items of ``plan``: sets ``fed_rows`` to the row
        where the input is its last sampled token, whose value only the device knows, to -1 and ``token_ids`` elsewhere.
        """
        fed_rows[:] = np.where(self.have_sampled(rows, computed), rows, -1)
        for b in np.flatnonzero(fed_rows < 0):
            token_ids[b] = self.known[int(rows[b])][computed[b]]
        for item, tokens in plan.inputs.items():
            if item < len(rows):
                token_ids[item], fed_rows[item] = tokens[0], -1


NONE: Ints = np.zeros(0, np.int32)
