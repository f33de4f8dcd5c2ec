"""What was proven of a model is used at its next start, and only where the proof still holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.config import EngineConfig
from octavo.core.engine import EngineCore
from octavo.models.hf import records
from octavo.models.hf.backend import TransformersModel
from octavo.models.llama import LlamaForCausalLM
from octavo.runtime.worker import Worker
from octavo.verify.subject import Subject
from tests.models.test_hf_backend import answers, edit_config
from tools import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # of Transformers' own code


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv(records.FOLDER, str(folder))
    return folder


def started(folder: Path, **options: Any) -> EngineCore:
    flat = {"device": "cpu", "dtype": "float32", "max_num_seqs": 4, "max_model_len": 192, **options}
    return EngineCore(EngineConfig.of(model=str(folder), model_impl="transformers", **flat), Worker())


def runs(folder: Path, **options: Any) -> type:
    return type(started(folder, **options)._worker._model)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "smollm3"])
def test_the_second_start_runs_the_native_model_with_the_same_answers(family: str, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path / "model", family)
    first, second = started(folder), started(folder)
    assert type(first._worker._model) is TransformersModel
    assert type(second._worker._model) is LlamaForCausalLM
    assert answers(first) == answers(second)


def test_a_verification_runs_the_backend_itself_each_time(tmp_path: Path) -> None:
    folder = tiny.make(tmp_path / "model", "llama")
    started(folder)
    config = EngineConfig.of(model=str(folder), model_impl="transformers", device="cpu", max_model_len=192)
    assert type(Subject(config).model) is TransformersModel


def test_the_second_start_does_not_import_the_models_of_transformers(tmp_path: Path) -> None:
    folder = tiny.make(tmp_path / "model", "llama")
    program = (
        "import sys; from octavo import LLM, SamplingParams\n"
        "with LLM(sys.argv[1], model_impl='transformers', skip_tokenizer_init=True) as llm:\n"
        "    print(llm.generate([[5, 6]], SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)[0].outputs)\n"
        "print('transformers.modeling_utils' in sys.modules)\n"
    )

    def run() -> list[str]:
        command = [sys.executable, "-c", program, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
        return done.stdout.splitlines()

    (first, imported), (second, again) = run(), run()
    assert (imported, again) == ("True", "False")
    assert first == second


def change_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "model.safetensors"
    save_file({**load_file(path), "model.rotary_emb.inv_freq": torch.zeros(1)}, path, metadata={"format": "pt"})


def change_config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_config(folder, rms_norm_eps=1e-4)


def change_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_code", lambda model_type: ["another Transformers"])


@pytest.mark.parametrize("change", [change_weights, change_config, change_code])
def test_what_changed_is_proven_anew(change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.make(tmp_path / "model", "llama")
    assert runs(folder) is TransformersModel
    change(folder, monkeypatch)
    assert runs(folder) is TransformersModel
    assert runs(folder) is LlamaForCausalLM


def test_another_length_and_type_are_proven_anew(tmp_path: Path) -> None:
    folder = tiny.make(tmp_path / "model", "llama")
    runs(folder)
    assert runs(folder, max_model_len=100) is TransformersModel
    assert runs(folder, dtype="bfloat16") is TransformersModel


def test_a_class_that_computes_something_else_is_never_taken_for_the_native_model(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    original = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: 0.98 * original(self, x))
    folder = tiny.make(tmp_path / "model", "llama")
    assert [runs(folder), runs(folder)] == [TransformersModel, TransformersModel]
    assert not cache.exists()


def test_tensors_by_other_names_are_left_to_transformers(tmp_path: Path, cache: Path) -> None:
    """It finds them without the prefix, which the native model does not."""
    folder = tiny.make(tmp_path / "model", "llama")
    path = folder / "model.safetensors"
    save_file({name.removeprefix("model."): t for name, t in load_file(path).items()}, path, metadata={"format": "pt"})
    assert [runs(folder), runs(folder)] == [TransformersModel, TransformersModel]
    assert not cache.exists()


def test_dummy_weights_are_proven_each_time(tmp_path: Path) -> None:
    folder = tiny.make(tmp_path / "model", "llama")
    assert [runs(folder, load_format="dummy"), runs(folder, load_format="dummy")] == [TransformersModel] * 2


def test_where_nothing_can_be_kept_the_model_starts_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(records.FOLDER, str(tmp_path / "file" / "cache"))
    folder = tiny.make(tmp_path / "model", "llama")
    assert [runs(folder), runs(folder)] == [TransformersModel] * 2
