"""Small models in Mistral's own format, made of tiny ones in that of Hugging Face."""

from __future__ import annotations

import base64
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from octavo.hub.bpe import TEKKEN_SPLIT
from tools import tiny

NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "block_sparse_moe": "feed_forward",
}
SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *(
        "[/TOOL_RESULTS]",
        "[TOOL_CALLS]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[TOOL_CONTENT]",
        "[ARGS]",
        "[CALL_ID]",
    ),
)
RESERVED = 24


def mistral_repo(hf: Path, folder: Path, *, shards: int = 1, version: str = "v11", **params: Any) -> Path:
    """The model in ``hf`` (a tiny one of Mistral's families), in Mistral's format and nothing of the other."""
    folder.mkdir(parents=True)
    config = json.loads((hf / "config.json").read_text())
    write_params(folder, config, **params)
    tensors = {}
    for name, tensor in load_file(hf / "model.safetensors").items():
        own = name.removeprefix("model.layers.") if name.startswith("model.layers.") else name
        for theirs, ours in NAMES.items():
            own = own.replace(theirs, ours)
        own = f"layers.{own}" if name.startswith("model.layers.") else own
        if own.endswith(("wq.weight", "wk.weight")):
            tensor = neighbours(tensor, config["head_dim"])
        tensors[own] = np.ascontiguousarray(tensor)
    write_weights(folder, tensors, shards)
    write_tekken(folder / "tekken.json", config["vocab_size"], version=version)
    return folder


def write_params(folder: Path, config: dict[str, Any], **params: Any) -> None:
    values = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": config["head_dim"],
        "hidden_dim": config["intermediate_size"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "rope_theta": 10000.0,
        "sliding_window": config.get("sliding_window"),
        "max_seq_len": config["max_position_embeddings"],
        **params,
    }
    (folder / "params.json").write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def neighbours(rows: Any, size: int) -> Any:
    """Query or key rows in Mistral's order: row i of a head, which is turned with row i + size/2, goes to row 2i."""
    out = np.empty_like(rows)
    for row in range(len(rows)):
        head, i = divmod(row, size)
        half, place = divmod(i, size // 2)
        out[head * size + 2 * place + half] = rows[row]
    return out


def write_weights(folder: Path, tensors: dict[str, Any], shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "consolidated.safetensors")
        return
    files = [f"consolidated-{i:05d}-of-{shards:05d}.safetensors" for i in range(1, shards + 1)]
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_tekken(path: Path, vocab_size: int = 384, *, version: str = "v11", listed: bool = True) -> list[bytes]:
    """A tekken.json with the merges of the tiny tokenizer; returns the bytes of its tokens by rank."""
    ranks = [bytes([byte]) for byte in range(256)]
    for token in tiny_tokens():
        if token not in ranks and len(ranks) < vocab_size - RESERVED:
            ranks.append(token)
    special = [{"rank": i, "token_str": text, "is_control": True} for i, text in enumerate(SPECIAL)]
    data = {
        "config": {
            "pattern": TEKKEN_SPLIT,
            "num_vocab_tokens": len(ranks),
            "default_vocab_size": RESERVED + len(ranks),
            "default_num_special_tokens": RESERVED,
            "version": version,
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
            for i, token in enumerate(ranks)
        ],
    }
    path.write_text(json.dumps({**data, "special_tokens": special} if listed else data))
    return ranks


def tiny_tokens() -> list[bytes]:
    """The tokens of the tiny tokenizer in the order of its merges; all of them are ASCII."""
    with tempfile.TemporaryDirectory() as folder:
        made = tiny.tokenizer(folder)
    texts = sorted(made.get_vocab(), key=made.token_to_id)
    return [text.replace("Ġ", " ").replace("Ċ", "\n").encode() for text in texts if len(text) > 1 and "<|" not in text]
