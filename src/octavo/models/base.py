"""What the runner and the loader ask of a model."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from octavo.config import ModelConfig
from octavo.hub.checkpoint import Array, Checkpoint
from octavo.kernels.sampling import WHOLE, VocabPart


@dataclass(frozen=True)
class OwnCache:
    """Bytes that a model keeps for a sequence outside of the pages: so many, and so many more for each token."""

    per_row: int
    per_token: int

    def __str__(self) -> str:
        return f"{self.per_row} bytes a sequence and {self.per_token} bytes a token"


class Model(nn.Module):
    """A causal language model over the flat token axis of a step; see `layers.context` for what else it reads.

    Modules keep their checkpoint names, and are built without memory; `runtime.loader` fills them.
    """

    unused: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    """Patterns (as of `fnmatch`) of checkpoint tensors that the model can do without."""

    capturable = True
    """Whether a decode step may be captured as a graph: nothing in it looks at a tensor on the host."""

    def __init__(self, config: ModelConfig, max_len: int) -> None:
        super().__init__()
        self.config = config
        self.max_len = max_len
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.tied: tuple[str, str] | None = None
        """With a tied head, the checkpoint names that the head's weight and the embedding's have."""

    @property
    def own_cache(self) -> OwnCache | None:
        """What is kept for a row from its first token to `release`, outside of the pages; known after loading.

        None for a model that keeps nothing but K and V in pages: then prefixes can be reused.
        """
        return None

    def release(self, row: int) -> None:
        """Forgets what is kept for ``row``, whose sequence has ended."""

    def untie(self) -> None:
        """Gives a tied head a weight of its own; the loader asks for it where a checkpoint has two different ones."""
        raise NotImplementedError

    @abstractmethod
    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``token_ids[T]`` at ``positions[T]`` to the hidden states after the last norm: ``[S, C]`` of the tokens that
        the context wants, or ``[T, C]``."""

    @abstractmethod
    def own_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden[S, C]`` to the logits of `vocab_part` in the model's type, equally many on each rank; -inf for
        tokens that there are not."""

    @property
    def vocab_part(self) -> VocabPart:
        """The tokens that `own_logits` are of."""
        return WHOLE

    def whole_logits(self, own: torch.Tensor) -> torch.Tensor:
        """``[S, vocab]`` from what `own_logits` returned; a collective call."""
        return own

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden[S, C]`` to ``[S, vocab]`` in the model's type."""
        return self.whole_logits(self.own_logits(hidden))


Share = Callable[[float], None]
"""Is told which share of the weights is loaded, from 0 to 1."""


@dataclass(frozen=True)
class Loaded:
    """How many tensors were loaded, their bytes in the checkpoint, and the names of those that were not needed."""

    tensors: int
    nbytes: int
    unused: tuple[str, ...] = ()


class SelfLoading(Model):
    """A model whose modules are not our layers, so that it fills itself."""

    @abstractmethod
    def load_weights(self, checkpoint: Checkpoint, device: torch.device, progress: Share) -> Loaded:
        """Fills the model and makes it ready on ``device``; raises as `runtime.loader.load` does."""

    @abstractmethod
    def dummy_weights(self, seed: int, device: torch.device) -> Loaded:
        """As `load_weights` with random weights that depend on ``seed``."""


def as_tensor(array: Array) -> torch.Tensor:
    """A CPU tensor that shares the array's memory; only to be read."""
    with warnings.catch_warnings():  # mapped files are not writable, which torch warns of
        warnings.simplefilter("ignore", UserWarning)
        tensor = torch.from_numpy(array.data)
    return tensor.view(torch.bfloat16) if array.dtype == "bfloat16" else tensor
