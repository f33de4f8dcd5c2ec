"""`octavo verify` on tiny models: what is right passes, what is wrong is found and named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import cli
from octavo.verify.command import fitted
from octavo.verify.compare import EXACT, Expected, compare
from octavo.verify.subject import Subject
from tests.models.test_hf_backend import saved
from tools import sweep, tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # of Transformers' own code

SMALL = (
    "--max-tokens",
    "6",
    "--device",
    "cpu",
    "--kv-cache-memory-bytes",
    "8M",
    "--max-model-len",
    "200",
    "--max-num-seqs",
    "4",
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("the quick brown fox\n\npages of the book were read by hand, one after the other\na\n")
    return path


def verify(folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    status = cli.main(["verify", str(folder), *SMALL, "--prompts", str(prompts), "--json", *argv])
    out = capsys.readouterr().out
    return status, json.loads(out) if out else {}


@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_both_paths_pass_in_float32(
    impl: str, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = verify(tiny.make(tmp_path / "m", "llama"), prompts, capsys, "--model-impl", impl)
    assert status == 0
    assert report["dtype"] == "float32"
    assert report["implementation"] == ("LlamaForCausalLM" if impl == "native" else "TransformersModel")
    assert [one["verdict"] for one in report["prompts"]] == ["equal"] * 3
    assert all(one["error"] <= EXACT for one in report["prompts"])
    assert report["differs_first"] is None


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_passes_by_the_rule_for_ties(
    family: str, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, report = verify(tiny.make(tmp_path / "m", family), prompts, capsys, "--dtype", "bfloat16")
    assert status == 0, report
    assert report["dtype"] == "bfloat16"
    assert all(0 < one["error"] <= one["allowed"] for one in report["prompts"])


def test_a_model_of_transformers_without_native_one_passes(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = sweep.reference(sweep.tiny_config("gpt_neox", vocab_size=tiny.VOCAB_SIZE))
    wanted.config.architectures = [type(wanted).__name__]
    wanted.save_pretrained(tmp_path / "m")
    tiny.tokenizer(tmp_path / "m")
    assert verify(tmp_path / "m", prompts, capsys)[0] == 0


def spoil(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Every engine that `verify` makes has ``change`` done to its model."""
    make = Subject.__init__

    def spoiled(self: Subject, *args: Any) -> None:
        make(self, *args)
        with torch.no_grad():
            change(self.model)

    monkeypatch.setattr(Subject, "__init__", spoiled)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_the_first_layer_that_differs_is_named(
    layer: int, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.make(tmp_path / "m", "llama", num_hidden_layers=4)
    spoil(monkeypatch, lambda model: model.model.layers[layer].input_layernorm.weight.mul_(1.5))
    status, report = verify(folder, prompts, capsys)
    assert status == 1
    assert report["differs_first"] == f"layer {layer} (of 0 to 3)"
    assert not report["passed"]


def test_so_is_one_of_a_model_with_recurrent_layers(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, "lfm2")
    tiny.tokenizer(tmp_path)
    status, report = verify(tmp_path, prompts, capsys)
    assert (status, report["passed"]) == (0, True)
    spoil(monkeypatch, lambda model: model.body.layers[2].ffn_norm.weight.mul_(1.5))
    status, report = verify(tmp_path, prompts, capsys)
    assert status == 1
    assert report["differs_first"] == "layer 2 (of 0 to 3)"


def test_a_difference_outside_of_the_layers_is_named_so(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda model: model.model.norm.weight.mul_(1.5))
    status, report = verify(tiny.make(tmp_path / "m", "llama"), prompts, capsys)
    assert status == 1
    assert report["differs_first"] == "embedding, last norm or head"


def test_what_people_see_names_prompts_verdicts_and_the_count(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.make(tmp_path / "m", "llama")
    assert cli.main(["verify", str(folder), *SMALL, "--prompts", str(prompts)]) == 0
    out = capsys.readouterr().out
    assert "the quick brown fox" in out
    assert "equal" in out
    assert "3 of 3 prompts pass." in out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Il pleut", "Il pleut  "),
        ("昔々ある", "昔々ある  "),
        ("0123456789", "0123456789"),
        ("0123456789a", "012345678…"),
        ("昔々あるところ", "昔々ある… "),
        ("a昔々あるところ", "a昔々ある…"),
        ("e\u0301" * 10, "e\u0301" * 10),
    ],
)
def test_a_prompt_takes_the_same_columns_whatever_it_is_written_in(text: str, shown: str) -> None:
    assert fitted(text, 10) == shown


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--max-tokens", "0"), "--max-tokens is 0"),
        (("--prompts", "/nowhere/at/all"), "--prompts: /nowhere/at/all cannot be read"),
    ],
)
def test_wrong_arguments_are_named(
    argv: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(tmp_path), *argv]) != 0
    assert message in capsys.readouterr().err


def test_a_model_that_transformers_cannot_load_is_nothing_to_verify_against(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.make(tmp_path / "m", "llama")
    (folder / "model.safetensors").write_bytes(b"no weights")
    assert cli.main(["verify", str(folder), *SMALL, "--prompts", str(prompts)]) == 3
    assert "HF045" in capsys.readouterr().err


def test_a_model_that_embeds_has_no_text_to_compare(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.make(tmp_path / "m", "llama")
    assert cli.main(["verify", str(folder), *SMALL, "--prompts", str(prompts), "--runner", "pooling"]) == 2
    assert "--runner generate" in capsys.readouterr().err


def test_a_file_without_prompts_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_text("\n \n")
    assert cli.main(["verify", str(tmp_path), "--prompts", str(tmp_path / "empty")]) != 0
    assert "no line with text" in capsys.readouterr().err


# --- the rule ---------------------------------------------------------------------------------------------------------

EXACT_LOGITS = torch.tensor([[4.0, 3.9, 0.0], [1.0, 5.0, 2.0], [6.0, 0.0, 1.0]])


def rounded(error: float) -> torch.Tensor:
    return EXACT_LOGITS + error * torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]])


def test_float32_knows_no_ties() -> None:
    expected = Expected([7], [0, 1], EXACT_LOGITS)
    assert compare(expected, [0, 1], EXACT_LOGITS).verdict == "equal"
    differing = compare(expected, [1, 1], EXACT_LOGITS)
    assert (differing.verdict, differing.differs_at, differing.passed) == ("different", 0, False)


def test_tokens_closer_than_rounding_are_a_tie_and_others_are_not() -> None:
    expected = Expected([7], [0, 1], EXACT_LOGITS, rounded(0.06))
    assert compare(expected, [1, 1], rounded(0.01)).verdict == "tie"
    assert compare(expected, [2, 1], rounded(0.01)).verdict == "different"
    assert compare(expected, [0, 2], rounded(0.01)).verdict == "different"
    assert compare(Expected([7], [0, 1], EXACT_LOGITS, rounded(0.04)), [1, 1], rounded(0.01)).verdict == "different"


def test_an_error_may_be_a_quarter_more_than_that_of_transformers() -> None:
    expected = Expected([7], [0, 1], EXACT_LOGITS, rounded(0.04))
    assert compare(expected, [0, 1], rounded(0.049)).passed
    assert not compare(expected, [0, 1], rounded(0.051)).passed


@pytest.mark.parametrize("logits", [EXACT_LOGITS[:2], EXACT_LOGITS * float("nan")])
def test_logits_that_are_missing_or_not_finite_never_pass(logits: torch.Tensor) -> None:
    assert not compare(Expected([7], [0, 1], EXACT_LOGITS, rounded(0.04)), [0, 1], logits).passed
