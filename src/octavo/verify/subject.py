"""The model under test: a whole engine in this process, whose logits are taken down on their way to the sampler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from octavo.config import EngineConfig
from octavo.core.engine import EngineCore
from octavo.errors import OctavoError
from octavo.frontend.inputs import request_of
from octavo.runtime.worker import Worker
from octavo.types import Request, Sampling


class Subject:
    """An engine for ``config``. Raises as `EngineCore` does."""

    def __init__(self, config: EngineConfig) -> None:
        self._worker = Worker(anew=True)
        self._core = EngineCore(config, self._worker)
        self._asked = 0

    @property
    def model(self) -> torch.nn.Module:
        """The loaded model."""
        return self._worker.model

    @property
    def dtype(self) -> torch.dtype:
        """The type that the model runs in."""
        return self._worker.model.dtype

    def greedy(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        """The ``count`` likeliest tokens after each of ``prompts``, which run together, past any end of text."""
        return self._run(prompts, Sampling(temperature=0.0, max_tokens=count))

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """``[T, vocab]`` in float32 on the CPU: of every token of one sequence, through the paths of a prompt."""
        self._core.reset_prefix_cache()
        with self._recorded() as pieces:
            self._run([tokens], Sampling(temperature=0.0, max_tokens=1, prompt_logprobs=0))
        return torch.cat(pieces)

    @contextmanager
    def _recorded(self) -> Iterator[list[torch.Tensor]]:
        pieces: list[torch.Tensor] = []
        model, compute = self._worker.model, self._worker.model.logits

        def record(hidden: torch.Tensor) -> torch.Tensor:
            logits = compute(hidden)
            pieces.append(logits.float().cpu())
            return logits

        model.logits = record  # type: ignore[method-assign]
        try:
            yield pieces
        finally:
            del model.logits  # the class's own shows again

    def _run(self, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        requests = [self._request(tokens, sampling) for tokens in prompts]
        texts: dict[str, list[int]] = {request.id: [] for request in requests}
        outputs = [refusal for request in requests if (refusal := self._core.add(request)) is not None]
        while self._core.has_work():
            outputs += self._core.step()
        for output in outputs:
            if output.finish_reason not in (None, "length"):
                raise OctavoError(f"a request ended with {output.finish_reason}: {output.error}")
            texts[output.id] += output.token_ids
        return list(texts.values())

    def _request(self, tokens: list[int], sampling: Sampling) -> Request:
        self._asked += 1
        return request_of(self._core.info, str(self._asked), tokens, sampling)

    def close(self) -> None:
        """Frees the model and the cache."""
        self._core.close()
