"""The tokens of one step, on their way to the host."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from octavo.types import TokenLogprobs


class LogprobGroup(NamedTuple):
    """Log-probabilities of some items."""

    items: list[int]
    counts: list[int]
    packed: torch.Tensor  # see `kernels.sampling.packed_logprobs`


class Sampled:
    """The tokens of one `Sampler.sample`. ``tokens`` is int32 ``[S]`` on the device, 0 for a bad item.

    ``outcome[2, S or more]``, of which they are the first row, is as `kernels.sampling.greedy` returns it.
    """

    def __init__(self, outcome: torch.Tensor, tokens: torch.Tensor, logprobs: list[LogprobGroup]) -> None:
        self.tokens = tokens
        # Copies are queued now: queued in `finish`, they would wait for a step that was launched in between.
        self._host = _to_host(outcome)
        self._logprobs = [group._replace(packed=_to_host(group.packed)) for group in logprobs]
        self._copied: torch.cuda.Event | None = None
        if outcome.is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def ready(self) -> bool:
        """Whether `finish` need not wait."""
        return self._copied is None or bool(self._copied.query())  # type: ignore[no-untyped-call]

    def finish(self) -> tuple[list[int], dict[int, TokenLogprobs], list[int]]:
        """Waits for the tokens; returns (token of each item, log-probabilities by item, bad items).

        An item is bad if a logit is NaN or +inf, or if no token is left to it; its token is 0, without
        log-probabilities.
        """
        if self._copied is not None:
            self._copied.synchronize()
        count, (tokens, finite) = self.tokens.shape[0], self._host.tolist()
        del tokens[count:], finite[count:]
        bad = [] if all(finite) else [item for item, ok in enumerate(finite) if not ok]
        found: dict[int, TokenLogprobs] = {}
        for group in self._logprobs:
            chosen = [tokens[item] for item in group.items]
            entries = token_logprobs(chosen, group.counts, group.packed)
            found.update((item, entry) for item, entry in zip(group.items, entries, strict=True) if finite[item])
        return tokens, found, bad


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("cpu", non_blocking=True) if tensor.is_cuda else tensor


def token_logprobs(tokens: list[int], counts: list[int], packed: torch.Tensor) -> list[TokenLogprobs]:
    """One `TokenLogprobs` for each of ``tokens`` from what `kernels.sampling.packed_logprobs` returned."""
    numbers = packed.cpu().numpy()
    most = numbers.shape[1] // 2 - 1
    ids, floats = numbers[:, 2 : 2 + most].tolist(), numbers.view(np.float32)
    own, values = floats[:, 0].tolist(), floats[:, 2 + most :].tolist()
    ranks = numbers[:, 1].tolist()
    return [
        TokenLogprobs(token, own[i], ranks[i], ids[i][:count], values[i][:count])
        for i, (token, count) in enumerate(zip(tokens, counts, strict=True))
    ]
