"""Which engine a request goes to: one that has its prefix in the cache, unless that one is much busier.

The keys of a prompt's pages (`cache.prefix`) say what it shares with others. The table remembers, for the keys of a
prompt's pages 1, 2, 4, 8, … and the last, which engines it went to; of a new prompt the deepest page that is known
decides. So a conversation goes where its last turn went, whatever it shares with others, at a dozen entries a prompt;
and what all share is soon known to be everywhere.

The longer the known prefix, the more may its engine be busier than the least busy one: computing `TOKENS` of a prompt
again is held to be as bad as one more request beside oneself.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from octavo.cache.prefix import split_keys
from octavo.types import EngineInfo

TABLE_SIZE = 100_000  # entries, of about 150 bytes
SLACK = 0.25  # of a batch: no prefix is worth more requests beside oneself
TOKENS = 128


class Router:
    """``slack``: so many more requests than the least busy engine may one have at most and still get those of its
    prefixes; ``page_size`` is in tokens."""

    def __init__(self, slack: int, page_size: int, *, table_size: int = TABLE_SIZE) -> None:
        self._slack = slack
        self._page_size = page_size
        self._table: OrderedDict[bytes, int] = OrderedDict()  # key of a page -> engines, as bits
        self._table_size = table_size
        self._last = -1

    def pick(self, page_hashes: bytes, loads: Sequence[float | None]) -> int | None:
        """The index of the engine for a prompt with these page keys; None if there is none.

        ``loads`` are the requests that each engine has; None for one that is not running.
        """
        least = self._least_busy(loads)
        if least is None:
            return None
        keys = split_keys(page_hashes)
        depth = next((depth for depth in range(len(keys), 0, -1) if keys[depth - 1] in self._table), 0)
        chosen = self._holder(self._table[keys[depth - 1]], loads, least, depth) if depth else least
        self._remember(keys, chosen)
        self._last = chosen
        return chosen

    def _holder(self, engines: int, loads: Sequence[float | None], least: int, depth: int) -> int:
        """The least busy of ``engines``, which have ``depth`` pages of the prompt, if it is not too busy for that."""
        holders = [(load, i) for i, load in enumerate(loads) if load is not None and engines >> i & 1]
        load, holder = min(holders, default=(math.inf, least))
        allowed = min(self._slack, depth * self._page_size / TOKENS)
        return holder if load - (loads[least] or 0) <= allowed else least

    def forget(self, engine: int | None = None) -> None:
        """Drops what is known of an engine whose cache is gone; None: of all."""
        gone = -1 if engine is None else 1 << engine
        self._table = OrderedDict((key, left) for key, engines in self._table.items() if (left := engines & ~gone))

    def _least_busy(self, loads: Sequence[float | None]) -> int | None:
        """Among equals the next one in turn, so that an idle server warms all of its engines."""
        count = len(loads)
        turn = [(self._last + 1 + i) % count for i in range(count)]
        running = [(load, place, i) for place, i in enumerate(turn) if (load := loads[i]) is not None]
        return min(running)[2] if running else None

    def _remember(self, keys: Sequence[bytes], engine: int) -> None:
        for depth in _depths(len(keys)):
            key = keys[depth - 1]
            self._table[key] = self._table.get(key, 0) | 1 << engine
            self._table.move_to_end(key)
        while len(self._table) > self._table_size:
            self._table.popitem(last=False)


def _depths(pages: int) -> list[int]:
    """1, 2, 4, 8, … below ``pages``, and ``pages``."""
    return [1 << i for i in range((pages - 1).bit_length())] + [pages] if pages else []


def router_for(info: EngineInfo) -> Router:
    """The router among engines that are like ``info``."""
    return Router(max(2, int(SLACK * info.max_num_seqs)), info.page_size)


def together(infos: Sequence[EngineInfo]) -> EngineInfo:
    """Several engines described as one: what every one of them can take, and what they hold in sum."""
    return msgspec.structs.replace(
        infos[0],
        max_model_len=min(info.max_model_len for info in infos),
        max_num_seqs=sum(info.max_num_seqs for info in infos),
        num_pages=sum(info.num_pages for info in infos),
    )
