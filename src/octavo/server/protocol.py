"""Bodies of requests, as OpenAI's API and vLLM's extensions of it have them.

Decoding is strict: a field that is not named here is refused, since it would change the answer for all we know. Fields
of `_Ignored` change nothing and are accepted. ``null`` always means the default. Ranges of sampling parameters are
checked by `SamplingParams.validate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from octavo.errors import RequestError
from octavo.frontend.beams import BeamSearchParams
from octavo.sampling_params import MAX_LOGPROBS, PoolingParams, SamplingParams
from octavo.structured import StructuredOutputsParams

MAX_PROMPTS = 1024  # prompts in one completion request, and answers to them
MAX_INPUTS = 2048  # texts in one request for embeddings, as in OpenAI's API
MAX_STOP_LENGTH = 1024  # characters of a stop string
PRIORITY_LIMIT = 2**31
UNLIMITED = 2**31 - 1  # tokens: as many as fit
MAX_SALT = 1024  # characters of cache_salt
JsonSchema = str | dict[str, Any] | bool
GUIDED = ("json", "regex", "choice", "grammar")  # the fields guided_json, …, which vLLM had before


class _Ignored(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Accepted without effect: bookkeeping of OpenAI's platform."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """``include_usage``: the last chunk tells the usage."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # with every piece, not only at the end
    include_obfuscation: Any = None  # padding against eavesdroppers: OpenAI's, without effect


class Asked(_Ignored, kw_only=True, forbid_unknown_fields=True):
    """What every request to the model may set."""

    model: str | None = None
    stream: bool | None = None
    truncate_prompt_tokens: int | None = None
    priority: int | None = None  # lower runs first
    cache_salt: str | None = None  # cached prefixes are shared only with requests that have the same one

    def check(self) -> None:
        """Checks what `SamplingParams.validate` does not know."""
        if abs(self.priority or 0) >= PRIORITY_LIMIT:
            most = PRIORITY_LIMIT - 1
            cause = f"priority is {self.priority}, outside [{-most}, {most}]."
            raise RequestError(cause, "Give a value in that range.", param="priority")
        if len(self.cache_salt or "") > MAX_SALT:
            raise RequestError(f"cache_salt is longer than {MAX_SALT}.", "Shorten it.", param="cache_salt")

    def beams(self, params: SamplingParams) -> BeamSearchParams | None:
        """The beam search that is asked for, with ``params`` for the rest; None: there is no search."""
        return None


class Sampled(Asked, kw_only=True, forbid_unknown_fields=True):
    """What every request for text may set. Names are those of `SamplingParams` where the meaning is."""

    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def sampling_params(self, defaults: SamplingParams) -> SamplingParams:
        """``defaults`` overridden by the fields of the request that are set; validated."""
        given = {name: value for name in _SAMPLING if (value := getattr(self, name, None)) is not None}
        wanted = {**self.own_constraints(), "structured_outputs": self.structured_outputs}
        constraints = {name: one for name, one in wanted.items() if one is not None}
        if len(constraints) > 1:
            cause = f"{' and '.join(constraints)} are both set."
            raise RequestError(cause, "Set one.", param=next(iter(constraints)))
        given["structured_outputs"] = next(iter(constraints.values()), None)
        params = msgspec.structs.replace(defaults, **(given | self.own_sampling()))
        params.validate()
        if any(len(stop) > MAX_STOP_LENGTH for stop in params.stops()):
            cause = f"a stop string is longer than {MAX_STOP_LENGTH} characters."
            raise RequestError(cause, "Shorten it.", param="stop")
        return params

    def own_sampling(self) -> dict[str, Any]:
        """Fields of `SamplingParams` that the API has in words of its own."""
        return {}

    def own_constraints(self) -> dict[str, StructuredOutputsParams | None]:
        """What the output must match, by the API's own fields that can say so."""
        return {}


def check_metadata(metadata: Mapping[str, str] | None) -> None:
    """OpenAI's bounds; raises `RequestError`."""
    pairs = (metadata or {}).items()
    if len(pairs) > 16 or any(len(key) > 64 or len(value) > 512 for key, value in pairs):
        cause = "metadata has more than 16 pairs, or a key over 64 or a value over 512 characters."
        raise RequestError(cause, "Send less.", param="metadata")


# --- completions ------------------------------------------------------------------------------------------------------


class JsonSchemaFormat(msgspec.Struct, forbid_unknown_fields=True):
    """``strict`` changes nothing: the schema always holds."""

    name: str | None = None
    description: str | None = None
    schema: JsonSchema | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True):
    """OpenAI's ``response_format``."""

    type: str
    json_schema: JsonSchemaFormat | None = None

    def params(self, field: str = "response_format") -> StructuredOutputsParams | None:
        """What the output must match; None for text. Raises `RequestError`, naming ``field``, for an unknown type."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutputsParams(json_object=True)
        if self.type != "json_schema":
            what = f"{field} {self.type[:100]!r} is not supported."
            raise RequestError(what, "Use text, json_object or json_schema.", param=field)
        if self.json_schema is None or self.json_schema.schema is None:
            raise RequestError(f"{field} has no schema (json_schema.schema).", "Send the schema.", param=field)
        return StructuredOutputsParams(json=self.json_schema.schema)


class Generation(Sampled, kw_only=True, forbid_unknown_fields=True):
    """What both kinds of completion share."""

    stream_options: StreamOptions | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    return_timings: bool | None = None  # how long it took, in the answer or in the stream's last chunk
    return_tokens_as_token_ids: bool | None = None  # names of tokens in log-probabilities: token_id:7
    response_format: ResponseFormat | None = None
    guided_json: JsonSchema | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    use_beam_search: bool | None = None  # the ``n`` best answers
    length_penalty: float | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return bool(self.include_usage and self.stream_options and self.stream_options.continuous_usage_stats)

    def beams(self, params: SamplingParams) -> BeamSearchParams | None:
        if not self.use_beam_search:
            return None
        return BeamSearchParams(
            beam_width=params.n,
            max_tokens=params.max_tokens or UNLIMITED,
            ignore_eos=params.ignore_eos,
            temperature=self.temperature or 0.0,
            length_penalty=1.0 if self.length_penalty is None else self.length_penalty,
            include_stop_str_in_output=params.include_stop_str_in_output,
        )

    def own_constraints(self) -> dict[str, StructuredOutputsParams | None]:
        found = {"response_format": self.response_format.params() if self.response_format else None}
        plain = StructuredOutputsParams(whitespace_pattern=self.guided_whitespace_pattern)
        for name in GUIDED:
            value = getattr(self, f"guided_{name}")
            found[f"guided_{name}"] = None if value is None else msgspec.structs.replace(plain, **{name: value})
        return found

    def check(self) -> None:
        """Checks what concerns more than one field."""
        super().check()
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is set, but stream is not.", "Set stream.", param="stream_options")
        if self.length_penalty is not None and not self.use_beam_search:
            cause = "length_penalty is set, but use_beam_search is not."
            raise RequestError(cause, "Set use_beam_search.", param="length_penalty")
        if self.stream and self.prompt_logprobs is not None:
            raise RequestError("prompt_logprobs cannot be streamed.", "Unset stream.", param="prompt_logprobs")


def check_top_logprobs(count: int | None) -> None:
    """Raises `RequestError` for more than there are, or less than none."""
    if not 0 <= (count or 0) <= MAX_LOGPROBS:
        cause = f"top_logprobs is {count}, outside [0, {MAX_LOGPROBS}]."
        raise RequestError(cause, "Give a value in that range.", param="top_logprobs")


def several(name: str, given: str | list[str | int | list[int]], most: int) -> list[str | list[int]]:
    """The prompts of the field ``name``, one entry each: a text or token ids; raises `RequestError`."""
    if isinstance(given, str):
        found: list[str | list[int]] = [given]
    else:
        tokens = [part for part in given if isinstance(part, int)]
        found = [part for part in given if not isinstance(part, int)]
        if tokens and found:
            raise RequestError(f"{name} mixes tokens and prompts.", "Send a list of one kind.", param=name)
        found = [tokens] if tokens else found
    if not 0 < len(found) <= most:
        cause = f"{name} holds {len(found)} prompts, outside [1, {most}]."
        raise RequestError(cause, "Send at least one, or split the request.", param=name)
    if not all(found):
        raise RequestError("a prompt is empty.", "Send at least one token.", param=name)
    return found


_SAMPLING = set(Generation.__struct_fields__) & set(SamplingParams.__struct_fields__) - {"structured_outputs"}


class CompletionRequest(Generation, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/completions``."""

    prompt: str | list[str | int | list[int]]  # an int is a token: all or none
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None

    @property
    def only_echo(self) -> bool:
        """``max_tokens`` 0 with ``echo``: how evaluation harnesses score a text."""
        return bool(self.echo) and self.max_tokens == 0

    def own_sampling(self) -> dict[str, Any]:
        own: dict[str, Any] = {"logprobs": self.logprobs}
        if self.echo and self.logprobs is not None and self.prompt_logprobs is None:
            own["prompt_logprobs"] = self.logprobs
        if self.only_echo:
            own["max_tokens"] = 1  # made, and not shown
        return own

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt: a text or token ids."""
        return several("prompt", self.prompt, MAX_PROMPTS)

    def check(self) -> None:
        super().check()
        prompts = self.prompts()
        if len(prompts) * (self.n or 1) > MAX_PROMPTS:
            cause = f"{len(prompts)} prompts with n {self.n} are more than {MAX_PROMPTS} answers."
            raise RequestError(cause, "Split the request.", param="n")
        if self.suffix:
            raise RequestError("suffix is not supported.", "Put all text into prompt.", param="suffix")
        if self.best_of not in (None, self.n or 1):
            raise RequestError(f"best_of is {self.best_of}, not n.", "Leave it out and use n.", param="best_of")
        if self.stream and self.echo and self.logprobs is not None:
            raise RequestError("echo with logprobs cannot be streamed.", "Unset stream.", param="echo")


class EmbeddingRequest(Asked, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/embeddings``."""

    input: str | list[str | int | list[int]]  # an int is a token: all or none
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    use_activation: bool | None = None
    add_special_tokens: bool | None = None

    def prompts(self) -> list[str | list[int]]:
        """One entry a text: itself or its token ids."""
        return several("input", self.input, MAX_INPUTS)

    def check(self) -> None:
        super().check()
        self.prompts()
        if self.stream:
            raise RequestError("stream is set, and an embedding comes whole.", "Leave it out.", param="stream")

    def pooling_params(self) -> PoolingParams:
        return PoolingParams(
            dimensions=self.dimensions,
            use_activation=self.use_activation,
            truncate_prompt_tokens=self.truncate_prompt_tokens,
        )


class ChatRequest(Generation, kw_only=True, forbid_unknown_fields=True):
    """``POST /v1/chat/completions``."""

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    reasoning_effort: str | None = None  # a variable of the template, if it has one of this name
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    prediction: Any = None  # a guess that makes OpenAI's models faster; the answer is the same
    verbosity: Literal["medium"] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        super().check()
        if self.functions:
            raise RequestError("functions are the former form of tools.", "Send tools.", param="functions")
        if self.function_call not in (None, "none", "auto"):
            cause = "function_call is the former form of tool_choice."
            raise RequestError(cause, "Send tool_choice.", param="function_call")
        if self.modalities not in (None, ["text"]):
            raise RequestError(f"modalities is {self.modalities}.", "Only text is made here.", param="modalities")
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs is set, but logprobs is not.", "Set logprobs.", param="top_logprobs")
        check_top_logprobs(self.top_logprobs)

    def template_kwargs(self) -> dict[str, Any]:
        """Variables for the chat template."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | (self.chat_template_kwargs or {})

    def own_sampling(self) -> dict[str, Any]:
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return {
            "max_tokens": limit,  # without one the answer may fill the context
            "logprobs": (self.top_logprobs or 0) if self.logprobs else None,
        }


class TokenizeRequest(_Ignored, kw_only=True, forbid_unknown_fields=True):
    """``POST /tokenize``: of a text, or of a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Ignored, kw_only=True, forbid_unknown_fields=True):
    """``POST /detokenize``."""

    model: str | None = None
    tokens: list[int]
