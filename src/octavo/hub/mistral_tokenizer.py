"""Mistral's own tokenizers: ``tekken.json`` (byte-level BPE) and ``tokenizer.model.v*`` (SentencePiece).

Ids are those of mistral-common. Repos in this format have no chat template; `hub.mistral_chat` has one for the version
of the tokenizer, which ``tekken.json`` names and the suffix of a SentencePiece file is.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from octavo.errors import ModelError
from octavo.hub import bpe
from octavo.hub import sentencepiece_file as spm
from octavo.hub.configs import read_json
from octavo.hub.mistral_chat import template_for
from octavo.hub.tokenizer import HfTokenizer

_MAX_TOKENS: Final = 1 << 21
_UNKNOWN, _BOS, _EOS, _PAD = "<unk>", "<s>", "</s>", "<pad>"
_NAMES: Final = {"unk_token": _UNKNOWN, "bos_token": _BOS, "eos_token": _EOS, "pad_token": _PAD}
# Special tokens of a tekken.json up to v7 that lists none itself.
_UNLISTED: Final = (
    *(_UNKNOWN, _BOS, _EOS, "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", _PAD, "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]"),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


def find(folder: Path, *, bare: bool) -> Path | None:
    """The tokenizer in Mistral's format: tekken before SentencePiece, the latest version before others.

    ``bare``: a plain ``tokenizer.model``, which repos of other makers have, too, will do.
    """
    tekken = folder / "tekken.json"
    if tekken.is_file():
        return tekken
    found = [(version, p.name, p) for p in folder.glob("tokenizer.model.v*") if (version := _version(p))]
    if found:
        return max(found)[2]
    plain = folder / "tokenizer.model"
    return plain if bare and plain.is_file() else None


def _version(path: Path) -> int | None:
    """``tokenizer.model.v7m1`` -> 7; None for another kind of name."""
    match = re.fullmatch(r"tokenizer\.model\.v(\d+)(?:m\d+)?", path.name)
    return int(match[1]) if match else None


def load(path: Path, templates: Mapping[str, str]) -> HfTokenizer:
    """The tokenizer in ``path``, which `find` returned. ``templates`` are the repo's.

    They count before that of a ``tekken.json``, but not with SentencePiece: theirs have spaces that this tokenizer adds
    by itself.

    Raises `ModelError`: HF002 for a broken file, HF060 for a kind of model that is not Mistral's.
    """
    return _tekken(path, templates) if path.suffix == ".json" else _sentencepiece(path, templates)


def _templates(version: int) -> dict[str, str]:
    template = template_for(version)
    return {} if template is None else {"default": template}


# --- tekken -----------------------------------------------------------------------------------------------------------


def _tekken(path: Path, templates: Mapping[str, str]) -> HfTokenizer:
    data = read_json(path)
    try:
        config = data["config"]
        size, reserved = int(config["default_vocab_size"]), int(config["default_num_special_tokens"])
        version = int(str(config["version"]).removeprefix("v"))
        special = _special(data.get("special_tokens"), reserved)
        ranks = _ranks(data["vocab"], size - reserved)
        tokenizer = _byte_level(special, ranks, str(config["pattern"]))
    except (KeyError, TypeError, ValueError, IndexError, binascii.Error) as error:
        raise ModelError(
            f"{path} is no tekken tokenizer: {type(error).__name__}: {error}.", "Download it again.", id="HF002"
        ) from None
    bpe.add_tokens(tokenizer, special, special=True)
    bpe.add_template(tokenizer, special, special.index(_BOS) if _BOS in special else None, None)
    names = {name: text for name, text in _NAMES.items() if text in special}
    return HfTokenizer(tokenizer, names, templates or _templates(version))


def _special(listed: Any, reserved: int) -> list[str]:
    """Special tokens by id; those that nobody named are ``<SPECIAL_n>``."""
    if not 0 < reserved < _MAX_TOKENS:
        raise ValueError(f"it has {reserved} special tokens")
    tokens = [f"<SPECIAL_{i}>" for i in range(reserved)]
    named = enumerate(_UNLISTED) if listed is None else ((int(t["rank"]), str(t["token_str"])) for t in listed)
    for i, text in named:
        if not 0 <= i < reserved:
            raise ValueError(f"special token {text!r} has id {i} of {reserved}")
        tokens[i] = text
    return tokens


def _ranks(vocabulary: list[Mapping[str, Any]], count: int) -> list[bytes]:
    """The bytes of the first ``count`` tokens; a token's rank is its place."""
    if not 0 < count <= min(len(vocabulary), _MAX_TOKENS):
        raise ValueError(f"it has {len(vocabulary)} tokens and wants {count} of them")
    ranks = [base64.b64decode(entry["token_bytes"], validate=True) for entry in vocabulary[:count]]
    if any(entry["rank"] != i for i, entry in enumerate(vocabulary[:count])):
        raise ValueError("its tokens are not in the order of their ranks")
    return ranks


def _byte_level(special: list[str], ranks: list[bytes], split: str) -> Tokenizer:
    """Tokens follow the special ones. Two tokens merge if they make a third one, the lowest rank first."""
    rank_of = {token: rank for rank, token in enumerate(ranks)}
    pairs = (
        (left, right)
        for token in ranks
        for at in range(1, len(token))
        if (left := rank_of.get(token[:at])) is not None and (right := rank_of.get(token[at:])) is not None
    )
    texts = [token.decode("latin-1").translate(_ALPHABET) for token in ranks]
    vocabulary = {text: len(special) + rank for rank, text in enumerate(texts)}
    merges = [(texts[left], texts[right]) for left, right in pairs]
    return bpe.byte_level({**vocabulary, **bpe.first_ids(special)}, merges, split=split, whole_words=True)


def _alphabet() -> dict[int, str]:
    """GPT-2's letters for bytes: printable ones of Latin-1 stand for themselves, others for U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(0x100 + i) for i, byte in enumerate(rest)}


_ALPHABET: Final = _alphabet()


# --- SentencePiece ----------------------------------------------------------------------------------------------------


def _sentencepiece(path: Path, templates: Mapping[str, str]) -> HfTokenizer:
    model = spm.read_pieces(path)
    if model.model_type != spm.BPE or model.tidies or sum(map(len, model.tokens)) > bpe.MAX_CHARS:
        raise ModelError(
            f"{path} is no SentencePiece model of Mistral's: it is not BPE, or it changes spaces.",
            "Use --tokenizer-mode hf, or name another tokenizer with --tokenizer.",
            id="HF060",
        )
    tokenizer = bpe.sentencepiece(model.tokens, model.scores, unknown=model.unknown, prefix=model.prefix, strict=True)
    bpe.add_by_kind(tokenizer, model.tokens, model.kinds)
    bpe.add_template(tokenizer, model.tokens, model.bos if model.bos >= 0 else None, None)
    names = {name: text for name, text in _NAMES.items() if text in model.tokens}
    return HfTokenizer(tokenizer, names, _templates(_version(path) or 1) or templates)
