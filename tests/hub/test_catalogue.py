"""Every error of the catalogue between a name and a ready model is provoked through what users call."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from octavo.errors import ModelError, OctavoError
from octavo.llm import LLM
from tests.hub_server import Hub
from tools import tiny

CATALOGUE = Path(__file__).parent.parent.parent / "docs" / "errors.md"
OPTIONS = {"device": "cpu", "max_num_seqs": 2, "kv_cache_memory_bytes": 1 << 22}

Spoil = Callable[[Path], dict[str, Any] | None]  # changes a good model in place; returns further options


def config(**values: Any) -> Spoil:
    """Sets keys of config.json; None removes one."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        hf = {**json.loads(path.read_text()), **values}
        path.write_text(json.dumps({key: value for key, value in hf.items() if value is not None}))

    return spoil


def options(**values: Any) -> Spoil:
    return lambda folder: values


def removed(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def weights(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = {name: tensor.copy() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path)

    return spoil


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def code_of_the_repo(folder: Path) -> None:
    removed("tokenizer.json")(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": "t.T"}}))


def broken_code_of_the_repo(folder: Path) -> dict[str, Any]:
    code_of_the_repo(folder)
    (folder / "t.py").write_text("import no_such_package_at_all\n")
    return {"trust_remote_code": True}


NORM = "model.norm.weight"

SPOILED: dict[str, Spoil] = {
    "HF001": options(model="./no/such/folder"),
    "HF002": removed("config.json"),
    "HF010": code_of_the_repo,
    "HF011": broken_code_of_the_repo,
    "HF012": config(architectures=None, model_type="no_such_type"),
    "HF020": config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}),
    "HF021": options(max_model_len=1 << 20),
    "HF022": options(dtype="float16", hf_overrides={"model_type": "gemma2"}),
    "HF030": config(architectures=["NoSuchForCausalLM"], model_type="no_such_type"),
    "HF031": config(architectures=["BertLMHeadModel"], model_type="bert", is_decoder=False),
    "HF040": removed("model.safetensors"),
    "HF041": truncated,
    "HF042": weights(lambda tensors: tensors.update({"model.extra.weight": np.zeros(4, np.float32)})),
    "HF043": weights(lambda tensors: tensors.pop(NORM)),
    "HF044": weights(lambda tensors: tensors.update({NORM: np.zeros(4, np.float32)})),
    "HF050": config(quantization_config={"quant_method": "hqq"}),
    "HF060": removed("tokenizer.json"),
}
OF_THE_HUB = {"HF003", "HF004", "HF005", "HF006", "HF007"}
ELSEWHERE = {
    "HF000",  # the default of the class: nothing raises it bare
    "HF033",  # several devices: tests/parallel/test_transformers.py
    "HF045",  # of octavo verify: tests/verify/test_verify.py
    "HF061",  # a request: tests/frontend/test_chat.py
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("catalogue") / "good", "llama")


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("id", SPOILED)
def test_a_spoiled_model_is_answered_with_its_id_a_cause_and_a_remedy(id: str, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    further = SPOILED[id](folder)
    with pytest.raises(OctavoError) as caught:
        LLM(**{"model": str(folder), **OPTIONS, **(further or {})})
    error = caught.value
    assert (error.id, error.exit_code) == (id, ModelError.exit_code), str(error)
    assert error.cause
    assert error.remedy
    assert "\n" not in error.cause + error.remedy


def test_a_good_model_is_answered_with_none(good: Path) -> None:
    LLM(str(good), **OPTIONS).close()


def test_errors_of_the_hub(hub: Hub, client: Callable[..., Any], tmp_path: Path) -> None:
    hub.push("owner/gated", {"config.json": b"{}", "tokenizer.json": b"{}"}, gated=True, token="t")
    found = {
        "HF003": client("owner/gated"),
        "HF004": client("owner/nothing"),
        "HF005": client("owner/offline", env={"HF_HUB_OFFLINE": "1"}),
    }
    (tmp_path / "file").touch()
    hub.push("owner/name", {"config.json": b"{}"})
    found["HF007"] = client("owner/name", download_dir=str(tmp_path / "file"))
    hub.fail_with = 503
    found["HF006"] = client("owner/busy")
    assert {id: answer["id"] for id, answer in found.items()} == {id: id for id in OF_THE_HUB}
    assert all(answer["cause"] and answer["remedy"] for answer in found.values())


def test_the_catalogue_has_no_id_that_is_not_provoked() -> None:
    listed = set(re.findall(r"^\| `(HF\d{3})`", CATALOGUE.read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == SPOILED.keys() | OF_THE_HUB | ELSEWHERE
