"""From token ids to text, one token at a time, and where stop strings end it.

The text of a token depends on its neighbours: a character can be spread over tokens, and decoders of the SentencePiece
kind drop a space at the start. So a window of ids is decoded, and only what cannot change any more is let out:

    done ..... | shown ..... | pending ....
               ^ window      ^ read        decode(window) minus decode(shown) is the new text

A boundary ``read`` is only set where the text so far ends in a whole character, so it holds for good and the window
stays short: the cost of a token does not grow with the length of the text.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from octavo.sampling_params import SamplingParams

if TYPE_CHECKING:
    from octavo.hub.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
CONTEXT = 6  # tokens of the prompt that are decoded along with the first of the output
MAX_PENDING = 16  # tokens without a whole character at the end; only meaningless bytes get there


class TextDecoder:
    """A tokenizer with what the incremental decoding of all requests shares."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.special_ids = tokenizer.special_ids
        # Decoders with byte fallback turn a whole run of byte tokens into text, or into replacement characters.
        found = (tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self.byte_ids = frozenset(i for i in found if i is not None)
        self._alone: dict[tuple[int, bool], str] = {}

    def alone(self, token: int, *, skip_special_tokens: bool) -> str:
        """The text of one token by itself, remembered."""
        key = (token, skip_special_tokens)
        text = self._alone.get(key)
        if text is None:
            text = self._alone[key] = self.tokenizer.decode([token], skip_special_tokens=skip_special_tokens)
        return text

    def name(self, token: int) -> str:
        """The text of one token by itself, as ``decoded_token`` of logprobs."""
        return self.alone(token, skip_special_tokens=False)


class IncrementalText:
    """The text that follows ``prompt``: the concatenation of all pieces is decode(prompt + output) - decode(prompt).

    Where special tokens are skipped, those in ``keep`` are not.
    """

    def __init__(
        self,
        decoder: TextDecoder,
        prompt: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        keep: Collection[int] = (),
    ) -> None:
        self._decoder = decoder
        self._hidden = decoder.special_ids.difference(keep) if skip_special_tokens else frozenset()
        self._skip = skip_special_tokens and not keep  # the tokenizer would not keep any
        self._join_specials = not skip_special_tokens and not spaces_between_special_tokens
        self._after_special = False  # whether the last token was a special one
        self._window = self._context(prompt)
        self._read = len(self._window)
        self._shown = self._text(self._window)
        if self._shown.endswith(REPLACEMENT):  # the prompt ends inside a character: what follows stands alone
            self._window, self._read, self._shown = [], 0, ""

    def push(self, token: int) -> str:
        """Takes one token; returns the text that became certain, often that of this token."""
        if token in self._hidden:
            return ""
        if self._join_specials:
            after, self._after_special = self._after_special, token in self._decoder.special_ids
            if after and self._after_special:
                return self._push_apart(token)
        self._window.append(token)
        if token in self._decoder.byte_ids:
            return ""  # the run may go on; it is decoded when it has ended
        text = self._text(self._window)
        if text.endswith(REPLACEMENT):
            return self._split(text) if len(self._window) - self._read > MAX_PENDING else ""
        if self._shown.startswith(text):
            return ""
        return self._advance(text)

    def flush(self) -> str:
        """The rest, at the end of the output, be it whole or not."""
        return self._advance(self._text(self._window))

    def _push_apart(self, token: int) -> str:
        """Takes a token whose text is that which it has alone; the text before it is certain now."""
        rest = self.flush()
        self._window, self._read = [token], 1
        self._shown = self._text(self._window)
        return rest + self._shown

    def _text(self, ids: list[int]) -> str:
        if len(ids) == 1:
            return self._decoder.alone(ids[0], skip_special_tokens=self._skip)
        return self._decoder.tokenizer.decode(ids, skip_special_tokens=self._skip) if ids else ""

    def _advance(self, text: str) -> str:
        """Lets out ``text``, the whole window's, but for what was shown; the pending tokens become the shown ones."""
        # A tokenizer that tidies up spaces can take back one that is out already; what follows it must not be lost.
        same = len(self._shown) if text.startswith(self._shown) else _same_start(self._shown, text)
        new = text[same:]
        del self._window[: self._read]
        self._read = len(self._window)
        self._shown = self._text(self._window)
        return new

    def _split(self, text: str) -> str:
        """Lets out the older half of a long run of broken bytes, at a boundary that following bytes cannot move.

        A character has at most four bytes, so one of any four boundaries lies between characters; it is found by
        decoding both sides apart.
        """
        middle = len(self._window) - MAX_PENDING // 2
        for cut in range(middle, middle - 4, -1):
            left = self._text(self._window[:cut])
            if left + self._text(self._window[cut:]) == text:
                new = left[len(self._shown) :]
                del self._window[:cut]
                self._read, self._shown = 0, ""
                return new
        return ""

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of the prompt that have text: enough for a decoder to see that this is not the start."""
        context: list[int] = []
        for token in reversed(prompt):
            if len(context) == CONTEXT:
                break
            if token in self._hidden or (not context and token in self._decoder.byte_ids):
                continue
            context.append(token)
        return context[::-1]


def _same_start(left: str, right: str) -> int:
    """How many characters at the start are the same."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


class StopMatcher:
    """Finds stop strings in text that arrives in pieces (Knuth, Morris, Pratt: each character is looked at once).

    The match that ends first wins; of those that end together, the one listed first.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._tables = [_failures(stop) for stop in stops]
        self._states = [0] * len(stops)  # how many characters of each stop the text ends with

    @property
    def held(self) -> int:
        """How many characters at the end of the text may turn out to begin a stop string."""
        return max(self._states, default=0)

    def feed(self, text: str, *, armed: bool = True) -> tuple[int, str] | None:
        """Reads ``text``; returns (characters read up to the end of the match, stop string), or None.

        Nothing may be fed after a match. A match that ends while not ``armed`` does not count.
        """
        states, stops, tables = self._states, self._stops, self._tables
        for at, char in enumerate(text):
            found = None
            for i, stop in enumerate(stops):
                state = states[i]
                if state == len(stop):  # a match that did not count
                    state = tables[i][state]
                while state and stop[state] != char:
                    state = tables[i][state]
                states[i] = state = state + (stop[state] == char)
                if armed and found is None and state == len(stop):
                    found = stop
            if found is not None:
                return at + 1, found
        return None


def _failures(stop: str) -> list[int]:
    """table[k]: length of the longest proper suffix of ``stop[:k]`` that is also its beginning."""
    table = [0, 0]
    for k in range(1, len(stop)):
        state = table[k]
        while state and stop[state] != stop[k]:
            state = table[state]
        table.append(state + (stop[state] == stop[k]))
    return table


class Detokenizer:
    """The text of one output: incremental decoding, then stop strings, then hold-back.

    ``text()`` is what the user sees in the end; ``take()`` hands it out in pieces that are never taken back.
    """

    def __init__(
        self, decoder: TextDecoder, prompt: Sequence[int], params: SamplingParams, *, keep: Collection[int] = ()
    ) -> None:
        self._decode = IncrementalText(
            decoder,
            prompt,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
            keep=keep,
        )
        self._stops = StopMatcher(params.stops()) if params.stops() else None
        self._include = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._tokens = 0
        self._pieces: list[str] = []  # all text so far; joined when asked for
        self._new = ""  # its end, not handed out yet
        self.stopped: str | None = None  # the stop string that was found

    def push(self, token: int) -> bool:
        """Takes one token; True when its text completed a stop string, after which nothing may follow."""
        self._tokens += 1
        return self._add(self._decode.push(token))

    def finish(self) -> bool:
        """Takes the end of the output; True when the text held until now contained a stop string."""
        return self._add(self._decode.flush())

    def take(self, *, final: bool = False) -> str:
        """The text that has become certain since the last call; all that is left if ``final``."""
        held = 0 if final or self._stops is None or self._include else self._stops.held
        cut = max(len(self._new) - held, 0)
        out, self._new = self._new[:cut], self._new[cut:]
        return out

    def text(self) -> str:
        """All text handed out so far."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        text = self._pieces[0] if self._pieces else ""
        return text[: len(text) - len(self._new)]

    def _add(self, text: str) -> bool:
        if not text:
            return False
        if self._stops is not None:
            match = self._stops.feed(text, armed=self._tokens > self._min_tokens)
            if match is not None:
                end, self.stopped = match
                self._append(text[:end])
                if not self._include:
                    self._drop(len(self.stopped))
                return True
        self._append(text)
        return False

    def _append(self, text: str) -> None:
        self._pieces.append(text)
        self._new += text

    def _drop(self, length: int) -> None:
        """Removes the stop string from the end; what it began with was held back, so none of it is out."""
        self._pieces = ["".join(self._pieces)[:-length]]
        self._new = self._new[:-length]
