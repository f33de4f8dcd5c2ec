"""A worker without a model, for tests of everything above it; imports no torch.

It keeps token ids where a real one keeps K and V, and its next token is a checksum of what it finds in a sequence's
pages: a page that was shared, moved, freed or overwritten wrongly changes the answer.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from octavo.config import EngineConfig, LayerSpec, ModelConfig
from octavo.runtime.base import TokenMask
from octavo.types import StepPlan, StepResult

VOCAB = 256
MAX_LEN = 2048


def next_token(context: npt.NDArray[np.int32], vocab: int = VOCAB) -> int:
    """What the stub answers to ``context``: printable ASCII if the vocabulary is bytes."""
    return 32 + zlib.crc32(context.tobytes()) % (min(vocab, 127) - 32)


@dataclass
class _Done:
    value: StepResult

    def ready(self) -> bool:
        return True

    def result(self) -> StepResult:
        return self.value


class StubWorker:
    """``num_pages`` is what `plan_memory` reports, unless the config gives bytes for them, of which a token takes four.

    ``pages[p, i]`` holds the token in slot i of page p.
    """

    overlaps = False
    device = "stub"
    enough_tokens: int | None = None
    draft_tokens = 32
    shares_prefixes = True
    step_bytes = 0
    bandwidth = 0.0

    def __init__(self, num_pages: int = 1024, max_len: int = MAX_LEN) -> None:
        self.num_pages = num_pages
        self.max_len = max_len
        self.steps = 0
        self.fail_at: int | None = None  # number of the step that raises, to test faults

    def init(self, config: EngineConfig) -> ModelConfig:
        """A model of one layer over bytes."""
        self.page_size = int(config.memory.block_size)
        if config.memory.kv_cache_memory_bytes:
            self.num_pages = int(config.memory.kv_cache_memory_bytes) // (4 * self.page_size)
        self.pools = config.model.runner == "pooling"
        rows = self.max_rows = config.limits.max_num_seqs
        self.max_len = min(self.max_len, config.model.max_model_len or self.max_len)
        self.pages = np.full((self.num_pages, self.page_size), -1, np.int32)
        self.table = np.full((rows, -(-self.max_len // self.page_size)), -1, np.int32)
        self.last = np.zeros(rows, np.int32)
        self.known: dict[int, npt.NDArray[np.int32]] = {}
        return ModelConfig(
            architecture="Stub",
            model_type="stub",
            vocab_size=VOCAB,
            hidden_size=1,
            intermediate_size=1,
            layers=(LayerSpec(heads=1, kv_heads=1, head_dim=1),),
            max_len=self.max_len,
            max_len_reason="stub",
            dtype="float32",
            dtype_reason="stub",
            eos_ids=(),
            norm_eps=0.0,
            hidden_act="none",
            tie_embeddings=True,
            hf={},
            has_head=not self.pools,
        )

    def load(self) -> None:
        """Nothing to load."""

    def plan_memory(self) -> tuple[int, int]:
        """(pages, longest sequence)."""
        return self.num_pages, self.max_len

    def step(self, plan: StepPlan) -> None:
        """Writes the step's tokens into pages and computes the next ones."""
        self.steps += 1
        if self.steps == self.fail_at:
            raise RuntimeError("the stub was told to fail here")
        for row in plan.ended:
            self.known.pop(row, None)
            self.table[row] = -1
        for start in plan.starts:
            self.known[start.row] = np.asarray(start.tokens, np.int32)
            self.table[start.row, : len(start.pages)] = start.pages
        for grant in plan.pages:
            self.table[grant.row, grant.first : grant.first + len(grant.ids)] = grant.ids
        self._items: list[int] = []  # of each sample
        self._tokens: list[int] = []
        for item, (row, count, computed, samples) in enumerate(
            zip(plan.rows, plan.counts, plan.computed, plan.samples, strict=True)
        ):
            self._write(row, computed, count, plan.inputs.get(item))
            for length in range(computed + count - samples + 1, computed + count + 1):
                self.last[row] = next_token(self._read(row, length))
                self._items.append(item)
                self._tokens.append(int(self.last[row]))
        self._rows = plan.rows

    def sample(self, mask: TokenMask | None = None) -> _Done:
        """The tokens of the last `step`; one that ``mask`` forbids is replaced by one that it allows.

        A model that embeds has the token, which tells of all of the prompt's pages, as the one number of an embedding.
        """
        if self.pools:
            return _Done(StepResult(tokens=[], embeddings=[np.float32(token).tobytes() for token in self._tokens]))
        result = StepResult(tokens=self._tokens)
        for item, bits in zip(mask.items, mask.all_bits(), strict=True) if mask else ():
            allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), count=VOCAB, bitorder="little"))
            place = self._items.index(item)
            token = result.tokens[place]
            if not len(allowed):
                result.bad.append(place)
            elif token not in allowed:
                result.tokens[place] = self.last[self._rows[item]] = int(allowed[token % len(allowed)])
        return _Done(result)

    def close(self) -> None:
        """Nothing was started."""

    def _write(self, row: int, computed: int, count: int, inputs: list[int] | None) -> None:
        known = self.known[row]
        position = np.arange(computed, computed + count)
        tokens = known[position] if computed + count <= len(known) else self.last[row : row + 1]
        if inputs is not None:
            tokens = np.array(inputs, np.int32)
        self.pages[self.table[row, position // self.page_size], position % self.page_size] = tokens

    def _read(self, row: int, length: int) -> npt.NDArray[np.int32]:
        """What the row's pages say of its first ``length`` tokens."""
        pages = self.table[row, : -(-length // self.page_size)]
        return self.pages[pages].reshape(-1)[:length]
