"""``consolidated*.safetensors``, Mistral's own layout of weights, under the names and in the order of Hugging Face's.

The two numbers of a rotated pair are neighbours in a head's rows of query and key projections there (0, 1, 2, 3 …);
Transformers rotates dimension i with i + d/2, so its rows of the same head are 0, 2, 4 …, 1, 3, 5 ….
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt

from octavo.errors import ModelError
from octavo.hub.checkpoint import Array, SafetensorsCheckpoint, Slices
from octavo.hub.configs import read_json
from octavo.hub.mistral_config import heads_of
from octavo.hub.safetensors_file import TensorInfo

_TOP: Final = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
_IN_LAYER: Final = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.gate": "block_sparse_moe.gate",
}
_LEAVES: Final = {"weight": "weight", "bias": "bias", "qscale_weight": "weight_scale", "qscale_act": "input_scale"}
_OF_IMAGES: Final = ("vision_encoder.", "vision_language_adapter.", "patch_merger.", "pre_mm_projector_norm.")


class MistralCheckpoint:
    """The language part of ``paths``; ``params`` is the ``params.json`` beside them, which says what a head is."""

    def __init__(self, paths: tuple[Path, ...], params: Path) -> None:
        if not params.is_file():
            raise ModelError(
                f"{paths[0].name} is in Mistral's format, but {params.parent} has no params.json.",
                "Download params.json, or weights in the Hugging Face format.",
                id="HF040",
            )
        self._files = SafetensorsCheckpoint(paths)
        self._head_size = heads_of(read_json(params), params)[2]
        own = (name for name in self._files.tensors() if not name.startswith(_OF_IMAGES))
        self._names = {hf_name(name): name for name in own}
        self._tensors = {name: self._files.tensors()[own] for name, own in self._names.items()}

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def forget(self) -> None:
        """See `hub.checkpoint.Checkpoint`."""
        self._files.forget()

    def read(self, name: str, slices: Slices | None = None) -> Array:
        own = self._names[name]
        if not own.endswith(("attention.wq.weight", "attention.wk.weight")):
            return self._files.read(own, slices)
        size, count = self._head_size, self._files.tensors()[own].shape[0]
        if size % 2 or count % size:
            raise ModelError(
                f"{own} has {count} rows, which are no heads of {size}, as params.json says.",
                "Download weights and params.json of one model.",
                id="HF044",
            )
        rows, *rest = slices or (slice(None),)
        first, last, _ = rows.indices(count)
        start, end = first - first % size, last + -last % size  # whole heads
        found = self._files.read(own, (slice(start, end), *rest))
        return Array(_halves(found.data, size)[first - start : last - start], found.dtype)


def hf_name(name: str) -> str:
    """The name in Transformers' models of what Mistral calls ``name``; names that are not known stay as they are."""
    stem, _, leaf = name.rpartition(".")
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", stem)
    if match is None or leaf not in _LEAVES:
        return f"{_TOP[stem]}.{leaf}" if stem in _TOP else name
    expert = re.fullmatch(r"feed_forward\.experts\.(\d+)\.(w[123])", match[2])
    inside = f"block_sparse_moe.experts.{expert[1]}.{expert[2]}" if expert else _IN_LAYER.get(match[2])
    return name if inside is None else f"model.layers.{match[1]}.{inside}.{_LEAVES[leaf]}"


def _halves(rows: npt.NDArray[Any], size: int) -> npt.NDArray[Any]:
    """``rows`` [heads * size, …] with the even rows of each head before its odd ones."""
    pairs = rows.reshape(-1, size // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
