"""Who may ask for what. Keys are compared as digests and in constant time, whether or not one of them fits."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

from octavo.config import ServerConfig
from octavo.errors import ConfigError

MAX_KEYS = 1000
USERS = ("OCTAVO_API_KEY", "VLLM_API_KEY")  # of the environment: a server that had a key is not open here
ADMIN = "OCTAVO_ADMIN_API_KEY"


@dataclass(frozen=True)
class Keys:
    """Digests of the keys of users and of the operator's. Without any, everybody may ask for everything.

    A single key of users is the operator's too; where there are several, users are strangers to each other, and what
    concerns all of them needs the operator's own.
    """

    users: tuple[bytes, ...] = ()
    admin: bytes | None = None

    @classmethod
    def given(cls, server: ServerConfig, environ: Mapping[str, str]) -> Keys:
        """Those of the options, else of the environment; raises `ConfigError`."""
        users = server.api_key or next((environ[name] for name in USERS if environ.get(name)), None)
        return cls.of(users, server.admin_api_key or environ.get(ADMIN))

    @classmethod
    def of(cls, users: str | None, admin: str | None = None) -> Keys:
        """From ``--api-key``, several separated by commas, and ``--admin-api-key``; raises `ConfigError`."""
        named = [key.strip() for key in (users or "").split(",") if key.strip()]
        if len(named) > MAX_KEYS:
            raise ConfigError(f"there are {len(named)} API keys, more than {MAX_KEYS}.", "Give fewer.")
        if admin in named:
            raise ConfigError("the admin key is one of the API keys.", "Give the operator a key of its own.")
        return cls(tuple(map(_digest, named)), _digest(admin) if admin else None)

    @property
    def any(self) -> bool:
        """Whether a key is needed at all."""
        return bool(self.users) or self.admin is not None

    def owner(self, given: bytes) -> bytes | None:
        """What tells the owner of the key ``given`` from others; None if it is no key of this server."""
        digest, found = sha256(given).digest(), None
        for known in (*self.users, *((self.admin,) if self.admin else ())):
            if hmac.compare_digest(digest, known):
                found = known
        return found

    def is_admin(self, owner: bytes) -> bool:
        """Whether ``owner`` may ask for what concerns everybody."""
        return owner == self.admin or (self.admin is None and len(self.users) == 1)


def _digest(key: str) -> bytes:
    return sha256(key.encode()).digest()
