"""What the benchmarks of GPUs share: shapes of models, workloads with fixed seeds, a run of one, the least time that a
card needs for it, and a yardstick.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from octavo.config import EngineConfig

ROWS = 256  # sequences in a step at most

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "rope_scaling": LLAMA3,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "rope_scaling": {**LLAMA3, "factor": 8.0},
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    },
}

Work = list[tuple[list[int], int]]
"""(prompt, output tokens) of each request."""

YARDSTICK = "vLLM 0.24 on one H100"
# Seconds, and the share of that card's floor (2.98 TB/s, 780 TFLOP/s).
VLLM: dict[tuple[str, str], tuple[float, float]] = {
    ("llama-3.2-1b", "mixed"): (8.03, 0.33),
    ("llama-3.2-1b", "single"): (0.591, 0.36),
    ("llama-3.2-1b", "decode64"): (2.13, 0.26),
    ("llama-3.2-1b", "prefill"): (0.585, 0.64),
    ("qwen3-0.6b", "mixed"): (8.61, 0.68),
    ("qwen3-0.6b", "single"): (0.708, 0.15),
    ("qwen3-0.6b", "decode64"): (2.35, 0.29),
    ("qwen3-0.6b", "prefill"): (0.432, 0.53),
    ("llama-3.1-8b", "mixed"): (17.18, 0.78),
    ("llama-3.1-8b", "single"): (1.717, 0.75),
    ("llama-3.1-8b", "decode64"): (4.38, 0.71),
    ("llama-3.1-8b", "prefill"): (3.22, 0.78),
}
SEEDS = {"mixed": 0, "single": 1, "decode64": 2, "prefill": 3, "shared": 4, "long": 5, "small": 6}


def workload(name: str, vocab: int) -> Work:
    """The requests of the workload ``name``, one of `SEEDS`."""
    rng = random.Random(SEEDS[name])

    def ids(count: int) -> list[int]:
        return [rng.randrange(100, vocab - 100) for _ in range(count)]

    match name:
        case "mixed":
            return [(ids(rng.randint(100, 1024)), rng.randint(100, 1024)) for _ in range(256)]
        case "single":
            return [(ids(128), 256)]
        case "decode64":
            return [(ids(128), 512) for _ in range(64)]
        case "prefill":
            return [(ids(4096), 1) for _ in range(32)]
        case "shared":  # one system prompt, many users
            prefix = ids(2048)
            return [(prefix + ids(rng.randint(20, 100)), 128) for _ in range(128)]
        case "long":
            return [(ids(16000), 128) for _ in range(4)]
        case _:
            return [(ids(rng.randint(8, 64)), rng.randint(8, 64)) for _ in range(1024)]


def engine_config(model: dict[str, Any], **options: Any) -> EngineConfig:
    """Of an engine with dummy weights for the model whose ``config.json`` is ``model``."""
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(model))
    sizes = {"max_num_seqs": ROWS, "max_num_batched_tokens": 8192}
    return EngineConfig.of(model=str(folder), load_format="dummy", **sizes, **options)


def run(core: Any, work: Work, tag: str, **wishes: Any) -> tuple[float, list[list[int]]]:
    """(seconds, tokens of each request), greedy but for ``wishes``, nothing of an earlier run being reused."""
    from octavo.frontend.inputs import request_of
    from octavo.types import Sampling

    core.reset_prefix_cache()
    wishes = {"temperature": 0.0, **wishes}
    requests = [
        request_of(core.info, f"{tag}-{i}", prompt, Sampling(max_tokens=count, seed=i, **wishes))
        for i, (prompt, count) in enumerate(work)
    ]
    answers: dict[str, list[int]] = {request.id: [] for request in requests}
    start = time.perf_counter()
    for request in requests:
        core.add(request)
    while core.has_work():
        for output in core.step():
            answers[output.id] += output.token_ids
    seconds = time.perf_counter() - start
    for answer, (_, count) in zip(answers.values(), work, strict=True):
        assert len(answer) == count, f"{len(answer)} tokens, not {count}"
    return seconds, list(answers.values())


@dataclass(frozen=True)
class Card:
    """What it was seen to do: bytes a second of a copy, read and write; operations a second of a bf16 product."""

    bandwidth: float
    flops: float


def floor(config: dict[str, Any], work: Work, card: Card, rows: int) -> float:
    """Seconds that ``card`` needs at the least: weights and K/V read once a decode step of at most ``rows`` requests,
    prompts at the matrix rate, what they share with the one before them once."""
    hidden, layers, kv = config["hidden_size"], config["num_hidden_layers"], config["num_key_value_heads"]
    dim, heads = config["head_dim"], config["num_attention_heads"]
    layer = hidden * dim * (heads + 2 * kv) + heads * dim * hidden + 3 * hidden * config["intermediate_size"]
    body, head = layers * layer, config["vocab_size"] * hidden
    per_token = 2 * layers * 2 * kv * dim  # bytes of K and V
    tokens = sum(count - 1 for _, count in work)
    steps = max(max(count for _, count in work) - 1, -(-tokens // rows))
    read = steps * 2 * (body + head)
    read += sum(per_token * (len(prompt) + i) for prompt, count in work for i in range(1, count))
    reused = [0] + [_common(a, b) // 16 * 16 for (a, _), (b, _) in pairwise(work)]
    operations = sum(
        2 * body * (len(prompt) - known) + 2 * layers * heads * dim * (len(prompt) ** 2 - known**2)
        for (prompt, _), known in zip(work, reused, strict=True)
    )
    return float(read / card.bandwidth + operations / card.flops)


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
