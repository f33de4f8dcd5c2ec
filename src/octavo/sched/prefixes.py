"""What sequences share: pages that are found by key, and pages that one of them computes while others wait for it."""

from __future__ import annotations

from array import array
from bisect import bisect
from collections.abc import Iterable

from octavo.cache.pages import Page, PagePool
from octavo.cache.prefix import page_key
from octavo.sched.sequence import SequenceState


class Prefixes:
    """The keys of sequences' pages in ``pool``; without ``enabled`` nothing is found and nothing offered.

    Who waits for a page is not looked at before it is there, or will not be: a step costs the same however many
    requests wait for one prefix. Such requests are what `publish`, `release` and `forget` return.
    """

    def __init__(self, pool: PagePool, page_size: int, hash_key: bytes, *, enabled: bool) -> None:
        self._pool = pool
        self._page_size = page_size
        self._hash_key = hash_key
        self._enabled = enabled
        self._claims: dict[bytes, SequenceState] = {}  # key -> the running sequence that computes that page
        self._waiters: dict[bytes, list[SequenceState]] = {}  # key of a claim -> who waits for it

    def find(self, seq: SequenceState) -> tuple[list[Page], bytes | None]:
        """The pages that ``seq`` can reuse, and the key of one that it should `wait` for as another computes it."""
        if not self._enabled or seq.sampling.whole_prompt:
            return [], None
        self._extend_keys(seq, seq.known)
        usable = (seq.known - 1) // self._page_size  # at least one token is computed: its logits are needed
        keys = seq.keys[:usable]
        hit = self._pool.match(keys)
        if len(hit) == usable or keys[len(hit)] not in self._claims:
            return hit, None
        # The last key in the row of claimed ones: its page comes last.
        return hit, keys[bisect(keys, False, lo=len(hit) + 1, key=lambda key: key not in self._claims) - 1]

    def wait(self, seq: SequenceState, key: bytes) -> None:
        """``seq`` waits for the page of ``key``."""
        self._waiters.setdefault(key, []).append(seq)

    def claim(self, seq: SequenceState, first: int) -> None:
        """``seq`` computes its pages from number ``first`` on, but for those that another one does."""
        if self._enabled:
            for key in seq.keys[first:]:
                self._claims.setdefault(key, seq)

    def publish(self, seq: SequenceState) -> list[SequenceState]:
        """Offers the pages of ``seq`` that have become full and are computed."""
        full = min(seq.committed, len(seq.tokens)) // self._page_size
        if not self._enabled or full <= seq.published:
            return []
        self._extend_keys(seq, full * self._page_size)
        for index in range(seq.published, full):
            self._pool.publish(seq.pages[index], seq.keys[index])
        freed = self._unclaim(seq, seq.keys[seq.published : full])
        seq.published = full
        return freed

    def release(self, seq: SequenceState) -> list[SequenceState]:
        """``seq`` computes no more for now."""
        return self._unclaim(seq, seq.keys[seq.published :])

    def forget(self) -> list[SequenceState]:
        """Nothing computed so far, or being computed, will be found."""
        self._pool.forget()
        freed = [seq for waiters in self._waiters.values() for seq in waiters]
        self._claims.clear()
        self._waiters.clear()
        return freed

    def waiting(self) -> list[SequenceState]:
        """Who waits for a page that somebody computes, those among them that were aborted meanwhile."""
        return [seq for key in self._waiters.keys() & self._claims.keys() for seq in self._waiters[key]]

    def _unclaim(self, seq: SequenceState, keys: Iterable[bytes]) -> list[SequenceState]:
        freed: list[SequenceState] = []
        for key in keys:
            if self._claims.get(key) is seq:
                del self._claims[key]
                freed += self._waiters.pop(key, ())
        return freed

    def _extend_keys(self, seq: SequenceState, length: int) -> None:
        """Keys of pages that generation has filled; the frontend brings those of the prompt."""
        size = self._page_size
        while (len(seq.keys) + 1) * size <= min(length, len(seq.tokens)):
            start = len(seq.keys) * size
            parent = seq.keys[-1] if seq.keys else seq.salt
            seq.keys.append(page_key(self._hash_key, parent, array("i", seq.tokens[start : start + size]).tobytes()))
