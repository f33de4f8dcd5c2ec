"""A sequence's part of a step: what it computes, and what it brings its request."""

from __future__ import annotations

from dataclasses import dataclass, field

from octavo.sched.sequence import SequenceState
from octavo.types import FinishReason, StepResult, TokenLogprobs, TokenOutput


@dataclass(slots=True)
class Item:
    """``count`` tokens of ``seq`` from position ``first`` on; after each of the last ``samples`` one is sampled.

    ``epoch`` tells a later commit whether the sequence's pages are still the same.
    """

    seq: SequenceState
    first: int
    count: int
    samples: int
    epoch: int
    drafts: list[int] = field(default_factory=list)  # its last tokens, which nobody has sampled yet
    deferred: bool = False  # what it samples means nothing

    @classmethod
    def of(cls, seq: SequenceState, count: int) -> Item:
        """The next ``count`` tokens of ``seq``, which are launched from now on."""
        return cls(seq, seq.computed, count, int(seq.advance(count)), seq.epoch)

    @property
    def holds(self) -> bool:
        """Whether the sequence has not left its pages since."""
        return self.epoch == self.seq.epoch

    @property
    def inputs(self) -> list[int]:
        """See `StepPlan.inputs`: of an item that may begin with a sample, since a worker does not know which of several
        samples hold; nothing of others."""
        return [self.seq.tokens[self.first], *self.drafts] if self.count == len(self.drafts) + 1 else []

    def place(self) -> int:
        """Its place in a plan: one token, one and drafts, pieces of prompts."""
        return (self.count > 1) + (self.count > max(self.samples, 1))

    def suppose(self, drafts: list[int]) -> None:
        """``drafts`` are launched behind the item's one token, as if it would sample them."""
        self.drafts = drafts
        self.count += len(drafts)
        self.samples += len(drafts)
        self.seq.computed += len(drafts)
        self.seq.inflight += len(drafts)

    def take(self, result: StepResult, place: int) -> tuple[int, FinishReason | None]:
        """Appends to the sequence those of the item's samples, at ``place`` of ``result``, that hold; returns their
        number, and what they end it for: an error if there was nothing to sample.

        A token is sampled after all before it. So one behind a draft holds if that was sampled, too: samples hold up to
        the first that differs from its draft.
        """
        seq = self.seq
        seq.inflight -= self.samples
        for count in range(self.samples):
            if place + count in result.bad:
                return count, "error"
            if seq.sampling.pooling is not None:
                return 0, "stop"
            token = result.tokens[place + count]
            seq.tokens.append(token)
            end = seq.end
            if end is not None or [token] != self.drafts[count : count + 1]:
                seq.computed = min(seq.computed, seq.known - 1)
                return count + 1, end
        return 0, None

    def outputs(
        self, result: StepResult, place: int, count: int, end: FinishReason | None, scores: list[TokenLogprobs]
    ) -> list[TokenOutput]:
        """What to tell of ``count`` samples that were taken, and of the prompt's ``scores``."""
        seq, outputs = self.seq, []
        fresh = self._fresh(scores) if scores else scores
        if count or fresh:
            first = len(seq.tokens) - count
            output = TokenOutput(
                id=seq.id,
                token_ids=seq.tokens[first:],
                logprobs=[result.logprobs[at] for at in range(place, place + count) if at in result.logprobs],
                prompt_logprobs=fresh,
                finish_reason=None if end == "error" else end,
                cached=seq.cached,
                queued=seq.queued if count and first == seq.prompt_len else 0.0,
            )
            outputs.append(output)
        if end == "error":
            outputs.append(_nothing_left(seq))
        elif end is not None and seq.sampling.pooling is not None:
            outputs.append(_pooled(seq, result.embeddings[place]))
        return outputs

    def _fresh(self, scores: list[TokenLogprobs]) -> list[TokenLogprobs]:
        """Those of ``scores`` (of the tokens after the first) that were not sent before a preemption."""
        fresh = scores[max(self.seq.scored - self.first, 0) :]
        self.seq.scored += len(fresh)
        return fresh


def _pooled(seq: SequenceState, embedding: bytes) -> TokenOutput:
    return TokenOutput(id=seq.id, embedding=embedding, finish_reason="stop", cached=seq.cached, queued=seq.queued)


def _nothing_left(seq: SequenceState) -> TokenOutput:
    """The end of a request of which no token could be sampled."""
    of = seq.sampling
    if of.guide is not None or of.allowed_token_ids or of.bad_words:
        error = "No token is left that the restrictions of the request allow, or its logits are not finite. Drop some."
        return TokenOutput(id=seq.id, finish_reason="error", error=error, status=400)
    what = "logits" if of.pooling is None else "hidden states"
    error = f"The model produced {what} that are not finite for this request. Try another prompt, or --dtype float32."
    return TokenOutput(id=seq.id, finish_reason="error", error=error, status=500)
