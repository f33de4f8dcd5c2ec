"""Any causal language model of Transformers that follows its attention interface, over the engine's pages.

The model's own classes run, unchanged but for their attention: it goes to the engine's operators through Transformers'
registry (`models.hf.attention`), with one batch entry that holds all tokens of a step. What may differ between tokens
only by attention does so there; the rest of the model sees a flat list of tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import zlib
from typing import Any

import torch
from torch import nn

from octavo.config import LayerSpec, ModelConfig
from octavo.errors import OctavoError, UnsupportedModel
from octavo.hub.checkpoint import Checkpoint
from octavo.kernels import select
from octavo.layers.base import Layer
from octavo.log import get_logger
from octavo.models.base import Loaded, SelfLoading, Share, as_tensor
from octavo.models.hf import trace, weights
from octavo.models.hf.attention import ATTRIBUTE, PagedAttention
from octavo.models.hf.build import build, freeze_rope
from octavo.models.hf.native import NativeDecoder
from octavo.models.hf.probe import counts_from_zero
from octavo.models.hf.swaps import swap


class TransformersModel(SelfLoading):
    """``config.layers`` become those that the model was seen to have; all have the K/V shape of the largest."""

    def __init__(self, config: ModelConfig, max_len: int, model: nn.Module | None = None) -> None:
        """``model``: one that is built already, for a class that the config does not lead to."""
        super().__init__(config, max_len)
        self._geometry = config
        self.model: Any = build(config, self.dtype) if model is None else model
        freeze_rope(self.model, max_len)
        self._body: nn.Module | None = None
        self._native: NativeDecoder | None = None
        self._plain_head: nn.Module | None = None
        self.swapped = ""
        """What of the model was replaced by our own layers, for the log."""
        self._adopt_early()

    def _adopt_early(self) -> None:
        """Traces a copy without memory, so that a model that cannot run is refused before its weights are read."""
        try:
            meta = copy.deepcopy(self.model).to("meta")
            self._adopt(meta, torch.device("meta"))
        except OctavoError:
            raise
        except Exception as error:  # code that looks into tensors cannot run without memory
            get_logger().debug("not traced without memory, so after loading: %s: %s", type(error).__name__, error)

    def load_weights(self, checkpoint: Checkpoint, device: torch.device, progress: Share) -> Loaded:
        tensors = checkpoint.tensors()
        groups, ignored = weights.plan(self.model, tensors)
        names = [name for group in groups for name, _ in group.sources]
        total, done = sum(tensors[name].nbytes for name in names), 0

        def loaded(group: weights.Group) -> None:
            nonlocal done
            done += sum(tensors[name].nbytes for name, _ in group.sources)
            progress(done / total)

        weights.fill(self.model, groups, lambda name: as_tensor(checkpoint.read(name)), device, loaded)
        self._finish(device)
        return Loaded(len(names), total, tuple(ignored))

    def dummy_weights(self, seed: int, device: torch.device) -> Loaded:
        generator, nbytes, count = torch.Generator(device), 0, 0
        for name, parameter in self.model.named_parameters():
            memory = torch.empty_like(parameter, device=device)
            generator.manual_seed(seed ^ zlib.crc32(name.encode()))
            if "norm" in name and name.endswith("weight"):
                memory.fill_(1.0)
            else:
                memory.normal_(0.0, 0.02, generator=generator)
            weights.assign(self.model, name, memory, device)
            nbytes, count = nbytes + memory.nbytes, count + 1
        self.model.tie_weights(recompute_mapping=False)
        self._finish(device)
        return Loaded(count, nbytes)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self._native is not None:
            found: torch.Tensor = self._native(token_ids, positions)
            return found
        output = self.body(
            input_ids=token_ids.long().unsqueeze(0), position_ids=positions.long().unsqueeze(0), use_cache=False
        )
        hidden: torch.Tensor = output[0][0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._plain_head is not None:
            found: torch.Tensor = self._plain_head(hidden)
            return found
        return self._logits_of_class(hidden)

    def _logits_of_class(self, hidden: torch.Tensor) -> torch.Tensor:
        """The class's own forward around the stand-in for its decoder: head, scale and cap as it has them."""
        self._head.given = hidden.unsqueeze(0)
        logits: torch.Tensor = self.model(input_ids=self._no_ids, use_cache=False).logits[0]
        self._head.given = None
        return logits

    @torch.inference_mode()
    def _find_plain_head(self, device: torch.device) -> nn.Module | None:
        """The head's module if nothing follows it: the same to the last bit for values that a soft cap would bend."""
        hidden = 30 * torch.randn(3, self.config.hidden_size, generator=torch.Generator().manual_seed(0))
        hidden = hidden.to(device, self.dtype)
        head: nn.Module = self.model.get_output_embeddings()
        return head if torch.equal(head(hidden), self._logits_of_class(hidden)) else None

    def _adopt(self, model: Any, device: torch.device) -> None:
        """Traces ``model``, this one or a copy of it, and puts our attention into this one."""
        recorder, body = trace.record(model, device, self.max_len)
        names = {module: name for name, module in model.named_modules()}
        layers = [shape for _, shape in recorder.calls]
        expected = self.model.config.get_text_config().num_hidden_layers
        if len(layers) != expected:
            raise UnsupportedModel(
                f"{type(self.model).__name__} has {expected} layers, but attention through the interface was called"
                f" {len(layers)} times.",
                "Choose a model of another architecture.",
                id="HF031",
            )
        for index, (module, shape) in enumerate(recorder.calls):
            setattr(self.model.get_submodule(names[module]), ATTRIBUTE, PagedAttention(index, shape))
        kv_heads, head_dim = max(s.kv_heads for s in layers), max(s.head_dim for s in layers)
        specs = tuple(LayerSpec(s.heads, kv_heads, head_dim, window=s.window) for s in layers)
        self.config = dataclasses.replace(self.config, layers=specs)
        self._body_name = names[body]
        self._body = self.model.get_submodule(self._body_name)

    def _finish(self, device: torch.device) -> None:
        """After the weights: buffers to the device, operators to the layers, the head apart from the decoder."""
        self.model.to(device)  # parameters are there; this moves the buffers
        left = [name for name, tensor in self.model.named_parameters() if tensor.is_meta]
        left += [name for name, tensor in self.model.named_buffers() if tensor.is_meta]
        if left:
            raise RuntimeError(f"without a value after loading: {', '.join(left)}")
        if self._body is None:
            self._adopt(self.model, device)
        ops = select.ops(device, self.dtype)
        for module in self.model.modules():
            if isinstance(module, Layer):
                module.finish(ops)
        body = self.model.get_submodule(self._body_name)
        if not counts_from_zero(body, self.config, self.dtype, device):
            raise trace.refusal(f"{type(body).__name__} numbers positions in its own way, not 0, 1, 2 …")
        self._native = self._replace(body)
        self.capturable = self._native is not None  # of code that is not ours nobody knows
        get_logger().info("transformers: %s", self.swapped)
        self.body = body
        parent, _, name = self._body_name.rpartition(".")
        self._head = _Given(self.body)
        setattr(self.model.get_submodule(parent), name, self._head)
        self._no_ids = torch.zeros(1, 1, dtype=torch.long, device=device)
        self._plain_head = self._find_plain_head(device) if self._native is not None else None

    def _replace(self, body: nn.Module) -> NativeDecoder | None:
        """Puts our own layers where they compute the same; the decoder that they make up, if they are all of it."""
        native, self.swapped = swap(self.model, body, self.config, self._geometry, self.max_len)
        return native


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
