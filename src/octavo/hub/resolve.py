"""From the name that a user gives to files on this disk; the only module that may use the network.

Order: a path that exists, a snapshot in the Hugging Face cache, a download. A snapshot that has everything is taken as
it is, without a single request; a branch that has moved on since is picked up once its snapshot is incomplete or gone,
or when the new commit is named with ``--revision``.
"""

from __future__ import annotations

import fnmatch
import json
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from octavo.errors import ModelError
from octavo.log import get_logger

GGUF_MAGIC: Final = b"GGUF"
RETRY_DELAYS: Final = (1.0, 3.0)  # seconds before the second and the third attempt
MAX_RETRY_AFTER: Final = 30.0

# Files beside the weights, at the root of a repo; never code, never media, never other frameworks' weights.
_SMALL_FILES: Final = (
    "*.json",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "tokenizer.model*",
    "*.spm",
    "sentencepiece.*.model",
    "merges.txt",
    "vocab.txt",
    "*.tiktoken",
)
_NOT_WEIGHTS: Final = ("consolidated*", "training_args.bin", "optimizer*", "scheduler*", "adapter_model*")
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


@dataclass(frozen=True)
class Source:
    """Where a model's files are. ``path`` is a folder, or the ``.gguf`` file itself."""

    name: str
    kind: Literal["folder", "snapshot", "gguf"]
    path: Path
    commit: str | None
    reason: str  # one log line: which meaning of the name was taken and why

    def file(self, name: str) -> Path | None:
        """The path of file ``name`` of the model, if it has one; a GGUF file has none beside it."""
        path = self.path / name
        return path if self.kind != "gguf" and path.is_file() else None


def resolve(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    download_dir: str | None = None,
    weights: bool = True,
) -> Source:
    """Finds ``name``: a folder, a GGUF file, or a repo id at ``revision`` in the cache or on the Hub.

    ``weights=False`` asks for config and tokenizer only. Raises `ModelError`: HF001 for a path that does not exist,
    HF003 gated, HF004 not found, HF005 offline and not in the cache, HF006 for a Hub that does not answer.
    """
    path = Path(name).expanduser()
    if path.exists():
        return _local(name, path)
    if _looks_like_path(name):
        raise _no_such_path(name, path)
    repo = _Repo(name, revision, token, download_dir, weights)
    snapshot = repo.cached()
    missing = ["the whole snapshot"] if snapshot is None else repo.missing(snapshot)
    if snapshot is not None and not missing:
        return repo.source(snapshot, "complete in the cache, so the Hub was not asked")
    return repo.download(snapshot, missing)


def _local(name: str, path: Path) -> Source:
    if path.is_dir():
        return Source(name, "folder", path, None, f"{name} is a local folder")
    with path.open("rb") as file:
        magic = file.read(4)
    if path.suffix == ".gguf" or magic == GGUF_MAGIC:
        return Source(name, "gguf", path, None, f"{name} is a local GGUF file")
    raise ModelError(
        f"{name} is a file, but neither its suffix nor its first bytes are those of GGUF.",
        "Name the folder with config.json in it, or a .gguf file.",
        id="HF001",
    )


def _looks_like_path(name: str) -> bool:
    return (
        name.startswith(("/", ".", "~"))
        or name.count("/") > 1
        or "\\" in name
        or name.endswith((".gguf", ".safetensors", ".bin"))
        or re.match(r"[A-Za-z]:", name) is not None
    )


def _no_such_path(name: str, path: Path) -> ModelError:
    absolute = path.absolute()
    parent = next(p for p in absolute.parents if p.is_dir())
    try:
        entries = sorted(entry.name for entry in parent.iterdir())
    except OSError:
        entries = []
    shown = ", ".join(entries[:10]) + (f" and {len(entries) - 10} more" if len(entries) > 10 else "")
    return ModelError(
        f"{name} does not exist. The nearest folder that does is {parent}; it has: {shown or 'nothing to see'}.",
        "Correct the path, or give a repo id such as owner/name.",
        id="HF001",
    )


# --- what a model needs -----------------------------------------------------------------------------------------------


def wanted_files(names: Iterable[str], weights: bool = True) -> list[str]:
    """Those of a repo's files that are needed: small ones, and safetensors or else PyTorch's ``.bin``."""
    names = sorted(names)
    out = [name for name in names if any(_matches(name, pattern) for pattern in _SMALL_FILES)]
    if not weights:
        return [name for name in out if not name.endswith(".index.json")]
    for suffix in (".safetensors", ".bin"):
        found = [n for n in names if "/" not in n and n.endswith(suffix)]
        own = [n for n in found if not any(fnmatch.fnmatchcase(n, pattern) for pattern in _NOT_WEIGHTS)]
        if own:
            return out + own
    return out


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def _missing(snapshot: Path, weights: bool) -> list[str]:
    """What a snapshot lacks that no model does without, as far as that shows without a listing of the repo."""
    has_config = (snapshot / "config.json").is_file()
    has_tokenizer = any((snapshot / name).is_file() for name in _TOKENIZER_FILES)
    if not weights and has_tokenizer:
        return []  # there are repos of a tokenizer alone
    out = [] if has_config else ["config.json"]
    if not has_tokenizer:
        out.append("tokenizer.json")
    return out + _missing_weights(snapshot) if weights else out


def _missing_weights(snapshot: Path) -> list[str]:
    indices = sorted(snapshot.glob("*.safetensors.index.json")) or sorted(snapshot.glob("*.bin.index.json"))
    for index in indices[:1]:
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return [index.name]
        return sorted(str(shard) for shard in shards if not (snapshot / str(shard)).is_file())
    present = [p.name for p in snapshot.iterdir() if p.suffix in (".safetensors", ".bin")]
    return [] if wanted_files(present) else ["model.safetensors"]


# --- the Hub ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Repo:
    id: str
    revision: str | None
    token: str | None
    cache: str | None
    weights: bool

    @property
    def label(self) -> str:
        return f"{self.id} (revision {self.revision})" if self.revision else self.id

    def cached(self) -> Path | None:
        """The snapshot folder in the cache, complete or not; no network."""
        import huggingface_hub as hub
        from huggingface_hub.errors import HFValidationError

        try:
            for name in ("config.json", "tokenizer.json"):
                found = hub.try_to_load_from_cache(self.id, name, cache_dir=self.cache, revision=self.revision)
                if isinstance(found, str):
                    return Path(found).parent
        except HFValidationError:
            raise ModelError(
                f"{self.id!r} is no path that exists and no repo id.",
                "A repo id is owner/name, of letters, digits, '-', '_' and '.'.",
                id="HF001",
            ) from None
        return None

    def missing(self, snapshot: Path) -> list[str]:
        """What the snapshot lacks: by the listing of the repo that its download left, else by what every model has.

        Another process may be filling the snapshot just now, so that some file is there says nothing of the others.
        """
        import huggingface_hub as hub
        from huggingface_hub import errors

        if not hasattr(hub, "get_cached_repo_tree"):  # before 2.0
            return _missing(snapshot, self.weights)
        try:
            listing = hub.get_cached_repo_tree(self.id, revision=snapshot.name, cache_dir=self.cache)
        except errors.CachedRepoTreeNotFoundError:
            return _missing(snapshot, self.weights)
        names = wanted_files((file.path for file in listing), self.weights)
        return [name for name in names if not (snapshot / name).is_file()]

    def source(self, snapshot: Path, why: str) -> Source:
        return Source(self.id, "snapshot", snapshot, snapshot.name, f"{self.label} at {snapshot.name}: {why}")

    def download(self, snapshot: Path | None, missing: list[str]) -> Source:
        """Fetches what is needed, or falls back to a snapshot that has config and weights, with a warning."""
        import huggingface_hub as hub

        if hub.is_offline_mode():
            return self._fall_back(snapshot, missing, _offline(self, missing))
        try:
            info = self._call(lambda: hub.HfApi(token=self.token).model_info(self.id, revision=self.revision))
            names = wanted_files((s.rfilename for s in info.siblings or ()), self.weights)
            self._check_listing(names)
            folder = self._call(
                lambda: hub.snapshot_download(
                    self.id,
                    revision=self.revision,
                    cache_dir=self.cache,
                    token=self.token,
                    allow_patterns=[_literal(name) for name in names],
                )
            )
        except ModelError as error:
            if error.id != "HF006":
                raise
            return self._fall_back(snapshot, missing, error)
        return self.source(Path(folder), "downloaded from the Hub" if snapshot is None else "completed from the Hub")

    def _check_listing(self, names: list[str]) -> None:
        if "config.json" not in names and not any(name in _TOKENIZER_FILES for name in names):
            raise ModelError(
                f"{self.label} has neither config.json nor a tokenizer.",
                "Name a repo with a Transformers model in it; of a GGUF repo, download the file and name that.",
                id="HF004",
            )

    def _fall_back(self, snapshot: Path | None, missing: list[str], error: ModelError) -> Source:
        if snapshot is None or set(_missing(snapshot, self.weights)) - {"tokenizer.json"}:
            raise error
        lacking = ", ".join(missing)
        get_logger().warning("%s The cached snapshot is used, which has no %s.", error.cause, lacking)
        return self.source(snapshot, f"from the cache, without {lacking}")

    def _call(self, request: Callable[[], Any]) -> Any:
        """Runs ``request``, again if the Hub did not answer; raises a `ModelError` for what huggingface_hub raises."""
        for delay in (*RETRY_DELAYS, None):
            try:
                return request()
            except Exception as error:
                failure = _hub_error(self, error)
                if failure is None:
                    raise
                if failure.id != "HF006" or delay is None:
                    raise failure from error
                time.sleep(max(delay, _retry_after(error)))
        raise AssertionError("unreachable")


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _hub_error(repo: _Repo, error: Exception) -> ModelError | None:
    """What the client raised as one of ours; None if it is no error of the Hub or the network."""
    from huggingface_hub import errors

    sent = "a token was sent" if _has_token(repo) else "no token was sent"
    if isinstance(error, errors.GatedRepoError):
        return ModelError(
            f"{repo.label} is gated and {sent}.",
            "Request access on the model's page, then set HF_TOKEN or --hf-token.",
            id="HF003",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return ModelError(
            f"{repo.id} has no revision {repo.revision!r}.", "Name a branch, tag or commit of the repo.", id="HF004"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelError(
            f"{repo.label} was not found on the Hub, or is private; {sent}.",
            "Check the spelling; for a private repo set HF_TOKEN or --hf-token.",
            id="HF004",
        )
    if isinstance(error, errors.DisabledRepoError):
        return ModelError(f"{repo.label} was disabled by the Hub.", "Choose another model.", id="HF004")
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return ModelError(
            f"the Hub refused {repo.label} with status {error.response.status_code}; {sent}.",
            "Check that the token in HF_TOKEN or --hf-token is valid and may read this repo.",
            id="HF003",
        )
    # Every error of the Hub is an OSError. The HTTP library below it differs between versions of the client.
    library = type(error).__module__.split(".")[0]
    known = isinstance(error, OSError) or library in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
    return _unreachable(repo, error) if known else None


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _retry_after(error: Exception) -> float:
    """The seconds that the Hub asks to wait, at most `MAX_RETRY_AFTER`."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    text = str(headers.get("Retry-After", ""))
    return min(float(text), MAX_RETRY_AFTER) if text.isdigit() else 0.0


def _unreachable(repo: _Repo, error: Exception) -> ModelError:
    status = _status(error)
    tries = f"{1 + len(RETRY_DELAYS)} attempts"
    if status == 429:
        return ModelError(
            f"the Hub limits the rate of requests: status 429 for {repo.label} after {tries}.",
            "Wait a minute, or set HF_TOKEN: the limit is higher with a token.",
            id="HF006",
        )
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    what = f"status {status}" if status else f"{type(error).__name__}: {first}"
    return ModelError(
        f"the Hub did not give {repo.label} after {tries} ({what}), and the cache does not have it.",
        "Check the network and HF_ENDPOINT, or name a local folder.",
        id="HF006",
    )


def _offline(repo: _Repo, missing: list[str]) -> ModelError:
    from huggingface_hub import constants

    more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
    return ModelError(
        f"HF_HUB_OFFLINE is set, and the cache in {repo.cache or constants.HF_HUB_CACHE} lacks "
        f"{', '.join(missing[:5])}{more} of {repo.label}.",
        f"With a network, run: hf download {repo.id}" + (f" --revision {repo.revision}" if repo.revision else ""),
        id="HF005",
    )


def _has_token(repo: _Repo) -> bool:
    import huggingface_hub as hub

    return bool(repo.token or hub.get_token())
