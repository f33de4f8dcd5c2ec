"""The weights of a GGUF file under the names of Hugging Face, without what llama.cpp's converter did to their values.

llama.cpp rotates neighbouring pairs of dimensions where Transformers rotates halves, for the architectures of
`PERMUTED`; its converter reorders the rows of ``attn_q`` and ``attn_k`` for that. Gemma's norms multiply by one more
than their weight; the converter adds the one. Reading undoes both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from octavo.hub.checkpoint import Array, Slices
from octavo.hub.gguf import GgufReader, GgufTensor
from octavo.hub.gguf_quants import Bytes
from octavo.hub.safetensors_file import TensorInfo

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


class GgufCheckpoint:
    """A GGUF file under Hugging Face names, dequantised to float32 on reading.

    A tensor without such a name keeps its own, so that loading reports it.
    """

    def __init__(self, reader: GgufReader) -> None:
        self._reader = reader
        self._arch = reader.architecture
        own = ((name, tensor) for name, tensor in reader.tensors.items() if name not in _CONFIG_TENSORS)
        self._tensors = {hf_name(name, self._arch): tensor for name, tensor in own}

    def tensors(self) -> Mapping[str, TensorInfo]:
        shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        return {name: TensorInfo("float32", shape, 4 * math.prod(shape)) for name, shape in shapes.items()}

    def read(self, name: str, slices: Slices | None = None) -> Array:
        tensor = self._tensors[name]
        values = tensor.read(slices, self._rows(tensor))
        if self._arch == "gemma3" and tensor.name.endswith("_norm.weight"):
            values = values - np.float32(1)
        return Array(values, "float32")

    def forget(self) -> None:
        """See `hub.checkpoint.Checkpoint`."""
        self._reader.forget()

    @property
    def stored(self) -> int:
        """See `hub.checkpoint.BlockCheckpoint`."""
        return sum(tensor.nbytes for tensor in self._reader.tensors.values())

    def block_types(self) -> dict[str, str]:
        """See `hub.checkpoint.BlockCheckpoint`."""
        return {name: tensor.format.name for name, tensor in self._tensors.items() if len(tensor.shape) == 2}

    def read_raw(self, name: str, rows: slice = slice(None)) -> Bytes:
        """``rows`` of the blocks as stored, uint8 [*rows, blocks in a row, bytes of a block].

        A view of the file, but for query and key projections of the architectures whose rows must be reordered.
        """
        tensor = self._tensors[name]
        order = self._rows(tensor)
        return tensor.blocks[rows] if order is None else tensor.blocks[order[rows]]

    def _rows(self, tensor: GgufTensor) -> npt.NDArray[np.intp] | None:
        """For a reordered projection: the row in the file of each row in Transformers' order. None: it is the same.

        Within a head of dimension d, row 2 i + j of the file (j in {0, 1}) is row j d / 2 + i.
        """
        match = re.fullmatch(r"blk\.\d+\.attn_(q|k)\.(?:weight|bias)", tensor.name)
        if not match or self._arch not in PERMUTED:
            return None
        key = f"{self._arch}.attention.head_count"
        heads = self._reader.integer(key)
        if match[1] == "k":
            heads = self._reader.integer(f"{key}_kv") or heads
        rows = tensor.shape[0]
        if not heads or heads < 0 or rows % (2 * heads):
            self._reader.fail(f"{tensor.name} has {rows} rows, which {heads} heads of even size cannot share")
        return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def hf_name(name: str, arch: str) -> str:
    """``blk.3.attn_q.weight`` -> ``model.layers.3.self_attn.q_proj.weight``; an unknown name is returned as it is."""
    block = {**_BLOCK, **_GEMMA3_BLOCK} if arch == "gemma3" else _BLOCK
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match:
        layer, part, leaf = match.groups()
        known = _TOP.get(part) if layer is None else block.get(part)
        if known:
            return f"{known}.{leaf}" if layer is None else f"model.layers.{layer}.{known}.{leaf}"
    return name
