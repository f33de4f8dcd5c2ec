"""One logger, one line a decision."""

from __future__ import annotations

import logging
import sys
import time

_START = time.perf_counter()


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        since = time.perf_counter() - _START
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        text = f"octavo {since:7.2f}s  {level}{record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


def get_logger() -> logging.Logger:
    """The package's logger; silent until `configure` is called, as a library's should be."""
    return logging.getLogger("octavo")


def configure(level: str = "info") -> None:
    """Logs to standard error. Called by the command line only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Format())
    logger = get_logger()
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())
