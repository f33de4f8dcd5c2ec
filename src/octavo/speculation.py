"""What a user sets of speculative decoding, under vLLM's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from octavo.errors import ConfigError

MOST_TOKENS = 64  # of a draft, and of an n-gram
DEFAULT_LOOKUP = 5  # tokens of an n-gram, as in vLLM


@dataclass(frozen=True)
class Speculation:
    """Drafts of up to ``num_speculative_tokens`` tokens, found by the longest n-gram at a text's end, of
    ``prompt_lookup_min`` to ``prompt_lookup_max`` tokens, that stood in it before."""

    num_speculative_tokens: int
    prompt_lookup_max: int
    prompt_lookup_min: int

    @classmethod
    def of(cls, given: object) -> Speculation:
        """From ``speculative_config``; raises `ConfigError`. Of the two bounds one that is missing is as the other."""
        if not isinstance(given, Mapping):
            raise ConfigError(f"speculative_config is {given!r}.", 'Give a dict: {"method": "ngram", …}.')
        fields = dict(given)
        method = fields.pop("method", None)
        if method != "ngram":
            raise ConfigError(
                f"speculative_config.method is {method!r}; octavo finds drafts in the text itself, by n-grams.",
                'Give "method": "ngram", or leave speculative_config out.',
            )
        known = ("num_speculative_tokens", "prompt_lookup_max", "prompt_lookup_min")
        unknown = sorted(set(fields).difference(known))
        if unknown:
            raise ConfigError(
                f"speculative_config has {', '.join(unknown)}, which n-grams do not need.",
                f"Give no more than method, {', '.join(known)}.",
            )
        least, most = fields.get("prompt_lookup_min"), fields.get("prompt_lookup_max")
        most = DEFAULT_LOOKUP if most is None and least is None else most
        values = (
            _checked("num_speculative_tokens", fields.get("num_speculative_tokens")),
            _checked("prompt_lookup_max", least if most is None else most),
            _checked("prompt_lookup_min", most if least is None else least),
        )
        if values[2] > values[1]:
            raise ConfigError(
                f"speculative_config.prompt_lookup_min is {values[2]}, more than prompt_lookup_max, {values[1]}.",
                "Lower the first or raise the second.",
            )
        return cls(*values)


def _checked(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_TOKENS:
        raise ConfigError(f"speculative_config.{name} is {value!r}.", f"Give a number from 1 to {MOST_TOKENS}.")
    return value
