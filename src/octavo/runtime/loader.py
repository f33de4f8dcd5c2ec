"""Weights into a model, layer by layer: read, convert to the parameter's type, let the layer re-pack, go on.

Layers say which checkpoint tensors they are made of (`layers.base.LoadRule`); this only executes it. Names and shapes
are checked before the first byte of a weight is read. The most that is held at once is the model loaded so far, one
layer before it is re-packed, and a few pieces of tensors in the checkpoint's type.
"""

from __future__ import annotations

import difflib
import os
import time
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
import torch

from octavo.errors import ConfigError, ModelError
from octavo.hub.checkpoint import Array, BlockCheckpoint, Checkpoint
from octavo.hub.quantised.checkpoint import optional_tensors
from octavo.hub.safetensors_file import TensorInfo
from octavo.kernels import select
from octavo.kernels.select import Ops
from octavo.layers.base import Blocks, Layer, LoadRule
from octavo.log import get_logger
from octavo.models.base import Model, SelfLoading, Share, as_tensor

LISTED = 10  # names that an error message lists
PIECE = 64 << 20  # bytes that one read returns at most, unless a single row is more
READERS = min(4, os.cpu_count() or 1)  # threads that read ahead; what they cost is the dequantising of GGUF blocks
FLOATS = frozenset({"float64", "float32", "float16", "bfloat16"})


@dataclass(frozen=True)
class LoadReport:
    """What was loaded; ``nbytes`` as they are in the checkpoint."""

    tensors: int
    nbytes: int
    seconds: float
    unused: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()  # types of blocks that are multiplied as they are

    def __str__(self) -> str:
        rate = self.nbytes / max(self.seconds, 1e-9)
        text = f"{self.tensors} tensors, {self.nbytes / 1e9:.2f} GB in {self.seconds:.2f} s ({rate / 1e9:.2f} GB/s)"
        if self.kinds:
            text += f"; {', '.join(self.kinds)} kept as they are (--dtype float32 or bfloat16 would dequantise them)"
        return f"{text}; not needed: {', '.join(self.unused[:LISTED])}" if self.unused else text


def load(
    model: Model,
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    progress: Share = lambda share: None,
    keep_blocks: bool = False,
    quantization: str | None = None,
) -> LoadReport:
    """Fills ``model``, built without memory, on ``device``.

    ``keep_blocks``: weights of few bits stay in the types that the operators of ``device`` multiply as they are;
    otherwise they become values of the model's type. ``quantization`` is that of `ModelOptions`.

    Raises `ModelError`: HF042 for tensors that the model has no place for, HF043 for parameters that the checkpoint
    lacks, HF044 for shapes that differ, HF050 for types that are not plain floats.
    """
    start = time.perf_counter()
    ops = choose_ops(model, device, quantization)
    if isinstance(model, SelfLoading):
        loaded = model.load_weights(checkpoint, device, progress)
        return LoadReport(loaded.tensors, loaded.nbytes, time.perf_counter() - start, loaded.unused)
    tensors = checkpoint.tensors()
    _untie_if_distinct(model, checkpoint, tensors)
    plan = [(layer, layer.load_rules(name)) for name, layer in _layers(model)]
    ignorable = (*model.unused, *optional_tensors(checkpoint), *(model.tied or ())[:1])
    unused = _check_names([rule for _, rules in plan for rule in rules], tensors, ignorable)
    _check_types(plan, tensors)
    _check_shapes(plan, tensors)

    if keep_blocks and isinstance(checkpoint, BlockCheckpoint):
        tensors = _use_blocks(model, checkpoint, tensors, ops)
        plan = [(layer, layer.load_rules(name)) for name, layer in _layers(model)]
    total = sum(_nbytes(rule, tensors) for _, rules in plan for rule in rules)
    arrays = _read_ahead(checkpoint, [piece for _, rules in plan for rule in rules for piece in _pieces(rule, tensors)])
    done = 0
    for layer, rules in plan:
        layer.materialise(device)
        for rule in rules:
            target = _target(layer, rule)
            for piece in _pieces(rule, tensors):
                target[piece.target].copy_(as_tensor(next(arrays)))
            done += _nbytes(rule, tensors)
            progress(done / total)
        layer.finish(ops)
        checkpoint.forget()
    count = sum(len(rules) for _, rules in plan)
    kinds = sorted({tensors[rule.source].dtype for _, rules in plan for rule in rules if rule.raw})
    return LoadReport(count, total, time.perf_counter() - start, tuple(unused), tuple(kinds))


def _use_blocks(
    model: Model, checkpoint: BlockCheckpoint, tensors: Mapping[str, TensorInfo], ops: Ops
) -> Mapping[str, TensorInfo]:
    """Lets layers take tensors as they are stored; returns what will be read, of these the type and size of blocks."""
    stored, blocks = dict(tensors), {}
    for name, kind in checkpoint.block_types().items():
        if kind in ops.block_types:
            raw = checkpoint.read_raw(name, slice(0, 1))
            blocks[name] = Blocks(kind, raw.nbytes, tensors[name].shape[1] // raw.shape[1])
            stored[name] = TensorInfo(kind, tensors[name].shape, raw.nbytes * tensors[name].shape[0])
    for name, layer in _layers(model):
        layer.use_blocks(name, blocks)
    taken = {rule.source for name, layer in _layers(model) for rule in layer.load_rules(name) if rule.raw}
    return {name: stored[name] if name in taken else info for name, info in tensors.items()}


def choose_ops(model: Model, device: torch.device, quantization: str | None) -> Ops:
    """The operators of ``model``'s layers; raises `ConfigError` where they have no products of rounded weights."""
    if quantization is None:
        return select.ops(device, model.dtype)
    found = None if isinstance(model, SelfLoading) else select.int8_ops(device, model.dtype)
    if found is None:
        what = "the Transformers backend" if isinstance(model, SelfLoading) else f"{model.dtype} on {device.type}"
        raise ConfigError(
            f"quantization is {quantization}, which {what} has no products for.",
            "Leave --quantization out, or run a native model on a GPU, or on a CPU with octavo's C++ extension.",
        )
    return found


def fill_dummy(
    model: Model, seed: int, device: torch.device | None = None, quantization: str | None = None
) -> LoadReport:
    """Random weights on ``device`` (the CPU by default): normal with std 0.02, norm weights 1.

    A tensor's values depend on the seed, its name, its type and the kind of device, and not on the number of ranks.
    """
    start = time.perf_counter()
    device = torch.device("cpu") if device is None else device
    ops = choose_ops(model, device, quantization)
    if isinstance(model, SelfLoading):
        loaded = model.dummy_weights(seed, device)
        return LoadReport(loaded.tensors, loaded.nbytes, time.perf_counter() - start)

    def fill(item: tuple[str, Layer]) -> list[int]:
        name, layer = item
        layer.materialise(device)
        generator, sizes = torch.Generator(device), []
        for parameter, tensor in layer.named_parameters(recurse=False):
            generator.manual_seed(seed ^ zlib.crc32(f"{name}.{parameter}".encode()))
            cut = [rule for rule in layer.load_rules(name) if rule.parameter == parameter and rule.cut is not None]
            if cut:
                _fill_cut(tensor, cut, generator)
            else:
                layer.fill_dummy(parameter, generator)
            sizes.append(tensor.nbytes)
        layer.finish(ops)
        return sizes

    with ThreadPoolExecutor(os.cpu_count(), "octavo-load") as pool:  # a generator fills on one core
        sizes = [size for layer in pool.map(fill, _layers(model)) for size in layer]
    return LoadReport(len(sizes), sum(sizes), time.perf_counter() - start)


def _untie_if_distinct(model: Model, checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo]) -> None:
    """As Transformers does, believes two different weights in the checkpoint more than ``tie_word_embeddings``."""
    if model.tied is None or any(name not in tensors for name in model.tied):
        return
    head, embedding = model.tied
    same = tensors[head] == tensors[embedding] and len(tensors[head].shape) == 2
    if same and all(
        np.array_equal(checkpoint.read(head, (rows,)).data, checkpoint.read(embedding, (rows,)).data)
        for rows in _runs(tensors[head])
    ):
        return
    get_logger().warning(
        "config.json ties the head to the embedding, but %s differs from %s: not tied", head, embedding
    )
    model.untie()


class _Piece(NamedTuple):
    source: str
    slices: tuple[slice, ...]  # of the source
    target: slice  # rows of the rule's part of the parameter
    raw: bool


def _pieces(rule: LoadRule, tensors: Mapping[str, TensorInfo]) -> list[_Piece]:
    """What a rule reads, in pieces of whole rows, or of the rank's part of each row."""
    runs = _runs(tensors[rule.source])
    if rule.cut is None:
        return [_Piece(rule.source, (rows,), rows, rule.raw) for rows in runs]
    if rule.cut.dim == 1:
        return [_Piece(rule.source, (rows, *rule.cut.slices()[1:]), rows, rule.raw) for rows in runs]
    first, last = rule.cut.first, rule.cut.first + rule.cut.size
    own = [slice(max(rows.start, first), min(rows.stop, last)) for rows in runs]
    return [
        _Piece(rule.source, (rows,), slice(rows.start - first, rows.stop - first), rule.raw)
        for rows in own
        if rows.start < rows.stop
    ]


def _nbytes(rule: LoadRule, tensors: Mapping[str, TensorInfo]) -> int:
    whole = tensors[rule.source].nbytes
    return whole if rule.cut is None else whole * rule.cut.size // rule.cut.whole


def _fill_cut(tensor: torch.Tensor, rules: Sequence[LoadRule], generator: torch.Generator) -> None:
    """This rank's parts of what `Layer.fill_dummy` gives to the whole parameter, its sources one below the other."""
    cuts = [rule.cut for rule in rules if rule.cut is not None]
    sizes = [cut.whole if cut.dim == 0 else rule.rows for rule, cut in zip(rules, cuts, strict=True)]
    columns = cuts[0].whole if cuts[0].dim == 1 else tensor.shape[-1]
    shape = (sum(sizes), columns) if tensor.dim() == 2 else (sum(sizes),)
    whole = torch.empty(shape, dtype=tensor.dtype, device=tensor.device).normal_(0.0, 0.02, generator=generator)
    for rule, cut, part in zip(rules, cuts, torch.split(whole, sizes), strict=True):
        tensor.data.narrow(0, rule.start, rule.rows).copy_(part[cut.slices()])


def _runs(info: TensorInfo) -> list[slice]:
    """The rows of a tensor in runs of about `PIECE` bytes."""
    count = info.shape[0]
    step = max(1, count * PIECE // max(1, info.nbytes))
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


def _read_ahead(checkpoint: Checkpoint, pieces: Iterable[_Piece]) -> Iterator[Array]:
    """The arrays of ``pieces`` in order, each of `READERS` threads reading one while the caller copies another."""
    pending: deque[Future[Array]] = deque()
    with ThreadPoolExecutor(READERS, "octavo-load") as pool:
        for piece in pieces:
            pending.append(pool.submit(_read, checkpoint, piece))
            if len(pending) > READERS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _read(checkpoint: Checkpoint, piece: _Piece) -> Array:
    if not piece.raw or not isinstance(checkpoint, BlockCheckpoint):
        return checkpoint.read(piece.source, piece.slices)
    blocks = checkpoint.read_raw(piece.source, piece.slices[0])
    return Array(blocks.reshape(blocks.shape[0], -1)[:, *piece.slices[1:]], "uint8")


def _layers(model: Model) -> list[tuple[str, Layer]]:
    """In the order of the model, each once even if several modules share it."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Layer)]


def _whole_shape(target: torch.Tensor, rule: LoadRule) -> tuple[int, ...]:
    shape = list(target.shape)
    if rule.cut is not None:
        shape[rule.cut.dim] = rule.cut.whole
    return tuple(shape)


def _target(layer: Layer, rule: LoadRule) -> torch.Tensor:
    return layer.get_parameter(rule.parameter).data.narrow(0, rule.start, rule.rows)


def _check_names(rules: Sequence[LoadRule], tensors: Mapping[str, TensorInfo], ignorable: Iterable[str]) -> list[str]:
    """The tensors that nothing needs and that may be ignored; raises for all others without a counterpart."""
    wanted = {rule.source for rule in rules}
    missing = [rule.source for rule in rules if rule.source not in tensors]
    spare = [name for name in tensors if name not in wanted]
    ignored = [name for name in spare if any(fnmatchcase(name, pattern) for pattern in ignorable)]
    unexpected = sorted(set(spare) - set(ignored))
    if missing:
        raise ModelError(
            f"The checkpoint lacks {len(missing)} of the model's {len(rules)} tensors: {_listed(missing, unexpected)}.",
            "Check that the weights belong to this config.json and that no shard is missing.",
            id="HF043",
        )
    if unexpected:
        raise ModelError(
            f"The checkpoint has {len(unexpected)} tensors that the model has no place for:"
            f" {_listed(unexpected, sorted(wanted))}.",
            "Check that config.json names the architecture, biases and layers that these weights have.",
            id="HF042",
        )
    return ignored


def _listed(names: Sequence[str], candidates: Sequence[str]) -> str:
    """The first names, each with the likeliest counterpart among ``candidates``."""
    shown = []
    for name in names[:LISTED]:
        near = difflib.get_close_matches(name, candidates, n=1)
        shown.append(f"{name} (nearest: {near[0]})" if near else name)
    return ", ".join(shown) + (", …" if len(names) > LISTED else "")


def _check_types(plan: Sequence[tuple[Layer, list[LoadRule]]], tensors: Mapping[str, TensorInfo]) -> None:
    found = {tensors[rule.source].dtype: rule.source for _, rules in plan for rule in rules}
    for dtype, name in found.items():
        if dtype not in FLOATS:
            raise ModelError(
                f"Tensor {name} is {dtype}; weights of {', '.join(sorted(FLOATS))} can be loaded.",
                "If it is quantised, config.json lacks its quantization_config.",
                id="HF050",
            )


def _check_shapes(plan: Sequence[tuple[Layer, list[LoadRule]]], tensors: Mapping[str, TensorInfo]) -> None:
    wrong = []
    for layer, rules in plan:
        for rule in rules:
            wanted, found = _whole_shape(_target(layer, rule), rule), tuple(tensors[rule.source].shape)
            if wanted != found:
                wrong.append(f"{rule.source} is {list(found)} where the model needs {list(wanted)}")
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors have another shape than config.json implies: {'; '.join(wrong[:LISTED])}"
            f"{'; …' if len(wrong) > LISTED else ''}.",
            "Check vocab_size, the sizes and the head counts in config.json against the weights.",
            id="HF044",
        )
