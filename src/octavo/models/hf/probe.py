"""Running a loaded model over a few tokens, to see what its modules take and return."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from octavo.config import ModelConfig
from octavo.kernels.metadata import AttentionMetadata
from octavo.layers import context

TOKENS = 7
PAGE = 16
# Greatest norm of a difference, as a share of the norm of what is expected.
SAME = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass
class Call:
    """The last call of a module: its arguments and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states ``[1, T, C]`` that went in."""
        found: torch.Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return found

    @property
    def result(self) -> torch.Tensor:
        """The first of what it returned."""
        found: torch.Tensor = self.output[0] if isinstance(self.output, (tuple, dict)) else self.output
        return found


def same(found: torch.Tensor, wanted: torch.Tensor, *, rounded_at: torch.Tensor | None = None) -> bool:
    """Whether ``found`` is ``wanted`` but for rounding in its type; that of the values ``rounded_at`` comes on top."""
    if found.shape != wanted.shape or not bool(wanted.isfinite().all()):
        return False
    allowed = SAME[wanted.dtype] * wanted.float().norm()
    if rounded_at is not None:
        allowed += torch.finfo(wanted.dtype).eps * rounded_at.float().norm()
    return bool((found.float() - wanted.float()).norm() <= allowed)


def spread(max_len: int, device: torch.device) -> torch.Tensor:
    """`TOKENS` positions far apart, so that a rotation that is missing or of another kind shows."""
    return torch.linspace(0, max_len - 1, TOKENS, device=device).round().to(torch.int32)


@contextmanager
def small_context(config: ModelConfig, dtype: torch.dtype, device: torch.device, sequences: int = 1) -> Iterator[None]:
    """A cache of its own for ``sequences`` of `TOKENS` tokens each."""
    shape = config.cache_shape(sequences + 1, PAGE)

    def ints(count: int) -> torch.Tensor:
        return torch.arange(count, dtype=torch.int32, device=device)

    meta = AttentionMetadata(
        query_start=ints(sequences + 1) * TOKENS,
        seq_lens=torch.full((sequences,), TOKENS, dtype=torch.int32, device=device),
        rows=ints(sequences),
        block_table=ints(sequences).unsqueeze(1),
        slots=(ints(sequences).unsqueeze(1) * PAGE + ints(TOKENS)).flatten(),
        num_decodes=0,
        max_query=TOKENS,
        max_seq=TOKENS,
    )
    with context.use(context.ForwardContext(meta, torch.zeros(shape, dtype=dtype, device=device))):
        yield


def watch(body: nn.Module, config: ModelConfig, dtype: torch.dtype, positions: torch.Tensor) -> dict[nn.Module, Call]:
    """One forward of the decoder ``body`` over random tokens; what each of its modules was called with."""
    seen: dict[nn.Module, Call] = {}

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen[module] = Call(args, kwargs, output)

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in body.modules()]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, TOKENS), generator=generator).to(positions.device)
    try:
        with small_context(config, dtype, positions.device):
            body(input_ids=ids, position_ids=positions.long().unsqueeze(0), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@torch.inference_mode()
def first_position(body: Any, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> int | None:
    """The number that the decoder ``body`` gives the first token when it is not told positions; None if they are not
    consecutive numbers from 0 or, as in RoBERTa, from the padding id + 1."""
    padding = getattr(body.config.get_text_config(), "pad_token_id", None)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (1, TOKENS), generator=generator)
    ids[ids == padding] = 0 if padding else 1  # padding is numbered in a way of its own
    ids = ids.to(device)

    def hidden(positions: torch.Tensor | None) -> torch.Tensor:
        with small_context(config, dtype, device):
            found: torch.Tensor = body(input_ids=ids, position_ids=positions, use_cache=False)[0]
            return found

    expected, numbers = hidden(None), torch.arange(TOKENS, device=device).unsqueeze(0)
    firsts = (0,) if padding is None else (0, padding + 1)
    return next((first for first in firsts if torch.equal(hidden(numbers + first), expected)), None)
