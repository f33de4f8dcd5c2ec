"""What serving a model would take, computed from its config and the headers of its weights alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from octavo.config import EngineConfig, ModelConfig, RopeSpec
from octavo.errors import ModelError, OctavoError, OutOfMemory
from octavo.hub.checkpoint import BlockCheckpoint, open_checkpoint, pickled_paths
from octavo.hub.configs import max_model_len, model_config
from octavo.hub.files import files_of
from octavo.hub.gguf import GgufReader
from octavo.hub.machines import Machine, larger_than
from octavo.hub.peek import Peeked
from octavo.hub.quantised.checkpoint import unquantised
from octavo.hub.quantised.settings import check_wanted
from octavo.hub.safetensors_file import TensorInfo
from octavo.hub.source import Source

GPU_RESERVE: Final = 3 << 28  # bytes: the context, libraries' workspaces, what measuring would not show
_SHOWN: Final = 3  # downloads named one by one
_SMALLER: Final = "--dtype bfloat16 halves weights and KV cache."
_SHORT: Final = 2048  # tokens of a context that still is of use
_ASKED_LENGTHS: Final = (1024, 4096, 16_384, 65_536)
_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts")


class Models(Protocol):
    """What a plan asks `models`, which hub must not import."""

    def is_traced(self, hf: Mapping[str, Any], impl: str) -> bool:
        """See `models.registry.is_traced`."""
        ...

    def choose(self, config: ModelConfig, impl: str, max_len: int) -> tuple[str, str, ModelConfig]:
        """(address of the class, the reason, the config with the layers that the class finds out itself)."""
        ...


@dataclass(frozen=True)
class Weights:
    """``stored`` bytes on disk, ``loaded`` in memory; ``read`` of those in a step for one sequence.

    A token is multiplied by ``layers`` numbers, and by those of the ``head`` to sample the next one; 0: not known.
    ``experts`` are the bytes of all experts, of which one token reads the ``share``.
    ``small``: they take less than 16 bits.
    """

    parameters: int
    stored: int
    loaded: int
    read: int
    note: str = ""
    layers: int = 0
    head: int = 0
    small: bool = False
    experts: int = 0
    share: float = 1.0


@dataclass(frozen=True)
class Cache:
    """The KV cache: ``tokens`` fit into ``budget`` bytes, ``sequences`` of them by their length."""

    bytes_per_token: int
    budget: int
    budget_reason: str
    tokens: int
    sequences: Mapping[int, int]


@dataclass(frozen=True)
class Plan:
    """Sizes are bytes. ``exit_code`` is what starting the engine would end with, 0 if it would run."""

    model: str
    machine: Machine
    implementation: str | None
    implementation_reason: str
    dtype: str
    dtype_reason: str
    max_len: int
    max_len_reason: str
    rope: tuple[str, ...]
    quantisation: str | None
    weights: Weights
    cache: Cache
    pooling: str | None  # of a model that embeds
    sampling: Mapping[str, Any]
    eos_ids: tuple[int, ...]
    downloads: tuple[tuple[str, int], ...]
    floor_ms: float | None
    advice: tuple[str, ...]
    exit_code: int


def make_plan(peeked: Peeked, config: EngineConfig, machine: Machine, models: Models) -> Plan:
    """The plan for ``config`` on ``machine``.

    Raises `ModelError` where the config or a header cannot be read; what can be read but not run is in the plan.
    """
    options, source = config.model, peeked.source
    files = files_of(options, source)
    hf, pooler = files.read_config()
    check_wanted(options.quantization, hf)
    model = model_config(
        hf,
        dtype=options.dtype,
        generation=files.generation,
        device=machine.device,
        fast_bfloat16=machine.fast_bfloat16,
        kv_cache_dtype=config.memory.kv_cache_dtype,
        converts_float8=machine.device == "cuda",
        traced=models.is_traced(hf, options.model_impl),
        has_head=pooler is None,
    )
    max_len, max_len_reason = max_model_len(model, options.max_model_len)
    rope = _rope(model)  # before layers are traced, which shows their attention alone
    code = 0
    implementation: str | None = None
    try:
        implementation, implementation_reason, model = models.choose(model, options.model_impl, max_len)
    except OctavoError as error:
        implementation_reason, code = str(error), error.exit_code
    keeps = options.dtype == "auto" and ".hf." not in (implementation or "")
    bits = _BLOCK_BITS.get(machine.device, {}) if keeps else {}
    load_format = "auto" if options.load_format == "dummy" else options.load_format
    rounded = None if options.rounding is None else _BLOCK_BITS[machine.device]["Q8_0"]
    weights = _weights(source, model, load_format, bits, rounded)
    cache = _cache(config, model, machine, weights, max_len)
    advice = _advice(config, model, machine, weights, cache, max_len)
    fixed = options.max_model_len not in (None, -1)
    fitting = cache.tokens if cache.bytes_per_token else max_len  # what nobody knows is not against it
    if _too_heavy(machine, weights, cache) or fitting < (max_len if fixed else 1):
        code = code or OutOfMemory.exit_code
    elif fitting < max_len:
        max_len, max_len_reason = cache.tokens, f"as many as fit; the model's own is {max_len_reason}"
    return Plan(
        model=source.reason,
        machine=machine,
        implementation=implementation,
        implementation_reason=implementation_reason,
        dtype=model.dtype,
        dtype_reason=model.dtype_reason,
        max_len=max_len,
        max_len_reason=max_len_reason,
        rope=rope,
        quantisation=_quantisation(source, model, bits),
        weights=weights,
        cache=cache,
        pooling=None if pooler is None else str(pooler),
        sampling=files.sampling_defaults(),
        eos_ids=model.eos_ids,
        downloads=peeked.downloads,
        floor_ms=None if machine.bandwidth is None else 1e3 * weights.read / machine.bandwidth,
        advice=advice,
        exit_code=code,
    )


def kv_remedy(tokens: int, needed: int, dtype: str) -> str:
    """What to do when ``tokens`` fit into the KV cache and one longest sequence needs ``needed`` bytes in ``dtype``."""
    shorter = f"Pass --max-model-len {tokens} or less, or give" if tokens > 0 else "Give"
    smaller = f" {_SMALLER}" if dtype == "float32" else ""
    return f"{shorter} the KV cache {size(needed)} with --kv-cache-memory-bytes.{smaller}"


def size(count: float) -> str:
    """Bytes for people: 1.5 GiB; less than nothing is nothing."""
    count = max(count, 0)
    power = min(int(math.log(count, 1024)), 4) if count >= 1 else 0
    count /= 1024**power
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{count:.0f} {unit}" if power == 0 or count >= 100 else f"{count:.1f} {unit}"


# --- the parts --------------------------------------------------------------------------------------------------------


_EXPERT: Final = re.compile(r"\.experts\.")

# Bits of a value in GGUF's types that the kernels of a device multiply as they are, the scales included.
_BLOCK_BITS: Final[Mapping[str, Mapping[str, float]]] = {
    "cpu": {"Q4_0": 4.5, "Q4_1": 5, "Q5_0": 5.5, "Q5_1": 6, "Q8_0": 8.5, "Q4_K": 5, "Q5_K": 6, "Q6_K": 7},
    "cuda": {"Q4_0": 5, "Q4_1": 5, "Q8_0": 9, "Q4_K": 5, "Q6_K": 9},
}


def _weights(
    source: Source, model: ModelConfig, load_format: str, bits: Mapping[str, float], rounded: float | None
) -> Weights:
    """``bits``: of a value in the types of blocks that stay as they are; ``rounded``: of one that is rounded."""
    wide = 4 if model.dtype == "float32" else 2
    try:
        checkpoint = unquantised(open_checkpoint(source, load_format), model.hf)
        tensors = checkpoint.tensors()
    except ModelError:
        paths = () if source.kind == "gguf" else pickled_paths(source.path)
        if not paths:
            raise
        stored = sum(path.stat().st_size for path in paths)
        count = stored // (4 if model.hf.get("dtype") in (None, "float32") else 2)
        return Weights(count, stored, count * wide, count * wide, "estimated from the size of pickled files")
    stored = sum(info.nbytes for info in tensors.values())
    headless = model.tie_embeddings or not model.has_head
    counts = {name: math.prod(info.shape) for name, info in tensors.items() if not headless or name != "lm_head.weight"}
    bytes_of = {name: _loaded_bytes(tensors[name], counts[name], wide) for name in counts}
    if rounded is not None:
        kept = () if model.tie_embeddings else ("embed_tokens",)
        names = [n for n in counts if len(tensors[n].shape) == 2 and not any(part in n for part in kept)]
        bytes_of |= {name: int(counts[name] * rounded / 8) for name in names}
    if isinstance(checkpoint, BlockCheckpoint):
        stored = checkpoint.stored
        kinds = checkpoint.block_types()
        bytes_of |= {name: int(n * bits[kinds[name]] / 8) for name, n in counts.items() if kinds.get(name) in bits}
    idle = 0 if model.tie_embeddings else sum(n for name, n in bytes_of.items() if "embed_tokens" in name)
    share = active_experts(model.hf)
    experts = sum(n for name, n in bytes_of.items() if _EXPERT.search(name))
    idle += int((1 - share) * experts)
    loaded = sum(bytes_of.values())
    head = model.vocab_size * model.hidden_size
    used = sum(counts.values()) - int((1 - share) * sum(n for name, n in counts.items() if _EXPERT.search(name)))
    layers = used - (head if headless else 2 * head)
    small = rounded is not None or loaded < 2 * sum(counts.values())
    return Weights(
        sum(counts.values()),
        stored,
        loaded,
        loaded - idle,
        layers=layers,
        head=head if model.has_head else 0,
        small=small,
        experts=experts,
        share=share,
    )


def _loaded_bytes(info: TensorInfo, count: int, wide: int) -> int:
    """Floats become the model's type; anything else is packed or a scale and stays as it is."""
    return count * wide if info.dtype in ("float64", "float32", "float16", "bfloat16") else info.nbytes


def active_experts(hf: Mapping[str, Any]) -> float:
    """Which share of the experts one token uses; 1 for a model without."""
    inner = hf.get("text_config")
    text = {**hf, **inner} if isinstance(inner, Mapping) else hf
    experts, used = next((text[key] for key in _EXPERTS if text.get(key)), None), text.get("num_experts_per_tok")
    return min(1.0, used / experts) if isinstance(experts, int) and isinstance(used, int) else 1.0


def _cache(config: EngineConfig, model: ModelConfig, machine: Machine, weights: Weights, max_len: int) -> Cache:
    memory, limits = config.memory, config.limits
    page = int(memory.block_size)
    page_bytes = max(model.kv_bytes_per_token, 1) * page  # 0: nothing can run it, so nobody knows its layers
    if memory.num_gpu_blocks_override is not None:
        budget, why = (memory.num_gpu_blocks_override + 1) * page_bytes, "--num-gpu-blocks-override"
    elif memory.kv_cache_memory_bytes is not None:
        budget, why = memory.kv_cache_memory_bytes, "--kv-cache-memory-bytes"
    elif machine.kv_share is not None:
        budget, why = int(machine.memory * machine.kv_share), f"{machine.kv_share:.0%} of {size(machine.memory)}"
    else:
        step = _step_bytes(config, model, max_len)
        usable = int(machine.memory * memory.gpu_memory_utilization)
        budget = usable - weights.loaded - step - GPU_RESERVE
        why = (
            f"{memory.gpu_memory_utilization:.0%} of {size(machine.memory)} - weights - about {size(step)} for the "
            f"largest step - {size(GPU_RESERVE)} reserve"
        )
    pages = max(max(budget, 0) // page_bytes - 1, 0) if model.layers else 0  # one page is the dummy
    lengths = sorted({n for n in _ASKED_LENGTHS if n < max_len} | {max_len})
    fitting = {n: count for n in lengths if (count := min(pages // -(-n // page), limits.max_num_seqs))}
    return Cache(
        model.kv_bytes_per_token, budget, why, pages * page, {n: count for n, count in fitting.items() if count}
    )


def _step_bytes(config: EngineConfig, model: ModelConfig, max_len: int) -> int:
    """Activations of the largest step, roughly: hidden states, the wider of QKV and gate-up, scores of all rows."""
    tokens = min(config.limits.max_num_batched_tokens, max_len)
    wide = 4 if model.dtype == "float32" else 2
    scores = config.limits.max_num_seqs * model.vocab_size * (wide + 8)
    return tokens * wide * (6 * model.hidden_size + 3 * model.intermediate_size) + scores


def _too_heavy(machine: Machine, weights: Weights, cache: Cache) -> bool:
    return weights.loaded + max(cache.budget, 0) > machine.memory


def _advice(
    config: EngineConfig, model: ModelConfig, machine: Machine, weights: Weights, cache: Cache, max_len: int
) -> tuple[str, ...]:
    """What to change; empty if one sequence of ``max_len`` fits."""
    page = int(config.memory.block_size)
    needed = (-(-max_len // page) + 1) * page * cache.bytes_per_token
    too_heavy = _too_heavy(machine, weights, cache)
    if (cache.tokens >= max_len or not cache.bytes_per_token) and not too_heavy:
        return ()
    out = []
    if too_heavy or cache.budget < 0:
        share = 1.0 if machine.device == "cpu" else config.memory.gpu_memory_utilization
        usable = int(machine.memory * share)
        out.append(f"The weights take {size(weights.loaded)} of {size(usable)}, which leaves too little.")
        out += [_SMALLER] if model.dtype == "float32" else []
    else:
        remedy = kv_remedy(cache.tokens, needed, model.dtype)
        out.append(f"One sequence of {max_len} tokens needs {size(needed)} of KV cache. {remedy}")
    if machine.device == "cuda":
        out.append(_other_gpu(config, model, weights, max_len))
    return tuple(out)


def _other_gpu(config: EngineConfig, model: ModelConfig, weights: Weights, max_len: int) -> str:
    share, fixed = config.memory.gpu_memory_utilization, weights.loaded + _step_bytes(config, model, max_len)
    for length in (max_len, _SHORT):
        total = (fixed + GPU_RESERVE + (length + 2 * int(config.memory.block_size)) * model.kv_bytes_per_token) / share
        gpu = larger_than(int(total))
        if gpu is not None:
            return f"One GPU holds it with {length} tokens from {size(total)} on: see --gpu {gpu}."
    return f"No single GPU that octavo knows has the {size(total)} it needs for {_SHORT} tokens."


def _rope(model: ModelConfig) -> tuple[str, ...]:
    specs = dict.fromkeys(_rope_text(layer.rope, layer.head_dim) for layer in model.layers)
    return tuple(specs)


def _rope_text(rope: RopeSpec | None, head_dim: int) -> str:
    if rope is None:
        return "none"
    factor = rope.params.get("factor")
    scaled = f", factor {factor:g}" if factor else ""
    return f"{rope.kind}, theta {rope.theta:g}{scaled}, {rope.dim} of {head_dim} dimensions"


def _quantisation(source: Source, model: ModelConfig, bits: Mapping[str, float]) -> str | None:
    if source.kind == "gguf":
        types = {t.format.name for t in GgufReader(source.path).tensors.values() if len(t.shape) > 1}
        kept, others = ", ".join(sorted(types & set(bits))), ", ".join(sorted(types - set(bits)))
        said = [f"{kept} as stored" if kept else "", f"{others} dequantised on loading" if others else ""]
        return f"GGUF {'; '.join(filter(None, said))}"
    stated = model.hf.get("quantization_config")
    if not stated:
        return None
    return f"{stated['quant_method']}, {'groups of 4 and 8 bits as stored' if bits else 'dequantised on loading'}"


# --- as text ----------------------------------------------------------------------------------------------------------


def describe(plan: Plan) -> str:
    """The plan in lines of a name and what there is to say on it."""
    weights, cache, machine = plan.weights, plan.cache, plan.machine
    fits = [f"{count} of {length}" for length, count in cache.sequences.items()]
    sequences = ", ".join(fits) + " tokens" if fits else "none fits"
    room = f"{size(cache.bytes_per_token)} a token; {size(cache.budget)} = {cache.tokens:,} tokens"
    if not cache.bytes_per_token:
        room, sequences = f"{size(cache.budget)}; what a token takes is found out by running the model", "not known"
    sampling = ", ".join(f"{k} {v}" for k, v in plan.sampling.items())
    speed = "" if machine.bandwidth is None else f", {machine.bandwidth / 1e9:.0f} GB/s"
    rows = [
        ("model", plan.model),
        ("machine", f"{machine.name}, {size(machine.memory)}{speed}"),
        ("implementation", plan.implementation_reason),
        ("dtype", f"{plan.dtype} ({plan.dtype_reason})"),
        ("max length", f"{plan.max_len} ({plan.max_len_reason})"),
        *(("rope", line) for line in plan.rope),
        ("quantisation", plan.quantisation or "none"),
        ("weights", f"{weights.parameters:,} parameters, {size(weights.loaded)} ({size(weights.stored)} on disk)"),
        ("kv cache", room),
        ("", cache.budget_reason),
        ("sequences", sequences),
        ("pooling", plan.pooling) if plan.pooling else ("sampling", sampling or "octavo's own defaults"),
        ("ends at", ", ".join(map(str, plan.eos_ids)) or "no id is named; the tokenizer's"),
        ("downloads", _downloads_text(plan.downloads)),
        ("floor", _floor_text(plan)),
        *(("to change", line) for line in plan.advice),
    ]
    if weights.note:
        rows.insert(8, ("", weights.note))
    return "\n".join(f"{name:15} {text}" for name, text in rows)


def _downloads_text(downloads: tuple[tuple[str, int], ...]) -> str:
    if not downloads:
        return "nothing"
    named = ", ".join(f"{file} {size(count)}" for file, count in downloads[:_SHOWN])
    rest = f" and {len(downloads) - _SHOWN} more" if len(downloads) > _SHOWN else ""
    return f"{size(sum(count for _, count in downloads))}: {named}{rest}"


def _floor_text(plan: Plan) -> str:
    if plan.floor_ms is None:
        return "unknown: this device's bandwidth is in no table of octavo"
    rate = f"{(plan.machine.bandwidth or 0) / 1e9:.0f} GB/s"
    time = f"{plan.floor_ms:,.0f}" if plan.floor_ms >= 100 else f"{plan.floor_ms:.3g}"
    return f"{time} ms a token for one sequence: {size(plan.weights.read)} of weights at {rate}"
