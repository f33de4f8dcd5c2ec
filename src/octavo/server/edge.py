"""What may stand between browsers or proxies and the guard: CORS, and a prefix of all paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.config import ServerConfig
from octavo.errors import ConfigError

EXPOSED = ("x-request-id", "retry-after")  # headers of answers that scripts may read
PREFLIGHT_SECONDS = 600  # for which a browser keeps the answer


@dataclass(frozen=True)
class Edge:
    """``origins`` are those whose pages may talk with the server; ``prefix`` is where a proxy has put it."""

    origins: tuple[str, ...] = ()
    methods: tuple[str, ...] = ("*",)
    headers: tuple[str, ...] = ("*",)
    credentials: bool = False
    prefix: str = ""

    @classmethod
    def of(cls, server: ServerConfig) -> Self:
        """As the options say; raises `ConfigError`."""
        prefix = server.root_path.rstrip("/")
        if prefix and (not prefix.startswith("/") or prefix == "/v1"):
            raise ConfigError(f"root_path is {server.root_path!r}.", "Give a path beside /v1, with a slash: /llm")
        if server.allow_credentials and "*" in server.allowed_origins:
            raise ConfigError(
                "allow_credentials with every origin would let any page act for its visitors.",
                "Name the origins: --allowed-origins '[\"https://chat.example.org\"]'",
            )
        return cls(
            tuple(server.allowed_origins),
            tuple(server.allowed_methods),
            tuple(server.allowed_headers),
            server.allow_credentials,
            prefix,
        )

    def around(self, app: ASGIApp) -> ASGIApp:
        """``app`` behind this. What browsers ask first (OPTIONS) is answered here, since it comes without a key."""
        if self.origins:
            app = CORSMiddleware(
                app,
                allow_origins=self.origins,
                allow_methods=self.methods,
                allow_headers=self.headers,
                allow_credentials=self.credentials,
                expose_headers=EXPOSED,
                max_age=PREFLIGHT_SECONDS,
            )
        return _Unprefixed(app, self.prefix) if self.prefix else app


class _Unprefixed:
    """Takes the prefix off paths, for proxies that leave it on; the guard and the routes know paths without it."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app, self._prefix = app, prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if path == self._prefix or path.startswith(f"{self._prefix}/"):
            path = path.removeprefix(self._prefix) or "/"
        await self._app({**scope, "path": path, "prefix": self._prefix}, receive, send)
