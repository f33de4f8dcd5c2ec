"""The experts of an adopted Transformers model, by the engine's grouped products.

Transformers has a registry of forwards for modules that hold the weights of experts, as it has for attention. Routers
are the model's own code, of whatever kind. Ours is taken by a module if it computes the same: a copy in float32 with
random weights and a few experts is compared for each kind of module, and then each module with its own weights.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from octavo.kernels.select import Ops, ops
from octavo.layers.experts import ATTRIBUTE, GroupedProduct, mixture
from octavo.models.hf.probe import TOKENS, same

NAME = "octavo"
"""Our entry in Transformers' registry of forwards of experts."""

FEW = 3  # experts of the copy with random weights
CHOSEN = 2  # experts of a token in comparisons


class NotTaken(Exception):
    """Why a module keeps Transformers' code, as a clause."""


@dataclass(frozen=True)
class _Names:
    """Of a module's parameters."""

    up: str
    down: str
    biases: bool

    def all(self) -> tuple[str, ...]:
        return (self.up, self.down, *((f"{self.up}_bias", f"{self.down}_bias") if self.biases else ()))


class AdoptedExperts:
    """Transformers' forward of one module of experts. It is no part of the module: those are walked and copied."""

    def __init__(self, module: Any, chosen: Ops, dtype: torch.dtype) -> None:
        """Raises `NotTaken` for a module of other parts than the registry has."""
        names = _names(module, dtype)
        turned = module.is_transposed
        self._ops = chosen.experts
        self._count = len(module.get_parameter(names.up))
        self._activation = _activation(module, chosen)
        self._after: Callable[[torch.Tensor], torch.Tensor] | None = (
            module.post_expert_norm if module.has_post_expert_norm else None
        )
        self._up, self._down = (
            GroupedProduct(
                self._ops,
                module.get_parameter(name).data.mT if turned else module.get_parameter(name).data,
                module.get_parameter(f"{name}_bias").data if names.biases else None,
            )
            for name in (names.up, names.down)
        )

    def __call__(self, hidden: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``hidden[T, C]``, ``experts`` and ``weights[T, K]`` to ``[T, C]``."""
        return mixture(
            self._ops, hidden, experts, weights, self._count, self._up, self._activation, self._down, self._after
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return self._up.nbytes + self._down.nbytes

    @property
    def is_packed(self) -> bool:
        """Whether the weights are there a second time, so that the module's own are not needed."""
        return self._up.packed is not None and self._down.packed is not None


def adopt(model: nn.Module, dtype: torch.dtype, device: torch.device) -> str:
    """Gives every module of experts in the loaded ``model`` our forward where it computes the same.

    Returns a line for the log; "" for a model without experts.
    """
    _register()
    done: Counter[str] = Counter()
    proven: dict[tuple[Any, ...], str | None] = {}
    with torch.inference_mode():
        for module in list(model.modules()):
            if not is_registered(module):
                if type(module).__name__.endswith("Experts"):
                    done[f"{type(module).__name__} does not use Transformers' registry"] += 1
                continue
            try:
                _take(module, dtype, device, proven)
                done[""] += 1
            except NotTaken as reason:
                done[str(reason)] += 1
    return _told(done)


def _told(done: Counter[str]) -> str:
    taken = done.pop("", 0)
    parts = [f"{taken} {'layer' if taken == 1 else 'layers'} by octavo's grouped product"] if taken else []
    parts += [f"{count} by Transformers' own code, since {reason}" for reason, count in done.items()]
    return f"experts: {'; '.join(parts)}" if parts else ""


def _forward(module: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> Any:
    """The forward in Transformers' registry."""
    ours: AdoptedExperts | None = getattr(module, ATTRIBUTE, None)
    run = _own(module) if ours is None else ours
    return run(hidden_states, top_k_index, top_k_weights)


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)


def is_registered(module: Any) -> bool:
    """Whether its class runs what the registry has for its config."""
    return hasattr(module, "is_transposed") and hasattr(type(module).forward, "__wrapped__")


def _own(module: Any) -> Callable[..., torch.Tensor]:
    """The forward that is written in the class."""
    found: Callable[..., torch.Tensor] = type(module).forward.__wrapped__.__get__(module)
    return found


def _names(module: Any, dtype: torch.dtype) -> _Names:
    names = _Names("gate_up_proj" if module.has_gate else "up_proj", "down_proj", module.has_bias)
    found = dict(module.named_parameters(recurse=False))
    if found.keys() != set(names.all()):
        raise NotTaken(f"{type(module).__name__} has the parameters {', '.join(sorted(found))}")
    kinds = {parameter.dtype for parameter in found.values()}
    if kinds != {dtype}:
        raise NotTaken(f"its weights are {', '.join(str(kind) for kind in kinds)} in a model of {dtype}")
    if found[names.up].dim() != 3 or len({len(parameter) for parameter in found.values()}) != 1:
        raise NotTaken(f"{type(module).__name__} has not as many weights of each kind as experts")
    return names


def _activation(module: Any, chosen: Ops) -> Callable[[torch.Tensor], torch.Tensor]:
    """Ours where it is the same for numbers small and large, else the module's own."""
    own: Callable[[torch.Tensor], torch.Tensor] = module._apply_gate if module.has_gate else module.act_fn
    device = next(module.parameters()).device
    x = torch.linspace(-40, 40, 6 * 512, device=device)[torch.randperm(6 * 512, generator=_generator()).to(device)]
    x = x.view(6, 512)
    wanted = own(x)
    for candidate in ("silu_and_mul", "gelu_tanh_and_mul"):
        found = getattr(ops(device, torch.float32), candidate)(x)
        if found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-5, atol=1e-5):
            made: Callable[[torch.Tensor], torch.Tensor] = getattr(chosen, candidate)
            return made
    return own


def _take(module: Any, dtype: torch.dtype, device: torch.device, proven: dict[tuple[Any, ...], str | None]) -> None:
    names = _names(module, dtype)
    shapes = tuple(tuple(module.get_parameter(name).shape) for name in names.all())
    key = (type(module), shapes, id(module.config))
    if key not in proven:
        proven[key] = _reason(_small_copy(module, names), device)
    if (reason := proven[key]) is not None:
        raise NotTaken(reason)
    ours = _proven(module, dtype, device)
    if ours.is_packed:
        for name in names.all():
            delattr(module, name)
    setattr(module, ATTRIBUTE, ours)
    module.config._experts_implementation_internal = NAME


def _small_copy(module: Any, names: _Names) -> Any:
    """The module in float32 with random weights, which make its activation bend, and no more experts than `FEW`."""
    made, generator = copy.copy(module), _generator()
    count = len(module.get_parameter(names.up))
    kept = min(count, FEW) if getattr(module, "num_experts", None) == count else count
    made._parameters = {}
    made._modules = {name: copy.deepcopy(child).float() for name, child in module._modules.items()}
    for name in names.all():
        old = module.get_parameter(name)
        inputs = 1 if old.dim() == 2 else old.shape[1 if module.is_transposed else 2]
        values = torch.randn(kept, *old.shape[1:], generator=generator) * (2 * inputs**-0.5)
        made._parameters[name] = nn.Parameter(values.to(old.device), requires_grad=False)
    if kept != count:
        made.num_experts = kept
    return made


def _reason(module: Any, device: torch.device) -> str | None:
    """Why our forward is not that of ``module``, which is in float32; None if it is."""
    try:
        _proven(module, torch.float32, device)
    except NotTaken as reason:
        return str(reason)
    return None


def _proven(module: Any, dtype: torch.dtype, device: torch.device) -> AdoptedExperts:
    """Our forward of ``module``, which gives the same for random inputs; raises `NotTaken`."""
    ours = AdoptedExperts(module, ops(device, dtype), dtype)
    up = module.get_parameter(_names(module, dtype).up)
    count, size = len(up), up.shape[1 if module.is_transposed else 2]
    generator = _generator()
    hidden = (2 * torch.randn(TOKENS, size, generator=generator)).to(device, dtype)
    experts = torch.rand(TOKENS, count, generator=generator).topk(min(CHOSEN, count)).indices.to(device)
    weights = torch.rand(experts.shape, generator=generator).to(device, dtype)
    try:
        wanted = _own(module)(hidden, experts, weights)
    except Exception as error:  # code of any kind, which ours cannot be compared with
        raise NotTaken(f"{type(module).__name__} could not be run alone ({type(error).__name__}: {error})") from error
    if not same(ours(hidden, experts, weights), wanted):
        raise NotTaken(f"{type(module).__name__} computes something else")
    return ours


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
