from __future__ import annotations

from array import array

from octavo.cache.prefix import KEY_BYTES, page_hashes, page_key, split_keys


def ids(*tokens: int) -> bytes:
    return array("i", tokens).tobytes()


def test_only_full_pages_have_keys() -> None:
    assert len(page_hashes(b"k", b"", ids(*range(11)), 4)) == 2 * KEY_BYTES
    assert page_hashes(b"k", b"", ids(1, 2, 3), 4) == b""


def test_a_key_covers_everything_before_its_page() -> None:
    one = split_keys(page_hashes(b"k", b"", ids(1, 2, 3, 4), 2))
    other = split_keys(page_hashes(b"k", b"", ids(9, 2, 3, 4), 2))
    assert one[1] != other[1]
    assert one[1] == page_key(b"k", one[0], ids(3, 4))


def test_secret_and_salt_keep_keys_apart() -> None:
    keys = {page_hashes(secret, salt, ids(1, 2), 2) for secret in (b"a", b"b") for salt in (b"", b"tenant")}
    assert len(keys) == 4
