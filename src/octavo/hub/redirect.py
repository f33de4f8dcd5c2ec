"""Other names for models: ``OCTAVO_MODEL_REDIRECT_PATH`` is a file that says what to take in a name's place.

It is a JSON object, or has lines of a name, blanks and what is meant: a path or another repo id, for instance where a
site keeps a model. Lines of another form are passed over.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Final

from octavo.errors import ConfigError
from octavo.log import get_logger

VARIABLE: Final = "OCTAVO_MODEL_REDIRECT_PATH"


def redirected(name: str) -> str:
    """What ``name`` stands for, itself if nothing says otherwise; raises `ConfigError` for a file that is not there."""
    path = os.environ.get(VARIABLE)
    meant = _table(path).get(name, name) if path else name
    if meant != name:
        get_logger().info("model: %s stands for %s, by %s", name, meant, path)
    return meant


@functools.lru_cache(maxsize=1)
def _table(path: str) -> dict[str, str]:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{VARIABLE} is {path}, which cannot be read: {error}.", "Correct or unset it.") from None
    try:
        value = json.loads(text)
        found = list(value.items()) if isinstance(value, dict) else []
    except ValueError:
        found = [(pair[0], pair[1]) for line in text.splitlines() if len(pair := line.split(maxsplit=1)) == 2]
    return {name: meant.strip() for name, meant in found if isinstance(meant, str) and meant.strip()}
