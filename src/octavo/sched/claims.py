"""Pages that running sequences are computing, and the requests that wait for them instead of computing them again."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Sequence

from octavo.sched.sequence import SequenceState


class Claims:
    """The running sequence that computes the page of a key, and those that `wait` for it.

    Who waits here is looked at once more, when the claim is released: a step costs the same however many requests wait
    for one prefix.
    """

    def __init__(self) -> None:
        self._owners: dict[bytes, SequenceState] = {}
        self._waiters: dict[bytes, list[SequenceState]] = {}  # their keys are among those of `_owners`

    def add(self, seq: SequenceState, keys: Iterable[bytes]) -> None:
        """``seq`` computes the pages of ``keys``, but for those that another one does."""
        for key in keys:
            self._owners.setdefault(key, seq)

    def awaited(self, keys: Sequence[bytes], first: int) -> bytes | None:
        """Where key ``first`` of a sequence is claimed: the last key from there on that is, since it comes last."""
        if first == len(keys) or keys[first] not in self._owners:
            return None
        return keys[bisect(keys, False, lo=first + 1, key=lambda key: key not in self._owners) - 1]

    def wait(self, seq: SequenceState, key: bytes) -> None:
        """``seq`` waits for the claim of ``key``."""
        self._waiters.setdefault(key, []).append(seq)

    def release(self, seq: SequenceState, keys: Iterable[bytes]) -> list[SequenceState]:
        """``seq`` has computed the pages of ``keys``, or will not; returns who waited for them."""
        freed: list[SequenceState] = []
        for key in keys:
            if self._owners.get(key) is seq:
                del self._owners[key]
                freed += self._waiters.pop(key, ())
        return freed

    def clear(self) -> list[SequenceState]:
        """Releases every claim; returns who waited."""
        freed = [seq for waiters in self._waiters.values() for seq in waiters]
        self._owners.clear()
        self._waiters.clear()
        return freed

    def waiting(self) -> list[SequenceState]:
        """Who waits, those among them that were aborted meanwhile."""
        return [seq for key in self._waiters.keys() & self._owners.keys() for seq in self._waiters[key]]

    def __len__(self) -> int:
        return len(self._owners)
