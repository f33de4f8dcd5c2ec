"""What a killed download has left is taken up where it stopped.

The Hub's client writes each file into ``blobs/<etag>.<random>.incomplete``, one for each process, goes on with it after
a broken connection, and leaves it when the process is killed; the next process starts anew (huggingface_hub 2.4). Here
such a file is completed and checked before the client looks for it. The ETag of a large file is its SHA-256; one of Xet
storage is written by a library in an order of its own, so what is left of it is removed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from octavo.log import get_logger

if TYPE_CHECKING:
    from octavo.hub.repo import Repo

STREAMS: Final = 8  # files that are completed together, as many as the client fetches
_QUIET: Final = 1.0  # seconds; a file that was written to since is somebody's, though the lock says otherwise
_CHUNK: Final = 1 << 20


def finish(repo: Repo, commit: str, names: Iterable[str]) -> None:
    """Completes those of ``names`` whose download was killed; raises `ModelError` as a download does."""
    if not any((repo.folder() / "blobs").glob("*.incomplete")):
        return
    lacking = [name for name in names if not (repo.folder() / "snapshots" / commit / name).exists()]
    with ThreadPoolExecutor(STREAMS, "octavo-resume") as pool:
        list(pool.map(lambda name: _finish(repo, commit, name), lacking))


def _finish(repo: Repo, commit: str, name: str) -> None:
    import huggingface_hub as hub

    utils: Any = hub.utils
    found = repo.metadata(name, commit)
    etag, size = found.etag, found.size
    blobs = repo.folder() / "blobs"
    if etag is None or size is None or not _left(blobs, etag):
        return
    lock = repo.folder().parent / ".locks" / repo.folder().name / f"{etag}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with utils.WeakFileLock(lock):  # whoever downloads this file holds it
        parts = _left(blobs, etag)
        if not parts:
            return
        longest = parts.pop()
        for part in parts:
            part.unlink()
        if found.xet_file_data is not None or len(etag) != 64 or (blobs / etag).exists():
            longest.unlink()
            return
        get_logger().info("%s: going on at %d of %d bytes", name, longest.stat().st_size, size)
        repo.call(lambda: _append(repo, commit, name, longest, size))
        if _sha256(longest) == etag:
            longest.replace(blobs / etag)
        else:  # not a beginning of this file: the client fetches it anew
            longest.unlink()


def _left(blobs: Path, etag: str) -> list[Path]:
    """What is left of a file, the shortest first."""
    parts = [part for part in blobs.glob(f"{etag}.*incomplete") if time.time() - part.stat().st_mtime > _QUIET]
    return sorted(parts, key=lambda part: part.stat().st_size)


def _append(repo: Repo, commit: str, name: str, part: Path, size: int) -> None:
    import huggingface_hub as hub

    utils: Any = hub.utils
    start = part.stat().st_size
    if start >= size:
        return
    with (
        part.open("ab") as out,
        utils.tqdm(total=size, initial=start, unit="B", unit_scale=True, desc=name) as bar,
        repo.stream(name, commit, start, size) as chunks,
    ):
        for chunk in chunks:
            out.write(chunk)
            bar.update(len(chunk))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            digest.update(data)
    return digest.hexdigest()
