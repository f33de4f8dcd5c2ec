"""Beam search over the answers of an engine: each step asks for the likeliest next tokens of every beam.

The search is vLLM's: of each beam ``2 * beam_width`` candidates; those that end are put aside, of the others the best
``beam_width`` go on; the score is the sum of log-probabilities over ``length ** length_penalty``, where the length is
that of prompt and answer without the end token. Nothing ends it early but ``max_tokens``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import msgspec

from octavo.errors import RequestError
from octavo.sampling_params import MAX_LOGPROBS, SamplingParams
from octavo.types import Logprob, TokenLogprobs, TokenOutput

Candidates = dict[int, Logprob]  # the token that was drawn, then the likeliest
MAX_PENALTY = 50.0  # powers of lengths stay finite
# What a request with beam search may set; anything else would have no effect.
_MEANT = {"n", "temperature", "seed", "max_tokens", "logprobs", "ignore_eos", "include_stop_str_in_output"}
_MEANT |= {"detokenize", "skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens"}


class BeamSearchParams(msgspec.Struct):
    """How to search; names and defaults are those of vLLM's class of this name.

    With a ``temperature`` above 0 the token that it draws is a candidate, too.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False

    def validate(self, max_logprobs: int, *, width: str = "beam_width") -> None:
        """Raises `RequestError`; an engine gives ``max_logprobs`` candidates at most. ``width`` is its caller's name of
        ``beam_width``."""
        for name, value, kind, low, high in (
            (width, self.beam_width, int, 1, max_logprobs // 2),
            ("max_tokens", self.max_tokens, int, 1, 2**31 - 1),
            ("length_penalty", self.length_penalty, int | float, -MAX_PENALTY, MAX_PENALTY),
        ):
            if not isinstance(value, kind) or not math.isfinite(value):
                raise RequestError(f"{name} is {value!r}.", "Give a number.", param=name)
            if not low <= value <= high:
                remedy = "Give a value in that range."
                if name == width and high < MAX_LOGPROBS // 2:
                    remedy = f"Give a value in that range, or raise --max-logprobs to {2 * value}."
                raise RequestError(f"{name} is {value}, outside [{low}, {high}].", remedy, param=name)
        self.step().validate()

    def step(self, shown: int = 0) -> SamplingParams:
        """What each beam asks for; ``shown`` log-probabilities at least."""
        return SamplingParams(max_tokens=1, temperature=self.temperature, logprobs=max(2 * self.beam_width, shown))


def check_only_meant(params: SamplingParams) -> None:
    """Raises `RequestError` for a parameter that has no effect on a search."""
    plain = SamplingParams()
    for name in params.__struct_fields__:
        if name not in _MEANT and getattr(params, name) != getattr(plain, name):
            raise RequestError(f"{name} has no effect on a beam search.", "Leave one of them out.", param=name)


@dataclass
class BeamSearchSequence:
    """One beam. ``tokens`` are the prompt's and the answer's; ``text`` is theirs, set in the end."""

    tokens: list[int]
    logprobs: list[Candidates] = field(default_factory=list)
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: str | None = None

    def longer(self, token: int, candidates: Candidates) -> BeamSearchSequence:
        """With one more token, which is one of ``candidates``."""
        total = self.cum_logprob + candidates[token].logprob
        return BeamSearchSequence([*self.tokens, token], [*self.logprobs, candidates], total)


@dataclass
class BeamSearchOutput:
    """The best sequences of one prompt, the best first."""

    sequences: list[BeamSearchSequence]


class Search:
    """The search from one prompt, at most ``most`` tokens long. ``ends`` are the tokens that end an answer."""

    def __init__(self, prompt: Sequence[int], params: BeamSearchParams, ends: Collection[int], most: int) -> None:
        self._params = params
        self._ends = frozenset() if params.ignore_eos else frozenset(ends)
        self._left = min(params.max_tokens, most)
        self._beams = [BeamSearchSequence(list(prompt))]
        self._ended: list[BeamSearchSequence] = []

    def prompts(self) -> list[list[int]]:
        """What the next tokens are wanted of; empty at the end."""
        return [beam.tokens for beam in self._beams] if self._left else []

    def take(self, found: Sequence[Candidates]) -> None:
        """Goes on with the candidates for each of `prompts`."""
        self._left -= 1
        longer = [
            beam.longer(token, candidates)
            for beam, candidates in zip(self._beams, found, strict=True)
            for token in self._likeliest(candidates)
        ]
        for beam in longer:
            if beam.tokens[-1] in self._ends:
                beam.finish_reason = "stop"
                self._ended.append(beam)
        self._beams = self._best([beam for beam in longer if beam.finish_reason is None])

    def best(self) -> list[BeamSearchSequence]:
        """The best, the best first."""
        for beam in self._beams:
            beam.finish_reason = "length"
        return self._best([*self._ended, *self._beams])

    def _likeliest(self, candidates: Candidates) -> list[int]:
        """Those that count, however many there are, and the one that was drawn, which is the first."""
        drawn, *others = candidates
        return [drawn, *(token for token in others if (candidates[token].rank or 0) <= 2 * self._params.beam_width)]

    def _best(self, beams: list[BeamSearchSequence]) -> list[BeamSearchSequence]:
        return sorted(beams, key=self._score, reverse=True)[: self._params.beam_width]

    def _score(self, beam: BeamSearchSequence) -> float:
        length = len(beam.tokens) - (beam.finish_reason == "stop")
        return beam.cum_logprob / float(length**self._params.length_penalty)


def output_of(id: str, beam: BeamSearchSequence, alternatives: int | None) -> TokenOutput:
    """The answer of ``beam`` as if an engine had given it at once, with ``alternatives`` to each token."""
    tokens = beam.tokens[-len(beam.logprobs) :]
    return TokenOutput(
        id=id,
        token_ids=tokens,
        logprobs=[] if alternatives is None else list(map(_entry, tokens, beam.logprobs, [alternatives] * len(tokens))),
        finish_reason="stop" if beam.finish_reason == "stop" else "length",
    )


def _entry(token: int, candidates: Candidates, count: int) -> TokenLogprobs:
    ranked = sorted(candidates, key=lambda one: candidates[one].rank or 0)[:count]
    own = candidates[token]
    return TokenLogprobs(token, own.logprob, own.rank or 0, ranked, [candidates[one].logprob for one in ranked])
