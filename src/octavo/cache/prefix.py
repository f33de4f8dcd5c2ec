"""Keys of pages: a page's key covers its tokens and, through its parent's key, everything before them.

    key(i) = blake2b-128(secret, key(i-1) | tokens of page i)        key(-1) = salt

The secret is drawn at each start of the engine, so nobody can craft a collision; the salt keeps tenants apart.
Used by the frontend (keys of prompts) and by the scheduler (keys of pages that generation fills).
"""

from __future__ import annotations

from hashlib import blake2b

KEY_BYTES = 16
TOKEN_BYTES = 4  # int32


def page_key(secret: bytes, parent: bytes, tokens: bytes) -> bytes:
    """The key of one full page; ``tokens`` are its ids as int32, little endian."""
    return blake2b(parent + tokens, digest_size=KEY_BYTES, key=secret).digest()


def page_hashes(secret: bytes, salt: bytes, token_ids: bytes, page_size: int) -> bytes:
    """The keys of all full pages of ``token_ids`` (int32 bytes), concatenated."""
    step, parent, keys = page_size * TOKEN_BYTES, salt, []
    for start in range(0, len(token_ids) - step + 1, step):
        parent = page_key(secret, parent, token_ids[start : start + step])
        keys.append(parent)
    return b"".join(keys)


def split_keys(hashes: bytes) -> list[bytes]:
    """Concatenated keys as a list."""
    return [hashes[i : i + KEY_BYTES] for i in range(0, len(hashes), KEY_BYTES)]
