"""Prompts and parameters become requests, or errors that name the numbers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from octavo.cache.prefix import page_hashes
from octavo.errors import RequestError
from octavo.frontend.inputs import InputProcessor, Prepared, pack, unpack
from octavo.hub.pooling import Pooler
from octavo.sampling_params import PoolingParams, SamplingParams
from tests.frontend.fakes import FakeTokenizer, byte_level, info, prepared, prompt_of, sentencepiece

TOKENIZER = byte_level()
EOS = TOKENIZER.eos_id


def process(prompt: Any, _salt: bytes = b"", _clamp: bool = False, **params: Any) -> Prepared:
    inputs = InputProcessor(TOKENIZER, info(), eos_ids={EOS}, clamp_max_tokens=_clamp)
    return prepared(inputs, prompt, SamplingParams(**params), salt=_salt)


@pytest.mark.parametrize("prompt", ["he w", {"prompt": "he w"}])
def test_text_is_encoded(prompt: Any) -> None:
    made = process(prompt)
    assert made.prompt == "he w"
    assert made.prompt_token_ids == prompt_of(made.requests[0]) == TOKENIZER.encode("he w")


@pytest.mark.parametrize("prompt", [[1, 2, 3], {"prompt_token_ids": [1, 2, 3]}, (1, 2, 3)])
def test_token_ids_are_taken_as_they_are(prompt: Any) -> None:
    made = process(prompt)
    assert made.prompt is None
    assert prompt_of(made.requests[0]) == [1, 2, 3]


def test_special_tokens_are_added_to_text() -> None:
    inputs = InputProcessor(sentencepiece(bos=True), info())
    assert prepared(inputs, "he").prompt_token_ids[0] == 1


@pytest.mark.parametrize(
    ("prompt", "params", "param", "words"),
    [
        ("", {}, "prompt", ["empty"]),
        ([], {}, "prompt", ["empty"]),
        ([1, 300], {}, "prompt", ["300", "299"]),
        ([-1], {}, "prompt", ["-1"]),
        ([True], {}, "prompt", ["True"]),
        (["a"], {}, "prompt", ["'a'"]),
        (5, {}, "prompt", ["int"]),
        ({"text": "a"}, {}, "prompt", ["'text'"]),
        ({"prompt": 5}, {}, "prompt", ["'prompt'"]),
        ([1] * 64, {"max_tokens": 4}, "prompt", ["64", "4", "68"]),
        ([1] * 64, {"max_tokens": None}, "prompt", ["64"]),
        ([1] * 60, {"max_tokens": 5}, "max_tokens", ["60", "5", "65", "64"]),
        ([1], {"stop_token_ids": [300]}, "stop_token_ids", ["300"]),
        ([1], {"logit_bias": {-1: 1.0}}, "logit_bias", ["-1"]),
        ([1], {"allowed_token_ids": [999]}, "allowed_token_ids", ["999"]),
        ([1], {"bad_words": [" "]}, "bad_words", ["' '"]),
        ([1], {"temperature": -1.0}, "temperature", ["-1.0"]),
        ([1], {"top_p": float("nan")}, "top_p", ["nan"]),
        (b"ab", {}, "prompt", ["bytes"]),
        ({}, {}, "prompt", ["empty"]),
        ({"prompt_token_ids": "ab"}, {}, "prompt", ["str"]),
        ([1], {"temperature": "1"}, "temperature", ["float", "str"]),
        ([1], {"temperature": None}, "temperature", ["null"]),
        ([1], {"temperature": 10**400}, "temperature", ["out of range"]),
        ([1], {"top_k": 1.5}, "top_k", ["float"]),
        ([1], {"top_k": 10**400}, "top_k", ["outside"]),
        ([1], {"n": True}, "n", ["bool"]),
        ([1], {"logprobs": 1.5}, "logprobs", ["float"]),
        ([1], {"stop": ["a", 1]}, "stop", ["stop[1]", "int"]),
        ([1], {"stop": b"a"}, "stop", ["bytes"]),
        ([1], {"stop_token_ids": 5}, "stop_token_ids", ["int"]),
        ([1], {"logit_bias": [1]}, "logit_bias", ["array"]),
        ([1], {"logit_bias": {"1": 1.0}}, "logit_bias", ["str"]),
        ([1], {"bad_words": "abc"}, "bad_words", ["str"]),
        ([1], {"detokenize": "yes"}, "detokenize", ["str"]),
    ],
)
def test_a_bad_request_is_refused_with_field_value_and_limit(
    prompt: Any, params: dict[str, Any], param: str, words: list[str]
) -> None:
    with pytest.raises(RequestError) as caught:
        process(prompt, **params)
    assert caught.value.param == param
    assert all(word in caught.value.cause for word in words)
    assert caught.value.remedy


def test_keys_of_a_prompt_without_a_value_are_as_good_as_absent() -> None:
    assert process({"prompt_token_ids": [1], "prompt": None, "multi_modal_data": None}).prompt_token_ids == [1]


def test_numbers_and_arrays_of_numpy_are_taken() -> None:
    params = {"temperature": np.float64(0.5), "top_k": np.int64(3), "stop_token_ids": np.array([7, 8])}
    sampling = process([1], **params).requests[0].sampling
    assert (sampling.temperature, sampling.top_k) == (0.5, 3)
    assert {7, 8} <= set(sampling.end_ids)


def test_a_clone_shares_nothing() -> None:
    params = SamplingParams(stop=["a"], n=2)
    copy = params.clone()
    assert copy == params
    copy.stop.append("b")  # type: ignore[union-attr]
    assert params.stop == ["a"]


def test_max_tokens_of_none_is_the_rest_of_the_context() -> None:
    assert process([1] * 10, max_tokens=None).requests[0].sampling.max_tokens == 54


def test_an_output_beyond_the_context_is_cut_only_when_told_so() -> None:
    assert process([1] * 60, _clamp=True, max_tokens=100).requests[0].sampling.max_tokens == 4


def test_a_default_that_is_too_long_is_cut_without_being_told() -> None:
    inputs = InputProcessor(None, info(), defaults={"max_tokens": 50})
    assert prepared(inputs, [1] * 60).requests[0].sampling.max_tokens == 4


def test_only_the_first_of_several_outputs_computes_prompt_logprobs() -> None:
    requests = process([1, 2], n=2, prompt_logprobs=0).requests
    assert [r.sampling.prompt_logprobs for r in requests] == [0, None]


def test_ends_are_eos_and_stop_tokens() -> None:
    sampling = process([1], stop_token_ids=[7], min_tokens=2).requests[0].sampling
    assert set(sampling.end_ids) == set(sampling.masked_until_min) == {EOS, 7}
    sampling = process([1], stop_token_ids=[7], ignore_eos=True).requests[0].sampling
    assert (sampling.end_ids, sampling.masked_until_min) == ((7,), ())


def test_bad_words_are_banned_with_and_without_a_space() -> None:
    encode = TOKENIZER.lib.encode
    banned = process([1], bad_words=["wo"]).requests[0].sampling.bad_words
    assert banned == (tuple(encode("wo").ids), tuple(encode(" wo").ids))


def test_page_keys_follow_the_prompt_and_the_salt() -> None:
    a, b = process(list(range(10)), b"a").requests[0], process(list(range(10)), b"b").requests[0]
    assert a.page_hashes == page_hashes(b"k" * 32, b"a", a.token_ids, 4)
    assert len(a.page_hashes) == 2 * 16
    assert a.page_hashes != b.page_hashes


def test_no_page_keys_without_prefix_caching() -> None:
    inputs = InputProcessor(None, info(prefix_caching=False))
    assert prepared(inputs, [1] * 10).requests[0].page_hashes == b""


def test_a_users_seed_is_kept_and_its_siblings_differ_but_repeat() -> None:
    alone = process([1], seed=5).requests[0]
    seeds = [r.sampling.seed for r in process([1], seed=5, n=3).requests]
    assert alone.sampling.seed == seeds[0] == 5
    assert len(set(seeds)) == 3
    assert seeds == [r.sampling.seed for r in process([1], seed=5, n=3).requests]


def test_a_seed_is_drawn_for_every_output_without_one() -> None:
    def drawn() -> list[int]:
        inputs = InputProcessor(None, info(), seeds=random.Random(1))
        return [r.sampling.seed for _ in range(2) for r in prepared(inputs, [1], SamplingParams(n=2)).requests]

    assert len(set(drawn())) == 4
    assert drawn() == drawn()


def test_ids_of_several_outputs_are_numbered() -> None:
    assert [r.id for r in process([1], n=2).requests] == ["r_0", "r_1"]
    assert [r.id for r in process([1]).requests] == ["r"]


def test_the_models_defaults_apply_only_when_no_parameters_are_given() -> None:
    inputs = InputProcessor(None, info(), defaults={"temperature": 0.25})
    assert prepared(inputs, [1]).requests[0].sampling.temperature == 0.25
    assert prepared(inputs, [1], SamplingParams()).requests[0].sampling.temperature == 1.0


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(RequestError, match="without a tokenizer"):
        prepared(InputProcessor(None, info()), "text")


def test_several_prompts_are_encoded_as_each_alone() -> None:
    inputs = InputProcessor(sentencepiece(bos=True), info())
    prompts: list[Any] = ["he", [5, 6], {"prompt": "he w"}, "w", {"prompt": "he", "prompt_token_ids": [7]}]
    alone = [prepared(inputs, prompt) for prompt in prompts]
    assert inputs.encode_prompts(prompts) == [(one.prompt, one.prompt_token_ids) for one in alone]
    bare = inputs.encode_prompts(["he", "w"], add_special_tokens=False)
    assert [ids for _, ids in bare] == [ids[1:] for _, ids in inputs.encode_prompts(["he", "w"])]


def test_one_prompt_of_several_that_cannot_fit_is_refused_before_any_is_encoded() -> None:
    tokenizer = byte_level()
    tokenizer.encode_all = lambda *args, **options: pytest.fail("encoded")  # type: ignore[method-assign]
    with pytest.raises(RequestError, match="100000 characters"):
        InputProcessor(tokenizer, info()).encode_prompts(["he", "w" * 100_000])


class Framed(FakeTokenizer):
    """Puts token 1 before and token 2 behind a text."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = super().encode(text, add_special_tokens=False)
        return [1, *ids, 2] if add_special_tokens else ids


@pytest.mark.parametrize(
    ("keep", "left"), [(None, 9), (9, 9), (100, 9), (8, 8), (4, 4), (3, 3), (2, 2), (1, 1), (-1, 9)]
)
def test_a_text_to_embed_that_is_cut_keeps_its_special_tokens(keep: int | None, left: int) -> None:
    tokenizer = Framed(byte_level().lib)
    pooler = Pooler("last", normalize=True, size=4, nested=False, dimensions=None, reason="")
    inputs = InputProcessor(tokenizer, info(max_model_len=32), pooler=pooler)
    whole = tokenizer.encode("xyzxyzx")
    params = PoolingParams(truncate_prompt_tokens=keep)
    made = inputs.process_ids("r", whole, params, text="xyzxyzx")
    wanted = whole[:1] if left == 1 else [*whole[: left - 1], 2]
    assert made.prompt_token_ids == prompt_of(made.requests[0]) == wanted
    assert made.prompt == ("xyzxyzx" if left == 9 else None)
    cut = inputs.process_ids("r", whole, params)
    assert cut.prompt_token_ids == whole[:left]  # of token ids nobody knows which are special


def test_numbers_are_packed_little_endian_and_unpacked() -> None:
    numbers = [0.5, -2.0, 1e-30]
    assert pack(numbers, "f") == np.array(numbers, "<f4").tobytes()
    assert unpack(pack(numbers, "f"), "f").tolist() == np.array(numbers, np.float32).tolist()
