"""A Transformers model that is loaded already, served with its own parameters.

The engine runs a copy of the model's structure whose parameters and buffers are the model's: what is changed in place,
by an optimiser for one, is what the next forward uses. The model itself is left as it was, its attention, its training
mode and its hooks included.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from octavo.config import ModelConfig
from octavo.errors import ConfigError, UnsupportedModel
from octavo.log import get_logger
from octavo.models.base import Model
from octavo.models.hf import attention
from octavo.models.hf.backend import TransformersModel
from octavo.models.hf.swaps import swap_norms


class SharingModel(TransformersModel):
    """``live`` is a ``transformers.PreTrainedModel``. Raises `UnsupportedModel` as the Transformers backend does."""

    def __init__(self, config: ModelConfig, max_len: int, live: Any) -> None:
        _check(live)
        super().__init__(config, max_len, _share(live))

    def _adopt_early(self) -> None:
        """Nothing: a copy without memory would copy the weights first. The trace runs on the model itself."""

    def _adopt_experts(self, device: torch.device) -> None:
        """Nothing: their weights would be packed, which copies them."""

    def _replace(self, body: nn.Module) -> str:
        return swap_norms(body, self.config, self.max_len)


def share(live: Any, config: ModelConfig, max_len: int, device: torch.device) -> Model:
    """A model that is ready to run, with the parameters of ``live``, which is on ``device``."""
    found = next(live.parameters()).device
    if found != device:
        raise ConfigError(f"the model is on {found}, but the engine runs on {device}.", f"Move the model to {device}.")
    made = SharingModel(config, max_len, live)
    made._finish(device)
    return made


def _check(live: Any) -> None:
    kind = type(live).__name__
    if getattr(live, "quantization_method", None) is not None:
        raise UnsupportedModel(
            f"The weights of this {kind} are quantised ({live.quantization_method}); plain floats can be shared.",
            "Load the model without quantisation.",
            id="HF050",
        )
    split = [name for name, parameter in live.named_parameters() if type(parameter.data) is not torch.Tensor]
    if split:
        raise UnsupportedModel(
            f"{split[0]} of this {kind} is a {type(live.get_parameter(split[0]).data).__name__}, of which this process"
            " may hold a part only.",
            "Gather the weights in a model of this process first.",
            id="HF031",
        )


def _share(live: Any) -> nn.Module:
    """The structure of ``live`` copied, around the same parameters and buffers, with the engine's attention."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*live.parameters(), *live.buffers())}
    for module in live.modules():  # hooks may refer to anything, a trainer for one; what they do is not the model's
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = OrderedDict()
    shared = copy.deepcopy(live, memo).eval()
    attention.register()
    if shared._can_set_attn_implementation():
        shared.set_attn_implementation(attention.NAME)
    get_logger().info("transformers: parameters are shared with the %s given", type(live).__name__)
    made: nn.Module = shared
    return made
