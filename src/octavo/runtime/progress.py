"""How far loading the weights has come: a bar on a terminal, elsewhere a line of the log now and then."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any, Final, Self, TextIO

from octavo.log import get_logger

EVERY: Final = 5.0  # seconds between two lines; a load that is shorter than that has none


class LoadProgress:
    """Called with the share of ``nbytes`` that is there, 0 to 1. Use it as a context.

    Nothing is shown if the log is quieter than info, or without ``shown``. ``clock`` gives seconds; ``stream`` is where
    a terminal would be.
    """

    def __init__(
        self,
        nbytes: int,
        *,
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
    ) -> None:
        self._nbytes, self._clock = nbytes, clock
        self._shown = shown and get_logger().isEnabledFor(logging.INFO)
        self._stream = sys.stderr if stream is None else stream
        self._bar: Any = None
        self._start = self._told = clock()

    def __enter__(self) -> Self:
        if self._shown and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._nbytes, desc="weights", unit="B", unit_scale=True, leave=False, file=self._stream
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, share: float) -> None:
        done, now = share * self._nbytes, self._clock()
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
        elif self._shown and now - self._told >= EVERY:
            self._told = now
            rate = done / max(now - self._start, 1e-9)
            get_logger().info(
                "weights: %d %%, %.2f of %.2f GB, %.2f GB/s", 100 * share, done / 1e9, self._nbytes / 1e9, rate / 1e9
            )
