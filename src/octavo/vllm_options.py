"""Options of vLLM that octavo does not have.

A command line or a call that was written for vLLM goes through as long as it means the same: values that would change
nothing are accepted, and others are refused by name, with what to do instead.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from octavo.errors import ConfigError


class Foreign(NamedTuple):
    """``fine`` are the values that change nothing, None: every one; a ``switch`` has the forms --x and --no-x."""

    fine: tuple[Any, ...] | None
    switch: bool = False


OPTIONS: dict[str, Foreign] = {
    "allowed_local_media_path": Foreign(("",)),
    "async_scheduling": Foreign(None, switch=True),
    "calculate_kv_scales": Foreign((False,), switch=True),
    "cpu_offload_gb": Foreign((0,)),
    "data_parallel_backend": Foreign(("mp",)),
    "disable_cascade_attn": Foreign(None, switch=True),
    "disable_custom_all_reduce": Foreign(None, switch=True),
    "disable_hybrid_kv_cache_manager": Foreign(None, switch=True),
    "disable_log_stats": Foreign(None, switch=True),
    "disable_sliding_window": Foreign((False,), switch=True),
    "enable_chunked_prefill": Foreign((None, True), switch=True),
    "enable_expert_parallel": Foreign((False,), switch=True),
    "enable_lora": Foreign((False,), switch=True),
    "enable_prompt_embeds": Foreign((False,), switch=True),
    "enable_sleep_mode": Foreign((False,), switch=True),
    "ignore_patterns": Foreign(("original/**/*", ["original/**/*"])),  # what no model needs is not downloaded
    "logprobs_mode": Foreign(("raw_logprobs",)),
    "long_prefill_token_threshold": Foreign((0,)),
    "max_long_partial_prefills": Foreign((1,)),
    "max_num_partial_prefills": Foreign((1,)),
    "max_parallel_loading_workers": Foreign(None),
    "max_seq_len_to_capture": Foreign(None),
    "model_loader_extra_config": Foreign(({},)),
    "num_scheduler_steps": Foreign(None),
    "pipeline_parallel_size": Foreign((1,)),
    "preemption_mode": Foreign((None, "recompute")),
    "prefix_caching_hash_algo": Foreign(None),
    "safetensors_load_strategy": Foreign(None),
    "scheduling_policy": Foreign(("fcfs", "priority")),
    "skip_mm_profiling": Foreign(None, switch=True),
    "stream_interval": Foreign((1,)),
    "swap_space": Foreign(None),
    "use_tqdm_on_load": Foreign(None, switch=True),
}
SERVER_OPTIONS: dict[str, Foreign] = {
    "disable_frontend_multiprocessing": Foreign(None, switch=True),
    "disable_uvicorn_access_log": Foreign(None, switch=True),
    "enable_auto_tool_choice": Foreign((True,), switch=True),  # tools can always be chosen
    "enable_log_outputs": Foreign((False,), switch=True),
    "enable_log_requests": Foreign((True,), switch=True),
    "enable_prompt_tokens_details": Foreign((True,), switch=True),  # usage always has them
    "enable_reasoning": Foreign((True,), switch=True),
    "enable_server_load_tracking": Foreign((True,), switch=True),  # /load
    "max_log_len": Foreign(None),  # no text is logged
    "response_role": Foreign(("assistant",)),
    "uvicorn_log_level": Foreign(None),
}

# What to do instead of options that are not accepted in any form: vLLM's, then those of TGI and llama-server.
INSTEAD = {
    "--compilation-config": "leave it out; --enforce-eager turns CUDA graphs off",
    "--enable-force-include-usage": "send stream_options with each request",
    "--enable-ssl-refresh": "start the server again when the certificate changes",
    "--guided-decoding-backend": "leave it out: grammars are llguidance's",
    "--h11-max-header-count": "leave it out: the head of a request is at most 64 KiB",
    "--h11-max-incomplete-event-size": "leave it out: the head of a request is at most 64 KiB",
    "--limit-mm-per-prompt": "leave it out: only text is read",
    "--lora-modules": "merge the adapter into the model",
    "--log-config-file": "use --log-format json and --log-level",
    "--logits-processors": "send logit_bias, bad_words, allowed_token_ids or structured_outputs with each request",
    "--middleware": "put a proxy in front: no code from outside runs in the server",
    "--reasoning-parser-plugin": "leave it out: --reasoning-parser has the formats",
    "--return-tokens-as-token-ids": "send return_tokens_as_token_ids with each request",
    "--rope-scaling": "use --hf-overrides.rope_parameters JSON",
    "--rope-theta": "use --hf-overrides.rope_theta N",
    "--structured-outputs-config": "leave it out: grammars are llguidance's",
    "--tool-parser-plugin": "leave it out: --tool-call-parser has the formats",
    "--tool-server": "leave it out: tools are called by the client",
    "--trust-request-chat-template": "leave it out: templates are the server's, by --chat-template",
    "-O3": "leave it out; --enforce-eager turns CUDA graphs off",
    "--max-concurrent-requests": "use --max-num-seqs, and --max-waiting for those that wait",
    "--max-input-length": "use --max-model-len, which counts prompt and answer",
    "--max-total-tokens": "use --max-model-len",
    "--model-id": "use --model, or MODEL alone",
    "--num-shard": "use --tensor-parallel-size",
    "--quantize": "use --quantization",
    "--ctx-size": "use --max-model-len",
    "--n-gpu-layers": "leave it out: all layers are where --device says",
    "--parallel": "use --max-num-seqs",
    "-c": "use --max-model-len",
    "-m": "use --model, or MODEL alone",
    "-ngl": "leave it out: all layers are where --device says",
    "-np": "use --max-num-seqs",
}

# What scripts look for on vLLM's `LLM` and do not find here.
METHODS = {
    "apply_model": "give LLM a loaded model of Transformers, which it shares, and change that",
    "classify": "there are no classifiers",
    "collective_rpc": "give LLM a loaded model of Transformers, which it shares, and change that",
    "llm_engine": "info has the limits, config the options, get_tokenizer() the tokenizer",
    "reward": "there are no reward models",
    "score": "there are no cross-encoders",
    "set_tokenizer": "name the tokenizer when the LLM is made",
    "sleep": "close() gives all memory back; make a new LLM to wake up",
    "start_profile": "run the script under py-spy or torch.profiler",
    "stop_profile": "run the script under py-spy or torch.profiler",
    "wake_up": "make a new LLM",
}

# Tasks that vLLM had before --runner and --convert took their place, and what they became.
LEGACY_TASKS = {
    "auto": {},
    "generate": {"runner": "generate", "convert": "none"},
    "embed": {"runner": "pooling", "convert": "embed"},
    "embedding": {"runner": "pooling", "convert": "embed"},
}
OTHER_TASKS = ("classify", "reward", "score")


def without(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` but for those of `OPTIONS`; raises `ConfigError` for a value that would change something."""
    known = dict(options)
    known.pop("served_model_name", None)  # a name for clients
    known |= of_task(known.pop("task", None), known)
    for name in known:
        if (remedy := INSTEAD.get(_flag(name))) is not None:
            raise ConfigError(f"octavo has no {name}.", f"{remedy[0].upper()}{remedy[1:]}.")
    for name in sorted(OPTIONS.keys() & known.keys()):
        _check(name, known.pop(name), OPTIONS[name].fine, str)
    return known


def add_task(group: Any) -> None:
    """The option of `of_task`."""
    group.add_argument("--task", metavar="TASK", help="former name of --runner and --convert")


def of_task(task: str | None, given: Mapping[str, Any]) -> dict[str, str]:
    """What ``task`` is called now; raises `ConfigError` if there is no such one, or if ``given`` says another."""
    if task is None:
        return {}
    if task in OTHER_TASKS:
        raise ConfigError(f"task is {task}: octavo generates text and embeds it.", "Give generate or embed.")
    if task not in LEGACY_TASKS:
        raise ConfigError(f"task is {task!r}.", f"Give one of {', '.join(LEGACY_TASKS)}.")
    found = LEGACY_TASKS[task]
    for name, value in found.items():
        if given.get(name, "auto") not in ("auto", value):
            raise ConfigError(f"task is {task}, which is {name} {value}, and {name} is {given[name]}.", "Drop one.")
    return found


def add_ineffective(parser: argparse.ArgumentParser, options: Mapping[str, Foreign]) -> None:
    """``options`` as flags that help does not list, but for those that ``parser`` has already."""
    known = {flag for action in parser._actions for flag in action.option_strings}
    for name, (_, switch) in options.items():
        flag = _flag(name)
        if flag in known:
            continue
        settings: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        if switch:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
        else:
            parser.add_argument(flag, type=_value, **settings)


def check_ineffective(args: argparse.Namespace, options: Mapping[str, Foreign]) -> None:
    """Raises `ConfigError` for a flag of `add_ineffective` whose value would change something."""
    for name, (fine, _) in options.items():
        if hasattr(args, name):
            _check(name, getattr(args, name), fine, _flag)


def _check(name: str, value: Any, fine: tuple[Any, ...] | None, shown: Any) -> None:
    if fine is not None and value not in fine:
        raise ConfigError(
            f"{shown(name)} is {value!r}, which octavo does not have.",
            f"Leave it out, or give {' or '.join(repr(one) for one in fine if one is not None)}.",
        )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _value(text: str) -> Any:
    """A number where the text is one."""
    try:
        return json.loads(text)
    except ValueError:
        return text
