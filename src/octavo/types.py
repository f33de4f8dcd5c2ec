"""The vocabulary: what a request is, what a step is, and the messages between frontend and core.

Everything here crosses a process boundary or could (msgspec structs, msgpack). Text never reaches the core, but for
grammars: `sampling_params.SamplingParams` is what a user writes, `Sampling` the part that the core sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from octavo.errors import OctavoError, retold
from octavo.structured import Guide

FinishReason = Literal["stop", "length", "abort", "error"]
PoolingKind = Literal["last", "mean", "cls"]  # the hidden state of the last token, the mean of all, that of the first


class Pooling(msgspec.Struct, frozen=True, array_like=True):
    """How an embedding is made: of what hidden states, of how many of their numbers (None: all), and whether of
    length 1."""

    kind: PoolingKind
    dimensions: int | None = None
    normalize: bool = True


class Sampling(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The part of `SamplingParams` that the core acts on, all in token ids, all validated."""

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0  # always set by the frontend: drawn at submission when the user gave none
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    end_ids: tuple[int, ...] = ()  # a sampled token of these ends the request (eos set unless ignored, stop_token_ids)
    masked_until_min: tuple[int, ...] = ()  # cannot be sampled before min_tokens
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()  # token sequences that must not be completed
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    guide: Guide | None = None
    pooling: Pooling | None = None  # nothing is sampled: the request ends with an embedding of its prompt

    @property
    def whole_prompt(self) -> bool:
        """Whether every token of the prompt is to be computed for it, even if its K and V are known."""
        return self.prompt_logprobs is not None or (self.pooling is not None and self.pooling.kind != "last")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """Frontend to core. ``page_hashes`` holds one 16-byte key for each full page of the prompt (`cache.prefix`)."""

    id: str
    token_ids: bytes  # int32, little endian
    page_hashes: bytes
    sampling: Sampling
    priority: int = 0  # lower runs first
    salt: bytes = b""  # keeps prefix pages of different tenants apart


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Log-probabilities at one position: of the token itself, then of the best ones, best first."""

    token: int
    logprob: float
    rank: int  # 1 is the likeliest
    top_ids: list[int]
    top_logprobs: list[float]


class TokenOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Core to frontend: what one step added to one request. ``finish_reason`` makes it the terminal message."""

    id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    finish_reason: FinishReason | None = None
    embedding: bytes = b""  # float32, little endian
    cached: int = 0  # prompt tokens found in the prefix cache
    queued: float = 0.0  # with the first token: seconds before the request was first part of a step
    error: str = ""  # with finish_reason "error": cause and remedy
    status: int = 0  # with finish_reason "error": the HTTP status of the error


# --- the step: the only thing between scheduler and worker ------------------------------------------------------------


class RowStart(msgspec.Struct, frozen=True, array_like=True):
    """A sequence enters row ``row``: first admission, or again after a preemption (then tokens hold its output too)."""

    row: int
    tokens: list[int]
    prompt_len: int
    pages: list[int]
    sampling: Sampling


class PageGrant(msgspec.Struct, frozen=True, array_like=True):
    """``ids`` become entries ``first``, ``first + 1``, … of row ``row``'s block table."""

    row: int
    first: int
    ids: list[int]


class StepPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One step, as deltas. Item b computes ``counts[b]`` tokens of row ``rows[b]``, from position ``computed[b]`` on.

    Items of one token come first, then those of which every token is sampled after, drafts. After each of its last
    ``samples[b]`` tokens item b samples one: none before the end of what is known is reached, more than one where
    drafts follow that end. ``inputs[b]`` are its tokens, where given; else those of the row's start, and behind these
    the row's last sample. ``ended`` rows are free before anything else happens.
    """

    starts: list[RowStart]
    pages: list[PageGrant]
    rows: list[int]
    counts: list[int]
    computed: list[int]
    samples: list[int]
    ended: list[int]
    inputs: dict[int, list[int]] = {}

    @property
    def num_tokens(self) -> int:
        return sum(self.counts)


class StepResult(msgspec.Struct, kw_only=True):
    """What a step sampled, item after item: as many tokens as the plan's ``samples`` say.

    ``bad`` lists places in ``tokens`` whose logits were not finite.
    """

    tokens: list[int]
    logprobs: dict[int, TokenLogprobs] = {}  # place in tokens -> of that token
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}  # item -> of the prompt tokens this chunk predicts
    bad: list[int] = []
    embeddings: list[bytes] = []  # in place of tokens, where prompts are pooled: float32, little endian


# --- messages (tagged; see core/transport.py) -------------------------------------------------------------------------

MAX_MESSAGE_BYTES = 256 * 2**20  # a longer message is not sent, and a peer that sends one is cut off


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """New requests; each gets outputs, the last of them terminal."""

    requests: list[Request]


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Ends requests early; ids that are not known are ignored."""

    ids: list[str]


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Asks the core loop for a `Pong`: proof that the loop turns, not only that the socket is open."""

    nonce: int


class ResetPrefixCache(msgspec.Struct, frozen=True, tag="reset"):
    """Forgets every reusable page; answered by a `Pong` of the same nonce."""

    nonce: int


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Stop at once; pending requests are finished with ``abort``."""


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """The first message of a frontend; answered by `Ready` once the engine is, or by `Dead`."""


class Bye(msgspec.Struct, frozen=True, tag="bye"):
    """A frontend's last message; its requests are aborted and its outputs dropped."""


CoreInput = Hello | Submit | Abort | Ping | ResetPrefixCache | Bye | Shutdown


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a ready core tells its frontends."""

    max_model_len: int
    num_pages: int
    page_size: int
    vocab_size: int
    hash_key: bytes  # secret of this start: keys the prefix hashes
    dtype: str
    device: str
    max_num_seqs: int
    max_num_batched_tokens: int
    max_logprobs: int
    prefix_caching: bool
    weight_bytes: int = 0  # that a step reads; 0: not known
    kv_bytes: int = 0  # of a token
    bandwidth: float = 0.0  # bytes a second of the device's memory; 0: not known
    phases: dict[str, float] = {}  # seconds of each part of the engine's start


class Stats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Gauges are of now; counters only grow."""

    running: int = 0
    waiting: int = 0
    pages_used: int = 0  # referenced by a request
    pages_total: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    draft_tokens: int = 0  # tokens supposed by speculation …
    accepted_tokens: int = 0  # … and those of them that were sampled, too
    slots_allocated: int = 0  # summed over steps: slots of the pages that requests hold …
    slots_filled: int = 0  # … and how many of those hold a token; their ratio is 1 - waste
    busy_seconds: float = 0.0  # in steps

    @property
    def kv_cache_usage(self) -> float:
        """Share of the pages that requests hold, 0 to 1."""
        return self.pages_used / self.pages_total if self.pages_total else 0.0

    @classmethod
    def sum(cls, several: Sequence[Stats]) -> Stats:
        """Those of several engines as one's."""
        return cls(**{name: sum(getattr(one, name) for one in several) for name in cls.__struct_fields__})


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The answer to `Hello` of a core that has loaded its model."""

    info: EngineInfo


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """What one turn of the core's loop produced, over all requests."""

    outputs: list[TokenOutput]
    stats: Stats | None = None


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """The answer to a `Ping` or a `ResetPrefixCache`."""

    nonce: int
    stats: Stats


class Dead(msgspec.Struct, frozen=True, tag="dead"):
    """The core is going down. ``kind`` is the class name of the error, ``id`` and ``exit_code`` are its own."""

    cause: str
    remedy: str = ""
    kind: str = "EngineDead"
    exit_code: int = 1
    id: str = ""

    @classmethod
    def of(cls, error: OctavoError) -> Dead:
        """Because of ``error``."""
        return cls(error.cause, error.remedy, type(error).__name__, error.exit_code, error.id)

    def error(self) -> OctavoError:
        """What ended the core, as the class that it was there."""
        return retold(self.kind, self.cause, self.remedy, self.id)


CoreOutput = Ready | Outputs | Pong | Dead


# --- results that a user sees -----------------------------------------------------------------------------------------


class Logprob(msgspec.Struct, frozen=True):
    """As vLLM's: of one candidate token at one position."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


class CompletionOutput(msgspec.Struct, kw_only=True):
    """One answer to a prompt. ``finish_reason`` is None while it grows; ``stop_reason`` is the stop string or the token
    of ``stop_token_ids`` that ended it, None for the model's own end."""

    index: int
    text: str = ""
    token_ids: list[int] = []
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    embedding: list[float] | None = None  # in place of text, of a model that embeds

    def finished(self) -> bool:
        return self.finish_reason is not None


class RequestMetrics(msgspec.Struct, kw_only=True):
    """Seconds on the monotonic clock of the process that made the request."""

    arrival_time: float = 0.0
    scheduled_time: float | None = None  # known with the first token; time on the way to the engine comes after it
    first_token_time: float | None = None
    finished_time: float | None = None


class EmbeddingOutput(msgspec.Struct, kw_only=True):
    """As vLLM's."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        return len(self.embedding)


class EmbeddingRequestOutput(msgspec.Struct, kw_only=True):
    """A text that was embedded."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int = 0
    finished: bool = True


class RequestOutput(msgspec.Struct, kw_only=True):
    """A request as its user sees it: cumulative, one `CompletionOutput` for each of ``n``."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics = msgspec.field(default_factory=RequestMetrics)

    def embedded(self) -> EmbeddingRequestOutput:
        """As `LLM.embed` returns it."""
        return EmbeddingRequestOutput(
            request_id=self.request_id,
            outputs=EmbeddingOutput(embedding=self.outputs[0].embedding or []),
            prompt_token_ids=self.prompt_token_ids,
            num_cached_tokens=self.num_cached_tokens,
        )
