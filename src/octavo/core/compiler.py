"""Compiles grammars that come from strangers.

Their text is bounded (`structured`), and llguidance's own limits bound most of what one call may take, but not all
of it: an intersection of a dozen regexes runs for hours within its fuel, and nothing can end a thread that is inside of
it. So every new grammar is compiled first in a process of its own (`trial`), which is killed when it takes too long and
has a limit on its memory; only what came through that is compiled here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from octavo.core.constraint import GRACE_SECONDS, Grammar, TokenTexts
from octavo.core.matcher import make_matcher, make_tokenizer
from octavo.core.trial import Trial
from octavo.core.vocabulary import Vocabulary
from octavo.errors import OctavoError
from octavo.log import get_logger
from octavo.structured import GrammarSpec

_BASE_BYTES = 64 << 10  # measured over many schemas; the lexer's states grow with use
_BYTES_PER_CHARACTER = 400


class Compiler:
    """Makes `Grammar`s for one vocabulary, which is loaded with the first one. Used by one thread."""

    def __init__(self, load: Callable[[], Vocabulary]) -> None:
        self._load = load
        self._tokenizer: Any = None
        self._trial: Trial | None = None
        self._mask_words = 0
        self.texts = TokenTexts((), lambda text: None)

    def compile(self, spec: GrammarSpec) -> Grammar | str:
        """The grammar, or why it cannot be one; raises `OctavoError` for what is no fault of its."""
        try:
            trial = self._trial or self._set_up(self._load())
            return trial.refusal(spec) or self._compile(spec)
        except OctavoError:
            raise
        except BaseException as error:  # a panic of llguidance is no Exception; this thread must go on
            get_logger().exception("a grammar could not be compiled")
            return f"The grammar could not be compiled: {type(error).__name__}."

    def kill(self) -> None:
        """Ends the process, from any thread; what it is compiling is refused, and what comes later."""
        if self._trial is not None:
            self._trial.kill()

    def close(self) -> None:
        """After `kill`, from the thread that compiles."""
        if self._trial is not None:
            self._trial.close()

    def _set_up(self, vocabulary: Vocabulary) -> Trial:
        # Without a token that ends a text, one is made up outside of the logits: it is allowed and never sampled.
        size = len(vocabulary.tokens)
        ends = vocabulary.ends or [size]
        tokens = vocabulary.tokens if vocabulary.ends else [*vocabulary.tokens, b"<end>"]
        special = sorted({*vocabulary.special, *ends})
        self._mask_words = -(-len(tokens) // 32)
        trial = Trial(tokens, special, ends)  # starts while the table is built here
        self._tokenizer = make_tokenizer(tokens, special, ends, _encoder(vocabulary))
        self.texts = TokenTexts(vocabulary.tokens, vocabulary.tokenizer.token_to_id)
        self._trial = trial
        return trial

    def _compile(self, spec: GrammarSpec) -> Grammar:
        matcher = make_matcher(self._tokenizer, spec)
        first = matcher.deep_copy()
        begin = time.perf_counter()
        mask = np.frombuffer(first.compute_bitmask(), np.int32)[: self._mask_words]
        size = _BASE_BYTES + _BYTES_PER_CHARACTER * len(spec.text) + mask.nbytes
        grammar = Grammar(matcher, mask, size, self._tokenizer.tokenize_bytes)
        grammar.slow = time.perf_counter() - begin > GRACE_SECONDS
        return grammar


def _encoder(vocabulary: Vocabulary) -> Callable[[str | bytes], list[int]]:
    """Ids of text that follows other text: no space is put before it."""
    encode = vocabulary.tokenizer.encode
    anchor = encode("\n", add_special_tokens=False)

    def call(text: str | bytes) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        ids = encode("\n" + text, add_special_tokens=False)
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else encode(text, add_special_tokens=False)

    return call
