"""A checkpoint into an adopted model: names and conversions are Transformers' own, completeness is checked here.

Transformers says per model how checkpoint names map to parameters, and which tensors are put together (the experts of
a layer, for one) or taken apart. All names are mapped before the first byte of a weight is read.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from octavo.errors import ModelError
from octavo.hub.safetensors_file import TensorInfo
from octavo.models.hf.shard import Cuts, ParameterCut

Read = Callable[[str, tuple[slice, ...] | None], torch.Tensor]
"""From a checkpoint name, and slices of it, to a CPU tensor that is only to be read."""

LISTED = 10  # names that a message lists
READERS = 4
FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})


@dataclass
class Group:
    """Checkpoint tensors that together become ``targets``; ``transform`` None: one tensor, as it is."""

    targets: list[str]
    sources: list[tuple[str, str]] = field(default_factory=list)  # (checkpoint name, pattern it matched)
    transform: Any = None
    source_cut: ParameterCut | None = None  # what this rank reads of each source …
    target_cuts: dict[str, ParameterCut] = field(default_factory=dict)  # … or keeps of what is made of whole ones


def plan(
    model: Any,
    tensors: Mapping[str, TensorInfo],
    cuts: Cuts,
    optional: Collection[str] = (),
    dropped: Collection[str] = (),
) -> tuple[list[Group], list[str]]:
    """The groups that fill ``model``, and the checkpoint tensors that it ignores. ``cuts`` is what `shard` returned.

    ``optional`` are tensors that the model may have no place for, ``dropped`` modules that it would have.

    Raises `ModelError`: HF042 for tensors that have no place, HF043 for parameters without tensors, HF044 for shapes
    that differ, HF050 for types that are not plain floats.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    wanted = model.state_dict()
    prefix = model.base_model_prefix
    groups: dict[str, Group] = {}
    spare, needless = [], set(optional)
    for name in sorted(tensors, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if target not in wanted:
            spare.append(name)
            needless |= {name} if target.rpartition(".")[0] in dropped else set()
        elif pattern is None:
            groups.setdefault(target, Group([target])).sources.append((name, name))
        else:
            converter = by_pattern[pattern]
            group = groups.setdefault(target, Group(_targets(target, converter), [], copy.deepcopy(converter)))
            group.sources.append((name, pattern))
    ignored = _check_names(model, wanted, groups, spare, needless)
    _check_plain(wanted, groups, tensors, cuts)
    for group in groups.values():
        _cut(group, tensors, cuts)
    return list(groups.values()), ignored


def _targets(first: str, converter: Any) -> list[str]:
    patterns = converter.target_patterns
    return [first.replace(patterns[0], pattern) for pattern in patterns]


def _check_names(
    model: Any, wanted: Mapping[str, Any], groups: Mapping[str, Group], spare: list[str], optional: Collection[str]
) -> list[str]:
    filled = {target for group in groups.values() for target in group.targets}
    missing = [name for name in wanted if name not in filled and not _optional(model, name, filled)]
    skipped = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.(inv_freq|cos_cached|sin_cached)"]
    needless = {name for name in spare if name in optional or any(re.search(pattern, name) for pattern in skipped)}
    unexpected = [name for name in spare if name not in needless]
    kind = type(model).__name__
    if missing:
        raise ModelError(
            f"The checkpoint lacks {len(missing)} of the {len(wanted)} tensors of {kind}: {_listed(missing, spare)}.",
            "Check that the weights belong to this config.json and that no shard is missing.",
            id="HF043",
        )
    if unexpected:
        raise ModelError(
            f"The checkpoint has {len(unexpected)} tensors that {kind} has no place for:"
            f" {_listed(unexpected, sorted(wanted))}.",
            "Check that config.json names the architecture, biases and layers that these weights have.",
            id="HF042",
        )
    return sorted(set(spare) - set(unexpected))


def _optional(model: Any, name: str, filled: set[str]) -> bool:
    """Whether ``name`` gets its value from a weight it is tied to, or may keep the one it was built with."""
    ties: Mapping[str, str] = model.all_tied_weights_keys
    partners = {ties.get(name), *(target for target, source in ties.items() if source in (name, ties.get(name)))}
    is_buffer = name in dict(model.named_buffers())
    ignorable = any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())
    return bool(partners & filled) or (is_buffer and ignorable)


def _check_plain(
    wanted: Mapping[str, Any], groups: Mapping[str, Group], tensors: Mapping[str, TensorInfo], cuts: Cuts
) -> None:
    wrong = []
    for group in groups.values():
        for name, _ in group.sources:
            if tensors[name].dtype not in FLOATS and wanted[group.targets[0]].is_floating_point():
                raise ModelError(
                    f"Tensor {name} is {tensors[name].dtype}; weights of {', '.join(sorted(FLOATS))} can be loaded.",
                    "If it is quantised, config.json lacks its quantization_config.",
                    id="HF050",
                )
        name, target = group.sources[0][0], group.targets[0]
        shape = tuple(wanted[target].shape)
        shape = cuts[target].whole(shape) if target in cuts else shape
        if group.transform is None and tuple(tensors[name].shape) != shape:
            wrong.append(_shapes(name, tensors[name].shape, shape))
    _refuse_shapes(wrong)


def _shapes(name: str, found: tuple[int, ...], needed: tuple[int, ...]) -> str:
    return f"{name} is {list(found)} where the model needs {list(needed)}"


def _refuse_shapes(wrong: list[str]) -> None:
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors have another shape than config.json implies: {'; '.join(wrong[:LISTED])}.",
            "Check vocab_size, the sizes and the head counts in config.json against the weights.",
            id="HF044",
        )


def _listed(names: list[str], candidates: list[str]) -> str:
    shown = []
    for name in names[:LISTED]:
        near = difflib.get_close_matches(name, candidates, n=1)
        shown.append(f"{name} (nearest: {near[0]})" if near else name)
    return ", ".join(shown) + (", …" if len(names) > LISTED else "")


_MERGING = frozenset(("MergeModulelist", "Concatenate"))
"""Conversions that put tensors of experts side by side, so that their parts can be cut before."""


def _cut(group: Group, tensors: Mapping[str, TensorInfo], cuts: Cuts) -> None:
    """Sets what this rank reads for ``group``: where possible, its part of each source."""
    own = cuts.get(group.targets[0])
    if group.transform is None:
        group.source_cut = own
        return
    shapes = {tensors[name].shape for name, _ in group.sources}
    merges = {type(operation).__name__ for operation in group.transform.operations} <= _MERGING
    if own is not None and merges and len(group.targets) == 1 and len(shapes) == 1:
        shape, dim = shapes.pop(), own.own.dim - 1
        if 0 <= dim < len(shape) and shape[dim] == own.own.whole:
            group.source_cut = ParameterCut(replace(own.own, dim=dim))
            return
    group.target_cuts = {target: cuts[target] for target in group.targets if target in cuts}


def _read_part(read: Read, name: str, part: ParameterCut | None) -> torch.Tensor:
    if part is None:
        return read(name, None)
    pieces = [read(name, slices) for slices in part.slices()]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=part.own.dim)


Place = Callable[[str, torch.Tensor], None]
"""Takes a copy of the value of the parameter or buffer of that name."""


def fill(model: Any, groups: list[Group], read: Read, place: Place, loaded: Callable[[Group], None]) -> None:
    """Executes ``groups``; ``loaded`` is told of each. Raises `ModelError` HF044 for shapes that conversion shows."""
    with ThreadPoolExecutor(READERS, "octavo-load") as pool:
        for group, futures in _ahead(groups, lambda name, part: pool.submit(_read_part, read, name, part)):
            for target, tensor in _convert(model, group, futures).items():
                own = group.target_cuts.get(target)
                place(target, tensor if own is None else own.of(tensor))
            loaded(group)


def _ahead(
    groups: list[Group], submit: Callable[[str, ParameterCut | None], Future[torch.Tensor]]
) -> Iterator[tuple[Group, list[Future[torch.Tensor]]]]:
    """Each group with its tensors on the way, those of the next group being read while one is converted."""
    pending: deque[tuple[Group, list[Future[torch.Tensor]]]] = deque()
    for group in groups:
        pending.append((group, [submit(name, group.source_cut) for name, _ in group.sources]))
        if len(pending) > READERS:
            yield pending.popleft()
    yield from pending


def _convert(model: Any, group: Group, futures: list[Future[torch.Tensor]]) -> dict[str, torch.Tensor]:
    if group.transform is None:
        return {group.targets[0]: futures[0].result()}
    for (name, pattern), future in zip(group.sources, futures, strict=True):
        group.transform.add_tensor(group.targets[0], name, pattern, future)
    try:
        made = group.transform.convert(group.targets[0], model=model, config=model.config)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ModelError(
            f"{group.targets[0]} cannot be made of {len(group.sources)} tensors of the checkpoint: {error}.",
            "Check that no shard is missing, and the sizes in config.json.",
            id="HF044",
        ) from error
    return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}


def assign(model: nn.Module, target: str, tensor: torch.Tensor, device: torch.device) -> None:
    """A copy of ``tensor`` on ``device``, in the type that the model has for the parameter or buffer ``target``."""
    path, _, name = target.rpartition(".")
    owner = model.get_submodule(path)
    old = getattr(owner, name)
    check_shape(target, tensor, old.shape)
    memory = torch.empty(tensor.shape, dtype=old.dtype, device=device).copy_(tensor)
    setattr(owner, name, nn.Parameter(memory, requires_grad=False) if isinstance(old, nn.Parameter) else memory)


def check_shape(target: str, tensor: torch.Tensor, shape: torch.Size) -> None:
    """Raises `ModelError` HF044 if ``tensor`` has another."""
    if tensor.shape != shape:
        _refuse_shapes([_shapes(target, tuple(tensor.shape), shape)])


def tie(model: Any) -> None:
    """Gives parameters that no tensor filled those that they are tied to."""
    model.tie_weights(missing_keys=_on_meta(model), recompute_mapping=False)


def _on_meta(model: nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if tensor.is_meta}
