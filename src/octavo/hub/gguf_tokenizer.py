"""The tokenizer that the metadata of a GGUF file describes, built with the ``tokenizers`` library.

Two kinds exist for the models served here: ``gpt2``, byte-level BPE with merges, and ``llama``, SentencePiece BPE with
scores. A file names its pre-tokenizer (``tokenizer.ggml.pre``) but does not contain it; `PRE_TOKENIZERS` has those that
are known. They follow the ``tokenizer.json`` of the models themselves: digits apart for SmolLM (so that "a  5" is "a",
two spaces as one token, "5"; Transformers' GGUF conversion of 5.23 leaves this out), NFC for Qwen2, and whole words
before merges for Llama 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from tokenizers import Tokenizer

from octavo.errors import ModelError
from octavo.hub import bpe
from octavo.hub.gguf import GgufReader
from octavo.hub.tokenizer import HfTokenizer

_MAX_TOKENS = 1 << 21

_SPECIAL_KEYS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
    "sep_token": "seperator_token_id",  # spelled so in the format
    "cls_token": "cls_token_id",
    "mask_token": "mask_token_id",
}


@dataclass(frozen=True)
class PreTokenizer:
    """How byte-level BPE cuts text before merging. ``split`` None: the pattern of GPT-2."""

    split: str | None = None
    digits: bool = False  # each digit is cut off first
    nfc: bool = False
    whole_words: bool = False  # a piece that is a token is taken as it is, whatever the merges say
    add_bos: bool = False  # if the file does not say


_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2 = PreTokenizer()
_DIGITS = PreTokenizer(digits=True)
_LLAMA3 = PreTokenizer(_LLAMA3_SPLIT, whole_words=True, add_bos=True)
_QWEN2 = PreTokenizer(_QWEN2_SPLIT, nfc=True)

PRE_TOKENIZERS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    # Llama 3's vocabulary in models that prepend nothing, SmolLM3 among them.
    "smaug-bpe": PreTokenizer(_LLAMA3_SPLIT, whole_words=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": PreTokenizer(bpe.TEKKEN_SPLIT, whole_words=True, add_bos=True),
}


def gguf_tokenizer(reader: GgufReader) -> HfTokenizer:
    """Raises `ModelError` HF060 for a kind or a pre-tokenizer that is not known."""
    tokens = _tokens(reader)
    kind = reader.text("tokenizer.ggml.model") or "missing"
    if kind == "gpt2":
        tokenizer, default_bos = _byte_level(reader, tokens)
    elif kind == "llama":
        tokenizer, default_bos = _sentencepiece(reader, tokens), True
    else:
        _refuse(reader, f"its tokenizer is of kind {kind!r}; known are 'gpt2' and 'llama'")
    _add_tokens(reader, tokenizer, tokens)
    named = ((name, reader.integer(f"tokenizer.ggml.{key}")) for name, key in _SPECIAL_KEYS.items())
    ids = {name: i for name, i in named if i is not None and 0 <= i < len(tokens)}
    flag = reader.flag("tokenizer.ggml.add_bos_token")
    bos = ids.get("bos_token") if (default_bos if flag is None else flag) else None
    eos = ids.get("eos_token") if reader.flag("tokenizer.ggml.add_eos_token") else None
    bpe.add_template(tokenizer, tokens, bos, eos)
    template = reader.text("tokenizer.chat_template")
    templates = {} if template is None else {"default": template}
    return HfTokenizer(tokenizer, {name: tokens[i] for name, i in ids.items()}, templates)


def _tokens(reader: GgufReader) -> list[str]:
    tokens = reader.strings("tokenizer.ggml.tokens")
    if not tokens:
        _refuse(reader, "it has no tokenizer.ggml.tokens")
    if len(tokens) > _MAX_TOKENS:
        _refuse(reader, f"it has {len(tokens)} tokens, more than {_MAX_TOKENS}")
    return tokens


def _byte_level(reader: GgufReader, tokens: list[str]) -> tuple[Tokenizer, bool]:
    name = reader.text("tokenizer.ggml.pre") or "default"
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        _refuse(reader, f"its pre-tokenizer {name!r} is not known; known are {', '.join(PRE_TOKENIZERS)}")
    vocabulary = bpe.first_ids(tokens)
    merges = [_merge(reader, text, vocabulary) for text in reader.strings("tokenizer.ggml.merges") or []]
    tokenizer = bpe.byte_level(
        vocabulary, merges, split=pre.split, digits=pre.digits, nfc=pre.nfc, whole_words=pre.whole_words
    )
    return tokenizer, pre.add_bos


def _merge(reader: GgufReader, text: str, vocabulary: dict[str, int]) -> tuple[str, str]:
    """``"ab c"`` as a pair, checked here because the library's own checks end in a panic or name no file."""
    at = text.find(" ", 1)
    pair = text[:at], text[at + 1 :]
    if at < 0 or not all(part in vocabulary for part in (*pair, pair[0] + pair[1])):
        _refuse(reader, f"its merge {text[:80]!r} is not of two tokens that make a third one")
    return pair


def _sentencepiece(reader: GgufReader, tokens: list[str]) -> Tokenizer:
    """SentencePiece BPE as Transformers builds it for Llama: merges by score, bytes for what has no token."""
    scores = reader.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens) or not np.all(np.isfinite(scores)):
        _refuse(reader, "its tokenizer.ggml.scores are missing, not finite or not as many as its tokens")
    if sum(map(len, tokens)) > bpe.MAX_CHARS:
        _refuse(reader, f"its tokens have more than {bpe.MAX_CHARS} characters")
    unknown = reader.integer("tokenizer.ggml.unknown_token_id")
    unknown = 0 if unknown is None or not 0 <= unknown < len(tokens) else unknown
    prefix = reader.flag("tokenizer.ggml.add_space_prefix")
    return bpe.sentencepiece(tokens, scores.tolist(), unknown=unknown, prefix=prefix is not False)


def _add_tokens(reader: GgufReader, tokenizer: Tokenizer, tokens: list[str]) -> None:
    types = reader.metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return
    if not isinstance(types, np.ndarray) or types.dtype.kind not in "iu" or len(types) != len(tokens):
        _refuse(reader, "its tokenizer.ggml.token_type is not one integer for each token")
    bpe.add_by_kind(tokenizer, tokens, types.tolist())


def _refuse(reader: GgufReader, cause: str) -> NoReturn:
    raise ModelError(
        f"no tokenizer can be made from {reader.path}: {cause}.",
        "Pass the tokenizer of the original model with --tokenizer.",
        id="HF060",
    )
