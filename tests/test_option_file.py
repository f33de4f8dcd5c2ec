"""``--config FILE``: what a file of options says, and what is said of one that is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from octavo import cli, options
from octavo.config import EngineConfig


def parse(folder: Path, text: str, *argv: str, command: str = "serve") -> Any:
    path = folder / "options.yaml"
    path.write_text(text, encoding="utf-8")
    return cli.build_parser().parse_args([command, "--config", str(path), *argv])


def engine(folder: Path, text: str, *argv: str, command: str = "serve") -> EngineConfig:
    return options.engine_config(parse(folder, text, *argv, command=command))


FILE = """\
# how this model is served
model: some/model
max_num_seqs: 7
max-num-batched-tokens: 2k
revision: 0012          # as it is written, no number
gpu-memory-utilization: 0.5
enable-prefix-caching: false
trust_remote_code: true
tp: 2
dtype: null
hf_overrides:
  rope_theta: 1e6
  architectures: [A]
hf-overrides.rope_parameters.factor: 4
served-model-name: [a, b]
swap-space: 4
allowed-origins: ["https://a"]
"""


def test_a_file_says_what_the_same_options_say(tmp_path: Path) -> None:
    argv = ["serve", "some/model", "--max-num-seqs", "7", "--max-num-batched-tokens", "2k", "--revision", "0012"]
    argv += ["--gpu-memory-utilization=0.5", "--no-enable-prefix-caching", "--trust-remote-code", "-tp", "2"]
    argv += ["--hf-overrides", '{"rope_theta": 1e6, "architectures": ["A"], "rope_parameters": {"factor": 4}}']
    assert engine(tmp_path, FILE) == options.engine_config(cli.build_parser().parse_args(argv))
    server = options.server_config(parse(tmp_path, FILE))
    assert (server.served_model_name, server.allowed_origins) == ("a,b", ["https://a"])


def test_json_is_taken_too(tmp_path: Path) -> None:
    config = engine(tmp_path, '{"model": "m", "hf_overrides": {"a": true}, "block-size": 32}')
    assert (config.model.model, config.model.hf_overrides, config.memory.block_size) == ("m", {"a": True}, 32)


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert engine(tmp_path, "# nothing yet\n", "m") == EngineConfig.of(model="m")


@pytest.mark.parametrize("argv", [("other",), ("--model", "other"), ("--model=other",)])
def test_the_command_line_has_the_last_word(tmp_path: Path, argv: tuple[str, ...]) -> None:
    given = (*argv, "--max-num-seqs", "9", "--enable-prefix-caching", "--hf-overrides", '{"b": 1}')
    config = engine(tmp_path, FILE.replace("hf-overrides.rope_parameters.factor: 4\n", ""), *given)
    assert (config.model.model, config.limits.max_num_seqs) == ("other", 9)
    assert config.memory.enable_prefix_caching
    assert config.model.hf_overrides == {"b": 1}
    assert config.model.revision == "0012"


def test_names_in_the_file_do_not_swallow_the_model(tmp_path: Path) -> None:
    args = parse(tmp_path, "served-model-name: [a, b]", "m")
    assert args.model_argument == "m"
    assert options.server_config(args).served_model_name == "a,b"


def test_every_command_with_a_model_takes_a_file(tmp_path: Path) -> None:
    args = parse(tmp_path, "model: m\nprompt: -1 and\ntemperature: 0\nstop: [x, y]", command="generate")
    assert options.engine_config(args).model.model == "m"
    assert args.prompt == "-1 and"
    assert options.sampling_values(args) == {"temperature": 0, "stop": ["x", "y"]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: m\nmax-num-seq: 4", r"line 2: max-num-seq is no option.*max-num-seqs"),
        ("compilation-config: 3", r"line 1: compilation-config: octavo has no --compilation-config"),
        ("config: other.yaml", r"line 1: config is no option"),
        ("help: true", r"line 1: help is no option"),
        ("dtype.a: 4", r"line 1: dtype.a is no option"),
        ("max_num_seqs: 4\n\nmax-num-seqs: 5", r"line 3: max-num-seqs is there already, in line 1"),
        ("enforce-eager: 1", r"line 1: enforce-eager is '1'\. Give true or false"),
        ("- model", r"holds no options"),
        ("model: m\nport: [", r"line 2: "),
        ("model: !!python/object/apply:os.getpid []", r"line 1: could not determine a constructor"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(
    tmp_path: Path, text: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(tmp_path, text)
    assert ended.value.code == 2
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--config", "/nowhere/at/all.yaml"), "the file of --config cannot be read"),
        (("--config",), "--config names no file"),
        (("--config=",), "--config names no file"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_usage_error(
    argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.build_parser().parse_args(["serve", *argv])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
