"""The bytes that each token stands for: what a grammar over characters needs to know of a tokenizer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from octavo.config import EngineConfig, ModelConfig
from octavo.errors import ConfigError
from octavo.hub.files import find_files
from octavo.hub.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Vocabulary:
    """``tokens[i]`` are the bytes of token i; ``special`` ones stand for no text; ``ends`` end one."""

    tokenizer: Tokenizer
    tokens: list[bytes]
    special: list[int]
    ends: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, size: int, ends: Collection[int]) -> Vocabulary:
        """For a model with ``size`` logits. Ids without a token are made special: no grammar allows them."""
        known = tokenizer.special_ids
        tokens, special = [], []
        piece_bytes = _sentencepiece if tokenizer.token_to_id("▁") is not None else _byte_level
        for id in range(size):
            piece = tokenizer.id_to_token(id)
            if piece is None or id in known or id in ends:
                special.append(id)
                tokens.append((piece or f"<[{id}]>").encode())
            else:
                tokens.append(piece_bytes(tokenizer, id, piece))
        return cls(tokenizer, tokens, special, sorted(id for id in ends if 0 <= id < size))


def load_vocabulary(config: EngineConfig, model: ModelConfig) -> Vocabulary:
    """Loads the tokenizer that the frontend uses; takes about a second. Raises `OctavoError`."""
    options = config.model
    if options.skip_tokenizer_init:
        raise ConfigError("structured output needs a tokenizer.", "Start without skip_tokenizer_init.")
    tokenizer = find_files(options, weights=False).load_tokenizer()
    ends = {*model.eos_ids} if tokenizer.eos_id is None else {*model.eos_ids, tokenizer.eos_id}
    return Vocabulary.of(tokenizer, model.vocab_size, ends)


def _sentencepiece(tokenizer: Tokenizer, id: int, piece: str) -> bytes:
    """``▁`` is a space and ``<0x0A>`` a byte. (Decoding one token alone would lose the space.)"""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass
    return piece.replace("▁", " ").encode()


def _byte_level(tokenizer: Tokenizer, id: int, piece: str) -> bytes:
    """The token's text where it is whole characters, else its pieces as GPT-2's alphabet of bytes has them."""
    text = tokenizer.decode([id], skip_special_tokens=False)
    if _REPLACEMENT not in text:
        return text.encode()
    found = [_BYTE_OF.get(char) for char in piece]
    return piece.encode() if None in found else bytes(byte for byte in found if byte is not None)


def _alphabet() -> dict[str, int]:
    """GPT-2's: printable characters of Latin-1 stand for themselves, other bytes for characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


_BYTE_OF = _alphabet()
