"""Sampling by groups of rows that need the same, with the operators that every platform has."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from octavo.kernels import sampling as kernels
from octavo.runtime.base import TokenMask
from octavo.runtime.penalties import upload
from octavo.runtime.sampling_rows import Mode, SampleItem, SamplingRows

_CACHED_ELEMENTS = 1 << 20  # edited at once on CPU: larger copies are memory that the system has to zero first
_FEW_OCTETS = 512  # of a mask with anything in them: fewer tokens than that, or so, are looked at one by one


class _Drawing(NamedTuple):
    """How some items are drawn."""

    key: torch.Tensor  # int32 [S, 2]
    temperature: torch.Tensor  # float32 [S, 1]
    filters: kernels.Filters


class GroupSampler:
    """``most``: rows worked on at once. Outcomes are as of `kernels.greedy`: int32 ``[2, S]``."""

    def __init__(self, rows: SamplingRows, most: int) -> None:
        self._rows = rows
        self._most = most
        self._most_edited = most if rows.device.type != "cpu" else max(1, _CACHED_ELEMENTS // rows.vocab)

    def sample(self, logits: torch.Tensor, items: list[SampleItem], mask: TokenMask | None) -> torch.Tensor:
        """The outcome of each item; its logits have to be finite before and after edits.

        A model that is asked for JSON writes JSON: what an item samples without a mask is mostly what it may, and that
        is then what it samples with it, so most masks are never needed. But filters look at what a mask leaves.
        """
        if mask is None and len(items) <= self._most and not any(self._rows[row].edited for row, _ in items):
            return self._choose(logits, items)
        outcome = torch.empty(2, len(items), dtype=torch.int32, device=logits.device)
        places = {} if mask is None else {item: at for at, item in enumerate(mask.items)}
        filtered = [i for i in places if self._rows[items[i].row].mode is Mode.FILTERED]
        free = set(range(len(items))).difference(filtered)
        self._pick(logits, items, sorted(free), None, outcome)
        if mask is not None:
            tokens = outcome[0].tolist()
            held = filtered + [i for i, at in places.items() if i in free and not mask.allows(at, tokens[i])]
            if held:
                bits = mask.bits([places[i] for i in held])
                rest = self._pick_few(logits, items, held, bits, outcome)
                self._pick(logits, items, [held[at] for at in rest], bits[rest], outcome)
        return outcome

    def _pick_few(
        self,
        logits: torch.Tensor,
        items: list[SampleItem],
        held: list[int],
        bits: npt.NDArray[np.int32],
        outcome: torch.Tensor,
    ) -> list[int]:
        """Samples those of ``held`` that may be one of few tokens, from these alone; returns the places of the others.

        They have been sampled without their masks before, so ``outcome`` knows whether their logits are finite.
        """
        rest: list[int] = []
        few: dict[Mode, list[tuple[int, npt.NDArray[np.int64]]]] = {}
        for at, i in enumerate(held):
            state = self._rows[items[i].row]
            ids = None if state.edited or state.mode is Mode.FILTERED else _few_tokens(bits[at], self._rows.vocab)
            if ids is None:
                rest.append(at)
            else:
                few.setdefault(state.mode, []).append((i, ids))
        for mode, members in few.items():
            table = np.full((len(members), max(len(ids) for _, ids in members)), -1)
            for place, (_, ids) in enumerate(members):
                table[place, : len(ids)] = ids
            index, tokens = self._rows.ids([i for i, _ in members]), upload(table, self._rows.device)
            x = logits[index.unsqueeze(1), tokens.clamp(min=0)].float().masked_fill_(tokens < 0, float("-inf"))
            if mode is Mode.GREEDY:
                chosen = tokens.gather(1, kernels.argmax(x)[0].unsqueeze(1)).squeeze(1)
            else:
                drawing = self._drawing([items[i] for i, _ in members])
                chosen = kernels.draw(kernels.probabilities(x, drawing.temperature), drawing.key, tokens)
            outcome[:, index] = _outcome(chosen, _is_finite(x.amax(-1)) & outcome[1, index].bool())
        return rest

    def _pick(
        self,
        logits: torch.Tensor,
        items: list[SampleItem],
        members: list[int],
        bits: npt.NDArray[np.int32] | None,
        outcome: torch.Tensor,
    ) -> None:
        """Fills in the ``outcome`` of the ``items`` that ``members`` names, under masks if there are any."""
        groups: dict[bool, list[int]] = {}
        for at, member in enumerate(members):
            groups.setdefault(self._rows[items[member].row].edited, []).append(at)
        for edited, places in groups.items():
            most = self._most_edited if edited or bits is not None else self._most
            for first in range(0, len(places), most):
                part = places[first : first + most]
                rows = [members[at] for at in part]
                of, x = [items[i] for i in rows], taken(logits, rows)
                if not edited and bits is None:
                    found = self._choose(x, of)
                else:
                    raw_finite = _is_finite(x.amax(-1))
                    x = self._masked(x, None if bits is None else bits[part])
                    if edited:
                        self._rows.edit_(x, of)
                        self._rows.penalise_(x, of)
                    found = self._choose(x, of) * raw_finite
                outcome[:, self._rows.ids(rows)] = found

    def _choose(self, x: torch.Tensor, items: list[SampleItem]) -> torch.Tensor:
        """The outcome of ``items``, whose logits are ``x[len(items), V]``."""
        settings = self._settings(items)
        found = kernels.sample_rows(x, settings)
        if found is not None:
            return found
        found = torch.empty(2, len(items), dtype=torch.int32, device=x.device)
        modes: dict[Mode, list[int]] = {}
        for at, item in enumerate(items):
            modes.setdefault(self._rows[item.row].mode, []).append(at)
        for mode, places in modes.items():
            found[:, self._rows.ids(places)] = self._choose_by(mode, taken(x, places), [items[at] for at in places])
        return found

    def _choose_by(self, mode: Mode, x: torch.Tensor, items: list[SampleItem]) -> torch.Tensor:
        if mode is Mode.GREEDY:
            return kernels.greedy(x)
        drawing = self._drawing(items)
        probs = kernels.probabilities(x, drawing.temperature)
        if mode is Mode.DRAW:
            token = kernels.draw(probs, drawing.key)
        else:
            token = kernels.draw_filtered(probs, drawing.key, drawing.filters)
        return _outcome(token, _is_finite(x.amax(-1)))

    def _settings(self, items: list[SampleItem]) -> torch.Tensor:
        """As `kernels.sample_rows` takes them."""
        of = self._rows.parameters[[item.row for item in items]]
        positions = np.array([item.position for item in items], np.uint64)
        keys = kernels.noise_keys(of["seed"], positions)
        numbers = np.stack((of["temperature"], of["top_p"], of["min_p"])).view(np.int32)
        return upload(np.concatenate((keys.T, of["top_k"][None], numbers)), self._rows.device)

    def _drawing(self, items: list[SampleItem]) -> _Drawing:
        settings = self._settings(items)
        temperature, top_p, min_p = settings[3:].view(torch.float32).unsqueeze(-1)
        of = self._rows.parameters[[item.row for item in items]]
        filters = kernels.Filters(settings[2].unsqueeze(-1), top_p, min_p, self._filter_width(of))
        return _Drawing(settings[:2].T.contiguous(), temperature, filters)

    def _filter_width(self, of: npt.NDArray[np.void]) -> int:
        if ((of["top_p"] < 1) & (of["top_k"] == 0)).any():
            return self._rows.vocab
        return max(1, int(of["top_k"].max()))

    def _masked(self, x: torch.Tensor, bits: npt.NDArray[np.int32] | None) -> torch.Tensor:
        """A copy of ``x`` in float32, masked."""
        if bits is None:
            return x.to(torch.float32, copy=True)
        return kernels.allowed_bias(upload(bits, self._rows.device), x.shape[1]).add_(x)


def _few_tokens(bits: npt.NDArray[np.int32], vocab: int) -> npt.NDArray[np.int64] | None:
    """The tokens of a mask in order; None if they are many or none."""
    octets = bits.view(np.uint8)
    filled = np.flatnonzero(octets)
    if not 0 < len(filled) <= _FEW_OCTETS:
        return None
    at, bit = np.nonzero(np.unpackbits(octets[filled], bitorder="little").reshape(-1, 8))
    ids = filled[at] * 8 + bit
    ids = ids[ids < vocab]  # the end of a text can be a token that was made up
    return ids if len(ids) else None


def _is_finite(peaks: torch.Tensor) -> torch.Tensor:
    """Of the greatest logit of each row: not NaN, +inf (wrong logits) or -inf (all masked)."""
    return peaks.abs() < float("inf")


def _outcome(tokens: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    return torch.stack((tokens * finite, finite)).int()


def taken(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """``x[rows]`` of ascending rows, without a copy where they are next to each other."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return x[rows[0] : rows[-1] + 1]
    return x[upload(np.array(rows, np.int64), x.device)]
