"""Causal language models of Transformers that cannot run over pages: recurrent ones, and those with attention of their
own. Slow, but right.

The model runs as it is, one sequence at a time, and for each sequence Transformers' own cache is kept here. How its
cache may be used is not believed but tried after loading: some are told positions, some have no cache. The first way
that gives the logits of the model without a cache is taken.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from octavo.errors import UnsupportedModel
from octavo.layers import context
from octavo.models.base import OwnCache
from octavo.models.hf.build import own_attention
from octavo.models.hf.head import ClassHead
from octavo.models.hf.probe import SAME

CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
"""Names under which classes return what they keep, and take it back."""

PIECES = (5, 1, 1, 4, 2, 8)  # how the tokens of the trial are cut
LONG = 1024  # tokens after which attention may be of another kind, in blocks or by hashes
PREFIX = 9  # tokens that show how much rounding differs from call to call
NOISE = 4.0  # a way may differ by so many times that
FIRST_ROW = -2  # rows of the trial; those of requests are not negative

History = Literal["cache", "none"]
_TOLD: dict[History, str] = {
    "cache": "one sequence at a time",
    "none": "one sequence at a time, which is computed anew from its start for each token",
}


@dataclass(frozen=True)
class Way:
    """How the model is asked for the next tokens of a sequence. ``positions``: it is told them."""

    history: History
    positions: bool


@dataclass
class _Sequence:
    """What is kept for a row: ``cache`` by the name of its argument, or all ``tokens`` if the model keeps nothing."""

    length: int = 0
    cache: dict[str, Any] = field(default_factory=dict)
    tokens: torch.Tensor | None = None


class Generic:
    """Runs ``model``, a causal language model of Transformers; ``reason`` says why not over pages."""

    def __init__(self, model: Any, reason: str) -> None:
        self.own_cache = OwnCache(0, 0)
        self._reason = reason
        self._model = model
        self._head: ClassHead | None = None  # None: "hidden states" are logits
        self._sequences: dict[int, _Sequence] = {}
        _use_own_attention(model)

    @torch.inference_mode()
    def prove(self, vocab_size: int, max_len: int, dtype: torch.dtype, device: torch.device) -> str:
        """Finds the way, once the weights are there; returns a line for the log.

        Raises `UnsupportedModel` HF031 if no way gives the logits of the unmodified model.
        """
        # cuDNN's convolutions round float32 to 10 bits unless told otherwise, while a step of one token sums exactly.
        torch.backends.cudnn.allow_tf32 = False
        sample = torch.randint(vocab_size, (2, min(LONG, max_len)), generator=torch.Generator().manual_seed(0)).to(
            device
        )
        trial = sample[:, : sum(PIECES)]
        try:
            wanted = [self._unmodified(tokens) for tokens in trial]
            random_state = _random_state(device)  # now: some set themselves up in their first forward
            floor = _difference(self._unmodified(trial[0, :PREFIX]), wanted[0][:PREFIX])
            limit = max(SAME[dtype], NOISE * floor)
            self._head = self._separate_head(trial[0], wanted[0], limit)
            begun = self._hidden(sample[0], 0, None)[: trial.shape[1]]
            later = max(floor, _difference(self.logits(begun), wanted[0]) / NOISE)
        except Exception as error:  # code that is not ours
            raise self._refused(f"tokens alone are not enough for it ({type(error).__name__}: {error})") from error
        if not torch.equal(_random_state(device), random_state):
            raise self._refused("it draws random numbers")
        if not later <= SAME[dtype]:
            raise self._refused("what it says of a token depends on later ones, or is not a number")
        for way in (Way(history, positions) for history in _TOLD for positions in (False, True)):
            self._way = way
            with suppress(Exception):  # code that is not ours, perhaps asked for what it does not have
                if self._trial(trial, wanted) <= limit:
                    self.own_cache = self._measured(trial[0])
                    return f"slow path, {_TOLD[way.history]}, since {self._reason}; it keeps {self.own_cache}"
        raise self._refused("its answers change with its own cache")

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[T, C]`` of the tokens of a step; a row whose first token is computed begins anew."""
        meta = context.current().attention
        starts, ends, rows = meta.query_start.tolist(), meta.seq_lens.tolist(), meta.rows.tolist()
        hidden = []
        for row, start, stop, end in zip(rows, starts[:-1], starts[1:], ends, strict=True):
            hidden.append(self._advance(row, token_ids[start:stop].long(), end - (stop - start)))
        return torch.cat(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `models.base.Model.logits`."""
        return hidden if self._head is None else self._head(hidden)

    def release(self, row: int) -> None:
        """Forgets the sequence of ``row``."""
        self._sequences.pop(row, None)

    # --- a sequence -------------------------------------------------------------------------------------------------

    def _advance(self, row: int, tokens: torch.Tensor, first: int) -> torch.Tensor:
        """Hidden states of ``tokens``, which are those from ``first`` on of the sequence of ``row``."""
        if first == 0:
            self._sequences[row] = _Sequence()
        kept = self._sequences.get(row)
        if kept is None or kept.length != first:
            raise RuntimeError(f"row {row} keeps {kept.length if kept else 'nothing'}, not {first} tokens")
        kept.length += len(tokens)
        if self._way.history == "none":
            kept.tokens = torch.cat([known for known in (kept.tokens, tokens) if known is not None])
            return self._hidden(kept.tokens, 0, None)[first:]
        return self._hidden(tokens, first, kept)

    def _hidden(self, tokens: torch.Tensor, first: int, kept: _Sequence | None) -> torch.Tensor:
        """Hidden states of ``tokens``; what the model returns to be kept replaces what ``kept`` has."""
        runner: Any = self._model if self._head is None else self._head.body
        arguments = {} if kept is None else dict(kept.cache)
        if kept is not None and self._way.positions:
            arguments["position_ids"] = torch.arange(first, first + len(tokens), device=tokens.device).unsqueeze(0)
        output = runner(input_ids=tokens.unsqueeze(0), use_cache=kept is not None, **arguments)
        if kept is not None:
            kept.cache = _caches(runner, output)
        result: torch.Tensor = output.logits if self._head is None else output[0]
        return result[0, -len(tokens) :]

    # --- finding the way --------------------------------------------------------------------------------------------

    def _unmodified(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits ``[T, vocab]`` of the model, called once without a cache."""
        logits: torch.Tensor = self._model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0]
        return logits

    def _separate_head(self, tokens: torch.Tensor, wanted: torch.Tensor, limit: float) -> ClassHead | None:
        """The head apart from the decoder, so that logits are made only where they are needed, if it can be had."""
        ran: list[nn.Module] = []
        bodies = {self._model.base_model, self._model.get_decoder()} - {self._model}
        hooks = [body.register_forward_pre_hook(lambda module, _: ran.append(module)) for body in bodies]
        self._unmodified(tokens[:1])
        for hook in hooks:
            hook.remove()
        if not ran:
            return None
        name = next(name for name, module in self._model.named_modules() if module is ran[0])
        head = ClassHead(self._model, name, tokens.device)
        with suppress(Exception):
            hidden = head.body(input_ids=tokens.unsqueeze(0), use_cache=False)[0][0]
            if _difference(head(hidden), wanted) <= limit:
                return head
        head.remove()
        return None

    def _trial(self, trial: torch.Tensor, wanted: list[torch.Tensor]) -> float:
        """The greatest difference of logits from those ``wanted``, by pieces of both sequences of ``trial`` in turn.

        In turn, so that what a model keeps elsewhere than in a cache shows.
        """
        found: list[list[torch.Tensor]] = [[] for _ in trial]
        done = 0
        for count in PIECES:
            for i, tokens in enumerate(trial):
                if done < len(tokens):
                    found[i].append(self._advance(FIRST_ROW + i, tokens[done : done + count], done))
            done += count
        logits = [self.logits(torch.cat(parts)) for parts in found]
        return max(_difference(ours, theirs) for ours, theirs in zip(logits, wanted, strict=True))

    def _measured(self, tokens: torch.Tensor) -> OwnCache:
        """What is kept for a sequence, from two lengths of it."""
        sizes, half = [], len(tokens) // 2
        for first, piece in ((0, tokens[:half]), (half, tokens[half:])):
            self._advance(FIRST_ROW, piece, first)
            sizes.append(_bytes(self._sequences[FIRST_ROW]))
        self._sequences.clear()
        per_token = -(-max(sizes[1] - sizes[0], 0) // (len(tokens) - half))
        return OwnCache(per_row=max(sizes[1] - len(tokens) * per_token, 0), per_token=per_token)

    def _refused(self, reason: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{type(self._model).__name__} cannot run over pages: {self._reason}. Nor does it run as it is: {reason}.",
            "Choose a model of another architecture.",
            id="HF031",
        )


def _use_own_attention(model: Any) -> None:
    """The attention that Transformers itself would choose, for all parts of ``model``."""
    for module in model.modules():
        if hasattr(module, "config") and hasattr(module, "_supports_sdpa"):
            module.config._attn_implementation_internal = own_attention(module)


def _caches(runner: nn.Module, output: Any) -> dict[str, Any]:
    """What ``runner`` returned to be given back; raises if that is nothing."""
    names = inspect.signature(runner.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values())
    found = {name: getattr(output, name, None) for name in CACHES if name in names or takes_all}
    found = {name: value for name, value in found.items() if value is not None}
    if not found:
        raise ValueError("nothing to keep was returned")
    return found


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference, as a share of the norm of what is wanted."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def _bytes(kept: _Sequence) -> int:
    """Of all memory that tensors somewhere inside ``kept`` hold."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    todo: list[Any] = [kept]
    while todo:
        value = todo.pop()
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif id(value) not in seen and not isinstance(value, (nn.Module, type)):
            seen.add(id(value))
            inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
            todo += [*inner, *getattr(value, "__dict__", {}).values()]
    return sum(storages.values())
