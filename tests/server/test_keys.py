"""Who may ask for what: several keys, the operator's, and what they share."""

from __future__ import annotations

import asyncio

import pytest

from octavo.config import ServerConfig
from octavo.errors import ConfigError
from octavo.server.keys import Keys
from tests.server.fake import Server

BODY = {"prompt": "hello", "max_tokens": 1}
OPERATOR = [("POST", "/reset_prefix_cache"), ("GET", "/dashboard/data")]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def statuses(key: str, **keys: str) -> dict[str, int]:
    """What ``key`` is answered by a server with ``keys``."""

    async def work() -> dict[str, int]:
        server, headers = Server(**keys), bearer(key)
        found = {path: (await server.http.request(m, path, headers=headers)).status_code for m, path in OPERATOR}
        return {**found, "completion": (await server.post("/v1/completions", BODY, headers=headers)).status_code}

    return asyncio.run(work())


@pytest.mark.parametrize(
    ("key", "keys", "operator", "completion"),
    [
        ("anything", {}, 200, 200),
        ("a", {"api_key": "a"}, 200, 200),
        ("b", {"api_key": "a"}, 401, 401),
        ("a", {"api_key": "a, b"}, 403, 200),
        ("b", {"api_key": "a, b"}, 403, 200),
        ("a, b", {"api_key": "a, b"}, 401, 401),
        ("a", {"api_key": "a", "admin_api_key": "root"}, 403, 200),
        ("root", {"api_key": "a,b", "admin_api_key": "root"}, 200, 200),
        ("", {"admin_api_key": "root"}, 401, 401),
        ("root", {"admin_api_key": "root"}, 200, 200),
    ],
)
def test_a_key_opens_what_is_its_own(key: str, keys: dict[str, str], operator: int, completion: int) -> None:
    assert statuses(key, **keys) == {**{path: operator for _, path in OPERATOR}, "completion": completion}


def test_users_with_different_keys_never_share_cached_pages_and_one_user_does() -> None:
    async def salts(*headers: dict[str, str]) -> list[bytes]:
        server = Server(api_key="a,b")
        for one in headers:
            await server.post("/v1/completions", BODY, headers=one)
        return [request.salt for request in server.fake.requests]

    first, again, other = asyncio.run(salts(bearer("a"), {"x-api-key": "a"}, bearer("b")))
    assert first == again != other
    assert first


def test_the_same_key_twice_in_different_case_is_two_keys() -> None:
    assert statuses("A", api_key="a")["completion"] == 401


@pytest.mark.parametrize(
    ("users", "admin", "message"),
    [
        ("a,root", "root", "the admin key is one of the API keys"),
        (",".join(map(str, range(1001))), None, "1001 API keys"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(users: str, admin: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Keys.of(users, admin)


def test_every_known_key_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return given == known

    monkeypatch.setattr("octavo.server.keys.hmac.compare_digest", compare)
    keys = Keys.of("a,b,c", "root")
    for given in (b"a", b"root", b"none"):
        compared.clear()
        keys.owner(given)
        assert len(compared) == 4


@pytest.mark.parametrize(
    ("option", "environ", "key"),
    [
        (None, {}, None),
        (None, {"OCTAVO_API_KEY": "", "VLLM_API_KEY": "v"}, b"v"),
        (None, {"OCTAVO_API_KEY": "o", "VLLM_API_KEY": "v"}, b"o"),
        ("k", {"OCTAVO_API_KEY": "o", "VLLM_API_KEY": "v"}, b"k"),
    ],
)
def test_a_key_is_the_option_s_else_the_environment_s_octavo_before_vllm(
    option: str | None, environ: dict[str, str], key: bytes | None
) -> None:
    keys = Keys.given(ServerConfig(api_key=option), environ | {"OCTAVO_ADMIN_API_KEY": "a"} if key else environ)
    assert keys.any is (key is not None)
    if key is not None:
        owner = keys.owner(key)
        assert owner is not None
        assert not keys.is_admin(owner)
        assert len(keys.users) == 1
