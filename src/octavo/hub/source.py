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
    "*_Pooling/config.json",
    "tokenizer.model.*",
    "*.model",
    "*.spm",
    "merges.txt",
    "vocab.txt",
    "*.tiktoken",
)
_NOT_WEIGHTS: Final = ("consolidated*", "training_args.bin", "optimizer*", "scheduler*", "scaler*", "adapter_model*")
_OF_TRAINING: Final = frozenset({"trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"})
_TOKENIZERS: Final = (
    "tokenizer.json",
    "tokenizer.model.v*",
    "*.model",
    "*.tiktoken",
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
_INDEX: Final = {
    "*.safetensors": "model*.safetensors.index.json",
    "consolidated*.safetensors": "consolidated*.safetensors.index.json",
    "*.bin": "*.bin.index.json",
    "*.pt": "*.pt.index.json",
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
    out = [name for name in out if not name.endswith(".index.json") and name not in _OF_TRAINING]
    if code:
        out += [name for name in names if name.endswith(".py")]
    if not weights:
        return out
    for pattern in _WEIGHTS.get(load_format, ()):
        indices = [n for n in names if _matches(n, _INDEX[pattern])]
        found = _weights(names, pattern)
        if indices and not _is_one_set(found):  # an index may name files in folders
            found += _nested(names, pattern)
        if found:
            return [*out, *indices, *found]
    return out


def _weights(names: list[str], pattern: str) -> list[str]:
    found = [n for n in names if _matches(n, pattern)]
    if pattern.startswith("consolidated"):
        return found if "params.json" in names else []
    return [n for n in found if not any(fnmatch.fnmatchcase(n, other) for other in _NOT_WEIGHTS)]


def _nested(names: list[str], pattern: str) -> list[str]:
    """Weights in folders, but for other companies' formats of the same ones."""
    suffix = pattern.rpartition("*")[2]
    return [n for n in names if "/" in n and n.endswith(suffix) and not n.startswith("original/")]


def _is_one_set(weights: list[str]) -> bool:
    """Whether these are shards 1 to N of N of one model, by their names."""
    parts = [re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.\w+", name) for name in weights]
    known = [part for part in parts if part is not None]
    sets = {(part[1], int(part[3])) for part in known}
    if len(known) != len(weights) or len(sets) != 1:
        return False
    (_, count) = sets.pop()
    return {int(part[2]) for part in known} == set(range(1, count + 1))


def named_by_index(names: Iterable[str], folder: Path) -> list[str]:
    """``names`` without the weight files that an index among them, which is in ``folder``, leaves out."""
    names = list(names)
    for index in names:
        shards = shards_of(folder / index) if index.endswith(".index.json") else None
        if shards is not None:
            suffixes = tuple({Path(shard).suffix for shard in shards})
            return [name for name in names if name in shards or not name.endswith(suffixes)]
    return names


def is_ambiguous(names: Iterable[str]) -> bool:
    """Whether there is an index among ``names`` that may leave out weight files, or name more."""
    names = list(names)
    weights = [name for name in names if name.endswith((".safetensors", ".bin"))]
    return any(name.endswith(".index.json") for name in names) and not _is_one_set(weights)


def named_but_absent(names: Iterable[str], folder: Path) -> list[str]:
    """The shards that an index among ``names``, which is in ``folder``, names, and that are not among ``names``."""
    present = set(names)
    named = (shards_of(folder / name) or set() for name in present if name.endswith(".index.json"))
    return sorted(set().union(*named) - present)


def shards_of(index: Path) -> set[str] | None:
    """The files that an index of shards names; None if it cannot be read."""
    try:
        return {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


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
    for pattern in _WEIGHTS.get(load_format, ()):
        for index in sorted(folder.glob(_INDEX[pattern]))[:1]:
            shards = shards_of(index)
            return [index.name] if shards is None else sorted(s for s in shards if not (folder / s).is_file())
        if _weights(present, pattern):
            return []
    return ["model.safetensors"]
