"""Workloads: the same token ids everywhere, and errors that name what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import make_workload
from octavo.bench import workload
from octavo.errors import ConfigError


def test_the_generated_ids_are_those_that_other_engines_were_measured_with() -> None:
    made = make_workload.workload()
    lengths = [len(prompt) for prompt in made["A"]["rounds"][0]["prompts"]]
    assert (len(lengths), sum(lengths)) == (64, 9075)
    assert made["A"]["rounds"][0]["prompts"][0][:6] == [44714, 25087, 28899, 6898, 29278, 16620]
    assert made["A"]["rounds"][0]["prompts"][1][:3] == [7652, 45889, 46653]
    assert {name: case["max_tokens"] for name, case in made.items()} == {"A": 128, "B": 128, "C": 1, "EA": 64, "EB": 64}


def test_rounds_have_equal_lengths_and_other_tokens() -> None:
    rounds = make_workload.CASES["A"].rounds()
    assert len({tuple(map(len, r["prompts"])) for r in rounds}) == 1
    assert len({tuple(r["prompts"][0]) for r in rounds}) == len(rounds)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    case = {"model": "m", "max_tokens": 3, "rounds": [{"prefix": [9], "prompts": [[1, 2], [3]]}] * 3}
    path = tmp_path / "w.json"
    path.write_text(json.dumps({"A": case, "B": case}), encoding="utf-8")
    return path


def test_a_prompt_is_prefix_and_item(file: Path) -> None:
    (case,) = workload.read(file, ["A"], rounds=1)
    assert (case.max_tokens, case.rounds) == (3, [[[9, 1, 2], [9, 3]]] * 2)


def test_all_cases_are_taken_when_none_is_named(file: Path) -> None:
    assert [case.name for case in workload.read(file, None, rounds=2)] == ["A", "B"]


@pytest.mark.parametrize(("names", "rounds", "said"), [(["X"], 1, "no case X"), (["A"], 3, "has 3 rounds")])
def test_what_the_file_lacks_is_named(file: Path, names: list[str], rounds: int, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        workload.read(file, names, rounds)


@pytest.mark.parametrize("content", ["", "[]", '{"A": {"max_tokens": "x", "rounds": []}}'])
def test_a_broken_file_is_an_error_with_a_remedy(tmp_path: Path, content: str) -> None:
    path = tmp_path / "w.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError) as raised:
        workload.read(path, None, 1)
    assert raised.value.remedy


def test_made_up_prompts_stay_inside_the_vocabulary_and_differ_by_round() -> None:
    case = workload.synthetic(input_len=5, output_len=2, num_prompts=3, vocab_size=120, rounds=2)
    flat = [token for prompts in case.rounds for prompt in prompts for token in prompt]
    assert len(flat) == 3 * 3 * 5
    assert min(flat) >= 0
    assert max(flat) < 120
    assert case.rounds[0] != case.rounds[1]
    assert case == workload.synthetic(input_len=5, output_len=2, num_prompts=3, vocab_size=120, rounds=2)
    assert case.rounds != workload.synthetic(5, 2, 3, vocab_size=120, rounds=2, seed=1).rounds


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, 0, 1), (1, 1, -1)])
def test_empty_workloads_are_refused(sizes: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError):
        workload.synthetic(*sizes, vocab_size=100, rounds=1)
