"""The pool of KV pages: reference counts, a free list in order of last use, an index by key.

    taken                        free, head is evicted first, keyless pages before all
    ┌────────┐ refs > 0          ┌────────┐   ┌────────┐   ┌────────┐
    │ page 7 │                   │ page 3 │ ⇄ │ page 9 │ ⇄ │ page 1 │   refs == 0
    └────────┘                   └────────┘   └────────┘   └────────┘
         by_key: {k7: 7, k9: 9, k1: 1}          no key       key k9       key k1

Invariants (`check` asserts them): a page is in the free list exactly when nobody refers to it; a key maps to exactly
one page and that page knows it; a free page keeps its key, and its content, until it is taken for something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Page:
    """One page. ``prev`` and ``next`` are meaningful only while it is free."""

    __slots__ = ("id", "key", "next", "prev", "refs")

    def __init__(self, id: int) -> None:
        self.id = id
        self.refs = 0
        self.key: bytes | None = None
        self.prev: Page = self
        self.next: Page = self


class PagePool:
    """``count`` pages with ids 0 … count-1."""

    def __init__(self, count: int) -> None:
        self.pages = [Page(i) for i in range(count)]
        self._by_key: dict[bytes, Page] = {}
        self._head = Page(-1)  # sentinel of the circular free list: head.next is evicted first
        self.num_free = 0
        for page in self.pages:
            self._add_free(page)

    def match(self, keys: Sequence[bytes]) -> list[Page]:
        """The longest run of known pages for ``keys``, from the first on. Takes no reference."""
        found: list[Page] = []
        for key in keys:
            page = self._by_key.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def reuse(self, pages: Iterable[Page]) -> None:
        """Adds a reference to each of ``pages``, which `match` returned."""
        for page in pages:
            if page.refs == 0:
                self._unlink(page)
            page.refs += 1

    def take(self, count: int) -> list[Page]:
        """``count`` pages for new content, least recently used first; the caller has checked `num_free`."""
        if count > self.num_free:
            raise ValueError(f"{count} pages wanted, {self.num_free} free")
        taken = []
        for _ in range(count):
            page = self._head.next
            self._unlink(page)
            if page.key is not None:
                del self._by_key[page.key]
                page.key = None
            page.refs = 1
            taken.append(page)
        return taken

    def publish(self, page: Page, key: bytes) -> None:
        """Makes a full, computed page findable. If another page has the key already, that one stays the known one."""
        if page.key is None and key not in self._by_key:
            page.key = key
            self._by_key[key] = page

    def release(self, pages: Sequence[Page]) -> None:
        """Drops a reference to each page of one sequence, last page first, so that leaves are evicted before roots."""
        for page in reversed(pages):
            page.refs -= 1
            if page.refs == 0:
                self._add_free(page)

    def forget(self) -> None:
        """Drops every key: nothing computed so far will be found again."""
        for page in self._by_key.values():
            page.key = None
        self._by_key.clear()

    def check(self) -> None:
        """Asserts the invariants drawn above; for tests and debugging."""
        free, page = set(), self._head.next
        while page is not self._head:
            assert page.refs == 0, f"page {page.id} is free with {page.refs} references"
            assert page.next.prev is page and page.prev.next is page, f"page {page.id} is linked badly"
            free.add(page.id)
            page = page.next
        assert len(free) == self.num_free, f"{len(free)} pages in the free list, {self.num_free} counted"
        for page in self.pages:
            assert (page.refs == 0) == (page.id in free), f"page {page.id}: {page.refs} references"
            assert page.key is None or self._by_key.get(page.key) is page, f"page {page.id} lost its key"
        assert all(page.key == key for key, page in self._by_key.items()), "a key points at another's page"

    def _add_free(self, page: Page) -> None:
        """To the tail; a page without a key holds nothing worth keeping and goes to the head."""
        after = self._head if page.key is None else self._head.prev
        page.prev, page.next = after, after.next
        after.next.prev = page
        after.next = page
        self.num_free += 1

    def _unlink(self, page: Page) -> None:
        page.prev.next, page.next.prev = page.next, page.prev
        self.num_free -= 1
