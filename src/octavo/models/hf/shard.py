"""A Transformers model divided among ranks, by the plan that its class or config has.

A plan maps names of modules and parameters to styles, which say how a weight is cut and what is done around the module
that has it. The styles' meaning is that of ``transformers.distributed.tensor_parallel``, for inference: activations
between modules are whole on each rank, so what is about gradients or about sequences in parts changes nothing.
The embedding and the head are always divided by the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from octavo.errors import ConfigError, UnsupportedModel
from octavo.layers.embedding import equal_parts, gather_vocab
from octavo.models.hf.plans import derived
from octavo.parallel.group import Group
from octavo.parallel.shards import MOST_RANKS, Cut, cut

# Older and newer names of the same, and what has no meaning in inference.
_SAME = {
    "colwise_rep": "colwise_gather_output",
    "local_colwise": "colwise",
    "rowwise_rep": "rowwise_split_input",
    "local_rowwise": "rowwise",
    "local_packed_rowwise": "packed_rowwise",
    "gather": "all_reduce",
    "moe_tp_experts": "all_reduce",
}
_WHOLE = frozenset(
    ("replicate", "replicated_with_grad_allreduce", "sequence_parallel", "local", "local_params", "mla_kv_a_proj")
)


@dataclass(frozen=True, slots=True)
class ParameterCut:
    """Along ``own.dim`` a parameter is ``blocks`` equal ones, such as gate and up; of each this rank has ``own``."""

    own: Cut
    blocks: int = 1

    def slices(self) -> list[tuple[slice, ...]]:
        """For indexing the whole tensor; the results belong one after the other, along ``own.dim``."""
        every = (slice(None),) * self.own.dim
        starts = (block * self.own.whole + self.own.first for block in range(self.blocks))
        return [(*every, slice(start, start + self.own.size)) for start in starts]

    def whole(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the whole parameter, of which ``shape`` is this rank's."""
        return (*shape[: self.own.dim], self.own.whole * self.blocks, *shape[self.own.dim + 1 :])

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of the whole ``tensor``."""
        return torch.cat([tensor[part] for part in self.slices()], dim=self.own.dim)


Cuts = Mapping[str, ParameterCut]
"""By the name of a parameter; one that is not there is whole on each rank."""


class RowwiseLinear(nn.Linear):
    """Has a part of the inputs' columns; the results are summed, then the bias is added."""

    group: Group
    own: slice | None  # what to take of an input that is whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x if self.own is None else x[..., self.own]
        out = self.group.all_reduce(F.linear(x, self.weight))
        return out if self.bias is None else out + self.bias


class GatheredLinear(nn.Linear):
    """Has a part of the outputs, which are then gathered."""

    group: Group
    whole: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return gather_vocab(equal_parts(super().forward(x), self.whole, self.group), self.whole, self.group)


class VocabHooks:
    """Around an embedding that has the rows ``own`` of the vocabulary."""

    def __init__(self, own: Cut, group: Group) -> None:
        self.own, self.group = own, group
        self._foreign = torch.empty(0)

    def before(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        local = args[0] - self.own.first
        self._foreign = (local < 0) | (local >= self.own.size)
        return local.clamp(0, self.own.size - 1), *args[1:]

    def after(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return self.group.all_reduce(output.masked_fill(self._foreign.unsqueeze(-1), 0))


@dataclass(frozen=True)
class Summed:
    """After a module whose parameters are in parts, so that each rank has a summand of its output."""

    group: Group

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return self.group.all_reduce(output)


@dataclass(frozen=True)
class Divided:
    """Before a module that is whole inside one whose output is summed."""

    group: Group

    def __call__(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return args[0] / self.group.size, *args[1:]


@dataclass(frozen=True)
class SplitEmbedding:
    """After an embedding that has some columns of each row."""

    group: Group

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return self.group.all_gather(output)


class _Sharder:
    """Applies styles to one model, whose parameters have no memory yet."""

    def __init__(self, model: Any, group: Group) -> None:
        self.model, self.group = model, group
        self.cuts: dict[str, ParameterCut] = {}
        self.uneven: list[tuple[str, int]] = []  # what does not divide
        self.divides_heads = False
        text = model.config.get_text_config()
        self.heads = int(getattr(text, "num_attention_heads", 1))
        self._kv_heads = int(getattr(text, "num_key_value_heads", None) or self.heads)

    def apply(self, name: str, style: str) -> None:
        """``style`` on the module or parameter ``name``."""
        style = _SAME.get(style, style)
        if style in _WHOLE:
            return
        module = dict(self.model.named_modules()).get(name)
        if module is None:
            self._parameter(name, style)
        elif style == "all_reduce":
            module.register_forward_hook(Summed(self.group))
        elif style == "moe_identity_expert":
            module.register_forward_pre_hook(Divided(self.group))
        elif style in ("embedding_rowwise", "embedding_colwise") and isinstance(module, nn.Embedding):
            self._embedding(name, module, style)
        elif style in _LINEAR and type(module) is nn.Linear:
            self._linear(name, module, style)
        else:
            raise _refusal(self.model, f"its plan has the style {style!r} for {name}, a {type(module).__name__}")

    def _parameter(self, name: str, style: str) -> None:
        parameter = self.model.get_parameter(name)
        if style == "rowwise" and parameter.dim() == 1:  # a bias, which is added to a summand: the first rank's alone
            raise _refusal(self.model, f"its plan divides the inputs of {name}, which has none")
        dim = -1 if style.endswith("rowwise") or parameter.dim() == 1 else parameter.dim() - 2
        if style not in ("colwise", "rowwise", "packed_colwise", "packed_rowwise"):
            raise _refusal(self.model, f"its plan has the style {style!r} for the parameter {name}")
        self._cut(name, dim % parameter.dim(), blocks=2 if style.startswith("packed") else 1)

    def _linear(self, name: str, module: nn.Linear, style: str) -> None:
        whole = module.out_features
        if style.startswith("rowwise"):
            own = self._cut(f"{name}.weight", 1, ragged=style == "rowwise_split_input").own
            module.__class__ = RowwiseLinear
            made: Any = module
            made.group, made.in_features = self.group, own.size
            made.own = own.slices()[1] if style == "rowwise_split_input" else None
            return
        blocks = 2 if style == "packed_colwise" else 1
        gathers = style == "colwise_gather_output"
        self.divides_heads |= style == "colwise" and "att" in name
        for kind, _ in list(module.named_parameters(recurse=False)):
            units = self._units(name) if not gathers else None
            self._cut(f"{name}.{kind}", 0, blocks=blocks, units=units, ragged=gathers)
        module.out_features = module.weight.shape[0]
        if gathers:
            module.__class__ = GatheredLinear
            made = module
            made.group, made.whole = self.group, whole

    def _units(self, name: str) -> int | None:
        """Heads of a projection of K or V, which may be fewer than ranks."""
        return self._kv_heads if name.endswith(("k_proj", "v_proj")) else None

    def _embedding(self, name: str, module: nn.Embedding, style: str) -> None:
        own = self._cut(f"{name}.weight", 0 if style == "embedding_rowwise" else 1, ragged=style != "embedding_colwise")
        if style == "embedding_colwise":
            module.register_forward_hook(SplitEmbedding(self.group))
            return
        module.num_embeddings, module.padding_idx = own.own.size, None
        hooks = VocabHooks(own.own, self.group)
        module.register_forward_pre_hook(hooks.before)
        module.register_forward_hook(hooks.after)

    def _cut(self, name: str, dim: int, *, blocks: int = 1, units: int | None = None, ragged: bool = False) -> Any:
        """Takes this rank's part of a parameter; ``ragged``: the last rank's may be shorter."""
        if name in self.cuts:
            return self.cuts[name]
        path, _, kind = name.rpartition(".")
        owner = self.model.get_submodule(path)
        parameter = owner.get_parameter(kind)
        whole, ranks = parameter.shape[dim] // blocks, self.group.size
        count = whole if units is None else units
        if not ragged and count % ranks and (units is None or ranks % units):
            self.uneven.append((name, count))
        found = ParameterCut(cut(dim, whole, self.group.rank, ranks, units), blocks)
        shape = list(parameter.shape)
        shape[dim] = found.own.size * blocks
        memory = torch.empty(shape, dtype=parameter.dtype, device="meta")
        self._replace(parameter, name, nn.Parameter(memory, requires_grad=False), found)
        return found

    def _replace(self, old: nn.Parameter, name: str, new: nn.Parameter, found: ParameterCut) -> None:
        """Wherever ``old`` is: a head that shares its weight with the embedding is cut with it."""
        for path, module in self.model.named_modules():
            for kind, parameter in list(module._parameters.items()):
                if parameter is old:
                    module._parameters[kind] = new
                    self.cuts[f"{path}.{kind}" if path else kind] = found


_LINEAR = frozenset(("colwise", "colwise_gather_output", "packed_colwise", "rowwise", "rowwise_split_input"))


def shard(model: Any, group: Group) -> Cuts:
    """Divides ``model``, whose parameters are on the meta device; returns what this rank has of each parameter.

    Raises `ConfigError` for a number of ranks that does not fit the sizes, `UnsupportedModel` HF033 for a model that
    has no plan and whose parts are not unmistakable.
    """
    if group.size == 1:
        return {}
    sharder = _Sharder(model, group)
    for name, style in _named(model, _plan(model)):
        sharder.apply(name, style)
    _refuse_uneven(group.size, sharder)
    return sharder.cuts


def refuse_generic(model: Any, reason: str, group: Group) -> None:
    """Raises for a model that cannot run over pages, for ``reason``, if there are several ranks."""
    if group.size > 1:
        raise _refusal(model, reason)


def _plan(model: Any) -> dict[str, str]:
    """The model's own plan or a derived one, with embedding and head."""
    plan = {name: style for name, style in (model._tp_plan or {}).items() if style}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {module: _generic(name) for name, module in model.named_modules()}
    ends = {names[module] for module in (head, embedding) if module is not None}
    if not any(_generic(name) not in ends for name in plan):
        inner = derived(model)
        if inner is None:
            raise _refusal(
                model, "Transformers has no plan for it, and what its modules do does not show in their names"
            )
        plan |= {_generic(name): style for name, style in inner.items()}
    if type(head) is nn.Linear and isinstance(embedding, nn.Embedding):
        plan[names[head]] = "colwise_gather_output"
        plan[names[embedding]] = "embedding_rowwise"
    elif head is not None and head.weight is embedding.weight:
        plan = {name: style for name, style in plan.items() if _generic(name) not in ends}
    return plan


def _generic(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _named(model: Any, plan: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The plan's styles by the names of the modules and parameters that there are."""
    names = [name for name, _ in model.named_modules() if name]
    names += [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return iter([(name, plan[_generic(name)]) for name in names if _generic(name) in plan])


def _refuse_uneven(ranks: int, sharder: _Sharder) -> None:
    if sharder.divides_heads and sharder.heads % ranks:
        sharder.uneven.append(("the attention heads", sharder.heads))
    if not sharder.uneven:
        return
    sizes = {size for _, size in sharder.uneven} | {sharder.heads}
    fitting = [str(n) for n in range(1, MOST_RANKS) if not any(size % n for size in sizes)]
    name, size = sharder.uneven[0]
    raise ConfigError(
        f"tensor_parallel_size is {ranks}, which does not divide {name} ({size}).",
        f"Give one of {', '.join(fitting)}.",
    )


def _refusal(model: Any, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{type(model).__name__} cannot be divided among devices: {reason}.",
        "Run it on one device, or choose a model of another architecture.",
        id="HF033",
    )
