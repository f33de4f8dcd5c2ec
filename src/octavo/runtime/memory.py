"""How many pages the KV cache gets, and the arithmetic in words."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from octavo.config import ModelConfig
from octavo.errors import OutOfMemory, UnsupportedModel
from octavo.hub.plan import active_experts, kv_remedy
from octavo.kernels.select import PackedLinear
from octavo.layers.embedding import Embedding
from octavo.layers.experts import ATTRIBUTE, Experts
from octavo.models.base import Model, OwnCache
from octavo.platforms.base import Platform


@dataclass(frozen=True)
class CachePlan:
    """``num_pages`` for requests (one more is allocated as the dummy), ``max_len`` tokens at most in one of them, of
    which ``max_rows`` run at once."""

    num_pages: int
    page_size: int
    page_bytes: int
    max_len: int
    max_rows: int
    reason: str

    def allocate(self, config: ModelConfig, platform: Platform) -> torch.Tensor:
        """The cache, laid out as `kernels.metadata` says; zeros, since masked slots are still multiplied by 0."""
        return platform.zeros(config.cache_shape(self.num_pages + 1, self.page_size), cache_dtype(config))


def step_bytes(model: Model) -> int:
    """Bytes of weights that a step reads: all, but for a table of embeddings that is not the head, too, and for the
    experts that one token does not choose; the more tokens a step has, the more of them it reads."""
    share = active_experts(model.config.hf)
    weights: dict[int, float] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding) or (isinstance(module, Embedding) and not module.tied):
            continue
        experts = module if isinstance(module, Experts) else getattr(module, ATTRIBUTE, None)
        if experts is not None:
            weights[id(experts)] = share * experts.nbytes
            continue
        part = share if type(module).__name__.endswith("Experts") else 1.0  # by Transformers' own code
        for parameter in module.parameters(recurse=False):
            weights[parameter.data_ptr()] = part * parameter.nbytes
        packed = getattr(module, "packed", None)
        if packed is not None:
            weights[id(packed)] = packed.nbytes
    return int(sum(weights.values()))


def few_rows(model: Model, most: int) -> int:
    """So many tokens, ``most`` if no product says less, take a step little longer than one does."""
    for module in model.modules():
        weight: PackedLinear | None = getattr(module, "packed", None)
        if weight is not None and weight.few_rows is not None:
            most = min(most, weight.few_rows)
    return most


def cache_dtype(config: ModelConfig) -> torch.dtype:
    """The type of K and V in the cache."""
    dtype: torch.dtype = getattr(torch, config.cache_dtype or config.dtype)
    return dtype


def plan_cache(
    config: ModelConfig,
    budget: int,
    why: str,
    *,
    page_size: int,
    max_len: int,
    fixed_len: bool,
    max_rows: int,
    own: OwnCache | None = None,
    pages: int | None = None,
) -> CachePlan:
    """Divides ``budget`` bytes into pages, or takes so many ``pages``.

    ``max_len`` shrinks to what one sequence can have, unless it is ``fixed_len`` by the user: then `OutOfMemory`. No
    more pages are made than ``max_rows`` longest sequences need. What a model keeps of its ``own`` is counted, too: at
    most half of the budget for what it keeps of each sequence, so there may be fewer rows; the rest by pages.
    """
    shapes = {(layer.kv_heads, layer.head_dim) for layer in config.layers}
    if len(shapes) > 1:
        raise UnsupportedModel(
            f"The layers of {config.architecture} have different K/V shapes (heads, size): {sorted(shapes)}.",
            "octavo has one pool of pages for now; such models are not served yet.",
        )
    if own is not None and own.per_row:
        max_rows = max(1, min(max_rows, budget // 2 // own.per_row))
        budget -= max_rows * own.per_row
        why = f"{why}, less {_size(own.per_row)} for each of {max_rows} sequences"
    page_bytes = max(1, config.kv_bytes_per_token + (own.per_token if own is not None else 0)) * page_size
    fitting = max(budget // page_bytes - 1, 0) if pages is None else pages
    wanted = -(-max_len // page_size)
    num_pages = min(fitting, wanted * max_rows)
    arithmetic = f"{_size(budget)} ({why}) / {page_bytes / 1024:.0f} KiB a page of {page_size} tokens = {fitting} pages"
    if pages is not None:
        arithmetic = f"{pages} pages (--num-gpu-blocks-override) of {page_size} tokens, {page_bytes / 1024:.0f} KiB"
    if num_pages < wanted:
        needed = _size((wanted + 1) * page_bytes)
        if fixed_len or num_pages < 1:
            raise OutOfMemory(
                f"The KV cache gets {arithmetic}; one sequence of {max_len} tokens needs {wanted}, {needed}.",
                kv_remedy(num_pages * page_size, (wanted + 1) * page_bytes, config.dtype)
                + " octavo plan has the arithmetic.",
            )
        max_len = num_pages * page_size
        arithmetic += f"; max_model_len lowered to {max_len}, {wanted * page_size} would need {needed}"
    elif num_pages < fitting:
        arithmetic += f"; {num_pages} are enough for {max_rows} sequences of {max_len} tokens"
    return CachePlan(num_pages, page_size, page_bytes, max_len, max_rows, arithmetic)


def _size(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 2**20:.0f} MiB" if count >= 10 * 2**20 else f"{count / 2**10:.0f} KiB"
