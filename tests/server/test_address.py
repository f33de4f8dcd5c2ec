"""Where the server listens: Unix sockets, several sockets at one address, TLS. Over real sockets of this machine."""

from __future__ import annotations

import asyncio
import re
import shutil
import ssl
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from octavo.config import ServerConfig
from octavo.errors import ConfigError
from octavo.server import address, run
from tests.server.fake import Server
from tests.waiting import PATIENCE


class Pair(NamedTuple):
    certificate: str
    key: str


def made(folder: Path, name: str) -> Pair:
    """A certificate that signs itself, for localhost."""
    if shutil.which("openssl") is None:
        pytest.skip("there is no openssl to make a certificate with")
    pair = Pair(str(folder / f"{name}.pem"), str(folder / f"{name}.key"))
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", pair.key, "-out", pair.certificate, "-days", "2", "-subj", f"/CN={name}"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"]
    subprocess.run(command, check=True, capture_output=True)
    return pair


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return made(tmp_path_factory.mktemp("server"), "server")


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return made(tmp_path_factory.mktemp("client"), "client")


def ask(config: ServerConfig, **options: Any) -> httpx.Response:
    """One ``/ping`` to a server that listens as ``config`` says, from a client with ``options``."""

    async def both() -> httpx.Response:
        with address.listeners(config) as [listener]:
            started = asyncio.Event()
            http = run._Http(run._http_config(Server().app, address.tls(config)), started.set)
            serving = asyncio.create_task(http.serve([listener]))
            await started.wait()
            try:
                async with httpx.AsyncClient(base_url=address.url_of(config, listener), **options) as one:
                    return await one.get("/ping", timeout=PATIENCE)
            finally:
                http.should_exit = True
                await serving

    return asyncio.run(both())


def trusting(pair: Pair, own: Pair | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=pair.certificate)
    if own is not None:
        context.load_cert_chain(own.certificate, own.key)
    return context


def test_a_certificate_makes_it_https(server: Pair) -> None:
    config = ServerConfig(port=0, ssl_certfile=server.certificate, ssl_keyfile=server.key)
    assert ask(config, verify=trusting(server)).status_code == 200
    with pytest.raises(httpx.ConnectError):
        ask(config)  # signed by nobody whom this client knows


def test_clients_may_have_to_bring_a_certificate(server: Pair, client: Pair) -> None:
    config = ServerConfig(
        port=0,
        ssl_certfile=server.certificate,
        ssl_keyfile=server.key,
        ssl_ca_certs=client.certificate,
        ssl_cert_reqs=2,
    )
    assert ask(config, verify=trusting(server, client)).status_code == 200
    with pytest.raises(httpx.TransportError):
        ask(config, verify=trusting(server))
    assert ask(replace(config, ssl_cert_reqs=1), verify=trusting(server)).status_code == 200


def test_files_that_are_no_certificate_and_key_end_the_start_with_what_to_do(
    server: Pair, client: Pair, tmp_path: Path
) -> None:
    other = tmp_path / "other.pem"
    other.write_text("nothing")
    for options, said in (
        ({"ssl_certfile": "/nowhere.pem"}, "ssl_certfile is /nowhere.pem, which cannot be read"),
        ({"ssl_certfile": str(other)}, "TLS cannot be set up with .*other.pem"),
        ({"ssl_certfile": server.certificate}, "no certificate with its key"),
        ({"ssl_certfile": server.certificate, "ssl_keyfile": client.key}, "key values mismatch"),
        ({"ssl_keyfile": server.key}, "no --ssl-certfile"),
        ({"ssl_certfile": server.certificate, "ssl_keyfile": server.key, "ssl_cert_reqs": 2}, "nothing to check"),
    ):
        with pytest.raises(ConfigError) as caught:
            address.tls(ServerConfig(**options))  # type: ignore[arg-type]
        assert re.search(said, caught.value.cause)
        assert caught.value.remedy


def test_a_key_with_a_password_is_refused_and_not_asked_for(server: Pair, tmp_path: Path) -> None:
    locked = str(tmp_path / "locked.key")
    subprocess.run(
        ["openssl", "pkey", "-in", server.key, "-aes256", "-passout", "pass:hush", "-out", locked], check=True
    )
    with pytest.raises(ConfigError, match="has a password"):
        address.tls(ServerConfig(ssl_certfile=server.certificate, ssl_keyfile=locked))


def test_a_unix_socket_is_listened_on_and_removed_in_the_end(tmp_path: Path) -> None:
    path = str(tmp_path / "o.sock")
    config = ServerConfig(uds=path)
    assert ask(config, transport=httpx.AsyncHTTPTransport(uds=path)).status_code == 200
    assert not Path(path).exists()


def test_a_socket_whose_server_is_gone_is_taken_over_and_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "o.sock"
    config = ServerConfig(uds=str(path))
    address._unix(str(path)).close()  # as after a kill
    with address.listeners(config) as [listener]:
        listener.listen()
        with pytest.raises(ConfigError, match="in use"), address.listeners(config):
            pass
    path.write_text("mine")
    with pytest.raises(ConfigError, match="cannot listen"), address.listeners(config):
        pass
    assert path.read_text() == "mine"


@pytest.mark.parametrize("unix", [False, True])
def test_several_api_processes_have_a_socket_each_at_one_address(unix: bool, tmp_path: Path) -> None:
    config = ServerConfig(port=0, api_server_count=3, uds=str(tmp_path / "o.sock") if unix else None)
    with address.listeners(config) as bound:
        assert len(bound) == 3
        assert len({one.getsockname() for one in bound}) == 1
        assert len({one.fileno() for one in bound}) == 3


def test_an_address_that_only_this_machine_reaches_is_private() -> None:
    assert address.is_private(ServerConfig())
    assert address.is_private(ServerConfig(host="0.0.0.0", uds="/run/o.sock"))
    assert not address.is_private(ServerConfig(host="0.0.0.0"))


def test_the_line_to_paste_names_the_unix_socket() -> None:
    assert address.curl(ServerConfig(uds="/run/my llm.sock")) == "curl --unix-socket '/run/my llm.sock'"
