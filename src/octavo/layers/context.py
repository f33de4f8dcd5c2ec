"""The one implicit state: what the step's forward needs besides its arguments."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from octavo.kernels.metadata import AttentionMetadata


@dataclass(slots=True)
class ForwardContext:
    """``kv_cache`` is the whole ``[layers, pages, 2, kv_heads, page_size, head_dim]`` (see `kernels.metadata`).

    ``wanted``, int32 ``[S]`` in ascending order, are the tokens whose hidden states the model is to return; None: all.
    """

    attention: AttentionMetadata
    kv_cache: torch.Tensor
    wanted: torch.Tensor | None = None

    def of_wanted(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden[T, C]`` of all tokens to ``[S, C]``."""
        return hidden if self.wanted is None else hidden[self.wanted]


_current: ForwardContext | None = None


def current() -> ForwardContext:
    """The context of the running forward; an error outside of one."""
    if _current is None:
        raise RuntimeError("no forward is running: wrap the call in layers.context.use(...)")
    return _current


class use:  # noqa: N801
    """Makes ``context`` the current one; nesting is an error. A class, since a generator costs each step more."""

    def __init__(self, context: ForwardContext) -> None:
        self._context = context

    def __enter__(self) -> None:
        global _current
        if _current is not None:
            raise RuntimeError("a forward is already running")
        _current = self._context

    def __exit__(self, *error: object) -> None:
        global _current
        _current = None
