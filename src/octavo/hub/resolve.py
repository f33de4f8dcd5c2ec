"""From the name that a user gives to files on this disk.

Order, behind what `hub.redirect` puts in a name's place: a path that exists, a snapshot in the Hugging Face cache, a
download. A snapshot that has everything is taken as it is, without a single request; a branch that has moved on since
is picked up once its snapshot is gone, or when the new commit is named with ``--revision``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, Unpack

from octavo.errors import ModelError
from octavo.hub.gguf_pick import GgufPick, file_in_repo, models, split_quant
from octavo.hub.redirect import redirected
from octavo.hub.repo import Repo, Wanted
from octavo.hub.source import CONFIGS, Source

GGUF_MAGIC: Final = b"GGUF"


def resolve(name: str, **wanted: Unpack[Wanted]) -> Source:
    """Finds ``name``: a folder, a GGUF file, or a repo id in the cache or on the Hub.

    ``folder:QUANT``, ``owner/name:QUANT`` and ``owner/name/file.gguf`` name one of several GGUF files.
    Raises `ModelError`: HF001 for a path that does not exist, HF003 gated, HF004 not found, HF005 offline and not in
    the cache, HF006 for a Hub that does not answer.
    """
    found = locate(name, **wanted)
    if isinstance(found, Source):
        return found
    repo, snapshot, missing = found
    return repo.download(snapshot, missing)


def locate(name: str, **wanted: Unpack[Wanted]) -> Source | tuple[Repo, Path | None, list[str]]:
    """As `resolve`, but without the network: the source if everything is here, else (repo, snapshot, what it lacks)."""
    name = redirected(name)
    path = Path(name).expanduser()
    try:
        if path.exists():
            return _local(name, path)
    except OSError as error:
        shown = name if len(name) < 100 else f"{name[:100]}…"
        raise ModelError(
            f"{shown} cannot be read: {error.strerror or error}.", "Name another path.", id="HF001"
        ) from None
    base, quant = split_quant(name)
    if quant is not None and Path(base).expanduser().is_dir():
        return _gguf_in_folder(name, Path(base).expanduser(), GgufPick(quant=quant))
    id, pick = base, None if quant is None else GgufPick(quant=quant)
    in_repo = file_in_repo(name)
    if in_repo is not None and not Path(name.split("/")[0]).exists():
        id, pick = in_repo[0], GgufPick(file=in_repo[1])
    elif "://" in name:
        raise _no_address(name)
    elif _looks_like_path(name):
        raise _no_such_path(name, path)
    repo = Repo(id, pick, **wanted)
    snapshot = repo.cached()
    missing = ["the whole snapshot"] if snapshot is None else repo.missing(snapshot)
    if snapshot is not None and not missing:
        return repo.source(snapshot, "complete in the cache, so the Hub was not asked")
    return repo, snapshot, missing


def _gguf_in_folder(name: str, folder: Path, pick: GgufPick) -> Source:
    names = [p.name for p in folder.iterdir()]
    chosen = pick.choose(names)
    if not chosen:
        raise ModelError(
            f"{folder} has no {pick}; its GGUF files: {', '.join(models(names)[:20]) or 'none'}.",
            "Name one of them.",
            id="HF001",
        )
    return Source(name, "gguf", folder / chosen[0], None, f"{name} is {chosen[0]} in a local folder")


def _local(name: str, path: Path) -> Source:
    if path.is_dir():
        names = [p.name for p in path.iterdir()]
        if not set(CONFIGS).intersection(names) and len(models(names)) == 1:
            return _gguf_in_folder(name, path, GgufPick())
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


def _no_address(name: str) -> ModelError:
    match = re.fullmatch(r"(?:https?://[^/]+|hf:/)/([\w.-]+/[\w.-]+)(?:/(?:tree|blob)/([^/]+))?(?:/.*)?", name)
    repo = match[1] + (f" --revision {match[2]}" if match[2] else "") if match else "owner/name"
    return ModelError(
        f"{name} is an address; octavo takes repo ids and paths.",
        f"{'Did you mean' if match else 'Write'} {repo}{'?' if match else ', or download it and name the folder.'}",
        id="HF001",
    )


def _no_such_path(name: str, path: Path) -> ModelError:
    is_repo = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+/+", name) is not None
    absolute = path.absolute()
    parent = next(p for p in absolute.parents if p.is_dir())
    try:
        entries = sorted(entry.name for entry in parent.iterdir())
    except OSError:
        entries = []
    shown = ", ".join(entries[:10]) + (f" and {len(entries) - 10} more" if len(entries) > 10 else "")
    return ModelError(
        f"{name} does not exist. The nearest folder that does is {parent}; it has: {shown or 'nothing to see'}.",
        f"Correct the path, or give a repo id such as {name.rstrip('/') if is_repo else 'owner/name'}.",
        id="HF001",
    )
