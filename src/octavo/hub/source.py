"""Where a model's files are (`Source`), and which of the files of a folder or repo a model needs."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

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
TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")


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


def wanted_files(names: Iterable[str], weights: bool = True, code: bool = False) -> list[str]:
    """Those of a repo's files that are needed: small ones, and safetensors or else PyTorch's ``.bin``.

    ``code``: Python files, too, for a model whose remote code is trusted.
    """
    names = sorted(names)
    out = [name for name in names if any(_matches(name, pattern) for pattern in _SMALL_FILES)]
    if code:
        out += [name for name in names if name.endswith(".py")]
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


def missing_files(folder: Path, weights: bool) -> list[str]:
    """What a snapshot lacks that no model does without, as far as that shows without a listing of the repo."""
    has_config = (folder / "config.json").is_file()
    has_tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    if not weights and has_tokenizer:
        return []  # there are repos of a tokenizer alone
    out = [] if has_config else ["config.json"]
    if not has_tokenizer:
        out.append("tokenizer.json")
    return out + _missing_weights(folder) if weights else out


def _missing_weights(folder: Path) -> list[str]:
    indices = sorted(folder.glob("*.safetensors.index.json")) or sorted(folder.glob("*.bin.index.json"))
    for index in indices[:1]:
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            return [index.name]
        return sorted(str(shard) for shard in shards if not (folder / str(shard)).is_file())
    present = [p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".bin")]
    return [] if wanted_files(present) else ["model.safetensors"]
