"""Matchers of llguidance, and what they may take of the machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from octavo.structured import GrammarSpec

# llguidance follows references between rules by recursion, and a chain of a few thousand of them overflows the usual
# stack, which would kill the process. Virtual; a level takes below 8 kB, and `MAX_GRAMMAR_BYTES` holds 16,384.
STACK_BYTES = 512 << 20
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 50_000,
    "max_lexer_states": 20_000,  # about 2 kB each
    "max_grammar_size": 250_000,
    "verbose_errors": False,
}


def check(tokenizer: Any, spec: GrammarSpec) -> str:
    """Why ``spec`` is refused, once it is compiled and its first mask computed; empty if it is not."""
    try:
        matcher = make_matcher(tokenizer, spec)
    except (ValueError, RecursionError) as error:
        return f"The grammar is refused: {brief(str(error))}."
    if not matcher.is_error():
        matcher.compute_bitmask()
    return f"The grammar is refused: {brief(matcher.get_error())}." if matcher.is_error() else ""


def make_matcher(tokenizer: Any, spec: GrammarSpec) -> Any:
    """An `LLMatcher`; raises `ValueError` or `RecursionError` for GBNF that cannot be read."""
    import llguidance

    return llguidance.LLMatcher(tokenizer, _source(spec), log_level=0, limits=llguidance.LLParserLimits(**_LIMITS))


def make_tokenizer(
    tokens: list[bytes], special: list[int], ends: list[int], encode: Callable[[str | bytes], list[int]]
) -> Any:
    """An `LLTokenizer`."""
    import llguidance

    wrapper = llguidance.TokenizerWrapper(_Encoder(tokens, special, ends, encode))
    return llguidance.LLTokenizer(wrapper, eos_token=ends)


class _Encoder:
    """What llguidance wants of a tokenizer."""

    bos_token_id = None

    def __init__(
        self, tokens: list[bytes], special: list[int], ends: list[int], encode: Callable[[str | bytes], list[int]]
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = ends[0]
        self._encode = encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text)


def _source(spec: GrammarSpec) -> str:
    """What `LLMatcher` takes; raises `ValueError` or `RecursionError` for GBNF that cannot be read."""
    from llguidance import LLMatcher
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if spec.kind == "json_schema":
        made = LLMatcher.grammar_from_json_schema(spec.text)
    elif spec.kind == "regex":
        made = LLMatcher.grammar_from_regex(spec.text)
    elif spec.kind == "lark":
        made = LLMatcher.grammar_from_lark(spec.text)
    else:
        try:
            made = LLMatcher.grammar_from_lark(gbnf_to_lark(spec.text))
        except RecursionError:
            raise
        except Exception as error:  # it raises nothing narrower for a rule that is missing
            raise ValueError(f"it is no GBNF: {error}") from None
    return str(made)


def brief(message: str) -> str:
    """The part of llguidance's message that is for people."""
    text = message.split("<state>")[0].replace("<non-verbose/>", "")
    return " ".join(text.split())[:300].rstrip(". ")
