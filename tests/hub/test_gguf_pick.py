"""Which GGUF file a name means: pure rules, local folders, repos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import ModelError
from octavo.hub.gguf_pick import GgufPick, file_in_repo, split_quant
from octavo.hub.resolve import resolve
from tests.hub_server import Hub

Client = Callable[..., Any]

NAMES = [
    "README.md",
    "config.json",
    "model-Q4_K_M.gguf",
    "model-it-Q4_K_M.gguf",
    "model-Q4_K_S.gguf",
    "model.Q8_0.gguf",
    "BF16/model-BF16-00001-of-00002.gguf",
    "BF16/model-BF16-00002-of-00002.gguf",
    "mmproj-F16.gguf",
    "a/b/model-Q2_K.gguf",
]


@pytest.mark.parametrize(
    ("quant", "chosen"),
    [
        ("Q4_K_M", ["model-Q4_K_M.gguf"]),  # fewest hyphens
        ("q4_k_s", ["model-Q4_K_S.gguf"]),
        ("Q8_0", ["model.Q8_0.gguf"]),
        ("BF16", ["BF16/model-BF16-00001-of-00002.gguf", "BF16/model-BF16-00002-of-00002.gguf"]),
        ("F16", []),  # a projector is no model
        ("Q2_K", []),  # two folders down
        ("Q4_K", []),
    ],
)
def test_a_quantisation_names_one_file_with_all_its_parts(quant: str, chosen: list[str]) -> None:
    assert GgufPick(quant=quant).choose(NAMES) == chosen


def test_without_a_quantisation_only_a_single_model_is_taken() -> None:
    assert GgufPick().choose(NAMES) == []
    assert GgufPick().choose(["x.gguf", "mmproj-F16.gguf"]) == ["x.gguf"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("o/n:Q4_K_M", ("o/n", "Q4_K_M")),
        ("o/n:q8_0", ("o/n", "Q8_0")),
        ("o/n:UD-Q4_K_XL", ("o/n", "UD-Q4_K_XL")),
        ("o/n:IQ1_S", ("o/n", "IQ1_S")),
        ("o/n:BF16", ("o/n", "BF16")),
        ("o/n:Q4_K_Z", ("o/n:Q4_K_Z", None)),
        ("o/n:main", ("o/n:main", None)),
        ("o/n", ("o/n", None)),
        (":Q8_0", (":Q8_0", None)),
    ],
)
def test_only_ggml_types_are_split_off_a_name(name: str, split: tuple[str, str | None]) -> None:
    assert split_quant(name) == split


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("o/n/x.gguf", ("o/n", "x.gguf")),
        ("o/n/sub/x.gguf", ("o/n", "sub/x.gguf")),
        ("o/x.gguf", None),
        ("/o/n/x.gguf", None),
        ("./n/x.gguf", None),
        ("o/n/x.bin", None),
    ],
)
def test_file_in_a_repo(name: str, found: tuple[str, str] | None) -> None:
    assert file_in_repo(name) == found


def test_folder_with_a_quantisation_is_a_file_in_it(tmp_path: Path) -> None:
    for name in ("m-Q4_0.gguf", "m-Q8_0.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    source = resolve(f"{tmp_path}:Q8_0")
    assert (source.kind, source.path) == ("gguf", tmp_path / "m-Q8_0.gguf")
    with pytest.raises(ModelError, match=r"m-Q4_0\.gguf, m-Q8_0\.gguf") as caught:
        resolve(f"{tmp_path}:F16")
    assert caught.value.id == "HF001"


def test_folder_with_a_single_gguf_file_and_no_config_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "m-Q4_0.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path)).path == tmp_path / "m-Q4_0.gguf"
    (tmp_path / "config.json").touch()
    assert resolve(str(tmp_path)).kind == "folder"


# --- repos ------------------------------------------------------------------------------------------------------------

FILES = {
    "README.md": b"x",
    "config.json": b"{}",
    "m-Q4_K_M.gguf": b"GGUF 4",
    "m-Q8_0-00001-of-00002.gguf": b"GGUF 8 first",
    "m-Q8_0-00002-of-00002.gguf": b"GGUF 8 second",
}


def test_repo_with_a_quantisation_fetches_that_file_alone_and_only_once(hub: Hub, client: Client) -> None:
    commit = hub.push("owner/name", FILES)
    first = client("owner/name:Q4_K_M")
    assert (first["kind"], first["commit"]) == ("gguf", commit)
    assert first["path"].endswith(f"{commit}/m-Q4_K_M.gguf")
    fetched = [request for request in hub.requests if "/resolve/" in request and "GET" in request]
    assert [request.rsplit("/", 1)[1] for request in fetched] == ["m-Q4_K_M.gguf"]
    hub.requests.clear()
    assert client("owner/name:Q4_K_M") == first
    assert client("owner/name/m-Q4_K_M.gguf", env={"HF_HUB_OFFLINE": "1"}) == first
    assert hub.requests == []


def test_split_file_comes_with_all_its_parts(hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    first = client("owner/name:Q8_0")
    assert first["path"].endswith("m-Q8_0-00001-of-00002.gguf")
    assert Path(first["path"].replace("00001-of", "00002-of")).read_bytes() == b"GGUF 8 second"


def test_another_quantisation_of_a_cached_repo_is_fetched(hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    client("owner/name:Q4_K_M")
    assert client("owner/name:Q8_0")["path"].endswith("m-Q8_0-00001-of-00002.gguf")


def test_quantisation_that_the_repo_lacks_lists_what_it_has(hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    error = client("owner/name:Q2_K")
    assert error["id"] == "HF004"
    assert "m-Q4_K_M.gguf, m-Q8_0-00001-of-00002.gguf" in error["cause"]
    assert client("owner/name/other.gguf")["id"] == "HF004"
    assert client("owner/name:LARGE")["id"] == "HF001"


def test_repo_of_gguf_files_needs_a_quantisation_unless_it_has_one_file(hub: Hub, client: Client) -> None:
    hub.push("owner/name", {"m-Q4_0.gguf": b"GGUF", "m-Q8_0.gguf": b"GGUF"})
    error = client("owner/name")
    assert error["id"] == "HF004"
    assert "m-Q4_0.gguf, m-Q8_0.gguf" in error["cause"]
    assert "owner/name:QUANT" in error["remedy"]
    hub.push("owner/single", {"m-Q4_0.gguf": b"GGUF", "mmproj-F16.gguf": b"GGUF"})
    assert client("owner/single")["path"].endswith("m-Q4_0.gguf")


def test_offline_without_the_file_says_what_is_missing(hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    client("owner/name:Q4_K_M")
    error = client("owner/name:Q8_0", env={"HF_HUB_OFFLINE": "1"})
    assert error["id"] == "HF005"
    assert "m-Q8_0-00001-of-00002.gguf" in error["cause"]
