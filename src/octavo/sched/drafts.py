"""Drafts: tokens that are supposed to come next, since they came next where a text had the same words before.

Text without repetition must not pay for it. So nothing is searched: an index has the last place of every n-gram and
grows with the text; and a draft is at most about twice as long as what held of the one before, and follows one of which
nothing held after a pause that doubles each time.
"""

from __future__ import annotations

from octavo.speculation import Speculation
from octavo.types import Sampling

LONGEST_PAUSE = 16  # tokens


class Lookup:
    """Of one sequence, whose tokens are only ever appended to. The index begins with the first call of `propose`."""

    def __init__(self, speculation: Speculation) -> None:
        self._sizes = range(speculation.prompt_lookup_max, speculation.prompt_lookup_min - 1, -1)
        self._most = self._width = speculation.num_speculative_tokens
        self._ends: dict[int, int] = {}  # hash of an n-gram -> where it last ended, with a token behind it
        self._indexed = 0  # ends below this are
        self._pause = 0  # tokens
        self._resumes = 0  # length of the text from which on there are drafts again

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """Up to ``most`` tokens that may follow ``tokens``."""
        if len(tokens) < self._resumes:
            return []
        self._extend(tokens)
        for size in self._sizes:
            end = self._ends.get(hash(tuple(tokens[-size:])))
            if end is not None:
                count = min(most, self._width)
                draft = tokens[end : end + count]
                return (draft * -(-count // len(draft)))[:count]  # what goes round in circles goes on
        return []

    def judge(self, length: int, accepted: int) -> None:
        """Takes in how many tokens of a draft held; the text has ``length`` tokens now."""
        self._width = min(self._most, 2 * accepted + 1)
        self._pause = 0 if accepted else min(max(2 * self._pause, 2), LONGEST_PAUSE)
        self._resumes = length + self._pause

    def _extend(self, tokens: list[int]) -> None:
        """Indexes n-grams up to the token before the last. Two of one hash cost a draft, not an answer."""
        for end in range(max(self._indexed, 1), len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._ends[hash(tuple(tokens[end - size : end]))] = end
        self._indexed = len(tokens)


def may_draft(sampling: Sampling, generated: int) -> bool:
    """Whether a token of a request depends on those before it by the model alone: what edits logits by the text so far
    would have to know drafts that do not hold. ``generated``: tokens of the output so far."""
    if sampling.penalised or sampling.bad_words or sampling.guide is not None or sampling.prompt_logprobs is not None:
        return False
    return not sampling.masked_until_min or generated >= sampling.min_tokens
