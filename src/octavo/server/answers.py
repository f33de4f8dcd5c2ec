"""Bodies of answers, whole and in pieces, as OpenAI's API has them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any, Generic, Literal, TypeVar

import msgspec
from starlette.responses import Response

from octavo.errors import RequestError
from octavo.types import Logprob, RequestOutput

Listed = TypeVar("Listed")
Logprobs = dict[int, Logprob]  # of one position: the token itself first, then the best ones


def now() -> int:
    """The ``created`` of an answer."""
    return int(time.time())


def json_response(body: object, status: int = 200) -> Response:
    """``body`` as JSON."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


class PromptDetails(msgspec.Struct):
    """``cached_tokens`` were found in the prefix cache."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """What a request took, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None

    @classmethod
    def of(cls, results: Iterable[RequestOutput]) -> Usage:
        """Summed over the prompts of one request."""
        results = list(results)
        prompt = sum(len(r.prompt_token_ids) for r in results)
        output = sum(len(o.token_ids) for r in results for o in r.outputs)
        return cls(prompt, output, prompt + output, PromptDetails(sum(r.num_cached_tokens for r in results)))


class EmbeddingUsage(msgspec.Struct):
    """As `Usage`, of embeddings."""

    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct, kw_only=True):
    """Of one text: numbers, or as float32 (little endian) in base64."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Embeddings(msgspec.Struct, kw_only=True):
    """An answer to ``/v1/embeddings``."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Timings(msgspec.Struct, kw_only=True):
    """How long a request took, in milliseconds, under llama.cpp's names where the meaning is equal.

    ``prompt_ms`` is from the arrival to the first token, waiting included; ``predicted_per_token_ms`` is the mean over
    the tokens after the first, of the longest of n answers. Of several prompts they are the first one's beginning and
    the last one's end.
    """

    prompt_n: int
    cached_n: int
    prompt_ms: float
    predicted_n: int
    predicted_per_token_ms: float | None
    total_ms: float

    @classmethod
    def of(cls, results: Sequence[RequestOutput]) -> Timings:
        """Of all prompts of one request, which has ended."""
        times = [result.metrics for result in results]
        began = min(one.arrival_time for one in times)
        first = min((one.first_token_time for one in times if one.first_token_time is not None), default=began)
        end = max((one.finished_time for one in times if one.finished_time is not None), default=first)
        lengths = [len(output.token_ids) for result in results for output in result.outputs]
        longest = max(lengths, default=0)
        return cls(
            prompt_n=sum(len(result.prompt_token_ids) for result in results),
            cached_n=sum(result.num_cached_tokens for result in results),
            prompt_ms=1e3 * (first - began),
            predicted_n=sum(lengths),
            predicted_per_token_ms=1e3 * (end - first) / (longest - 1) if longest > 1 else None,
            total_ms=1e3 * (end - began),
        )


class CompletionLogprobs(msgspec.Struct):
    """``text_offset`` counts characters from the start of the choice's text."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []

    def add(self, token: int, entry: Logprobs | None, text: str, *, as_ids: bool = False) -> None:
        """Appends a position; ``entry`` is None for the first token of a prompt, which nothing predicts."""
        offset = self.text_offset[-1] + len(self.tokens[-1]) if self.tokens else 0
        self.text_offset.append(offset)
        self.tokens.append(text)
        self.token_logprobs.append(None if entry is None else entry[token].logprob)
        tops = None if entry is None else {name_of(id, one, as_ids): one.logprob for id, one in entry.items()}
        self.top_logprobs.append(tops)


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One answer to a prompt, or one piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: Any = msgspec.UNSET
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, kw_only=True):
    """An answer to ``/v1/completions``, or one piece of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    timings: Timings | msgspec.UnsetType = msgspec.UNSET


class TopLogprob(msgspec.Struct):
    """A candidate token; ``bytes`` are those of its text in UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, with the likeliest at its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """Of the tokens of a choice, reasoning and calls among them."""

    content: list[TokenLogprob]


class FunctionCall(msgspec.Struct, kw_only=True):
    """``arguments`` are a JSON object's text, or a piece of it; only the first piece has the name."""

    name: str | msgspec.UnsetType = msgspec.UNSET
    arguments: str = ""


class ToolCall(msgspec.Struct):
    """A whole call."""

    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class ToolCallDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Only the first piece of a call has ``id`` and ``type``."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionCall


class Message(msgspec.Struct):
    """``reasoning_content`` is DeepSeek's name and ``reasoning`` OpenRouter's for the same: clients read either."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class MessageDelta(msgspec.Struct, omit_defaults=True):
    """What a piece adds to a `Message`."""

    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer to a conversation."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatDelta(msgspec.Struct, kw_only=True):
    """A piece of a choice; the last one has ``finish_reason``."""

    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    """An answer to ``/v1/chat/completions``."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: Any = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    """One piece of it."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | None = None
    timings: Timings | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Page(msgspec.Struct, Generic[Listed], kw_only=True):
    """A part of a list, the latest first."""

    object: Literal["list"] = "list"
    data: list[Listed]
    first_id: str | None
    last_id: str | None
    has_more: bool = False


def page_of(found: Sequence[Any], after: str, limit: int) -> Page[Any]:
    """At most ``limit`` of ``found``, from behind the one with the ``id`` ``after`` on; raises `RequestError`."""
    ids = [one.id for one in found]
    if after and after not in ids:
        raise RequestError(f"after is {after[:100]!r}, which is not in the list.", "Leave it out.", param="after")
    start = ids.index(after) + 1 if after else 0
    shown = ids[start : start + limit]
    return Page(
        data=list(found[start : start + limit]),
        first_id=shown[0] if shown else None,
        last_id=shown[-1] if shown else None,
        has_more=start + limit < len(ids),
    )


class ModelCard(msgspec.Struct, kw_only=True):
    """An answer to ``/v1/models/{name}``."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "octavo"
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    """An answer to ``/v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokenized(msgspec.Struct, kw_only=True):
    """An answer to ``/tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None


class Detokenized(msgspec.Struct):
    """An answer to ``/detokenize``."""

    prompt: str


class Version(msgspec.Struct):
    """An answer to ``/version``."""

    version: str


class Load(msgspec.Struct, kw_only=True):
    """An answer to ``/load``. ``server_load`` counts the requests of this API process that are being answered."""

    server_load: int
    running: int
    waiting: int
    kv_cache_usage: float  # 0 to 1


class Success(msgspec.Struct):
    """An answer to ``/reset_prefix_cache``, always true."""

    success: bool


def name_of(token: int, entry: Logprob, as_id: bool = False) -> str:
    """The text of a token, or its number where there is no tokenizer or that is wanted."""
    return f"token_id:{token}" if as_id or entry.decoded_token is None else entry.decoded_token


def chat_logprobs(
    token_ids: Sequence[int], entries: Sequence[Logprobs], top: int, *, as_ids: bool = False
) -> ChatLogprobs:
    """Of an output's tokens, each with the ``top`` likeliest; ``as_ids`` names them by their numbers."""
    content = []
    for token, entry in zip(token_ids, entries, strict=True):
        best = [_top(id, one, as_ids) for id, one in entry.items() if one.rank is not None and one.rank <= top]
        own = _top(token, entry[token], as_ids)
        best.sort(key=lambda one: -one.logprob)
        content.append(TokenLogprob(own.token, own.logprob, own.bytes, best))
    return ChatLogprobs(content)


def _top(token: int, entry: Logprob, as_id: bool) -> TopLogprob:
    text = name_of(token, entry)
    return TopLogprob(name_of(token, entry, as_id), entry.logprob, list(text.encode()))
