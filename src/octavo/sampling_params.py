"""What a user says about sampling, checked field by field, or about an embedding; the core sees `types.Sampling`."""

from __future__ import annotations

import copy
import math
import re
from typing import Any, Self

import msgspec

from octavo.errors import RequestError
from octavo.structured import StructuredOutputsParams

MAX_LOGPROBS = 1024  # the most that --max-logprobs allows: what the kernels list of a row
MAX_N = 128
MAX_STOP = 64
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 1024
SEED_LIMIT = 2**63

# Least and greatest value of numbers in `SamplingParams`; top_p lies above its least one.
BOUNDS: dict[str, tuple[float, float]] = {
    "n": (1, MAX_N),
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0.01, 100),  # products with logits stay finite
    "seed": (-SEED_LIMIT, SEED_LIMIT - 1),
    "max_tokens": (1, 2**31 - 1),
    "min_tokens": (0, 2**31 - 1),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
    "truncate_prompt_tokens": (-1, 2**31 - 1),
}
# Greatest number of entries.
LENGTHS = {"stop": MAX_STOP, "logit_bias": MAX_LOGIT_BIAS, "bad_words": MAX_BAD_WORDS}


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How to sample; names and defaults are those of vLLM's class of this name.

    Raises `RequestError` from `validate` (called by every entry point) with the field, the value and the limit.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0 and -1 both mean: all tokens
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    truncate_prompt_tokens: int | None = None  # keep so many at the end of the prompt; -1: as many as fit

    def __post_init__(self) -> None:
        """Takes numbers and arrays of NumPy and torch too: sweeps over parameters are full of them."""
        for name in self.__struct_fields__:
            if hasattr(value := getattr(self, name), "tolist"):
                setattr(self, name, value.tolist())

    def stops(self) -> list[str]:
        """The stop strings as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    def clone(self) -> Self:
        """A copy that shares nothing with this one."""
        return copy.deepcopy(self)

    def check_logprobs(self, limit: int) -> None:
        """Raises `RequestError` for more log-probabilities than ``limit``, which is the engine's."""
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > limit:
                cause = f"{name} is {getattr(self, name)}, outside [0, {limit}]."
                raise RequestError(cause, "Ask for fewer, or raise --max-logprobs.", param=name)

    def validate(self) -> None:
        """Checks every field that needs neither tokenizer nor model."""
        _of_declared_types(self)
        for name, (low, high) in BOUNDS.items():
            _within(name, getattr(self, name), low, high, above=name == "top_p")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, above max_tokens, which is {self.max_tokens}.",
                "Lower min_tokens or raise max_tokens.",
                param="min_tokens",
            )
        if self.truncate_prompt_tokens == 0:
            cause = "truncate_prompt_tokens is 0: nothing would be left of the prompt."
            raise RequestError(cause, "Give 1 or more, or -1.", param="truncate_prompt_tokens")
        for name, longest in LENGTHS.items():
            _at_most(name, self.stops() if name == "stop" else getattr(self, name) or (), longest)
        if any(not s for s in self.stops()):
            raise RequestError("stop contains an empty string.", "Remove it.", param="stop")
        if self.stops() and not self.detokenize:
            raise RequestError("stop strings need text, but detokenize is false.", "Set detokenize=True.", param="stop")
        for token, bias in (self.logit_bias or {}).items():
            _within(f"logit_bias[{token}]", bias, -100, 100)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty.", "Name at least one token.", param="allowed_token_ids")
        if self.structured_outputs is not None:
            self.structured_outputs.spec()


def _of_declared_types(params: SamplingParams) -> None:
    """Python checks no type when a struct is made, and a wrong one must not get as far as the engine."""
    try:
        msgspec.convert(msgspec.structs.asdict(params), SamplingParams)
    except msgspec.ValidationError as error:
        found = re.fullmatch(r"(.*) - at (?:`key` in )?`\$\.(\w+)([^`]*)`", str(error))
        reason, name, place = found.groups() if found else (str(error), None, "")
        raise RequestError(f"{name or 'a field'}{place}: {reason}.", "Give a value of that type.", param=name) from None


def _within(name: str, value: float | None, low: float, high: float, *, above: bool = False) -> None:
    if value is None:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"{name} is {value!r}, not a finite number.", f"Give a number up to {high}.", param=name)
    if value > high or value < low or (above and value == low):
        raise RequestError(
            f"{name} is {value!r}, outside {'(' if above else '['}{low}, {high}].",
            "Give a value in that range.",
            param=name,
        )


def _at_most(name: str, values: Any, limit: int) -> None:
    if len(values) > limit:
        raise RequestError(f"{name} has {len(values)} entries, more than {limit}.", "Send fewer.", param=name)


class PoolingParams(msgspec.Struct, kw_only=True):
    """As vLLM's. ``use_activation``: whether the embedding gets length 1; None: what the model's files say.

    ``dimensions`` of a model that was trained for fewer than all. ``truncate_prompt_tokens``: only the first so many
    tokens of a text and those that end every text; -1: as many as fit.
    """

    dimensions: int | None = None
    use_activation: bool | None = None
    truncate_prompt_tokens: int | None = None
