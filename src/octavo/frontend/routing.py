"""Which engine a request goes to: the one that has its prefix in the cache, unless that one is much busier.

The keys of a prompt's pages (`cache.prefix`) say what it shares with others. The table remembers, for the keys of a
prompt's pages 1, 2, 4, 8, … and the last, which engine it went to; of a new prompt the deepest page that is known
decides. So a conversation goes where its last turn went, whatever it shares with others, at a dozen entries a prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import msgspec

from octavo.cache.prefix import split_keys
from octavo.types import EngineInfo

TABLE_SIZE = 100_000  # entries, of about 150 bytes
SLACK = 0.25  # of a batch: by so much more may an engine have to do and still get the requests of its prefixes


class Router:
    """``slack``: so many more requests than the least busy engine may one have and still get those of its prefixes."""

    def __init__(self, slack: int, *, table_size: int = TABLE_SIZE) -> None:
        self._slack = slack
        self._table: OrderedDict[bytes, int] = OrderedDict()
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
        chosen = next((self._table[key] for key in reversed(keys) if key in self._table), least)
        load, lowest = loads[chosen], loads[least]
        if load is None or lowest is None or load - lowest > self._slack:
            chosen = least
        self._remember(keys, chosen)
        self._last = chosen
        return chosen

    def forget(self, engine: int | None = None) -> None:
        """Drops what is known of an engine whose cache is gone; None: of all."""
        for key in [key for key, index in self._table.items() if engine in (None, index)]:
            del self._table[key]

    def _least_busy(self, loads: Sequence[float | None]) -> int | None:
        """Among equals the next one in turn, so that an idle server warms all of its engines."""
        count = len(loads)
        turn = [(self._last + 1 + i) % count for i in range(count)]
        running = [(load, place, i) for place, i in enumerate(turn) if (load := loads[i]) is not None]
        return min(running)[2] if running else None

    def _remember(self, keys: Sequence[bytes], engine: int) -> None:
        for depth in _depths(len(keys)):
            self._table[keys[depth - 1]] = engine
            self._table.move_to_end(keys[depth - 1])
        while len(self._table) > self._table_size:
            self._table.popitem(last=False)


def _depths(pages: int) -> list[int]:
    """1, 2, 4, 8, … below ``pages``, and ``pages``."""
    return [1 << i for i in range((pages - 1).bit_length())] + [pages] if pages else []


def slack_of(info: EngineInfo) -> int:
    """The `Router`'s slack among engines that are like ``info``."""
    return max(2, int(SLACK * info.max_num_seqs))


def together(infos: Sequence[EngineInfo]) -> EngineInfo:
    """Several engines described as one: what every one of them can take, and what they hold in sum."""
    return msgspec.structs.replace(
        infos[0],
        max_model_len=min(info.max_model_len for info in infos),
        max_num_seqs=sum(info.max_num_seqs for info in infos),
        num_pages=sum(info.num_pages for info in infos),
    )
