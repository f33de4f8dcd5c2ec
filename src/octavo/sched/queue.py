"""Requests that wait for room, the first in line first."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from octavo.sched.sequence import SequenceState, Status


class Queue:
    """By priority, then arrival. A request that has ended, or runs, since it was pushed is passed over.

    Nothing is looked for in it, so it may hold more than are waiting.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], SequenceState]] = []

    def push(self, sequences: Iterable[SequenceState]) -> None:
        """They wait from now on, or again."""
        for seq in sequences:
            heapq.heappush(self._heap, (seq.order, seq))

    def first(self) -> SequenceState | None:
        """The first in line, which stays there; None if nobody waits."""
        while self._heap and self._heap[0][1].status is not Status.WAITING:
            heapq.heappop(self._heap)
        return self._heap[0][1] if self._heap else None

    def pop(self) -> SequenceState | None:
        """The first in line, which leaves it."""
        seq = self.first()
        if seq is not None:
            heapq.heappop(self._heap)
        return seq

    def waiting(self) -> list[SequenceState]:
        """Everybody, in no order."""
        return [seq for _, seq in self._heap if seq.status is Status.WAITING]
