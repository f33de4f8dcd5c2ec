"""Incremental text equals the text at once, and stop strings cut it at the same place however it arrives."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import models

from octavo.frontend.detokenize import Detokenizer, IncrementalText, StopMatcher, TextDecoder
from octavo.sampling_params import SamplingParams
from tests.frontend.fakes import FakeTokenizer, byte_level, sentencepiece

TOKENIZERS = {"byte_level": byte_level(), "sentencepiece": sentencepiece()}
DECODERS = {name: TextDecoder(tokenizer) for name, tokenizer in TOKENIZERS.items()}
KINDS = sorted(TOKENIZERS)


def ids_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Any ids; those of words and of pieces of characters come more often than chance would have it."""
    tokenizer = TOKENIZERS[kind]
    real = st.text(alphabet="helo wabc.,éß中😀\n▁�", max_size=8).map(
        lambda t: tokenizer.encode(t, add_special_tokens=False)
    )
    noise = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=6)
    special = st.lists(st.sampled_from(sorted(tokenizer.special_ids)), max_size=3)
    return st.lists(real | noise | special, max_size=8).map(lambda parts: [i for part in parts for i in part])


CASES = st.sampled_from(KINDS).flatmap(lambda kind: st.tuples(st.just(kind), ids_of(kind)))


def run(kind: str, ids: list[int], params: SamplingParams, chunks: list[int] | None = None) -> tuple[str, str, int]:
    """(final text, concatenated deltas, tokens taken), taking deltas after chunks of tokens of the given sizes."""
    out = Detokenizer(DECODERS[kind], (), params)
    deltas, sizes, due, taken = [], iter(chunks or []), 1, 0
    for token in ids:
        taken += 1
        if out.push(token):
            break
        due -= 1
        if due <= 0:
            deltas.append(out.take())
            due = next(sizes, 1)
    else:
        out.finish()
    deltas.append(out.take(final=True))
    return out.text(), "".join(deltas), taken


@given(CASES, st.booleans(), st.lists(st.integers(1, 5)))
@settings(max_examples=300)
def test_pieces_add_up_to_the_decoded_whole(case: tuple[str, list[int]], skip: bool, chunks: list[int]) -> None:
    kind, ids = case
    text, deltas, _ = run(kind, ids, SamplingParams(skip_special_tokens=skip), chunks)
    assert text == deltas == TOKENIZERS[kind].decode(ids, skip_special_tokens=skip)


@given(
    CASES,
    st.lists(st.text(alphabet="helo wa.\n中", min_size=1, max_size=4), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 6),
    st.lists(st.integers(1, 5)),
)
@settings(max_examples=300)
def test_stop_strings_cut_at_the_same_place_for_any_chunking(
    case: tuple[str, list[int]], stops: list[str], include: bool, min_tokens: int, chunks: list[int]
) -> None:
    kind, ids = case
    params = SamplingParams(stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens, max_tokens=None)
    text, deltas, taken = run(kind, ids, params, chunks)
    assert text == deltas
    assert (text, taken) == run(kind, ids, params)[::2]
    whole = TOKENIZERS[kind].decode(ids)
    assert whole.startswith(text)
    if min_tokens == 0:
        ends = [(whole.find(s) + len(s), k) for k, s in enumerate(stops) if s in whole]
        end, k = min(ends, default=(len(whole), -1))
        assert text == whole[: end - (0 if include or k < 0 else len(stops[k]))]


@given(CASES)
@settings(max_examples=100)
def test_text_after_a_prompt_is_the_text_of_both_less_the_prompt(case: tuple[str, list[int]]) -> None:
    kind, ids = case
    tokenizer = TOKENIZERS[kind]
    prompt = tokenizer.encode("hello w", add_special_tokens=False)
    out = IncrementalText(DECODERS[kind], prompt)
    text = "".join([*map(out.push, ids), out.flush()])
    assert tokenizer.decode(prompt) + text == tokenizer.decode(prompt + ids)


def test_a_leading_space_after_the_prompt_is_kept() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    out = IncrementalText(DECODERS["sentencepiece"], tokenizer.encode("hello"))
    assert out.push(tokenizer.lib.token_to_id("▁w")) == " w"


def test_a_character_split_over_tokens_comes_out_whole() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("😀!")
    assert len(ids) == 4  # two bytes are one token
    out = IncrementalText(DECODERS["byte_level"])
    assert [out.push(i) for i in ids] == ["", "", "😀", "!"]


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    out = IncrementalText(DECODERS["byte_level"])
    assert [out.push(i) for i in tokenizer.encode("😀")[:2]] == ["", ""]
    assert out.flush() == "�"


def test_an_output_that_completes_a_character_of_the_prompt_loses_nothing_after_it() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("😀 wo")
    out = IncrementalText(DECODERS["byte_level"], ids[:2])
    text = "".join([*map(out.push, ids[2:]), out.flush()])
    assert text.endswith(" wo")


def test_special_tokens_show_only_when_asked_for() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [*tokenizer.encode("he"), tokenizer.lib.token_to_id("<|end|>"), tokenizer.lib.token_to_id("<tool>")]
    assert run("byte_level", ids, SamplingParams())[0] == "he<tool>"
    assert run("byte_level", ids, SamplingParams(skip_special_tokens=False))[0] == "he<|end|><tool>"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["a", "</s>", "broken"])
def test_cost_of_a_token_does_not_grow_with_the_text(kind: str, unit: str) -> None:
    tokenizer = TOKENIZERS[kind]
    broken = tokenizer.lib.token_to_id("Ģ" if kind == "byte_level" else "<0x80>")
    ids = [broken if unit == "broken" else tokenizer.lib.token_to_id(unit)] * 2000
    tokenizer.decoded = 0
    run(kind, ids, SamplingParams(max_tokens=None))
    assert tokenizer.decoded < 60 * len(ids)


def test_stop_string_split_over_tokens_is_held_back() -> None:
    out = Detokenizer(DECODERS["byte_level"], (), SamplingParams(stop="low"))
    seen = []
    for token in TOKENIZERS["byte_level"].encode("elxel"):
        assert not out.push(token)
        seen.append(out.take())
    assert seen == ["e", "", "lx", "e", ""]
    assert [out.push(i) for i in TOKENIZERS["byte_level"].lib.encode("o").ids] == [False]
    assert out.take() == ""
    assert out.push(TOKENIZERS["byte_level"].lib.token_to_id("w"))
    assert (out.take(final=True), out.text(), out.stopped) == ("", "elxe", "low")


def test_stop_string_that_is_included_is_not_held_back() -> None:
    out = Detokenizer(DECODERS["byte_level"], (), SamplingParams(stop="lx", include_stop_str_in_output=True))
    token = TOKENIZERS["byte_level"].lib.token_to_id
    out.push(token("l"))
    assert out.take() == "l"
    assert out.push(token("x"))
    assert (out.take(final=True), out.text()) == ("x", "lx")


def test_the_match_that_ends_first_wins_and_then_the_one_listed_first() -> None:
    assert StopMatcher(["abcd", "bc"]).feed("xabcd") == (4, "bc")
    assert StopMatcher(["c", "abc"]).feed("xabcd") == (4, "c")
    assert StopMatcher(["abc", "c"]).feed("xabcd") == (4, "abc")


def test_a_stop_string_counts_only_when_it_ends_after_min_tokens() -> None:
    ids = TOKENIZERS["byte_level"].encode("a.b.c")
    assert run("byte_level", ids, SamplingParams(stop=".", min_tokens=2))[0] == "a.b"
    assert run("byte_level", ids, SamplingParams(stop=".", min_tokens=1))[0] == "a"


def test_nothing_is_lost_when_a_tokenizer_takes_a_space_back() -> None:
    class Tidy(FakeTokenizer):
        def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
            return super().decode(ids, skip_special_tokens=skip_special_tokens).replace(" .", ".")

    tokenizer = Tidy(TOKENIZERS["byte_level"].lib)
    out = IncrementalText(TextDecoder(tokenizer))
    ids = [i for word in ("a", " ", ".", " ", "b") for i in tokenizer.encode(word)]
    assert "".join([*map(out.push, ids), out.flush()]) == "a . b"


def test_special_tokens_that_are_kept_show_among_those_that_are_skipped() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = [tokenizer.token_to_id(t) or 0 for t in ("<s>", "<|end|>", "he", "</s>", "<|end|>")]
    out = Detokenizer(TextDecoder(tokenizer), ids, SamplingParams(), keep={tokenizer.token_to_id("<|end|>") or 0})
    for id in ids:
        out.push(id)
    assert out.take(final=True) == "<|end|>he<|end|>"


def test_special_tokens_are_joined_without_spaces_only_when_told_so() -> None:
    lib = Library(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))  # no decoder: words are joined with spaces
    lib.add_special_tokens(["<s>", "</s>"])
    ids = [0, 2, 3, 3, 1, 2]

    def text(**params: bool) -> str:
        out = Detokenizer(TextDecoder(FakeTokenizer(lib)), (), SamplingParams(skip_special_tokens=False, **params))
        pieces = []
        for token in ids:
            out.push(token)
            pieces.append(out.take())
        out.finish()
        assert "".join(pieces) + out.take(final=True) == out.text()
        return out.text()

    assert text() == lib.decode(ids, skip_special_tokens=False) == "a <s> </s> </s> b <s>"
    assert text(spaces_between_special_tokens=False) == "a <s></s></s> b <s>"
