"""The two kinds of BPE that checkpoints describe without a ``tokenizer.json``, built with the ``tokenizers`` library.

Byte-level BPE (GPT-2, Llama 3, Mistral's tekken) and SentencePiece BPE (Llama 2, older Mistral models), as Transformers
builds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from octavo.hub.sentencepiece_file import CONTROL, UNKNOWN, USER_DEFINED

# Limits of deriving merges from scores, whose work is the characters of all tokens times the length of the longest.
MAX_CHARS: Final = 1 << 23
_MAX_TOKEN_CHARS: Final = 1 << 8  # a longer token gets no merges

Merges = list[tuple[str, str]]

TEKKEN_SPLIT: Final = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(
    vocabulary: dict[str, int],
    merges: Merges,
    *,
    split: str | None = None,
    digits: bool = False,
    nfc: bool = False,
    whole_words: bool = False,
) -> Tokenizer:
    """``split``: the pattern of pieces, None for GPT-2's; ``digits`` cuts off each digit before; ``whole_words``: a
    piece that is a token is taken as it is, whatever the merges say. Raises ValueError for a pattern that is none.
    """
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=whole_words))
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[pre_tokenizers.PreTokenizer] = []
    if digits:
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    if split:
        steps.append(pre_tokenizers.Split(_regex(split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _regex(pattern: str) -> Regex:
    try:
        return Regex(pattern)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{pattern[:40]!r} is no pattern ({error})") from None


def sentencepiece(
    tokens: Sequence[str], scores: Sequence[float], *, unknown: int, prefix: bool = True, strict: bool = False
) -> Tokenizer:
    """Merges by score, bytes for what has no token. See `MAX_CHARS`.

    ``prefix`` puts a space before a text that has none there, as Transformers does; with ``strict`` it is put before
    every text, also those between special tokens, as SentencePiece itself does to what it is given.
    """
    vocabulary = first_ids(tokens)
    model = models.BPE(
        vocab=vocabulary,
        merges=merges_from_scores(vocabulary, scores),
        unk_token=tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    if strict:
        spaces = normalizers.Replace(" ", "▁")
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    else:
        scheme = "first" if prefix else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    steps: list[decoders.Decoder] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def first_ids(tokens: Iterable[str]) -> dict[str, int]:
    """Token -> id; of equal tokens (padding, in some files) the first counts."""
    vocabulary: dict[str, int] = {}
    for i, token in enumerate(tokens):
        vocabulary.setdefault(token, i)
    return vocabulary


def merges_from_scores(vocabulary: dict[str, int], scores: Sequence[float]) -> Merges:
    """Every pair of tokens that makes a token, best score of the result first.

    SentencePiece merges, of all neighbours that make a token, those whose token scores best: the order of these pairs.
    Ties are settled by the longer left part and then by the ids, as Transformers does.
    """
    found: list[tuple[float, int, int, int, int, str, str]] = []
    for token, i in vocabulary.items():
        if len(token) > _MAX_TOKEN_CHARS:
            continue
        for at in range(1, len(token)):
            left, right = token[:at], token[at:]
            a, b = vocabulary.get(left), vocabulary.get(right)
            if a is not None and b is not None:
                found.append((-scores[i], -len(left), -len(right), a, b, left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def add_tokens(tokenizer: Tokenizer, texts: Iterable[str], *, special: bool) -> None:
    """Tokens that are matched whole in a text; special ones are left out of decoded text."""
    wrapped = [AddedToken(text, normalized=False, special=special) for text in texts]
    if special:
        tokenizer.add_special_tokens(wrapped)
    else:
        tokenizer.add_tokens(wrapped)


def add_by_kind(tokenizer: Tokenizer, tokens: Iterable[str], kinds: Iterable[int]) -> None:
    """As `add_tokens`, by SentencePiece's kinds, which GGUF has too: control tokens and the unknown one are special,
    user-defined ones are not, others are not matched whole.
    """
    whole = [(text, kind) for text, kind in zip(tokens, kinds, strict=True) if text]
    add_tokens(tokenizer, (text for text, kind in whole if kind in (UNKNOWN, CONTROL)), special=True)
    add_tokens(tokenizer, (text for text, kind in whole if kind == USER_DEFINED), special=False)


def add_template(tokenizer: Tokenizer, tokens: Sequence[str], bos: int | None, eos: int | None) -> None:
    """Puts ``bos`` before and ``eos`` behind each sequence, under names of ours: a token's text could be ``$A``."""
    named = {name: i for name, i in (("bos", bos), ("eos", eos)) if i is not None}
    if not named:
        return

    def around(sequence: str) -> list[str]:
        return [part for part in ("bos", sequence, "eos") if part == sequence or part in named]

    tokenizer.post_processor = processors.TemplateProcessing(
        single=around("$A"),
        pair=[*around("$A"), *(f"{part}:1" for part in around("$B"))],
        special_tokens=[{"id": name, "ids": [i], "tokens": [tokens[i]]} for name, i in named.items()],
    )
