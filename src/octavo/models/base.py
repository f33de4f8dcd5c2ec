"""What the runner and the loader ask of a model."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import nn

from octavo.config import ModelConfig


class Model(nn.Module):
    """A causal language model over the flat token axis of a step; see `layers.context` for what else it reads.

    Modules keep their checkpoint names, and are built without memory; `runtime.loader` fills them.
    """

    unused: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    """Patterns (as of `fnmatch`) of checkpoint tensors that the model can do without."""

    def __init__(self, config: ModelConfig, max_len: int) -> None:
        super().__init__()
        self.config = config
        self.max_len = max_len
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.tied: tuple[str, str] | None = None
        """With a tied head, the checkpoint names that the head's weight and the embedding's have."""

    def untie(self) -> None:
        """Gives a tied head a weight of its own; the loader asks for it where a checkpoint has two different ones."""
        raise NotImplementedError

    @abstractmethod
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``token_ids[T]`` at ``positions[T]`` to hidden states ``[T, C]``, after the last norm."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden[S, C]`` to ``[S, vocab]`` in the model's type."""
