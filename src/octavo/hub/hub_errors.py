"""What the client of the Hub raises, as errors that name the cause and what to do."""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from octavo.errors import ModelError
from octavo.hub.gguf_pick import is_quant

if TYPE_CHECKING:
    from octavo.hub.repo import Repo

MAX_RETRY_AFTER: Final = 30.0  # seconds
_SHOWN: Final = 5  # names in a message
_OF_THE_DISK: Final = frozenset(
    (
        *(errno.EACCES, errno.EDQUOT, errno.EEXIST, errno.EFBIG, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOSPC),
        *(errno.ENOTDIR, errno.EPERM, errno.EROFS),
    )
)


def no_repo_id(name: str) -> ModelError:
    if "@" in name:
        base, _, revision = name.partition("@")
        return ModelError(f"{name!r} is no repo id.", f"Did you mean {base} --revision {revision}?", id="HF001")
    base, colon, quant = name.rpartition(":")
    if colon and not is_quant(quant):
        return ModelError(
            f"{name!r}: {quant!r} is no GGUF type.",
            "Write owner/name:Q4_K_M, with the type out of the name of the file.",
            id="HF001",
        )
    return ModelError(
        f"{name!r} is no path that exists and no repo id.",
        "A repo id is owner/name, of letters, digits, '-', '_' and '.'.",
        id="HF001",
    )


def hub_error(repo: Repo, error: Exception, attempts: int) -> ModelError | None:
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
        revisions = _revisions(repo)
        more = " …" if len(revisions) > _SHOWN else ""
        listed = f"; it has {', '.join(revisions[:_SHOWN])}{more}" if revisions else ""
        return ModelError(
            f"{repo.id} has no revision {repo.revision!r}{listed}.",
            "Name a branch, tag or commit of the repo.",
            id="HF004",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        near = near_cached(repo) or _near_on_hub(repo)
        guess = f"Did you mean {' or '.join(near)}? Else check" if near else "Check"
        return ModelError(
            f"{repo.label} was not found on the Hub, or is private; {sent}.",
            f"{guess} the spelling; for a private repo set HF_TOKEN or --hf-token.",
            id="HF004",
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return ModelError(
            f"the Hub lists a file of {repo.label} that it does not have: {error.response.url}.",
            "Name another --revision, or tell the owner of the repo.",
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
    if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
        return ModelError(
            f"the cache in {cache_root(repo)} cannot be used for {repo.label}: {error.strerror or error}.",
            "Make room there, or name another folder with --download-dir or HF_HOME.",
            id="HF007",
        )
    # Every error of the Hub is an OSError. The HTTP library below it differs between versions of the client.
    library = type(error).__module__.split(".")[0]
    known = isinstance(error, OSError) or library in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
    return _unreachable(repo, error, attempts) if known else None


def near_cached(repo: Repo) -> list[str]:
    """Repos in the cache whose name is nearly this one: another case, another owner, a letter."""
    folders = sorted(cache_root(repo).glob("models--*"))
    names = {name.lower(): name for name in (p.name.removeprefix("models--").replace("--", "/") for p in folders)}
    wanted = repo.id.lower()
    same = [name for low, name in names.items() if low.rpartition("/")[2] == wanted.rpartition("/")[2]]
    close = [names[low] for low in difflib.get_close_matches(wanted, names, n=3, cutoff=0.8)]
    return [name for name in dict.fromkeys((*close, *same)) if name != repo.id][:3]


def _near_on_hub(repo: Repo) -> list[str]:
    """What the Hub finds under the name without its owner; nothing if it does not answer."""
    import huggingface_hub as hub

    with contextlib.suppress(Exception):
        found = hub.HfApi(token=repo.token).list_models(search=repo.id.rpartition("/")[2], limit=3)
        return [model.id for model in found]
    return []


def _revisions(repo: Repo) -> list[str]:
    """Branches and tags; nothing if the Hub does not tell."""
    import huggingface_hub as hub

    with contextlib.suppress(Exception):
        refs = hub.HfApi(token=repo.token).list_repo_refs(repo.id)
        return [ref.name for ref in (*refs.branches, *refs.tags)]
    return []


def cache_root(repo: Repo) -> Path:
    from huggingface_hub import constants

    return Path(repo.download_dir or constants.HF_HUB_CACHE).expanduser()


def _status(error: Exception) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def retry_after(error: Exception) -> float:
    """The seconds that the Hub asks to wait, at most `MAX_RETRY_AFTER`."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    text = str(headers.get("Retry-After", ""))
    return min(float(text), MAX_RETRY_AFTER) if text.isdigit() else 0.0


def _unreachable(repo: Repo, error: Exception, attempts: int) -> ModelError:
    status = _status(error)
    tries = f"{attempts} attempts"
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


def offline(repo: Repo, missing: list[str]) -> ModelError:
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    near = near_cached(repo)
    guess = f"Did you mean {' or '.join(near)}, which is there? Else, with" if near else "With"
    return ModelError(
        f"HF_HUB_OFFLINE is set, and the cache in {cache_root(repo)} lacks "
        f"{', '.join(missing[:_SHOWN])}{more} of {repo.label}.",
        f"{guess} a network, run: hf download {repo.id}" + (f" --revision {repo.revision}" if repo.revision else ""),
        id="HF005",
    )


def check_token(repo: Repo) -> None:
    """Raises `ModelError` HF003 for a token that cannot be sent; the HTTP library's own error would show it."""
    token = _token(repo)
    if token and not re.fullmatch(r"[!-~]+", token):
        raise ModelError(
            f"the token for {repo.label} has spaces or other characters that no token has.",
            "Copy it again into HF_TOKEN or --hf-token.",
            id="HF003",
        )


def _has_token(repo: Repo) -> bool:
    return bool(_token(repo))


def _token(repo: Repo) -> str | None:
    import huggingface_hub as hub

    if repo.token:
        return repo.token
    with contextlib.suppress(OSError):  # a folder that cannot be read is reported by the download
        token: str | None = hub.get_token()
        return token
    return None
