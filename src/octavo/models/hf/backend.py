"""Any causal language model of Transformers that follows its attention interface, over the engine's pages.

The model's own classes run, unchanged but for their attention: it goes to the engine's operators through Transformers'
registry (`models.hf.attention`), with one batch entry that holds all tokens of a step. What may differ between tokens
only by attention does so there; the rest of the model sees a flat list of tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from octavo.config import LayerSpec, ModelConfig
from octavo.errors import OctavoError, UnsupportedModel
from octavo.hub.checkpoint import Checkpoint
from octavo.hub.quantised.checkpoint import optional_tensors
from octavo.kernels import select
from octavo.layers import context
from octavo.layers.base import Layer
from octavo.log import get_logger
from octavo.models.base import Loaded, OwnCache, SelfLoading, Share, as_tensor
from octavo.models.hf import experts, pieces, trace, weights
from octavo.models.hf.attention import ATTRIBUTE, PagedAttention
from octavo.models.hf.build import build, freeze_rope, may_keep_states, refuse_parts, refuse_states
from octavo.models.hf.generic import Generic
from octavo.models.hf.head import ClassHead, drop_head
from octavo.models.hf.mixers import Mixers
from octavo.models.hf.native import NotNative, Slot
from octavo.models.hf.probe import first_position
from octavo.models.hf.proof import NativeDecoder, Proven, drop_layers, prove
from octavo.models.hf.records import Record, is_native
from octavo.models.hf.shard import refuse_generic, shard
from octavo.models.hf.swaps import swap, swap_decoder
from octavo.models.llama import LlamaForCausalLM
from octavo.parallel.group import current


class TransformersModel(SelfLoading):
    """``config.layers`` become those that the model was seen to have; all have the K/V shape of the largest."""

    def __init__(
        self, config: ModelConfig, max_len: int, model: nn.Module | None = None, *, record: Record | None = None
    ) -> None:
        """``model``: one that is built already, for a class that the config does not lead to. ``record``: where to keep
        that the native model of ``config`` was proven to be the same."""
        super().__init__(config, max_len)
        self._geometry = config
        self._record = record
        self.model: Any = build(config, self.dtype) if model is None else model
        self._dropped = () if config.has_head else (drop_head(self.model),)
        freeze_rope(self.model, max_len)
        self._cuts = shard(self.model, current())
        self._body: nn.Module | None = None
        self._first_position = 0
        self._native: NativeDecoder | None = None
        self._kept = ""  # why there is none
        self._plain_head: nn.Module | None = None
        self.swapped = ""
        """What of the model was replaced by our own layers, for the log."""
        self.experts = ""
        """What runs its experts, if it has any, for the log."""
        self._generic: Generic | None = None
        self._mixers: Mixers | None = None
        with self._or_generic():
            refuse_parts(self.model)
            self._adopt_early()

    @contextmanager
    def _or_generic(self) -> Iterator[None]:
        """What finds inside that the model cannot run over pages makes it run as it is."""
        try:
            yield
        except trace.NotPaged as reason:
            if not self.config.has_head:
                cause = f"{type(self.model).__name__} cannot embed: {reason}."
                raise UnsupportedModel(cause, "Choose another embedding model.", id="HF031") from None
            refuse_generic(self.model, str(reason), current())
            self._generic, self._mixers = Generic(self.model, str(reason)), None
            self.config = dataclasses.replace(self.config, layers=())

    def _adopt_early(self) -> None:
        """Traces a copy without memory, so that how the model runs is known before its weights are read."""
        try:
            meta = copy.deepcopy(self.model).to("meta")
            self._adopt(meta, torch.device("meta"))
        except (OctavoError, trace.NotPaged):
            raise
        except Exception as error:  # code that looks into tensors cannot run without memory
            get_logger().debug("not traced without memory, so after loading: %s: %s", type(error).__name__, error)

    def load_weights(self, checkpoint: Checkpoint, device: torch.device, progress: Share) -> Loaded:
        tensors = checkpoint.tensors()
        optional = optional_tensors(checkpoint)
        groups, ignored = weights.plan(self.model, tensors, self._cuts, optional, self._dropped)
        names = [name for group in groups for name, _ in group.sources]
        total, done = sum(tensors[name].nbytes for name in names), 0

        def loaded(group: weights.Group) -> None:
            nonlocal done
            done += sum(tensors[name].nbytes for name, _ in group.sources)
            progress(done / total)
            checkpoint.forget()

        place = self._placing(device, groups)
        weights.fill(self.model, groups, lambda name, part: as_tensor(checkpoint.read(name, part)), place, loaded)
        self._finish_loading(device)
        return Loaded(len(names), total, tuple(ignored))

    def dummy_weights(self, seed: int, device: torch.device) -> Loaded:
        generator, nbytes, count, place = torch.Generator(device), 0, 0, self._placing(device, [])
        for name, parameter in self.model.named_parameters():
            if name in self.model.all_tied_weights_keys:
                continue  # gets the weight that it is tied to
            own = self._cuts.get(name)
            shape = tuple(parameter.shape) if own is None else own.whole(tuple(parameter.shape))
            memory = torch.empty(shape, dtype=parameter.dtype, device=device)
            generator.manual_seed(seed ^ zlib.crc32(name.encode()))
            if "norm" in name and name.endswith("weight"):
                memory.fill_(1.0)
            else:
                memory.normal_(0.0, 0.02, generator=generator)
            place(name, memory if own is None else own.of(memory))
            nbytes, count = nbytes + memory.nbytes, count + 1
        self._finish_loading(device)
        return Loaded(count, nbytes)

    def _placing(self, device: torch.device, groups: list[weights.Group]) -> weights.Place:
        """Where parameters go: into a native decoder, if one can be proven to compute the same, or into the model.

        ``groups`` are what fills the model.
        """
        slots: Mapping[str, Slot] = {}
        with self._or_generic():
            self._prove_mixers(device)
        if self._body is not None and self._generic is None:
            try:
                proven = prove(self.model, self._body_name, self.config, self._geometry, self.max_len, device)
            except NotNative as reason:
                self._kept = f"; its decoder stays: {reason}"
            else:
                self._native, slots = proven.decoder, proven.slots
                self._forget_record_unless(proven, groups)
                filling = proven.filling(device, select.ops(device, self.dtype))

        def place(name: str, tensor: torch.Tensor) -> None:
            if name in slots:
                weights.check_shape(name, tensor, slots[name].shape)
                filling.place(name, tensor)
            else:
                weights.assign(self.model, name, tensor, device)

        return place

    def _prove_mixers(self, device: torch.device) -> None:
        if self._mixers is not None and self._body is not None:
            pieces.prove(self._mixers, self._body, self.config, self._takes_positions, device)

    def _forget_record_unless(self, proven: Proven, groups: list[weights.Group]) -> None:
        """Nothing is kept of a decoder that is not that of the native model."""
        if self._record is not None:
            native = LlamaForCausalLM(self._geometry, self.max_len)
            self._record = self._record if is_native(self.model, proven, groups, native) else None

    def _finish_loading(self, device: torch.device) -> None:
        if self._native is not None and self._body is not None:
            drop_layers(self._body)
        weights.tie(self.model)
        self._finish(device)
        if self._record is not None and self._native is not None and self._plain_head is not None:
            self._record.keep()

    @property
    def fused(self) -> bool:
        """Whether the tokens of all sequences of a step are computed together."""
        return self._generic is None

    @property
    def own_cache(self) -> OwnCache | None:
        if self._mixers is not None:
            return OwnCache(per_row=self._mixers.row_bytes, per_token=0)
        return None if self._generic is None else self._generic.own_cache

    def release(self, row: int) -> None:
        keeps = self._generic or self._mixers
        if keeps is not None:
            keeps.release(row)

    def forward(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self._generic is not None:
            return context.current().of_wanted(self._generic.forward(token_ids))
        positions = positions + self._first_position if self._first_position else positions
        if self._native is not None:
            found: torch.Tensor = self._native(token_ids, positions)
            return found
        if self._mixers is not None:
            self._mixers.begin(context.current().attention)
        known = {"position_ids": positions.long().unsqueeze(0)} if self._takes_positions else {}
        output = self.body(input_ids=token_ids.long().unsqueeze(0), use_cache=False, **known)
        return context.current().of_wanted(output[0][0])

    def own_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._generic is not None:
            return self._generic.logits(hidden)
        found: torch.Tensor = (self._plain_head or self._head)(hidden)
        return found

    @torch.inference_mode()
    def _find_plain_head(self, device: torch.device) -> nn.Module | None:
        """The head's module if nothing follows it: the same to the last bit for values that a soft cap would bend."""
        hidden = 30 * torch.randn(3, self.config.hidden_size, generator=torch.Generator().manual_seed(0))
        hidden = hidden.to(device, self.dtype)
        head: nn.Module = self.model.get_output_embeddings()
        return head if torch.equal(head(hidden), self._head(hidden)) else None

    def _adopt(self, model: Any, device: torch.device) -> None:
        """Traces ``model``, this one or a copy of it, and puts our attention into this one."""
        seen = trace.record(model, device, self.max_len, states=may_keep_states(model))
        refuse_states(model, seen)
        if not seen.takes_positions and (seen.attention or not seen.mixers):
            raise trace.NotPaged(f"{type(model).__name__} takes no position_ids")
        names = {module: name for name, module in model.named_modules()}
        layers = [shape for _, shape in seen.attention]
        expected = self.model.config.get_text_config().num_hidden_layers
        if len(layers) != expected and not seen.mixers:
            raise trace.NotPaged(
                f"it has {expected} layers, but calls attention through Transformers' interface {len(layers)} times"
            )
        for index, (module, shape) in enumerate(seen.attention):
            setattr(self.model.get_submodule(names[module]), ATTRIBUTE, PagedAttention(index, shape))
        kv_heads, head_dim = max((s.kv_heads for s in layers), default=1), max((s.head_dim for s in layers), default=1)
        specs = tuple(LayerSpec(s.heads, kv_heads, head_dim, window=s.window) for s in layers)
        self.config = dataclasses.replace(self.config, layers=specs)
        self._body_name = names[seen.body]
        self._body = self.model.get_submodule(self._body_name)
        self._takes_positions, self._mixers = seen.takes_positions, seen.mixers

    def _finish(self, device: torch.device) -> None:
        """After the weights: buffers to the device, operators to the layers, the head apart from the decoder."""
        self.model.to(device)  # parameters are there; this moves the buffers
        left = [name for name, tensor in self.model.named_parameters() if tensor.is_meta]
        left += [name for name, tensor in self.model.named_buffers() if tensor.is_meta]
        if left:
            raise RuntimeError(f"without a value after loading: {', '.join(left)}")
        self._adopt_experts(device)
        if self._generic is None:
            with self._or_generic():
                self._finish_adopted(device)
        if self._generic is not None:
            self.capturable = False
            self.swapped = self._generic.prove(self.config.vocab_size, self.max_len, self.dtype, device)
            get_logger().warning("transformers: %s", self.swapped)

    def _adopt_experts(self, device: torch.device) -> None:
        self.experts = experts.adopt(self.model, self.dtype, device)
        if self.experts:
            get_logger().info("transformers: %s", self.experts)

    def _adopt_late(self, device: torch.device) -> None:
        """Traces the loaded model itself."""
        self._kept = f"; its decoder stays: {type(self.model).__name__} does not run without memory"
        try:
            self._adopt(self.model, device)
        except (OctavoError, trace.NotPaged):
            raise
        except Exception as error:
            raise trace.NotPaged(f"it could not be traced ({type(error).__name__}: {error})") from error

    def _finish_adopted(self, device: torch.device) -> None:
        if self._body is None:
            self._adopt_late(device)
            self._prove_mixers(device)
        ops = select.ops(device, self.dtype)
        for module in self.model.modules():
            if isinstance(module, Layer):
                module.finish(ops)
        body = self.model.get_submodule(self._body_name)
        if self._native is None and self._takes_positions:  # those of a native one rotate keys and nothing else
            first = first_position(body, self.config, self.dtype, device)
            if first is None:
                raise trace.NotPaged(f"{type(body).__name__} numbers positions in its own way, not 0, 1, 2 …")
            self._first_position = first
        self.capturable = self._native is not None  # of code that is not ours nobody knows
        self.swapped = self._replace(body)
        if self._mixers is not None:
            self._mixers.install(body)
            self.swapped = f"{self._mixers}; {self.swapped}"
        get_logger().info("transformers: %s", self.swapped)
        self.body = body
        self._head = ClassHead(self.model, self._body_name, device)
        has_native_head = self._native is not None and self.config.has_head
        self._plain_head = self._find_plain_head(device) if has_native_head else None

    def _replace(self, body: nn.Module) -> str:
        """Puts our own layers where they compute the same; returns a line for the log."""
        if self._native is not None:
            return swap_decoder(self.model, body, self._native)
        return swap(self.model, body, self.config, self.max_len) + self._kept
