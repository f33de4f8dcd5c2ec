from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download

from octavo.errors import ConfigError, ModelError
from octavo.hub.hub_errors import hub_error
from octavo.hub.repo import Repo
from octavo.hub.resolve import resolve
from octavo.hub.source import wanted_files
from tests.hub_server import Hub

Client = Callable[..., Any]

CONFIG = json.dumps({"model_type": "llama"}).encode()
FILES = {
    "README.md": b"# a model",
    "config.json": CONFIG,
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"x",
    "model-00001-of-00002.safetensors": b"first shard" * 1000,
    "model-00002-of-00002.safetensors": b"second",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "pytorch_model.bin": b"pickle",
    "modeling_x.py": b"raise SystemExit",
    "original/consolidated.00.pth": b"pth",
    "onnx/model.safetensors": b"other",
    "flax_model.msgpack": b"flax",
}
NEEDED = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
}


# --- paths ------------------------------------------------------------------------------------------------------------


def test_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    source = resolve(str(tmp_path))
    assert (source.kind, source.path, source.commit) == ("folder", tmp_path, None)
    assert source.file("config.json") == tmp_path / "config.json"
    assert source.file("nothing.json") is None
    assert "local folder" in source.reason


@pytest.mark.parametrize(("name", "data"), [("m.gguf", b""), ("m.bin", b"GGUF\3\0\0\0")])
def test_gguf_is_known_by_suffix_or_first_bytes(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").touch()
    source = resolve(str(tmp_path / name))
    assert (source.kind, source.path) == ("gguf", tmp_path / name)
    assert source.file("config.json") is None


def test_other_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(ModelError) as error:
        resolve(str(tmp_path / "x.txt"))
    assert error.value.id == "HF001"


def test_missing_path_names_the_nearest_folder_and_what_is_in_it(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"model-{i:02}").mkdir()
    with pytest.raises(ModelError) as error:
        resolve(str(tmp_path / "modle" / "deep"))
    assert error.value.id == "HF001"
    assert str(tmp_path) in error.value.cause
    assert "model-00" in error.value.cause
    assert "model-09" in error.value.cause
    assert "model-10" not in error.value.cause
    assert "2 more" in error.value.cause


@pytest.mark.parametrize(
    "name", ["/no/such", "./x", "../x", "~/no-such-x", "a/b/c", "C:\\models", "x.gguf", "a/x.gguf"]
)
def test_path_like_names_never_reach_the_hub(name: str) -> None:
    with pytest.raises(ModelError) as error:
        resolve(name)
    assert error.value.id == "HF001"
    assert name in error.value.cause


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("https://hub.example/owner/name", "Did you mean owner/name?"),
        ("https://hub.example/owner/name/tree/v1", "Did you mean owner/name --revision v1?"),
        ("https://hub.example/owner/name/blob/main/config.json", "Did you mean owner/name --revision main?"),
        ("hf://owner/name", "Did you mean owner/name?"),
        ("s3://bucket/a/b/c", "download it"),
        ("owner/name@v1", "Did you mean owner/name --revision v1?"),
        ("owner/name/", "such as owner/name."),
        ("owner/name:Q9_9", "owner/name:Q4_K_M"),
        (":Q4_K_M", "owner/name"),
    ],
)
def test_addresses_and_other_notations_are_told_what_was_meant(name: str, meant: str) -> None:
    with pytest.raises(ModelError) as error:
        resolve(name)
    assert error.value.id == "HF001"
    assert meant in error.value.remedy


@pytest.mark.parametrize("name", ["x" * 5000, "/" + "x" * 5000, "/proc/self/mem", "a\0b"])
def test_names_that_the_system_refuses_are_errors_not_crashes(name: str) -> None:
    with pytest.raises(ModelError) as error:
        resolve(name)
    assert error.value.id == "HF001"
    assert len(error.value.cause) < 300


@pytest.mark.parametrize(
    "text",
    ['{"owner/name": "%s", "other": 5}', "# here\nno-target\nowner/name   %s  \n\nother/name elsewhere"],
    ids=["json", "lines"],
)
def test_a_table_puts_another_name_in_its_place(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, table = tmp_path / "with a blank", tmp_path / f"table-{len(text)}"
    folder.mkdir()
    (folder / "config.json").touch()
    table.write_text(text % folder)
    monkeypatch.setenv("OCTAVO_MODEL_REDIRECT_PATH", str(table))
    assert resolve("owner/name").path == folder
    assert resolve(str(folder)).path == folder


def test_a_table_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_MODEL_REDIRECT_PATH", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="OCTAVO_MODEL_REDIRECT_PATH"):
        resolve(str(tmp_path))


def test_folder_named_like_a_repo_wins(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.push("owner/name", FILES)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert client()["kind"] == "folder"
    assert hub.requests == []


def test_name_that_is_neither_is_explained(hub: Hub, client: Client) -> None:
    got = client("what is this?")
    assert got["id"] == "HF001"
    assert hub.requests == []


# --- download and cache -----------------------------------------------------------------------------------------------


def test_only_needed_files_are_downloaded(hub: Hub, client: Client) -> None:
    commit = hub.push("owner/name", FILES)
    got = client()
    assert got["commit"] == commit
    assert set(got["files"]) == NEEDED
    shard = Path(got["path"]) / "model-00001-of-00002.safetensors"
    assert shard.read_bytes() == FILES["model-00001-of-00002.safetensors"]


@pytest.mark.parametrize("offline", [False, True])
def test_complete_snapshot_needs_no_request(offline: bool, hub: Hub, client: Client) -> None:
    commit = hub.push("owner/name", FILES)
    first = client()
    hub.requests.clear()
    env = {"HF_HUB_OFFLINE": "1"} if offline else {}
    for revision in (None, "main", commit):
        again = client(revision=revision, env=env)
        assert again["path"] == first["path"]
        assert again["commit"] == commit
    assert hub.requests == []


def test_branch_and_commit_select_the_snapshot(hub: Hub, client: Client) -> None:
    old = hub.push("owner/name", FILES)
    new = hub.push("owner/name", {**FILES, "config.json": b"{}"}, branch="dev")
    assert client(revision="dev")["commit"] == new
    assert client(revision=old)["commit"] == old
    assert client(revision="main")["commit"] == old


def test_interrupted_download_is_completed(hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    got = client()
    shard = Path(got["path"]) / "model-00002-of-00002.safetensors"
    shard.resolve().unlink()
    shard.unlink()
    hub.requests.clear()
    assert set(client()["files"]) == NEEDED
    fetched = [request for request in hub.requests if request.startswith("GET") and "resolve" in request]
    assert len(fetched) == 1
    assert fetched[0].endswith(shard.name)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "chat_template.jinja"])
def test_snapshot_that_another_process_is_filling_is_not_taken_for_complete(
    name: str, hub: Hub, client: Client
) -> None:
    hub.push("owner/name", FILES)
    (Path(client(weights=False)["path"]) / name).unlink()
    hub.requests.clear()
    assert name in client(weights=False)["files"]
    assert hub.requests


def test_snapshot_of_another_program_is_complete_with_config_weights_and_tokenizer(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    hub.push("owner/name", FILES)
    got = client()
    shutil.rmtree(tmp_path / "cache" / "models--owner--name" / "trees")
    (Path(got["path"]) / "generation_config.json").unlink()
    hub.requests.clear()
    fresh = {"OCTAVO_TEST_PROCESS": "fresh"}  # the client keeps listings in memory
    assert client(env=fresh)["path"] == got["path"]
    assert hub.requests == []


def test_cache_is_that_of_the_client_unless_a_folder_is_given(hub: Hub, clients: Any, tmp_path: Path) -> None:
    hub.push("owner/name", FILES)
    for kwargs, root in (({}, clients.home / "hub"), ({"download_dir": str(tmp_path / "x")}, tmp_path / "x")):
        got = clients.ask(tmp_path, {}, {"name": "owner/name", **kwargs})
        assert Path(got["path"]).is_relative_to(root)
        hub.requests.clear()
        assert clients.ask(tmp_path, {}, {"name": "owner/name", **kwargs})["path"] == got["path"]
        assert hub.requests == []


def test_without_weights_only_small_files_are_fetched(hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    got = client(weights=False)
    assert set(got["files"]) == {name for name in NEEDED if "safetensors" not in name}
    hub.requests.clear()
    assert client(weights=False)["path"] == got["path"]
    assert hub.requests == []
    assert set(client()["files"]) == NEEDED, "asking for weights later completes the snapshot"


def test_repo_of_a_tokenizer_alone(hub: Hub, client: Client) -> None:
    hub.push("owner/name", {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}"})
    got = client(weights=False)
    assert got["files"] == ["tokenizer.json", "tokenizer_config.json"]
    hub.requests.clear()
    assert client(weights=False, env={"HF_HUB_OFFLINE": "1"})["path"] == got["path"]
    assert hub.requests == []


def test_bin_files_are_taken_where_there_are_no_safetensors() -> None:
    names = ["config.json", "pytorch_model.bin", "training_args.bin", "sub/pytorch_model.bin", "model.pth"]
    assert wanted_files(names) == ["config.json", "pytorch_model.bin"]
    assert wanted_files([*names, "model.safetensors"]) == ["config.json", "model.safetensors"]
    assert wanted_files([*names, "consolidated.safetensors"]) == ["config.json", "pytorch_model.bin"]


def test_of_two_formats_only_one_comes_with_its_index() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    pickled = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
    for few, load_format in ((shards, "auto"), (shards, "safetensors"), (pickled, "pt"), (pickled, "auto")):
        names = [*shards, *pickled] if (few, load_format) != (pickled, "auto") else pickled
        assert sorted(wanted_files([*names, "trainer_state.json"], load_format=load_format)) == sorted(few)
    assert wanted_files([*shards, *pickled, "config.json"], load_format="dummy") == ["config.json"]


def test_weights_that_the_index_does_not_name_are_not_fetched(hub: Hub, client: Client) -> None:
    extra = {"model.fp16.safetensors": b"extra", "consolidated.safetensors": b"extra"}
    hub.push("owner/name", {**FILES, **extra})
    assert set(client()["files"]) == NEEDED
    assert not any("fp16" in request for request in hub.requests)
    hub.requests.clear()
    assert set(client()["files"]) == NEEDED
    assert hub.requests == []


def index_of(*shards: str) -> bytes:
    return json.dumps({"weight_map": {f"tensor.{i}": shard for i, shard in enumerate(shards)}}).encode()


@pytest.mark.parametrize("above", [{}, {"model-00001-of-00002.safetensors": b"first"}])
def test_shards_in_folders_are_fetched_if_the_index_names_them(
    above: dict[str, bytes], hub: Hub, client: Client
) -> None:
    small = {name: FILES[name] for name in ("config.json", "tokenizer.json")}
    nested = {"weights/part-1.safetensors": b"one", "weights/part-2.safetensors": b"two"}
    index = {"model.safetensors.index.json": index_of(*above, *nested)}
    hub.push("owner/name", {**small, **above, **nested, **index, "lora/adapter.safetensors": b"other"})
    assert set(client()["files"]) == {*small, *above, *nested, *index}
    hub.requests.clear()
    assert set(client(env={"HF_HUB_OFFLINE": "1"})["files"]) == {*small, *above, *nested, *index}
    assert hub.requests == []


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
def test_a_shard_that_the_repo_lacks_is_named_before_the_others_are_fetched(
    load_format: str, hub: Hub, client: Client
) -> None:
    hub.push("owner/name", {k: v for k, v in FILES.items() if k != "model-00002-of-00002.safetensors"})
    got = client(load_format=load_format)
    assert got["id"] == "HF040"
    assert "model-00002-of-00002.safetensors" in got["cause"]
    assert not any("model-00001" in request for request in hub.requests)


def test_snapshot_of_another_program_with_an_index_of_other_weights_is_complete(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    single = {name: FILES[name] for name in ("config.json", "tokenizer.json")}
    index = json.dumps({"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}).encode()
    hub.push("owner/name", {**single, "model.safetensors": b"x", "pytorch_model.bin.index.json": index})
    got = client()
    shutil.rmtree(tmp_path / "cache" / "models--owner--name" / "trees")
    (Path(got["path"]) / "pytorch_model.bin.index.json").write_bytes(index)
    assert client(env={"HF_HUB_OFFLINE": "1"})["path"] == got["path"]


@pytest.mark.parametrize("name", ["spiece.model", "tiktoken.model", "sentencepiece.bpe.model", "qwen.tiktoken"])
def test_tokenizers_of_any_age_are_fetched(name: str, hub: Hub, client: Client) -> None:
    hub.push("owner/name", {"config.json": CONFIG, name: b"x", "model.safetensors": b"y"})
    assert name in client()["files"]
    hub.requests.clear()
    assert name in client(env={"HF_HUB_OFFLINE": "1"})["files"]


# --- errors of the Hub ------------------------------------------------------------------------------------------------


def test_a_gated_repo_says_whether_a_token_was_sent(hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES, gated=True, token="good")
    without = client()
    assert without["id"] == "HF003"
    assert "gated" in without["cause"]
    assert "no token was sent" in without["cause"]
    assert "HF_TOKEN" in without["remedy"]
    wrong = client(token="bad")
    assert wrong["id"] == "HF003"
    assert "a token was sent" in wrong["cause"]
    assert "bad" not in wrong["cause"] + wrong["remedy"]
    assert set(client(token="good")["files"]) == NEEDED


def test_private_repo_with_a_token_from_the_environment(hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES, private=True, token="good")
    hidden = client()
    assert hidden["id"] == "HF004"
    assert "private" in hidden["cause"]
    assert client(env={"HF_TOKEN": "good"})["kind"] == "snapshot"


@pytest.mark.parametrize("token", ["hf_sec ret", "hf_sec\tret", "hf_señor"])
def test_a_token_that_cannot_be_sent_is_not_shown(token: str, hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    for got in (client(token=token), client(env={"HF_TOKEN": token})):
        assert got["id"] == "HF003"
        assert "sec" not in got["cause"] + got["remedy"]
        assert "señor" not in got["cause"] + got["remedy"]
    assert hub.requests == []


def test_missing_repo_and_revision(hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    missing = client("owner/nome")
    assert missing["id"] == "HF004"
    assert "owner/nome" in missing["cause"]
    revision = client(revision="nonesuch")
    assert revision["id"] == "HF004"
    assert "nonesuch" in revision["cause"]
    assert "owner/name" in revision["cause"]


# What the Hub answers for a repo -> id, what the cause says, whether it is asked again.
ANSWERS = {
    (401, "", "Invalid credentials in Authorization header"): ("HF003", "status 401", False),
    (401, "GatedRepo", "Access is restricted"): ("HF003", "gated", False),
    (401, "RepoNotFound", "Repository not found"): ("HF004", "not found on the Hub, or is private", False),
    (403, "GatedRepo", "Access is restricted"): ("HF003", "gated", False),
    (403, "", "Forbidden"): ("HF003", "status 403", False),
    (403, "", "Access to this resource is disabled."): ("HF004", "disabled", False),
    (404, "RepoNotFound", "Repository not found"): ("HF004", "not found on the Hub, or is private", False),
    (404, "RevisionNotFound", "Invalid rev id"): ("HF004", "no revision", False),
    (429, "", "slow down"): ("HF006", "limits the rate", True),
    (500, "", "oops"): ("HF006", "status 500", True),
    (502, "", "bad gateway"): ("HF006", "status 502", True),
    (503, "", "busy"): ("HF006", "status 503", True),
    (504, "", "timeout"): ("HF006", "status 504", True),
}


@pytest.mark.parametrize("refused", ANSWERS, ids=str)
def test_every_answer_of_the_hub_has_its_error(refused: tuple[int, str, str], hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    hub.repos["owner/name"].refused = refused
    id, said, again = ANSWERS[refused]
    got = client()
    assert got["id"] == id
    assert said in got["cause"]
    assert got["remedy"]
    assert hub.requests.count("GET /api/models/owner/name") == (5 if again else 1)


def test_a_home_that_is_a_file_is_named(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.push("owner/name", FILES)
    (tmp_path / "home").touch()
    got = client(env={"HF_HOME": str(tmp_path / "home")}, download_dir=None)
    assert got["id"] == "HF007"
    assert "HF_HOME" in got["remedy"]


def test_a_full_disk_is_not_blamed_on_the_hub() -> None:
    for number in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        found = hub_error(Repo("owner/name", download_dir="/cache"), OSError(number, os.strerror(number)), 3)
        assert found is not None
        assert found.id == "HF007"
        assert f"cache in /cache cannot be used for owner/name: {os.strerror(number)}." in found.cause
    refused = hub_error(Repo("owner/name"), ConnectionRefusedError(errno.ECONNREFUSED, "refused"), 3)
    assert refused is not None
    assert refused.id == "HF006"


def test_a_renamed_repo_is_followed(hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    hub.renamed["former/name"] = "owner/name"
    got = client("former/name")
    assert set(got["files"]) == NEEDED
    hub.requests.clear()
    assert client("former/name")["path"] == got["path"]
    assert hub.requests == []


def test_a_listed_file_that_is_not_there_is_named(hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    hub.repos["owner/name"].lost.add("generation_config.json")
    got = client()
    assert got["id"] == "HF004"
    assert "generation_config.json" in got["cause"]


def test_a_name_that_nearly_exists_is_suggested(hub: Hub, client: Client) -> None:
    hub.push("Owner/Some-Model-7B", FILES)
    assert "Did you mean Owner/Some-Model-7B?" in client("other/some-model-7b")["remedy"]
    assert client("Owner/Some-Model-7B")["kind"] == "snapshot"
    hub.repos.clear()
    for wrong in ("owner/some-model-7b", "Owner/Some-Modell-7B", "somebody/Some-Model-7B"):
        assert "Did you mean Owner/Some-Model-7B?" in client(wrong)["remedy"], wrong
        offline = client(wrong, env={"HF_HUB_OFFLINE": "1"})
        assert "Did you mean Owner/Some-Model-7B, which is there?" in offline["remedy"]
    assert "Did you mean" not in client("Owner/Quite-Another")["remedy"]


def test_revisions_that_exist_are_listed(hub: Hub, client: Client) -> None:
    for branch in ("main", "v1"):
        hub.push("owner/name", FILES, branch=branch)
    assert "it has main, v1." in client(revision="v2")["cause"]


def test_repo_without_a_model(hub: Hub, client: Client) -> None:
    hub.push("owner/name", {"README.md": b"x", "data.parquet": b"y"})
    got = client()
    assert got["id"] == "HF004"
    assert "config.json" in got["cause"]


def test_offline_without_a_snapshot_says_what_to_run(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.push("owner/name", FILES)
    got = client(revision="dev", env={"HF_HUB_OFFLINE": "1"})
    assert got["id"] == "HF005"
    assert str(tmp_path / "cache") in got["cause"]
    assert "hf download owner/name --revision dev" in got["remedy"]
    assert hub.requests == []


def test_offline_with_a_missing_shard_names_it(hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    got = client()
    (Path(got["path"]) / "model-00002-of-00002.safetensors").unlink()
    hub.requests.clear()
    offline = client(env={"HF_HUB_OFFLINE": "1"})
    assert offline["id"] == "HF005"
    assert "model-00002-of-00002.safetensors" in offline["cause"]
    assert hub.requests == []


@pytest.mark.parametrize("status", [429, 503])
def test_hub_that_does_not_answer_is_asked_five_times(status: int, hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    hub.fail_with = status
    got = client()
    assert got["id"] == "HF006"
    assert str(status) in got["cause"]
    assert "5 attempts" in got["cause"]
    assert len(hub.requests) == 5


def test_short_failure_is_survived(hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    hub.fail_with, hub.failures = 503, 4
    assert set(client()["files"]) == NEEDED


def test_the_hub_says_how_long_to_wait(hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    hub.fail_with, hub.failures, hub.retry_after = 429, 1, "1"
    start = time.monotonic()
    assert set(client()["files"]) == NEEDED
    assert time.monotonic() - start >= 1


def test_no_server_at_all(hub: Hub, client: Client) -> None:
    got = client(env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert got["id"] == "HF006"
    assert "HF_ENDPOINT" in got["remedy"]


def test_snapshot_with_config_and_weights_serves_while_the_hub_is_down(hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    first = client()
    (Path(first["path"]) / "tokenizer.json").unlink()
    hub.fail_with = 503
    assert client()["path"] == first["path"]
    assert client(env={"HF_HUB_OFFLINE": "1"})["path"] == first["path"]


# --- what is asked, and of which commit -------------------------------------------------------------------------------


def asked(hub: Hub) -> list[str]:
    return [request for request in hub.requests if request.startswith("GET /api/")]


@pytest.mark.parametrize("kind", ["default", "branch", "tag", "commit"])
@pytest.mark.parametrize("cdn", [False, True])
def test_a_download_asks_the_hub_once(kind: str, cdn: bool, hub: Hub, client: Client) -> None:
    hub.cdn = cdn
    commit = hub.push("owner/name", FILES)
    for branch in ("dev", "v1"):
        hub.push("owner/name", FILES, branch=branch)
    revision = {"default": None, "branch": "dev", "tag": "v1", "commit": commit}[kind]
    got = client(revision=revision, weights=False)
    where = f"/revision/{revision}" if revision else ""
    assert asked(hub) == [f"GET /api/models/owner/name{where}"]
    assert got["commit"] in hub.repos["owner/name"].commits
    hub.requests.clear()
    assert set(client(revision=revision)["files"]) == NEEDED
    assert asked(hub) == [], "the weights come by the listing that the small files came by"
    files = [request.rpartition("/")[2] for request in hub.requests if "resolve" in request]
    assert set(files) == {name for name in NEEDED if "safetensors" in name}


def test_the_listing_in_the_cache_is_what_the_client_would_have_put_there(
    hub: Hub, client: Client, tmp_path: Path
) -> None:
    hub.cdn = True
    commit = hub.push("owner/name", FILES)
    client()
    own = tmp_path / "own"
    snapshot_download("owner/name", endpoint=hub.url, cache_dir=own, allow_patterns="config.json", token=False)
    ours, theirs = (
        json.loads((root / "models--owner--name" / "trees" / f"{commit}.json").read_text())
        for root in (tmp_path / "cache", own)
    )
    assert ours == theirs
    assert ours["files"].keys() == FILES.keys()


def test_a_hub_that_tells_no_hashes_is_asked_for_them_by_the_client(hub: Hub, client: Client) -> None:
    hub.plain = True
    commit = hub.push("owner/name", FILES)
    assert set(client()["files"]) == NEEDED
    assert asked(hub) == ["GET /api/models/owner/name", f"GET /api/models/owner/name/tree/{commit}"]


def test_both_halves_of_a_start_get_the_same_commit(hub: Hub, client: Client) -> None:
    old = hub.push("owner/name", FILES)
    assert client(weights=False)["commit"] == old
    hub.push("owner/name", {**FILES, "config.json": b"{}"})
    assert client()["commit"] == old


def test_a_commit_that_the_hub_has_no_more_is_given_up(hub: Hub, client: Client) -> None:
    old = hub.push("owner/name", FILES)
    assert client(weights=False)["commit"] == old
    del hub.repos["owner/name"].commits[old]
    new = hub.push("owner/name", {**FILES, "extra.json": b"{}"})
    assert client()["commit"] == new


# --- caches in disorder -----------------------------------------------------------------------------------------------


def repo_folder(got: Any) -> Path:
    return Path(got["path"]).parent.parent


@pytest.mark.parametrize("ref", ["", "../../../etc", "no such commit", None])
def test_a_damaged_ref_is_made_anew(ref: str | None, hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    path = repo_folder(first := client()) / "refs" / "main"
    path.unlink() if ref is None else path.write_text(ref)
    assert client(env={"HF_HUB_OFFLINE": "1"})["id"] == "HF005"
    assert client()["path"] == first["path"]
    assert path.read_text() == first["commit"]


def test_a_ref_that_is_a_folder_is_named(hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    path = repo_folder(client()) / "refs" / "main"
    path.unlink()
    path.mkdir()
    assert client()["id"] == "HF007"


def test_links_whose_blobs_are_gone_are_fetched_again(hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    shutil.rmtree(repo_folder(client()) / "blobs")
    offline = client(env={"HF_HUB_OFFLINE": "1"})
    assert offline["id"] == "HF005"
    assert "config.json" in offline["cause"]
    assert set(client()["files"]) == NEEDED


@pytest.mark.parametrize("files", ["{", '{"../../../x": {"size": 1, "blob_id": "a"}}'])
def test_a_damaged_listing_is_no_snapshot(files: str, hub: Hub, client: Client) -> None:
    hub.push("owner/name", FILES)
    folder = repo_folder(client())
    (tree,) = (folder / "trees").iterdir()
    tree.write_text(f'{{"format_version": 1, "files": {files}}}')
    shutil.rmtree(folder / "snapshots")
    again = client(env={"OCTAVO_TEST_PROCESS": files})  # the client keeps listings in memory
    assert again.get("id") == "HF007" if "x" in files else set(again["files"]) == NEEDED
    assert "path" in again or str(folder) in again["remedy"]


def test_a_complete_cache_is_only_read(hub: Hub, client: Client, tmp_path: Path) -> None:
    hub.push("owner/name", FILES)
    client()

    def state() -> dict[Path, int]:
        return {path: path.lstat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}

    before = state()
    client()
    assert state() == before


def test_a_listing_leads_nowhere_outside_the_snapshot(hub: Hub, client: Client, tmp_path: Path) -> None:
    evil = dict.fromkeys(("../../evil.json", "/evil.json", "a/../../evil.json"), b"{}")
    hub.push("owner/name", {**FILES, **evil})
    assert set(client()["files"]) == NEEDED
    assert list(tmp_path.rglob("evil.json")) == []


# --- the way that bytes take ------------------------------------------------------------------------------------------


def test_weights_come_from_another_host_which_gets_no_token(hub: Hub, client: Client) -> None:
    hub.cdn, hub.leaked = True, 0
    hub.push("owner/name", FILES, gated=True, token="t")
    answer = client(token="t")
    assert set(answer["files"]) == NEEDED
    assert any("/cdn/" in request for request in hub.requests)
    assert hub.leaked == 0


def test_download_that_breaks_off_is_taken_up_where_it_stopped(hub: Hub, client: Client) -> None:
    hub.cuts = 1
    hub.push("owner/name", FILES)
    answer = client()
    assert hub.cuts == 0
    for name in NEEDED:
        assert (Path(answer["path"]) / name).read_bytes() == FILES[name]
