"""Tiny random models in Hugging Face's own formats, for tests: `make` writes one, with weights and a tokenizer.

    python tools/tiny.py llama out/llama --rope yarn --shards 3 --set num_hidden_layers=4

Weights are normal with std 0.2, far from Transformers' 0.02: logits then differ clearly from token to token, so greedy
decoding has no near ties and a wrong layer shows. Norm weights are near one but not one, biases are not zero.
`tokenizer` and `config` need neither torch nor transformers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

VOCAB_SIZE = 384
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")  # ids 0 to 3
BOS, IM_START, EOS, PAD = range(4)
WEIGHT_STD = 0.2

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "mistral": {"architectures": ["MistralForCausalLM"], "head_dim": 16, "sliding_window": 16},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    # The head size is not hidden_size / heads, as in the real small Qwen3 models.
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 32, "tie_word_embeddings": True},
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "head_dim": 16,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "sliding_window": None,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "smollm3": {
        "architectures": ["SmolLM3ForCausalLM"],
        "num_hidden_layers": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "tie_word_embeddings": True,
    },
}

# For a head size of 16, so of eight frequencies.
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0],
        "original_max_position_embeddings": 64,
    },
}
# Dynamic scaling begins past max_position_embeddings, so that has to be within a test's reach.
_ROPE_EXTRA: dict[str, dict[str, Any]] = {"dynamic": {"max_position_embeddings": 64}}

_TEXT = """the quick brown fox jumps over the lazy dog. a small model reads tokens and writes tokens, one at a time.
What is the capital of France? The capital of France is Paris. You are a helpful assistant. user system
def add(a, b):\n    return a + b\n{"name": "value", "list": [1, 2, 3]}\nThere was a time when there were no engines
and the pages of the book were read by hand, one after the other; then there was another, and the next."""


def make(
    folder: str | Path,
    family: str = "llama",
    *,
    rope: str | None = None,
    shards: int = 1,
    seed: int = 0,
    dtype: str = "float32",
    generation: dict[str, Any] | None = None,
    **overrides: Any,
) -> Path:
    """Writes a model of ``family`` with config, safetensors, generation config and tokenizer; returns the folder.

    ``rope`` names an entry of `ROPES`; ``shards`` is the least number of weight files (an index is written for more
    than one); ``generation`` is merged over ``generation_config.json``; ``overrides`` over the family's config.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model = build(family, rope=rope, seed=seed, dtype=dtype, **overrides)
    _write_weights(model, folder, shards)
    hf = json.loads((folder / "config.json").read_text())
    ids = {key: hf[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", {**ids, "eos_token_id": [EOS, BOS], **(generation or {})})
    tokenizer(folder)
    return folder


def config(family: str = "llama", *, rope: str | None = None, **overrides: Any) -> dict[str, Any]:
    """The dict of a ``config.json`` of ``family``, in the shape that Transformers 5 writes."""
    hf: dict[str, Any] = {
        "model_type": family,
        **_COMMON,
        **FAMILIES[family],
        "rope_parameters": {"rope_theta": 10000.0},
    }
    if rope is not None:
        hf = {**hf, **_ROPE_EXTRA.get(rope, {})}
        hf["rope_parameters"] = {**hf["rope_parameters"], **ROPES[rope]}
    return {**hf, **overrides}


def build(
    family: str = "llama", *, rope: str | None = None, seed: int = 0, dtype: str = "float32", **overrides: Any
) -> PreTrainedModel:
    """The Transformers model that `make` writes, in evaluation mode with eager attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    hf = config(family, rope=rope, **overrides)
    hf.setdefault("dtype", dtype)
    model_config = AutoConfig.for_model(hf.pop("model_type"), **hf)
    model = AutoModelForCausalLM.from_config(model_config, attn_implementation="eager")
    model = model.to(getattr(torch, dtype)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # a tied head appears once
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else WEIGHT_STD * noise)
    return model


def _write_weights(model: PreTrainedModel, folder: Path, shards: int) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=-(-size // shards))


def tokenizer(folder: str | Path, vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """Writes a byte-level BPE tokenizer of ``vocab_size`` tokens with a ChatML template; returns it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made = _train(vocab_size)
    made.save(str(folder / "tokenizer.json"))
    added = {
        str(i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, token in enumerate(SPECIAL)
    }
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": added,
            "bos_token": SPECIAL[BOS],
            "eos_token": SPECIAL[EOS],
            "pad_token": SPECIAL[PAD],
            "additional_special_tokens": [SPECIAL[IM_START]],
            "clean_up_tokenization_spaces": False,
            "model_max_length": 256,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return made


def _train(vocab_size: int) -> Tokenizer:
    """Merges learnt from a fixed text: the same vocabulary on every machine."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([_TEXT], trainer)
    if made.get_vocab_size() != vocab_size:
        raise RuntimeError(f"the text gives {made.get_vocab_size()} tokens, not {vocab_size}")
    return made


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _setting(text: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rope", choices=ROPES)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--set", dest="overrides", action="append", type=_setting, default=[], metavar="KEY=JSON")
    args = parser.parse_args()
    overrides = dict(args.overrides)
    folder = make(
        args.folder, args.family, rope=args.rope, shards=args.shards, seed=args.seed, dtype=args.dtype, **overrides
    )
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size:>10,}  {path}")


if __name__ == "__main__":
    main()
