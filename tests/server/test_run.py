from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.config import ModelOptions, ServerConfig
from octavo.errors import ConfigError
from octavo.server.address import listeners
from octavo.server.run import _banner
from octavo.server.service import served_names
from tests.server.fake import Server
from tools import tiny

CHECK = """
import sys, asyncio
import octavo.server.run
from octavo.config import EngineConfig
from octavo.frontend.loading import load_text_model
load_text_model(EngineConfig.of(model=sys.argv[1]))
print([name for name in ("torch", "transformers") if name in sys.modules])
"""


def test_the_api_process_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    tiny.tokenizer(tmp_path)
    tiny.write_json(tmp_path / "config.json", tiny.config())
    command = [sys.executable, "-c", CHECK, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_names_are_those_given_else_the_models_and_a_path_is_not_shown(tmp_path: Path) -> None:
    assert served_names(ModelOptions(model="org/name"), None) == ("org/name",)
    assert served_names(ModelOptions(model="org/name"), "a, b") == ("a", "b")
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert served_names(ModelOptions(model=str(folder)), None) == ("my-model", str(folder))


@pytest.mark.parametrize(("host", "port"), [("256.1.1.1", 0), ("127.0.0.1", 70_000), ("nowhere.invalid", 0)])
def test_an_address_that_cannot_be_bound_is_a_config_error(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match="cannot listen"), listeners(ServerConfig(host=host, port=port)):
        pass


def test_the_banner_has_address_limits_a_line_to_paste_and_a_warning_if_open_to_all() -> None:
    server = Server()
    with listeners(ServerConfig(host="127.0.0.1", port=0)) as [listener]:
        port = listener.getsockname()[1]
        text = _banner(server.service, ServerConfig(port=0), listener, guarded=False)
        assert f"serves m at http://127.0.0.1:{port}/v1" in text
        assert "128 tokens a request" in text
        assert "/v1/chat/completions" in text
        assert "warning" not in text
        assert "/docs" in text
        assert "/docs" not in _banner(server.service, ServerConfig(disable_fastapi_docs=True), listener, guarded=False)
        assert "https://127" in _banner(server.service, ServerConfig(ssl_certfile="c"), listener, guarded=False)
        assert "OCTAVO_API_KEY" in _banner(server.service, ServerConfig(), listener, guarded=True)
        assert "warning" in _banner(server.service, ServerConfig(host="0.0.0.0"), listener, guarded=False)


def test_the_list_of_models_has_every_name_but_paths(tmp_path: Path) -> None:
    assert Server(names=("m", "alias", str(tmp_path))).service.shown == ("m", "alias")


def test_the_line_to_paste_is_what_a_shell_takes_whatever_the_name() -> None:
    with listeners(ServerConfig(port=0)) as [listener]:
        service = Server(names=("it's $HOME",)).service
        banner = _banner(service, ServerConfig(port=0), listener, guarded=True)
    port = re.search(r":(\d+)/docs", banner)
    assert port is not None
    command = shlex.split(banner.splitlines()[-1])
    assert command[:2] == ["curl", f"http://127.0.0.1:{port[1]}/v1/chat/completions"]
    assert json.loads(command[command.index("-d") + 1])["model"] == "it's $HOME"
    assert "authorization: Bearer $OCTAVO_API_KEY" in command
