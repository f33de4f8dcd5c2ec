"""The head of a causal language model: its class's own forward, around hidden states that are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class ClassHead:
    """Puts a stand-in into the place of the decoder ``body_name`` of ``model``; `body` is the decoder, apart from it.

    Scaling, soft-capping and whatever else follows the head are what the class does.
    """

    def __init__(self, model: Any, body_name: str, device: torch.device) -> None:
        self.body: nn.Module = model.get_submodule(body_name)
        parent, _, self._name = body_name.rpartition(".")
        self._parent = model.get_submodule(parent)
        self._model = model
        self._stand_in = _Given(self.body)
        setattr(self._parent, self._name, self._stand_in)
        self._no_ids = torch.zeros(1, 1, dtype=torch.long, device=device)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden[S, C]`` to ``[S, vocab]``."""
        self._stand_in.given = hidden.unsqueeze(0)
        logits: torch.Tensor = self._model(input_ids=self._no_ids, use_cache=False).logits[0]
        self._stand_in.given = None
        return logits

    def remove(self) -> None:
        """Puts the decoder back."""
        setattr(self._parent, self._name, self.body)


def drop_head(model: Any) -> str:
    """Puts nothing into the place of the head of ``model``, whose parameters have no memory yet; returns its name."""
    head = model.get_output_embeddings()
    name: str = next(name for name, module in model.named_modules() if module is head)
    model.set_submodule(name, nn.Identity())
    ties = model.all_tied_weights_keys
    model.all_tied_weights_keys = {one: other for one, other in ties.items() if not one.startswith(f"{name}.")}
    return name


class _Given(nn.Module):
    """Stands for the decoder inside its causal language model, and returns the hidden states it was given."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self._stands_for = [body]  # in a list, so as not to become a part of this module
        self.given: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_stands_for"][0], name)

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return _Output((self.given,))


class _Output(tuple[Any, ...]):
    """An output of a decoder with hidden states and nothing else: all other fields are None."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        return self[0] if name == "last_hidden_state" else None
