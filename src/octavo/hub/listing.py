"""What a repo has at one commit, out of one answer of the Hub.

Before it fetches anything, the Hub's client asks for the files of a commit, unless its cache has them: since 2.0 it
keeps them as ``trees/<commit>.json`` in the repo's folder. `store` puts there what the Hub has told already, so that it
is asked once. A client that does not know this format asks again, which costs a request and changes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_FORMAT: Final = 1  # huggingface_hub 2.4, _tree_cache.py


def store(folder: Path, commit: str, files: Sequence[RepoSibling]) -> None:
    """Notes in ``folder``, that of the repo in the cache, that ``commit`` has ``files``, if their hashes are known."""
    if not re.fullmatch(r"[0-9a-f]{40}", commit) or any(f.size is None or f.blob_id is None for f in files):
        return
    path = folder / "trees" / f"{commit}.json"
    text = json.dumps({"format_version": _FORMAT, "files": {file.rfilename: _entry(file) for file in files}}, indent=1)
    with contextlib.suppress(OSError):  # a cache that cannot be written to is reported by the download
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        new.write_text(text, encoding="utf-8")
        new.replace(path)


def _entry(file: RepoSibling) -> dict[str, Any]:
    entry: dict[str, Any] = {"size": file.size, "blob_id": file.blob_id}
    if file.lfs is not None:
        entry |= {"lfs_sha256": file.lfs.sha256, "lfs_size": file.lfs.size}
    return entry
