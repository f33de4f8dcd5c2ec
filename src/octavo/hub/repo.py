"""One repo of the Hugging Face Hub and its snapshot in the cache: the only module that may use the network."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypedDict

from octavo.errors import ModelError
from octavo.hub import hub_errors, resume
from octavo.hub.gguf_pick import GgufPick, models
from octavo.hub.source import (
    CONFIGS,
    Source,
    has_tokenizer,
    is_ambiguous,
    missing_files,
    named_but_absent,
    named_by_index,
    wanted_files,
)
from octavo.log import get_logger

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata, ModelInfo
    from huggingface_hub.hf_api import RepoSibling

RETRY_DELAYS: Final = (0.5, 1.0, 2.0, 4.0)  # seconds before the second attempt and further ones, about
TREE_FORMAT: Final = 1  # of listings in the cache: huggingface_hub 2.4, _tree_cache.py
JITTER: Final = 0.25  # share by which they vary, so that processes that failed together do not ask together again


class Wanted(TypedDict, total=False):
    """What is wanted of a repo; each field is one of `Repo`."""

    revision: str | None
    token: str | None
    download_dir: str | None
    weights: bool
    code: bool
    load_format: str


@dataclass(frozen=True)
class Repo:
    """``gguf``: which GGUF file is wanted; None: whatever the repo has, safetensors before anything else.

    ``weights=False`` asks for config and tokenizer only; ``code=True`` for Python files, too, which runs none of them.
    ``load_format`` (see `ModelOptions`) says which weights are meant.
    """

    id: str
    gguf: GgufPick | None = None
    revision: str | None = None
    token: str | None = None
    download_dir: str | None = None
    weights: bool = True
    code: bool = False
    load_format: str = "auto"

    @property
    def label(self) -> str:
        return f"{self.id} (revision {self.revision})" if self.revision else self.id

    def cached(self) -> Path | None:
        """The snapshot folder in the cache, complete or not; no network."""
        import huggingface_hub as hub
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

        try:
            for name in ("config.json", "tokenizer.json"):
                found = hub.try_to_load_from_cache(self.id, name, cache_dir=self.download_dir, revision=self.revision)
                if isinstance(found, str):
                    return Path(found).parent
            folder = hub.snapshot_download(
                self.id,
                revision=self.revision,
                cache_dir=self.download_dir,
                local_files_only=True,
                ignore_patterns="*",  # only the folder is asked for, no file
            )
        except HFValidationError:
            raise hub_errors.no_repo_id(self.id) from None
        except LocalEntryNotFoundError:
            return None
        except OSError as error:
            raise hub_errors.hub_error(self, error, 1) or error from None
        return Path(folder)

    def missing(self, snapshot: Path) -> list[str]:
        """What the snapshot lacks: by the listing of the repo that its download left, else by what every model has.

        Another process may be filling the snapshot just now, so that some file is there says nothing of the others.
        """

        listing = self._cached_listing(snapshot.name)
        names = [] if listing is None else self.wanted(listing)
        if not names:
            here = _names_in(snapshot)
            if self.gguf is None and not models(here):
                return missing_files(snapshot, self.weights, self.load_format)
            names = self.wanted(here) or [str(self.gguf or GgufPick())]
        return [name for name in named_by_index(names, snapshot) if not (snapshot / name).is_file()]

    def _cached_listing(self, commit: str) -> list[str] | None:
        import huggingface_hub as hub
        from huggingface_hub import errors

        if not hasattr(hub, "get_cached_repo_tree"):  # before 2.0
            return None
        try:
            return [f.path for f in hub.get_cached_repo_tree(self.id, revision=commit, cache_dir=self.download_dir)]
        except errors.CachedRepoTreeNotFoundError:
            return None

    def wanted(self, names: Iterable[str]) -> list[str]:
        """Those of the repo's files that are to be there; of GGUF files only the one that is meant."""
        names = list(names)
        if self.gguf is not None:
            return self.gguf.choose(names)
        if self.load_format == "gguf":
            return GgufPick().choose(names)
        found = wanted_files(names, self.weights, self.code, self.load_format)
        has_weights = any(name.endswith((".safetensors", ".bin")) for name in wanted_files(names))
        return found if has_weights or self.load_format != "auto" else GgufPick().choose(names) or found

    def source(self, snapshot: Path, why: str) -> Source:
        """What is in the cache; ``why`` is the end of its reason."""
        reason = f"{self.label} at {snapshot.name}: {why}"
        chosen = [name for name in self.wanted(_names_in(snapshot)) if name.endswith(".gguf")]
        if chosen:
            return Source(self.id, "gguf", snapshot / chosen[0], snapshot.name, f"{chosen[0]} of {reason}")
        return Source(self.id, "snapshot", snapshot, snapshot.name, reason)

    def listing(self) -> tuple[str, dict[str, int]]:
        """(commit, the sizes of the files that are needed by name) as the Hub has them now."""
        info = self._info()
        return info.sha or "", self._needed(info)

    def _info(self) -> ModelInfo:
        """The commit and all files, with sizes and hashes: the one thing that the Hub is asked."""
        import huggingface_hub as hub

        api = hub.HfApi(token=self.token)
        info: ModelInfo = self.call(lambda: api.model_info(self.id, revision=self.revision, files_metadata=True))
        return info

    def _needed(self, info: ModelInfo) -> dict[str, int]:
        sizes = {file.rfilename: int(file.size or 0) for file in info.siblings or ()}
        names = self.wanted(sizes)
        self._check(names, sizes)
        return {name: sizes[name] for name in names}

    def download(self, snapshot: Path | None, missing: list[str]) -> Source:
        """Fetches what is needed, or falls back to a snapshot that has config and weights, with a warning."""
        import huggingface_hub as hub

        if hub.is_offline_mode():
            return self._fall_back(snapshot, missing, hub_errors.offline(self, missing))
        try:
            folder = self._begun(snapshot) or self._fetch(*self._manifest())
        except ModelError as error:
            if error.id != "HF006":
                raise
            return self._fall_back(snapshot, missing, error)
        return self.source(folder, "downloaded from the Hub" if snapshot is None else "completed from the Hub")

    def _begun(self, snapshot: Path | None) -> Path | None:
        """Completes the snapshot that a download began, at its commit and by its listing: all parts are of one commit.

        None if there is none, if it could do as it is, or if the Hub has that commit no more.
        """
        known = None if snapshot is None else self._cached_listing(snapshot.name)
        if snapshot is None or known is None or not self._lacks_model(snapshot):
            return None
        names = self.wanted(known)
        self._check(names, known)
        try:
            return self._fetch(snapshot.name, names)
        except ModelError as error:
            if error.id != "HF004":
                raise
            return None

    def _manifest(self) -> tuple[str, list[str]]:
        """(commit, needed files) as the Hub has them now. The cache learns both, so that the client need not ask."""
        info = self._info()
        commit, names = info.sha or "", list(self._needed(info))
        self._pin(commit)
        if self._cached_listing(commit) is None:
            self._store_listing(commit, info.siblings or ())
        return commit, names

    def _store_listing(self, commit: str, files: Sequence[RepoSibling]) -> None:
        """Notes in the cache that ``commit`` has ``files``, if their hashes are known.

        Before it fetches anything, the Hub's client asks for the files of a commit, unless its cache has them: since
        2.0 as ``trees/<commit>.json`` in the repo's folder. One that does not know this format asks again, which costs
        a request and changes nothing.
        """
        if re.fullmatch(r"[0-9a-f]{40}", commit) and all(f.size is not None and f.blob_id is not None for f in files):
            listing = {"format_version": TREE_FORMAT, "files": {file.rfilename: _tree_entry(file) for file in files}}
            _write(self.folder() / "trees" / f"{commit}.json", json.dumps(listing, indent=1))

    def _fetch(self, commit: str, names: list[str]) -> Path:
        """Fetches what the cache lacks of ``names``, in parallel; an index first, if it may name fewer or more."""
        if is_ambiguous(names):
            folder = self._fetch_all(commit, [name for name in names if name.endswith(".index.json")])
            if absent := named_but_absent(names, folder):
                raise ModelError(
                    f"an index of {self.label} names {', '.join(absent[:5])}, which the repo does not have.",
                    "Name another --revision, or tell the owner of the repo.",
                    id="HF040",
                )
            names = named_by_index(names, folder)
        return self._fetch_all(commit, names)

    def _fetch_all(self, commit: str, names: list[str]) -> Path:
        import huggingface_hub as hub

        resume.finish(self, commit, names)

        def fetch() -> str:
            patterns = [_literal(name) for name in names]
            return hub.snapshot_download(
                self.id, revision=commit, cache_dir=self.download_dir, token=self.token, allow_patterns=patterns
            )

        folder = Path(self.call(fetch))
        lost = [name for name in names if not (folder / name).is_file()]
        if lost:  # the client believes a listing that it once stored
            raise ModelError(
                f"the Hub has {', '.join(lost[:5])} of {self.label}, but the client did not fetch it.",
                f"Remove {folder.parent.parent}, which is damaged, and start again.",
                id="HF007",
            )
        return folder

    def folder(self) -> Path:
        """Where the cache keeps this repo."""
        return hub_errors.cache_root(self) / f"models--{self.id.replace('/', '--')}"

    def _pin(self, commit: str) -> None:
        """Notes in the cache which commit the revision is now, as the client does when it resolves one itself."""
        revision = self.revision or "main"
        path = self.folder() / "refs" / revision
        if revision == commit or ".." in path.parts:
            return
        _write(path, commit)

    def metadata(self, name: str, commit: str) -> HfFileMetadata:
        """ETag and size of file ``name``."""
        import huggingface_hub as hub

        url = hub.hf_hub_url(self.id, name, revision=commit)
        found: HfFileMetadata = self.call(lambda: hub.get_hf_file_metadata(url, token=self.token))
        return found

    def read(self, name: str, commit: str, count: int, *, start: int = 0) -> bytes:
        """``count`` bytes of file ``name`` from byte ``start``, fewer at its end; nothing goes into the cache."""

        def request() -> bytes:
            with self.stream(name, commit, start, start + count) as chunks:
                return b"".join(chunks)

        found: bytes = self.call(request)
        return found

    @contextlib.contextmanager
    def stream(self, name: str, commit: str, start: int, end: int) -> Iterator[Iterator[bytes]]:
        """Bytes ``start`` to ``end`` of file ``name`` as they come; raises what huggingface_hub raises (see `call`)."""
        import huggingface_hub as hub

        url = hub.hf_hub_url(self.id, name, revision=commit)
        own = hub.utils.build_hf_headers(token=self.token)  # type: ignore[attr-defined]
        headers = {**own, "Range": f"bytes={start}-{end - 1}"}
        with hub.get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
            hub.hf_raise_for_status(response)
            skip = 0 if response.status_code == 206 else start  # 200: a server that knows no ranges sends all
            yield _part(response.iter_bytes(), skip, end - start)

    def _check(self, names: list[str], all_names: Iterable[str]) -> None:
        """Raises `ModelError` HF004 if ``names``, which are to be fetched, are no model and no tokenizer."""
        ggufs = models(all_names)
        if self.gguf is not None and not names:
            raise ModelError(
                f"{self.label} has no {self.gguf}; its GGUF files: {', '.join(ggufs[:20]) or 'none'}.",
                f"Name one of them: {self.id}/FILE.gguf.",
                id="HF004",
            )
        configs = CONFIGS if self.weights else (*CONFIGS, "generation_config.json")
        found = not set(configs).isdisjoint(names) or has_tokenizer(names)
        if not found and not any(name.endswith((".gguf", ".py")) for name in names):
            several = f"; of its GGUF files, name one: {', '.join(ggufs[:20])}" if ggufs else ""
            raise ModelError(
                f"{self.label} has neither config.json nor a tokenizer{several}.",
                f"Name {self.id}:QUANT, for instance :Q4_K_M." if ggufs else "Name a repo with a model in it.",
                id="HF004",
            )

    def _fall_back(self, snapshot: Path | None, missing: list[str], error: ModelError) -> Source:
        if snapshot is None or self.gguf is not None or self._lacks_model(snapshot):
            raise error
        lacking = ", ".join(missing)
        get_logger().warning("%s The cached snapshot is used, which has no %s.", error.cause, lacking)
        return self.source(snapshot, f"from the cache, without {lacking}")

    def _lacks_model(self, snapshot: Path) -> bool:
        return bool(set(missing_files(snapshot, self.weights, self.load_format)) - {"tokenizer.json"})

    def call(self, request: Callable[[], Any]) -> Any:
        """Runs ``request``, again if the Hub did not answer; raises a `ModelError` for what huggingface_hub raises."""
        hub_errors.check_token(self)
        for delay in (*RETRY_DELAYS, None):
            try:
                return request()
            except Exception as error:
                failure = hub_errors.hub_error(self, error, 1 + len(RETRY_DELAYS))
                if failure is None:
                    raise
                if failure.id != "HF006" or delay is None:
                    raise failure from error
                pause = delay * random.uniform(1 - JITTER, 1 + JITTER)
                time.sleep(max(pause, hub_errors.retry_after(error)))
        raise AssertionError("unreachable")


def _part(chunks: Iterable[bytes], skip: int, count: int) -> Iterator[bytes]:
    """``count`` bytes of ``chunks``, the first ``skip`` left out."""
    for chunk in chunks:
        part = chunk[skip : skip + count]
        skip -= min(skip, len(chunk))
        count -= len(part)
        if part:
            yield part
        if not count:
            return


def _tree_entry(file: RepoSibling) -> dict[str, Any]:
    entry: dict[str, Any] = {"size": file.size, "blob_id": file.blob_id}
    return entry if file.lfs is None else {**entry, "lfs_sha256": file.lfs.sha256, "lfs_size": file.lfs.size}


def _write(path: Path, text: str) -> None:
    """Puts a file into the cache, whole or not at all."""
    with contextlib.suppress(OSError):  # a cache that cannot be written to is reported by the download
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        new.write_text(text, encoding="utf-8")
        new.replace(path)


def _names_in(snapshot: Path) -> list[str]:
    return [p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file()]


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
