"""Mixtures of experts on the C++ extension: see `reference.group`, `reference.grouped_linear`, `reference.combine`.

Of a step's experts only the weights of those that its tokens chose are read. A row's result depends on its own values
and its expert alone.
"""

from __future__ import annotations

import math

import torch

from octavo import _cpu
from octavo.kernels import reference
from octavo.kernels.cpu import PANEL, in_panels, weights
from octavo.kernels.metadata import Groups


def group(experts: torch.Tensor, count: int) -> Groups:
    """See `reference.group`."""
    tokens, each = experts.shape
    experts = experts.long().contiguous()
    rows = torch.empty(tokens * each, dtype=torch.int32)
    places = torch.empty((tokens, each), dtype=torch.int32)
    starts = torch.empty(count + 1, dtype=torch.int32)
    _cpu.group(experts.data_ptr(), tokens, each, count, rows.data_ptr(), places.data_ptr(), starts.data_ptr())
    return Groups(rows, places, starts)


def combine(x: torch.Tensor, weights: torch.Tensor, groups: Groups) -> torch.Tensor:
    """See `reference.combine`."""
    (tokens, each), cols = groups.places.shape, x.shape[1]
    if x.dtype not in (torch.bfloat16, torch.float32) or weights.shape != (tokens, each):
        return reference.combine(x, weights, groups)
    x, weights = x.contiguous(), weights.float().contiguous()
    out = torch.empty((tokens, cols), dtype=x.dtype)
    _cpu.combine(
        x.dtype is torch.bfloat16,
        x.data_ptr(),
        out.data_ptr(),
        weights.data_ptr(),
        groups.places.data_ptr(),
        tokens,
        each,
        cols,
    )
    return out


class PackedExperts:
    """Weights in panels as those of `cpu.PackedLinear`, the experts' one after the other; see csrc/kernels.h."""

    def __init__(self, panels: torch.Tensor, bias: torch.Tensor | None, in_features: int, out_features: int) -> None:
        self.experts, self.in_features, self.out_features = len(panels), in_features, out_features
        self.panels, self.bias = panels, bias  # whose addresses the extension holds
        bias_at = 0 if bias is None else bias.data_ptr()
        self.native = _cpu.Experts(panels.data_ptr(), bias_at, self.experts, in_features, out_features)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return self.panels.nbytes

    def __call__(self, x: torch.Tensor, groups: Groups, *, by_token: bool) -> torch.Tensor:
        """See `reference.grouped_linear`; another type, width or number of rows than it takes is a ValueError."""
        pairs = len(groups.rows)
        expected = (groups.places.shape[0] if by_token else pairs, self.in_features)
        if x.dtype is not torch.bfloat16 or x.shape != expected or len(groups.starts) != self.experts + 1:
            raise ValueError(
                f"x is {x.dtype} {tuple(x.shape)} in {len(groups.starts) - 1} groups; the weights of {self.experts}"
                f" experts take torch.bfloat16 {expected}"
            )
        x = x if x.stride(1) == 1 else x.contiguous()
        out = torch.empty((pairs, self.out_features), dtype=x.dtype)
        rows_at = groups.rows.data_ptr() if by_token else 0
        self.native.product(x.data_ptr(), out.data_ptr(), rows_at, groups.starts.data_ptr(), x.stride(0))
        return out


def pack_experts(weight: torch.Tensor, bias: torch.Tensor | None) -> PackedExperts | None:
    """The packed product of ``weight[E, out, in]``, which may be a view, and ``bias[E, out]``; None as `pack_linear`.

    Afterwards the caller drops ``weight``.
    """
    experts, out, size = weight.shape
    if weight.dtype is not torch.bfloat16 or size % 2 or weight.numel() == 0:
        return None
    shape = (experts, -(-out // PANEL), size // 2, PANEL)
    panels = weights.empty(4 * math.prod(shape)).view(torch.int32).view(shape)
    for own, values in zip(panels, weight, strict=True):
        own.copy_(in_panels(values))
    bias = None if bias is None else bias.to(torch.bfloat16).contiguous()
    return PackedExperts(panels, bias, size, out)
