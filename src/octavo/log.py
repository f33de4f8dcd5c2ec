"""One logger, one line a decision, as text or as JSON, without secrets."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time

FORMAT = "OCTAVO_LOG_FORMAT"
"""The environment variable that says "text" or "json", for this process and those that it starts."""

PROCESS = "OCTAVO_LOG_PROCESS"
"""The environment variable with the name of this process, where there are several of its kind: "engine 1"."""

OTHERS = ("asyncio", "uvicorn.error")
"""Loggers of libraries whose errors come in the same format."""

START = "OCTAVO_LOG_START"
"""The environment variable with the time from which all processes of one command count."""

_START = time.monotonic()
# Bearer tokens, keys of well-known services, credentials in URLs, and whatever is assigned to a name that says secret.
_SECRET = re.compile(
    r"(?P<name>\bbearer\s+|\b[\w-]*(?:api[_-]?key|token(?!s)|secret|password)[\w-]*[\"']?\s*[=:]\s*[\"']?)"
    r"[^\s\"',;&@)}\]]{6,}"
    r"|(?P<user>://[^/\s:@]*:)[^/\s@]+(?=@)"
    r"|\b(?:hf|sk|ghp|glpat)[_-][A-Za-z0-9_-]{8,}",
    re.IGNORECASE,
)


class _Format(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        since = time.monotonic() - float(os.environ.get(START, _START))
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        name = os.environ.get(PROCESS)
        text = f"octavo {since:7.2f}s  {f'{name}: ' if name else ''}{level}{record.getMessage()}"
        return redacted(f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text)


class _Json(logging.Formatter):
    """One object a line; ``time`` is seconds since 1970, ``process`` its id, ``name`` that of `PROCESS`."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "message": redacted(record.getMessage()),
            "process": record.process,
        }
        if PROCESS in os.environ:
            entry["name"] = os.environ[PROCESS]
        if record.exc_info:
            entry["exception"] = redacted(self.formatException(record.exc_info))
        return json.dumps(entry, ensure_ascii=False)


def redacted(text: str) -> str:
    """``text`` with what looks like a key, a token or a password replaced by ``***``."""
    return _SECRET.sub(lambda found: f"{found['name'] or found['user'] or ''}***", text)


def get_logger() -> logging.Logger:
    """The package's logger; silent until `configure` is called, as a library's should be."""
    return logging.getLogger("octavo")


def configure(level: str = "info") -> None:
    """Logs to standard error, in the format of the environment variable `FORMAT`. Called by the command line only."""
    os.environ.setdefault(START, repr(_START))
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if os.environ.get(FORMAT) == "json" else _Format())
    get_logger().setLevel(level.upper())
    for name in ("octavo", *OTHERS):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
