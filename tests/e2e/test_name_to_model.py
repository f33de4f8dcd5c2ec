"""Every step from a name to a ready model and every option of it, through the command line.

The steps are those of docs/life-of-a-model.md: find the config, read it, its class, code of the repo, old shapes, the
model's class, the Transformers backend, the choice between the two, tokenizer, weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.shell import Outcome, Shell, Terminal
from tests.gguf_files import tiny_metadata, tiny_tensors, write_gguf
from tests.hub_server import Hub
from tests.mistral_files import mistral_repo
from tools import tiny

Files = dict[str, bytes]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("model") / "tiny", "llama")


@pytest.fixture(scope="module")
def files(model: Path) -> Files:
    return {path.name: path.read_bytes() for path in model.iterdir()}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def terminal(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    with Terminal(Shell(hub, tmp_path_factory.mktemp("home"))) as terminal:
        yield terminal


@pytest.fixture(scope="module")
def plain(terminal: Terminal, model: Path) -> Outcome:
    """What the model says in the shape in which it was made, in a local folder: step 1, the first way."""
    outcome = terminal.generate(str(model))
    assert outcome.code == 0, outcome.err
    assert "is a local folder" in outcome.err
    return outcome


def changed(files: Files, **configs: dict[str, Any] | None) -> Files:
    """``files`` with keys of JSON files (named without their suffix) set; None removes the file."""
    out = dict(files)
    for name, values in configs.items():
        file = f"{name}.json"
        if values is None:
            del out[file]
        else:
            merged = {**json.loads(out.get(file, b"{}")), **values}
            out[file] = json.dumps({key: value for key, value in merged.items() if value is not None}).encode()
    return out


def same(outcome: Outcome, plain: Outcome) -> bool:
    assert outcome.code == 0, outcome.err
    return outcome.out == plain.out


def planned(outcome: Outcome) -> dict[str, Any]:
    assert outcome.code == 0, outcome.err
    found: dict[str, Any] = json.loads(outcome.out)
    return found


# --- 1: find it -------------------------------------------------------------------------------------------------------


def test_revision_names_a_branch_a_tag_or_a_commit(hub: Hub, terminal: Terminal, files: Files) -> None:
    wanted = hub.push("one/revision", files, branch="dev")
    hub.push("one/revision", files, branch="v1")
    hub.push("one/revision", {"config.json": b"{}", "tokenizer.json": b"{}"})
    for revision in ("dev", "v1", wanted):
        assert planned(terminal.plan("one/revision", "--revision", revision))["weights"]["parameters"], revision
    assert terminal.plan("one/revision").code == 3


def test_download_dir_holds_everything(
    hub: Hub, terminal: Terminal, files: Files, plain: Outcome, tmp_path: Path
) -> None:
    commit = hub.push("one/elsewhere", files)
    there = ("--download-dir", str(tmp_path / "own"))
    assert same(terminal.generate("one/elsewhere", *there), plain)
    snapshot = tmp_path / "own" / "models--one--elsewhere" / "snapshots" / commit
    assert {path.name for path in snapshot.iterdir()} >= {"config.json", "tokenizer.json", "model.safetensors"}
    before = len(hub.requests)
    assert planned(terminal.plan("one/elsewhere", *there))["downloads"] == []
    assert len(hub.requests) == before
    assert planned(terminal.plan("one/elsewhere"))["downloads"] != []


def test_gguf_files_in_a_folder_or_of_a_repo(hub: Hub, terminal: Terminal, tmp_path: Path) -> None:
    letters = [chr(ord("a") + i) for i in range(26)]
    vocabulary = {
        "model": "gpt2",
        "pre": "default",
        "tokens": ["<|end|>", *letters, *map(str, range(10)), "Ġ", "-", "_"],
    }
    vocabulary |= {"token_type": [3, *[1] * 39], "merges": [], "eos_token_id": 0}
    entries = {**tiny_metadata(), **{f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}}
    file = write_gguf(tmp_path / "m-F32.gguf", tiny_tensors(), entries)
    expected = terminal.generate(str(file))
    assert expected.code == 0, expected.err
    assert "is a local GGUF file" in expected.err
    hub.push("one/gguf", {file.name: file.read_bytes(), "m-Q8_0.gguf": b"GGUF"})
    assert "HF004" in terminal.generate("one/gguf").err
    assert same(terminal.generate("one/gguf:F32"), expected)
    plan = planned(terminal.plan(str(file)))
    for name in ("one/gguf/m-F32.gguf", f"{tmp_path}:F32"):
        assert planned(terminal.plan(name))["weights"] == plan["weights"], name
    assert not any("Q8_0" in request for request in hub.requests)
    assert "has no GGUF file in Q4_K_M" in terminal.generate("one/gguf:Q4_K_M").err


# --- 2: read it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "id", "said"),
    [
        ("config.json", b"{", "HF002", "config.json cannot be read"),
        ("config.json", b"[1]", "HF002", "not an object"),
        (
            "config.json",
            b'{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}',
            "HF002",
            "num_hidden_layers is missing",
        ),
        ("generation_config.json", b'{"temperature": -1}', "HF002", "generation_config.json"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1", "HF041", "Git LFS pointer"),
    ],
)
def test_a_broken_file_is_named(
    name: str, content: bytes, id: str, said: str, terminal: Terminal, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(model, folder)
    (folder / name).write_bytes(content)
    outcome = terminal.plan(str(folder))
    assert (outcome.code, outcome.out) == (3, "")
    assert f"octavo: {id}: " in outcome.err
    assert said in outcome.err


def test_config_and_sampling_defaults_from_elsewhere(
    hub: Hub, terminal: Terminal, files: Files, plain: Outcome
) -> None:
    hub.push("two/weights", changed(files, config=None, generation_config=None))
    hub.push("two/config", {name: files[name] for name in ("config.json", "generation_config.json")})
    hub.push("two/sampling", changed({}, generation_config={"temperature": 0.5, "top_k": 7, "eos_token_id": 5}))
    assert "HF002" in terminal.plan("two/weights").err
    there = ("--hf-config-path", "two/config")
    assert planned(terminal.plan("two/weights", *there))["eos_ids"] == [2, 0]
    there = (*there, "--generation-config", "two/sampling")
    found = planned(terminal.plan("two/weights", *there, "--override-generation-config", '{"top_k": 9}'))
    assert found["sampling"] == {"temperature": 0.5, "top_k": 9}
    assert found["eos_ids"] == [5, 2]
    assert planned(terminal.plan("two/weights", *there[:2], "--generation-config", "vllm"))["sampling"] == {}
    assert same(terminal.generate("two/weights", *there), plain)


def test_overrides_reach_the_model(hub: Hub, terminal: Terminal, files: Files, plain: Outcome) -> None:
    hub.push("two/overrides", changed(files, config={"rms_norm_eps": "wrong"}))
    assert terminal.plan("two/overrides").code == 3
    outcome = terminal.generate(
        "two/overrides", "--hf-overrides", '{"rms_norm_eps": 1e-5, "max_position_embeddings": 64}'
    )
    assert same(outcome, plain)
    assert "max length: 64 (max_position_embeddings 64)" in outcome.err


# --- 4: code of the repo ---------------------------------------------------------------------------------------------

OWN_CONFIG = """
from transformers import LlamaConfig
{mark}
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
OWN_MODEL = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
{mark}
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
OWN_TOKENIZER = """
from transformers import PreTrainedTokenizerFast
{mark}
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


def own(files: Files, marks: Path, **auto_map: Any) -> Files:
    """``files`` with classes of their own, each of which leaves a mark in the folder ``marks`` when it is imported."""
    code = {"configuration_own.py": OWN_CONFIG, "modeling_own.py": OWN_MODEL, "tokenization_own.py": OWN_TOKENIZER}
    code["processing_own.py"] = "{mark}"
    out = {
        name: text.replace("{mark}", f"open({str(marks / name)!r}, 'w').close()").encode()
        for name, text in code.items()
    }
    config = {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    out |= changed(
        files, config=config, tokenizer_config={"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer"] * 2}}
    )
    return {**out, "processor_config.json": b'{"auto_map": {"AutoProcessor": "processing_own.OwnProcessor"}}'}


def test_code_of_the_repo_runs_with_the_flag_alone(
    hub: Hub, terminal: Terminal, files: Files, plain: Outcome, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    commit = hub.push("four/own", own(files, marks, **classes))
    refused = terminal.generate("four/own")
    assert refused.code == 3
    assert "octavo: HF010: " in refused.err
    for said in ("configuration_own.py", commit, "--trust-remote-code"):
        assert said in refused.err
    planned_only = terminal.plan("four/own")
    assert planned_only.code == 3
    assert "modeling_own.OwnForCausalLM" in planned_only.out, planned_only.out
    assert terminal.run("verify", "four/own").code == 3
    assert list(marks.iterdir()) == []
    assert not any(request.endswith(".py") for request in hub.requests)
    assert same(terminal.generate("four/own", "--trust-remote-code"), plain)
    ran = {path.name for path in marks.iterdir()}
    assert ran == {"configuration_own.py", "modeling_own.py", "tokenization_own.py"}


# --- 3 to 8: classes --------------------------------------------------------------------------------------------------


def test_old_shapes_of_a_config_mean_what_the_new_ones_do(hub: Hub, terminal: Terminal, files: Files) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    hub.push("five/new", changed(files, config={"rope_parameters": rope}))
    scaling = {"type": "linear", "factor": 4.0}
    old = {"rope_theta": 5000.0, "rope_scaling": scaling, "torch_dtype": "float32"}
    hub.push("five/old", changed(files, config={"rope_parameters": None, "dtype": None, "architectures": None, **old}))
    new = planned(terminal.plan("five/new"))
    assert new["rope"] == ["linear, theta 5000, factor 4, 16 of 16 dimensions"]
    found = planned(terminal.plan("five/old"))
    for key in ("rope", "max_len", "dtype", "implementation", "eos_ids"):
        assert found[key] == new[key], key


def test_either_implementation_says_the_same(terminal: Terminal, model: Path, plain: Outcome) -> None:
    assert "implementation: native LlamaForCausalLM" in plain.err
    outcome = terminal.generate(str(model), "--task", "generate", "--model-impl", "transformers")
    assert same(outcome, plain)
    assert "implementation: Transformers backend for LlamaForCausalLM: asked for" in outcome.err
    for word in ("native", "vllm"):
        assert "native" in planned(terminal.plan(str(model), "--model-impl", word))["implementation_reason"]


def test_an_architecture_without_a_native_model_runs_on_the_backend(terminal: Terminal, tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 256}
    GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)).save_pretrained(tmp_path)
    tiny.tokenizer(tmp_path)
    outcome = terminal.generate(str(tmp_path))
    assert outcome.code == 0, outcome.err
    assert "Transformers backend for GPTNeoXForCausalLM: no native model of it" in outcome.err


def test_an_architecture_that_nobody_knows_is_told_what_was_tried(terminal: Terminal, model: Path) -> None:
    outcome = terminal.plan(str(model), "--hf-overrides", '{"architectures": ["LlamoForCausalLM"]}')
    assert outcome.code == 3
    for said in ("no native model", "entry points", "the installed Transformers lacks it", "LlamaForCausalLM"):
        assert said in json.loads(outcome.out)["implementation_reason"]
    assert "generates text and embeds it" in terminal.plan(str(model), "--task", "score").err


# --- 9: tokenizer -----------------------------------------------------------------------------------------------------


def test_tokenizer_from_another_revision_or_another_repo(
    hub: Hub, terminal: Terminal, files: Files, plain: Outcome
) -> None:
    tokenizer = {name: files[name] for name in files if name.startswith("tokenizer")}
    hub.push("nine/name", {**files, "tokenizer.json": b"{}"})
    hub.push("nine/name", tokenizer, branch="mended")
    hub.push("nine/tokenizer", {**tokenizer, "tokenizer.json": b"{}"})
    hub.push("nine/tokenizer", tokenizer, branch="mended")
    broken = terminal.generate("nine/name")
    assert broken.code == 3
    assert "tokenizer.json is no tokenizer" in broken.err
    mended = ("--tokenizer-revision", "mended")
    assert same(terminal.generate("nine/name", *mended), plain)
    assert same(terminal.generate("nine/name", "--tokenizer", "nine/tokenizer", *mended), plain)


def test_tokenizer_of_transformers_says_the_same(terminal: Terminal, model: Path, plain: Outcome) -> None:
    assert same(terminal.generate(str(model), "--tokenizer-mode", "hf"), plain)


def test_mistral_s_own_format(hub: Hub, terminal: Terminal, tmp_path: Path) -> None:
    hf = tiny.make(tmp_path / "hf", "mistral")
    own = mistral_repo(hf, tmp_path / "own", shards=2)
    shutil.copy(own / "tekken.json", hf)
    expected = terminal.generate(str(hf), "--tokenizer-mode", "mistral")
    hub.push("nine/mistral", own)
    downloads = {name for name, _ in planned(terminal.plan("nine/mistral"))["downloads"]}
    assert downloads == {path.name for path in own.iterdir()}
    assert same(terminal.generate("nine/mistral"), expected)
    for path in own.iterdir():
        shutil.copy(path, hf)
    (hf / "config.json").write_text("{")
    (hf / "model.safetensors").write_bytes(b"x")
    assert terminal.plan(str(hf)).code == 3
    found = planned(terminal.plan(str(hf), "--config-format", "mistral", "--load-format", "mistral"))
    assert found["weights"] == planned(terminal.plan("nine/mistral"))["weights"]


# --- 10: weights ------------------------------------------------------------------------------------------------------


def test_pickled_weights_where_there_are_no_safetensors(
    hub: Hub, terminal: Terminal, files: Files, model: Path, plain: Outcome, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(model / "model.safetensors"), tmp_path / "pytorch_model.bin")
    pickled = (tmp_path / "pytorch_model.bin").read_bytes()
    hub.push("ten/bin", {**{n: d for n, d in files.items() if n != "model.safetensors"}, "pytorch_model.bin": pickled})
    outcome = terminal.generate("ten/bin")
    assert same(outcome, plain)
    assert "safetensors are safer" in outcome.err
    hub.push("ten/both", {**files, "pytorch_model.bin": pickled})
    files_of = {name for name, _ in planned(terminal.plan("ten/both"))["downloads"]}
    assert "model.safetensors" in files_of
    assert "pytorch_model.bin" not in files_of
    before = len(hub.requests)
    asked = terminal.generate("ten/both", "--load-format", "pt")
    assert same(asked, plain)
    assert "safetensors are safer" in asked.err
    assert not any("model.safetensors" in request for request in hub.requests[before:])


def test_dummy_weights_are_not_fetched(hub: Hub, terminal: Terminal, files: Files) -> None:
    hub.push("ten/dummy", files)
    outcome = terminal.generate("ten/dummy", "--load-format", "dummy")
    assert outcome.code == 0, outcome.err
    assert not any("ten/dummy" in request and "safetensors" in request for request in hub.requests)


def test_two_ranks_say_what_one_says(terminal: Terminal, model: Path, plain: Outcome) -> None:
    assert same(terminal.generate(str(model), "--tensor-parallel-size", "2"), plain)


def test_what_does_not_fit_is_told_in_the_words_of_the_plan(terminal: Terminal, model: Path) -> None:
    little = ("--device", "cpu", "--kv-cache-memory-bytes", "4K")
    plan = json.loads(terminal.run("plan", str(model), "--json", *little).out)
    assert plan["exit_code"] == 4
    outcome = terminal.generate(str(model), *little)
    assert outcome.code == 4
    assert "octavo: MEM001: " in outcome.err
    (advice,) = plan["advice"]
    needs, _, what_to_do = advice.partition(". ")
    assert needs == "One sequence of 256 tokens needs 204 KiB of KV cache"
    assert what_to_do in outcome.err
    assert "--kv-cache-memory-bytes" in what_to_do
    assert "--dtype bfloat16" in what_to_do
