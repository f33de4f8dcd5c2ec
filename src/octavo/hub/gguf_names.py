"""Hugging Face names of the tensors of a GGUF file, and what llama.cpp's converter did to their values.

llama.cpp rotates neighbouring pairs of dimensions where Transformers rotates halves, for the architectures of
`PERMUTED`; its converter reorders the rows of ``attn_q`` and ``attn_k`` for that, and `attention_rows` undoes it.
Gemma's norms multiply by one more than their weight; the converter adds the one, and `value_offset` undoes that.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from octavo.hub.gguf import GgufReader, GgufTensor

PERMUTED = frozenset({"llama", "smollm3"})  # the converter of smollm3 is that of llama

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Gemma 3 has norms behind its sublayers, too, and so other names for the one before the MLP.
_GEMMA3_BLOCK = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_CONFIG_TENSORS = frozenset({"rope_freqs.weight"})  # part of the config, see `gguf_config`


def hf_names(reader: GgufReader) -> dict[str, str]:
    """Hugging Face name -> name in the file. A tensor without such a name keeps its own, so that loading reports it."""
    arch = reader.architecture
    return {hf_name(name, arch): name for name in reader.tensors if name not in _CONFIG_TENSORS}


def hf_name(name: str, arch: str = "llama") -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; an unknown name is returned as it is."""
    block = {**_BLOCK, **_GEMMA3_BLOCK} if arch == "gemma3" else _BLOCK
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match:
        layer, part, leaf = match.groups()
        known = _TOP.get(part) if layer is None else block.get(part)
        if known:
            return f"{known}.{leaf}" if layer is None else f"model.layers.{layer}.{known}.{leaf}"
    return name


def value_offset(reader: GgufReader, tensor: GgufTensor) -> float:
    """What to add to the values of ``tensor`` to have those of Transformers' parameter."""
    return -1.0 if reader.architecture == "gemma3" and tensor.name.endswith("_norm.weight") else 0.0


def attention_rows(reader: GgufReader, tensor: GgufTensor) -> npt.NDArray[np.intp] | None:
    """For a reordered projection: the row in the file of each row in Transformers' order. None: the order is the same.

    Within a head of dimension d, row 2 i + j of the file (j in {0, 1}) is row j d / 2 + i.
    """
    match = re.fullmatch(r"blk\.\d+\.attn_(q|k)\.(?:weight|bias)", tensor.name)
    if not match or reader.architecture not in PERMUTED:
        return None
    prefix = f"{reader.architecture}.attention.head_count"
    heads = reader.integer(prefix)
    if match[1] == "k":
        heads = reader.integer(f"{prefix}_kv") or heads
    rows = tensor.shape[0]
    if not heads or heads < 0 or rows % (2 * heads):
        reader.fail(f"{tensor.name} has {rows} rows, which {heads} heads of even size cannot share")
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
