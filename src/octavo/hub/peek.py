"""A look at a model without its weights: what `hub.plan` needs, in seconds, whatever the model's size.

Of a repo that is not in the cache only configs and the headers of weight files are fetched, by range requests. Each
weight file is then a stand-in: a sparse file of the true size with the true header in front of a hole, so that the
readers of `hub.checkpoint` and `hub.gguf` take it as it is. Nothing goes into the cache.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Unpack

from octavo.errors import ModelError
from octavo.hub import gguf, safetensors_file
from octavo.hub.quantised import settings
from octavo.hub.repo import Repo, Wanted
from octavo.hub.resolve import locate
from octavo.hub.source import CONFIGS, Source, named_by_index

READERS: Final = 8  # files that are looked at together
SAFETENSORS_START: Final = 1 << 17  # bytes; the headers of nearly all files are shorter
GGUF_START: Final = 1 << 23  # bytes; the vocabulary is in the header
_CONFIGS: Final = (*CONFIGS, "generation_config.json", *settings.FILES)


@dataclass(frozen=True)
class Peeked:
    """``source`` may hold stand-ins. ``downloads`` are (file, bytes) that serving would fetch, the largest first."""

    source: Source
    downloads: tuple[tuple[str, int], ...] = ()


@contextlib.contextmanager
def peek(name: str, **wanted: Unpack[Wanted]) -> Iterator[Peeked]:
    """What ``name`` means, as `hub.resolve.resolve` finds it, readable as long as the context lasts."""
    found = locate(name, **wanted)
    if isinstance(found, Source):
        yield Peeked(found)
        return
    repo, snapshot, missing = found
    import huggingface_hub as hub

    if hub.is_offline_mode():
        yield Peeked(repo.download(snapshot, missing))  # which takes what is there, or says what is not
        return
    commit, sizes = repo.listing()
    with tempfile.TemporaryDirectory(prefix="octavo-plan-") as temporary:
        folder = Path(temporary)
        looked_at = [file for file in sizes if _is_weights(file) or file in _CONFIGS or file.endswith(".index.json")]
        with ThreadPoolExecutor(READERS, "octavo-peek") as pool:
            list(pool.map(lambda file: _fetch(repo, commit, file, sizes[file], snapshot, folder), looked_at))
        needed = {file: sizes[file] for file in named_by_index(sizes, folder)}
        yield Peeked(_source(repo, commit, needed, folder), _downloads(needed, snapshot))


def _is_weights(file: str) -> bool:
    return file.endswith((".safetensors", ".bin", ".gguf"))


def _fetch(repo: Repo, commit: str, file: str, size: int, snapshot: Path | None, folder: Path) -> None:
    """Makes ``file`` in ``folder``: the cached one, the whole of a config, or a stand-in for weights."""
    target = folder / file
    target.parent.mkdir(parents=True, exist_ok=True)
    if snapshot is not None and (snapshot / file).is_file():
        target.symlink_to(snapshot / file)
    elif file.endswith(".safetensors"):
        start = repo.read(file, commit, SAFETENSORS_START)
        length = 8 + min(int.from_bytes(start[:8], "little"), safetensors_file.MAX_HEADER)
        _stand_in(target, start if length <= len(start) else repo.read(file, commit, length), size)
    elif file.endswith(".gguf"):
        _fetch_gguf(repo, commit, file, size, target)
    elif _is_weights(file):
        _stand_in(target, b"", size)
    else:
        target.write_bytes(repo.read(file, commit, max(size, 1)))


def _fetch_gguf(repo: Repo, commit: str, file: str, size: int, target: Path) -> None:
    """Fetches more of the file until its header can be read: it does not say how long it is.

    The divisors of RoPE frequencies are data, but belong to the config.
    """
    count = GGUF_START
    while True:
        _stand_in(target, repo.read(file, commit, min(count, size)), size)
        try:
            tensors = gguf.read_header(target)
            break
        except ModelError:
            if count >= min(size, gguf.MAX_HEADER):
                raise
            count *= 4
    factors = tensors.get("rope_freqs.weight")
    if factors is not None:
        data = repo.read(file, commit, factors.nbytes, start=factors.offset)
        with target.open("r+b") as out:
            out.seek(factors.offset)
            out.write(data)


def _stand_in(target: Path, start: bytes, size: int) -> None:
    with target.open("wb") as out:
        out.write(start[:size])
        out.truncate(size)


def _source(repo: Repo, commit: str, sizes: dict[str, int], folder: Path) -> Source:
    reason = f"{repo.label} at {commit}: headers alone, from the Hub"
    first = next((file for file in sizes if file.endswith(".gguf")), None)
    if first is not None:
        return Source(repo.id, "gguf", folder / first, commit, f"{first} of {reason}")
    return Source(repo.id, "snapshot", folder, commit, reason)


def _downloads(sizes: dict[str, int], snapshot: Path | None) -> tuple[tuple[str, int], ...]:
    absent = [(file, size) for file, size in sizes.items() if snapshot is None or not (snapshot / file).is_file()]
    return tuple(sorted(absent, key=lambda entry: (-entry[1], entry[0])))
