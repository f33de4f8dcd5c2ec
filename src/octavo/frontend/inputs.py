"""From what a user gives to what the core takes: a prompt and `SamplingParams` become `Request`s.

Every limit is checked here, with the numbers in the error, so that the core refuses nothing that got this far except
for want of room.
"""

from __future__ import annotations

import random
import sys
import time
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypeAlias, TypedDict, TypeGuard

import msgspec

from octavo.cache.prefix import page_hashes
from octavo.errors import ContextExceeded, RequestError
from octavo.sampling_params import SEED_LIMIT, PoolingParams, SamplingParams
from octavo.structured import Guide
from octavo.types import EngineInfo, Request, Sampling

if TYPE_CHECKING:
    from octavo.hub.pooling import Pooler
    from octavo.hub.tokenizer import Tokenizer


class TextPrompt(TypedDict):
    """A text to continue."""

    prompt: str


class TokensPrompt(TypedDict):
    """The same as token ids; ``prompt`` is the text they came from, if that is known."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]


# A text, its token ids, or either as a dict: `TextPrompt` or `TokensPrompt`.
Prompt: TypeAlias = str | list[int] | Mapping[str, Any]
Params: TypeAlias = SamplingParams | PoolingParams


@dataclass(frozen=True)
class Prepared:
    """A checked request of a user: ``params.n`` requests for the core, and what is needed to read their answers."""

    id: str
    prompt: str | None  # None when only token ids were given
    prompt_token_ids: list[int]
    params: SamplingParams
    requests: list[Request]
    kept_ids: frozenset[int] = frozenset()  # special tokens whose text is needed although others are skipped
    arrival_time: float = field(default_factory=time.monotonic)


class InputProcessor:
    """Makes requests for one engine and one tokenizer. Safe to use from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        info: EngineInfo,
        *,
        eos_ids: Collection[int] = (),
        defaults: Mapping[str, Any] | None = None,
        seeds: random.Random | None = None,
        clamp_max_tokens: bool = False,
        pooler: Pooler | None = None,
    ) -> None:
        """``defaults`` are sampling parameters of the model's own (`default_params`); ``seeds`` draws the seeds of
        requests that bring none. With ``clamp_max_tokens`` an output that would outgrow the context is cut at its end,
        as vLLM's ``LLM`` does, instead of refused; `process_ids` can ask for it for one request. ``pooler`` is that of
        an engine that embeds and generates nothing.
        """
        self.tokenizer = tokenizer
        self.info = info
        self.eos_ids = frozenset(eos_ids)
        self._defaults = dict(defaults or {})
        self._seeds = seeds or random.SystemRandom()
        self._clamp = clamp_max_tokens
        self._pooler = pooler

    @property
    def pooler(self) -> Pooler:
        """How the engine embeds; raises `RequestError` if it generates text."""
        if self._pooler is None:
            raise RequestError("this engine generates text and does not embed it.", "Start one with --runner pooling.")
        return self._pooler

    @property
    def embeds(self) -> bool:
        """Whether the engine embeds and generates nothing."""
        return self._pooler is not None

    def check_generates(self) -> None:
        """Raises `RequestError` if the engine embeds."""
        if self.embeds:
            raise RequestError("this engine embeds texts and generates none.", "Start one with --runner generate.")

    def default_params(self) -> SamplingParams:
        """Sampling parameters for requests that bring none: the model's own over those of `SamplingParams`."""
        return SamplingParams(**self._defaults)

    def process_ids(
        self,
        id: str,
        ids: Sequence[int],
        params: Params | None = None,
        *,
        text: str | None = None,
        priority: int = 0,
        salt: bytes = b"",
        clamp_max_tokens: bool = False,
    ) -> Prepared:
        """Checks and converts a request; raises `RequestError` naming the field, its value and the limit.

        ``ids`` and ``text``, what they came from, if that is known, are as `encode_prompts` tells them.
        """
        if isinstance(params, PoolingParams):
            return self._to_embed(id, list(ids), params, text, priority, salt)
        self.check_generates()
        clamp = self._clamp or clamp_max_tokens or params is None  # a default is no demand
        params = params or self.default_params()
        params.validate()
        params.check_logprobs(self.info.max_logprobs)
        ids, text = self._truncated(list(ids), text, params)
        self._check_ids("prompt", ids)
        sampling = self._sampling(params, self._max_tokens(params, len(ids), clamp))
        first = request_of(self.info, id, ids, sampling, priority=priority, salt=salt)
        requests = [
            msgspec.structs.replace(
                first,
                id=id if params.n == 1 else f"{id}_{i}",
                sampling=msgspec.structs.replace(
                    sampling,
                    seed=self._seed(params.seed, i),
                    prompt_logprobs=params.prompt_logprobs if i == 0 else None,  # they have one prompt
                ),
            )
            for i in range(params.n)
        ]
        return Prepared(id, text, ids, params, requests)

    def _truncated(self, ids: list[int], text: str | None, params: SamplingParams) -> tuple[list[int], str | None]:
        """The end of the prompt, if only that is wanted; then its text is not known."""
        keep = params.truncate_prompt_tokens
        if keep == -1:
            keep = max(1, self.info.max_model_len - (params.max_tokens or 1))
        return (ids, text) if keep is None or len(ids) <= keep else (ids[-keep:], None)

    def _to_embed(
        self, id: str, ids: list[int], params: PoolingParams, text: str | None, priority: int, salt: bytes
    ) -> Prepared:
        sampling = Sampling(max_tokens=0, pooling=self.pooler.pooling(params.dimensions, params.use_activation))
        keep, limit = params.truncate_prompt_tokens, self.info.max_model_len
        if keep is not None and not -1 <= keep < 2**31:
            cause = f"truncate_prompt_tokens is {keep}, outside [-1, {2**31 - 1}]."
            raise RequestError(cause, "Give a value in that range.", param="truncate_prompt_tokens")
        keep = limit if keep == -1 else keep
        if keep is not None and len(ids) > keep:
            ids, text = self._first(ids, text, keep), None
        self._check_ids("prompt", ids)
        if not 0 < len(ids) <= limit:
            raise ContextExceeded(
                f"the prompt has {len(ids)} tokens, outside [1, {limit}].",
                "Send at least one token, and to cut what is too long truncate_prompt_tokens -1.",
                param="prompt",
            )
        request = request_of(self.info, id, ids, sampling, priority=priority, salt=salt)
        return Prepared(id, text, ids, SamplingParams(max_tokens=None, detokenize=False), [request])

    def _first(self, ids: list[int], text: str | None, keep: int) -> list[int]:
        """The first ``keep`` of ``ids``, among them the special tokens around the text that they came from."""
        bare = ids if text is None else self.encode(text, add_special_tokens=False)
        extra = len(ids) - len(bare)
        begin = next((at for at in range(extra + 1) if ids[at : at + len(bare)] == bare), None)
        if begin is None or extra > keep:
            return ids[:keep]
        return [*ids[:begin], *bare[: keep - extra], *ids[begin + len(bare) :]]

    def encode_prompts(
        self, prompts: Iterable[Prompt], *, add_special_tokens: bool = True
    ) -> list[tuple[str | None, Sequence[int]]]:
        """(text if it is known, token ids) of each of ``prompts``; texts are encoded together."""
        split = [self._split(prompt) for prompt in prompts]
        texts = [text or "" for text, ids in split if ids is None]
        encoded = iter(self.encode_texts(texts, add_special_tokens=add_special_tokens))
        return [(text, next(encoded) if ids is None else ids) for text, ids in split]

    def encode_texts(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """As `encode`, but several on several threads, and none if one cannot fit: its tokens would take seconds."""
        for text in texts:
            self._check_length(text)
        if len(texts) < 2 or self.tokenizer is None:
            return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]
        return self.tokenizer.encode_all(texts, add_special_tokens=add_special_tokens)

    def _check_length(self, text: str) -> None:
        """Raises `ContextExceeded` for a text of more characters than the context can hold."""
        limit = self.info.max_model_len
        if len(text) > limit and len(text) > limit * self._longest_token:
            raise ContextExceeded(
                f"the prompt has {len(text)} characters: more than max_model_len, which is {limit} tokens, can hold.",
                "Shorten the prompt.",
                param="prompt",
            )

    @cached_property
    def _longest_token(self) -> int:
        """Characters of the longest token: none stands for more, but for unknown words of old tokenizers."""
        names = map(self.tokenizer.id_to_token, range(self.tokenizer.vocab_size)) if self.tokenizer else ()
        return max((len(name) for name in names if name is not None), default=1)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; raises `RequestError` without a tokenizer."""
        if self.tokenizer is None:
            raise RequestError(
                "the prompt is text, but the engine was started without a tokenizer.",
                "Send prompt_token_ids, or start without skip_tokenizer_init.",
                param="prompt",
            )
        return list(self.tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def _split(self, prompt: object) -> tuple[str | None, list[int] | None]:
        """(text, ids) of any form of prompt; one of them may be missing."""
        if isinstance(prompt, str):
            return prompt, None
        if isinstance(prompt, Mapping):
            given = {key: value for key, value in prompt.items() if value is not None}
            text, ids = given.pop("prompt", None), given.pop("prompt_token_ids", None)
            if not given and isinstance(text, str | None) and (_is_list(ids) or (text is not None and ids is None)):
                return text, ids if ids is None else list(ids)
            what = f"has {', '.join(f'{key!r} of type {type(value).__name__}' for key, value in prompt.items())}"
            what = what if prompt else "is empty: it has no keys"
        elif _is_list(prompt):
            return None, list(prompt)
        else:
            what = f"is of type {type(prompt).__name__}"
        raise RequestError(
            f"a prompt {what}.",
            'Give a string, a list of token ids, {"prompt": …} or {"prompt_token_ids": […]}.',
            param="prompt",
        )

    def _check_ids(self, name: str, ids: Collection[int]) -> None:
        vocab = self.info.vocab_size
        if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab):
            return
        for token in ids:
            if type(token) is not int or not 0 <= token < vocab:
                raise RequestError(
                    f"{name} holds {token!r}, which is not a token id in [0, {vocab - 1}].",
                    "Encode with this model's tokenizer.",
                    param=name,
                )

    def _sampling(self, params: SamplingParams, max_tokens: int) -> Sampling:
        extra = tuple(params.stop_token_ids or ())
        for name, ids in (
            ("stop_token_ids", extra),
            ("logit_bias", params.logit_bias or ()),
            ("allowed_token_ids", params.allowed_token_ids or ()),
        ):
            self._check_ids(name, ids)
        ends = set(extra) if params.ignore_eos else self.eos_ids | set(extra)
        end_ids = tuple(sorted(ends))
        return Sampling(
            max_tokens=max_tokens,
            min_tokens=params.min_tokens,
            temperature=float(params.temperature),
            top_p=float(params.top_p),
            top_k=max(params.top_k, 0),
            min_p=float(params.min_p),
            repetition_penalty=float(params.repetition_penalty),
            presence_penalty=float(params.presence_penalty),
            frequency_penalty=float(params.frequency_penalty),
            end_ids=end_ids,
            masked_until_min=end_ids if params.min_tokens else (),
            logit_bias=dict(params.logit_bias or {}),
            allowed_token_ids=tuple(params.allowed_token_ids or ()),
            bad_words=self._bad_words(params.bad_words or []),
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
            guide=self._guide(params),
        )

    def _guide(self, params: SamplingParams) -> Guide | None:
        if params.structured_outputs is None:
            return None
        if self.tokenizer is None:
            raise RequestError(
                "structured output needs a tokenizer, and the engine was started without one.",
                "Start without skip_tokenizer_init.",
                param="structured_outputs",
            )
        return Guide(whole=params.structured_outputs.spec())

    def _max_tokens(self, params: SamplingParams, length: int, clamp: bool) -> int:
        limit, wanted = self.info.max_model_len, params.max_tokens
        room = limit - length
        if length == 0:
            raise RequestError("the prompt is empty.", "Send at least one token.", param="prompt")
        if room < 1 or (wanted is not None and wanted > room and not clamp):
            asked = "at least 1" if wanted is None else wanted
            raise ContextExceeded(
                f"the prompt has {length} tokens and max_tokens is {asked}: "
                f"{length + (wanted or 1)} together, more than max_model_len, which is {limit}.",
                "Shorten the prompt." if room < 1 else f"Ask for at most {room} tokens, or shorten the prompt.",
                param="prompt" if room < 1 else "max_tokens",
            )
        return room if wanted is None else min(wanted, room)

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as it is written at the start of a text and after a space."""
        sequences: dict[tuple[int, ...], None] = {}
        for word in words:
            if not word.strip():
                raise RequestError(f"bad_words holds {word!r}.", "Give words.", param="bad_words")
            for form in (word.lstrip(), " " + word.lstrip()):
                sequences[tuple(self.encode(form, add_special_tokens=False))] = None
        return tuple(s for s in sequences if s)

    def _seed(self, seed: int | None, child: int) -> int:
        """The seed of output ``child``: the user's own for the first, others derived from it and as good as random."""
        if seed is None:
            return self._seeds.randrange(SEED_LIMIT)
        if child == 0:
            return seed
        mixed = blake2b(b"%d/%d" % (seed, child), digest_size=8).digest()
        return int.from_bytes(mixed, "little", signed=True)


def request_of(
    info: EngineInfo, id: str, ids: Sequence[int], sampling: Sampling, *, priority: int = 0, salt: bytes = b""
) -> Request:
    """What an engine gets of a prompt, with the keys of its pages if it shares them."""
    packed = pack(ids)
    keys = page_hashes(info.hash_key, salt, packed, info.page_size) if info.prefix_caching else b""
    return Request(id=id, token_ids=packed, page_hashes=keys, sampling=sampling, priority=priority, salt=salt)


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def pack(values: Sequence[Any], kind: Literal["i", "f"] = "i") -> bytes:
    """Token ids as int32, or numbers as float32, little endian."""
    packed = array(kind, values)
    if sys.byteorder != "little":
        packed.byteswap()
    return packed.tobytes()


def unpack(values: bytes, kind: Literal["i", "f"]) -> array[Any]:
    """What `pack` packed."""
    found = array(kind)
    found.frombytes(values)
    if sys.byteorder != "little":
        found.byteswap()
    return found
