"""Where the server listens: a TCP address or a Unix socket, with or without TLS."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import socket
import ssl
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from octavo.config import ServerConfig
from octavo.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@contextlib.contextmanager
def listeners(server: ServerConfig) -> Iterator[list[socket.socket]]:
    """A bound socket for each API process, all at one address, none listening yet; raises `ConfigError`.

    Until the engine is ready connections are refused and do not hang. The kernel shares them out among the sockets.
    """
    count = server.api_server_count
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(_unix(server.uds) if server.uds else _tcp(server, shared=False))
        if server.uds:
            stack.callback(Path(server.uds).unlink, missing_ok=True)
            yield [first, *(stack.enter_context(first.dup()) for _ in range(count - 1))]
        elif count == 1:
            yield [first]
        else:  # the first one fails if another server has the address, even one that would share it
            server = dataclasses.replace(server, port=first.getsockname()[1])
            first.close()
            yield [stack.enter_context(_tcp(server, shared=True)) for _ in range(count)]


def is_private(server: ServerConfig) -> bool:
    """Whether only this machine reaches the address."""
    return bool(server.uds) or server.host in LOOPBACK


def url_of(server: ServerConfig, listener: socket.socket) -> str:
    """What clients put in front of a path."""
    scheme = "https" if server.ssl_certfile else "http"
    if server.uds:
        return f"{scheme}://localhost"
    host = f"[{server.host}]" if ":" in server.host else server.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}"


def curl(server: ServerConfig) -> str:
    """The command, as far as the path."""
    return f"curl --unix-socket {shlex.quote(server.uds)}" if server.uds else "curl"


def tls(server: ServerConfig) -> dict[str, Any]:
    """uvicorn's options of TLS; raises `ConfigError` if the files are not what they should be."""
    given = {
        "ssl_certfile": server.ssl_certfile,
        "ssl_keyfile": server.ssl_keyfile,
        "ssl_ca_certs": server.ssl_ca_certs,
    }
    wanted = ssl.VerifyMode(int(server.ssl_cert_reqs))
    if server.ssl_certfile is None:
        if any(given.values()) or wanted:
            raise ConfigError("there are options of TLS, but no --ssl-certfile.", "Give it, or leave them out.")
        return {}
    if wanted and server.ssl_ca_certs is None:
        cause = f"ssl_cert_reqs is {wanted.value}, but there is nothing to check clients against."
        raise ConfigError(cause, "Give --ssl-ca-certs FILE.")
    for name, path in given.items():
        if path is not None and not os.access(path, os.R_OK):
            raise ConfigError(f"{name} is {path}, which cannot be read.", "Give a file in PEM format.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(server.ssl_certfile, server.ssl_keyfile, password=_no_password)
        if server.ssl_ca_certs is not None:
            context.load_verify_locations(server.ssl_ca_certs)
    except (ssl.SSLError, OSError) as error:
        files = " and ".join(path for path in given.values() if path is not None)
        reason = str(getattr(error, "reason", None) or "no certificate with its key in PEM format").replace("_", " ")
        cause = f"TLS cannot be set up with {files}: {reason.lower()}."
        raise ConfigError(cause, "Give --ssl-certfile and --ssl-keyfile that belong together, in PEM.") from None
    return {**given, "ssl_cert_reqs": wanted}


def _no_password() -> str:
    raise ConfigError("the key of TLS has a password.", "Give a key without: openssl pkey -in KEY -out PLAIN")


def _tcp(server: ServerConfig, *, shared: bool) -> socket.socket:
    """``shared``: further sockets may be bound to the same address."""
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        made.bind((server.host, server.port))
    except (OSError, OverflowError) as error:
        made.close()
        raise ConfigError(
            f"cannot listen on {server.host} port {server.port}: {str(error).rstrip('.')}.",
            "Give another --host or --port.",
        ) from None
    return made


def _unix(path: str) -> socket.socket:
    """Bound to ``path``, in the place of a socket that a server left there which is gone."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_left_over(path):
            os.unlink(path)
        made.bind(path)
    except OSError as error:
        made.close()
        raise ConfigError(f"cannot listen on {path}: {str(error).rstrip('.')}.", "Give another --uds.") from None
    return made


def _is_left_over(path: str) -> bool:
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(path)
    except FileNotFoundError:
        return False
    except ConnectionRefusedError:
        return True
    return False
