"""Where a model's files are (`Source`), and which of the files of a folder or repo a model needs.

Mistral's repos may have their own format, alone or beside that of Hugging Face: ``params.json`` for ``config.json``,
``consolidated*.safetensors`` for the weights, ``tekken.json`` or ``tokenizer.model.v*`` for the tokenizer.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from octavo.config import LOAD_PACKAGES

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
_NOT_WEIGHTS: Final = ("consolidated*", "training_args.bin", "optimizer*", "scheduler*", "scaler*", "adapter_model*")
_TOKENIZERS: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer.model.v*",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
CONFIGS: Final = ("config.json", "params.json")
# The patterns of weights in the order in which they are looked for.
_WEIGHTS: Final = {
    "auto": ("*.safetensors", "consolidated*.safetensors", "*.bin"),
    "hf": ("*.safetensors", "*.bin"),
    **dict.fromkeys(("safetensors", *LOAD_PACKAGES), ("*.safetensors",)),
    "pt": ("*.bin", "*.pt"),
    "mistral": ("consolidated*.safetensors",),
}
_INDICES: Final = {
    "auto": ("model*.safetensors.index.json", "*.bin.index.json", "consolidated*.safetensors.index.json"),
    "hf": ("model*.safetensors.index.json", "*.bin.index.json"),
    **dict.fromkeys(("safetensors", *LOAD_PACKAGES), ("model*.safetensors.index.json",)),
    "pt": ("*.bin.index.json",),
    "mistral": ("consolidated*.safetensors.index.json",),
}


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


def has_tokenizer(names: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in _TOKENIZERS)


def wanted_files(
    names: Iterable[str], weights: bool = True, code: bool = False, load_format: str = "auto"
) -> list[str]:
    """Those of a repo's files that are needed: small ones, and weights of ``load_format``.

    With auto these are safetensors, else Mistral's own with ``params.json``, else PyTorch's ``.bin``. ``code``: Python
    files, too, for a model whose remote code is trusted.
    """
    names = sorted(names)
    out = [name for name in names if any(_matches(name, pattern) for pattern in _SMALL_FILES)]
    if code:
        out += [name for name in names if name.endswith(".py")]
    if not weights:
        return [name for name in out if not name.endswith(".index.json")]
    for pattern in _WEIGHTS.get(load_format, ()):
        found = [n for n in names if _matches(n, pattern)]
        if not pattern.startswith("consolidated"):
            found = [n for n in found if not any(fnmatch.fnmatchcase(n, other) for other in _NOT_WEIGHTS)]
        elif "params.json" not in names:
            continue
        if found:
            return out + found
    return out


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def missing_files(folder: Path, weights: bool, load_format: str = "auto") -> list[str]:
    """What a snapshot lacks that no model does without, as far as that shows without a listing of the repo."""
    present = [p.name for p in folder.iterdir() if p.is_file()]
    tokenizer = has_tokenizer(present)
    if not weights and tokenizer:
        return []  # there are repos of a tokenizer alone
    out = [] if set(CONFIGS).intersection(present) else ["config.json"]
    if not tokenizer:
        out.append("tokenizer.json")
    return out + _missing_weights(folder, present, load_format) if weights else out


def _missing_weights(folder: Path, present: list[str], load_format: str) -> list[str]:
    indices = [p for kind in _INDICES.get(load_format, ()) for p in sorted(folder.glob(kind))]
    for index in indices[:1]:
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [index.name]
        return sorted(str(shard) for shard in shards if not (folder / str(shard)).is_file())
    found = set(wanted_files(present, load_format=load_format)) - set(wanted_files(present, weights=False))
    return [] if any(not name.endswith(".json") for name in found) else ["model.safetensors"]


def mistral_file(folder: Path, *, bare: bool) -> Path | None:
    """The tokenizer in Mistral's format: tekken before SentencePiece, the latest version before others.

    ``bare``: a plain ``tokenizer.model``, which repos of other makers have, too, will do.
    """
    tekken = folder / "tekken.json"
    if tekken.is_file():
        return tekken
    found = [(version, p.name, p) for p in folder.glob("tokenizer.model.v*") if (version := mistral_version(p))]
    if found:
        return max(found)[2]
    plain = folder / "tokenizer.model"
    return plain if bare and plain.is_file() else None


def mistral_version(path: Path) -> int | None:
    """``tokenizer.model.v7m1`` -> 7; None for another kind of name."""
    match = re.fullmatch(r"tokenizer\.model\.v(\d+)(?:m\d+)?", path.name)
    return int(match[1]) if match else None
