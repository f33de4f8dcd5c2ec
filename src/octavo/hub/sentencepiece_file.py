"""Reader of a SentencePiece model (``tokenizer.model``): the pieces, and the settings that matter for BPE.

Format: a protobuf message ``ModelProto`` (sentencepiece_model.proto) with pieces in field 1, the trainer's settings in
2 and the normaliser's in 3. Only the fields below are read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from octavo.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = range(1, 5)  # kinds of pieces; unused ones and bytes follow
BPE: Final = 2
MAX_BYTES: Final = 1 << 26
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class SentencePieces:
    """``kinds[i]`` is one of the constants above, ``bos`` is -1 if there is none.

    ``prefix``: a space is put before a text; ``tidies``: runs of spaces become one.
    """

    tokens: list[str]
    scores: list[float]
    kinds: list[int]
    model_type: int
    unknown: int
    bos: int
    prefix: bool
    tidies: bool


def read_pieces(path: Path) -> SentencePieces:
    """Reads ``path``; raises `ModelError` HF002 for a file that is none."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        _refuse(path, f"it has {size} bytes, more than {MAX_BYTES}")
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, int | bytes] = {}
    normaliser: dict[int, int | bytes] = {}
    try:
        for number, value in _fields(path.read_bytes()):
            if number == 1 and isinstance(value, bytes):
                pieces.append(_piece(value))
            elif number in (2, 3) and isinstance(value, bytes):
                (trainer if number == 2 else normaliser).update(_fields(value))
    except (IndexError, ValueError, struct.error) as error:
        _refuse(path, str(error) or type(error).__name__)
    if not pieces:
        _refuse(path, "it has no pieces")
    tokens, scores, kinds = ([piece[i] for piece in pieces] for i in range(3))
    return SentencePieces(
        tokens=[str(token) for token in tokens],
        scores=[float(score) for score in scores],
        kinds=[int(kind) for kind in kinds],
        model_type=_number(trainer, 3, 1),
        unknown=max(_id(trainer, 40, 0, len(pieces)), 0),
        bos=_id(trainer, 41, 1, len(pieces)),
        prefix=_number(normaliser, 3, 1) != 0,
        tidies=_number(normaliser, 4, 1) != 0,
    )


def _piece(message: bytes) -> tuple[str, float, int]:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(message):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    if score != score or abs(score) == float("inf"):
        raise ValueError(f"the score of {text!r} is {score}")
    return text, score, kind


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of every field: an int, or the bytes of anything else."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            length, at = _varint(message, at)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"field {key >> 3} is of wire type {kind}")
        if at + length > len(message):
            raise ValueError(f"field {key >> 3} ends behind its message")
        yield key >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("a number is longer than ten bytes")


def _number(message: dict[int, int | bytes], field: int, default: int) -> int:
    value = message.get(field, default)
    return value if isinstance(value, int) else default


def _id(message: dict[int, int | bytes], field: int, default: int, count: int) -> int:
    """A token's id; -1 is none."""
    value = _number(message, field, default)
    value -= value >> 63 << 64  # the two's complement of 64 bits
    return value if -1 <= value < count else default


def _refuse(path: Path, cause: str) -> NoReturn:
    raise ModelError(f"{path} is no SentencePiece model: {cause}.", "Download it again.", id="HF002")
