"""An engine core over the stub worker, and the answers it must give."""

from __future__ import annotations

from array import array

import numpy as np

from octavo.cache.prefix import page_hashes
from octavo.config import EngineConfig
from octavo.core.engine import EngineCore
from octavo.runtime.stub import StubWorker, next_token
from octavo.speculation import Speculation
from octavo.types import Request, Sampling, TokenOutput


def make_engine(
    *, pages: int = 64, max_len: int = 256, overlap: bool = False, enough_tokens: int | None = None, **options: object
) -> EngineCore:
    flat = {"model": "stub", "max_num_seqs": 4, "max_num_batched_tokens": 32, **options}
    worker = StubWorker(pages, max_len)
    worker.enough_tokens = enough_tokens
    return EngineCore(EngineConfig.of(**flat), worker, overlap=overlap)


def make_request(core: EngineCore, id: str, tokens: list[int], **sampling: object) -> Request:
    raw = array("i", tokens).tobytes()
    priority = sampling.pop("priority", 0)
    return Request(
        id=id,
        token_ids=raw,
        page_hashes=page_hashes(core.info.hash_key, b"", raw, core.info.page_size),
        sampling=Sampling(**{"max_tokens": 8, **sampling}),
        priority=priority,
    )


NGRAM = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


class Guesses:
    """Takes the place of `sched.drafts.Lookup`: up to 5 tokens that the stub will answer, as many wrong ones behind
    them as ``wrong`` says in turn."""

    wrong: tuple[int, ...] = (0, 1, 3, 5)

    def __init__(self, speculation: Speculation) -> None:
        self._turn = 0

    def propose(self, tokens: list[int], most: int) -> list[int]:
        self._turn += 1
        wrong = self.wrong[self._turn % len(self.wrong)]
        right = expected(tokens, 5 - wrong)
        return [*right, *[255] * wrong][:most]  # which the stub never answers

    def judge(self, length: int, accepted: int) -> None:
        pass


def expected(tokens: list[int], count: int) -> list[int]:
    """What the stub generates after ``tokens`` when nothing goes wrong with pages."""
    context = list(tokens)
    for _ in range(count):
        context.append(next_token(np.asarray(context, np.int32)))
    return context[len(tokens) :]


def run(core: EngineCore, *, check: bool = True, limit: int = 100_000) -> list[TokenOutput]:
    """Steps until nothing is left to do."""
    outputs: list[TokenOutput] = []
    for _ in range(limit):
        if not core.has_work():
            return outputs
        outputs += core.step()
        if check:
            core.scheduler.check()
    raise AssertionError("the engine does not come to an end")


def collect(outputs: list[TokenOutput]) -> dict[str, list[int]]:
    """Tokens by request; asserts that nothing follows a terminal message."""
    texts: dict[str, list[int]] = {}
    done: set[str] = set()
    for output in outputs:
        assert output.id not in done, f"{output.id} was answered after its end"
        texts.setdefault(output.id, []).extend(output.token_ids)
        if output.finish_reason is not None:
            done.add(output.id)
    return texts
