"""What the core sends becomes deltas and results with the right text, reasons and log-probabilities."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.errors import OctavoError, Overloaded, RequestError
from octavo.frontend.detokenize import TextDecoder
from octavo.frontend.inputs import InputProcessor
from octavo.frontend.outputs import OutputProcessor, RequestState
from octavo.sampling_params import SamplingParams
from octavo.types import TokenLogprobs, TokenOutput
from tests.frontend.fakes import byte_level, info, prepared

TOKENIZER = byte_level()
DECODER = TextDecoder(TOKENIZER)
EOS = TOKENIZER.eos_id


def token(text: str) -> int:
    found = TOKENIZER.token_to_id(text)
    assert found is not None
    return found


def state(**params: Any) -> RequestState:
    request = prepared(InputProcessor(TOKENIZER, info(), eos_ids={EOS}), "he", SamplingParams(**params))
    return RequestState(request, DECODER, {EOS})


def out(text: str, finish: Any = None, id: str = "r", **more: Any) -> TokenOutput:
    return TokenOutput(id=id, token_ids=TOKENIZER.encode(text), finish_reason=finish, **more)


def end(token_id: int, finish: Any = "stop") -> TokenOutput:
    return TokenOutput(id="r", token_ids=[token_id], finish_reason=finish)


def test_deltas_add_up_to_the_result() -> None:
    s = state()
    deltas = [s.process(out("lo")), s.process(out(" wa")), s.process(end(EOS))]
    result = s.snapshot()
    assert "".join(d.text for d in deltas if d) == result.outputs[0].text == "lo wa"
    assert [i for d in deltas if d for i in d.token_ids] == result.outputs[0].token_ids
    assert (result.finished, result.prompt, result.request_id) == (True, "he", "r")


def test_the_end_token_has_an_id_but_no_text() -> None:
    s = state(skip_special_tokens=False)
    s.process(out("lo"))
    s.process(end(EOS))
    one = s.snapshot().outputs[0]
    assert (one.text, one.token_ids[-1]) == ("lo", EOS)


def test_the_end_token_has_text_when_stop_strings_are_included() -> None:
    s = state(skip_special_tokens=False, include_stop_str_in_output=True)
    s.process(end(EOS))
    assert s.snapshot().outputs[0].text == "</s>"


@pytest.mark.parametrize(
    ("params", "last", "finish", "reasons"),
    [
        ({}, EOS, "stop", ("stop", None)),
        ({"stop_token_ids": [7]}, 7, "stop", ("stop", 7)),
        ({"stop_token_ids": [EOS]}, EOS, "stop", ("stop", None)),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, EOS, "stop", ("stop", EOS)),
        ({}, 7, "length", ("length", None)),
        ({}, 7, "abort", ("abort", None)),
    ],
)
def test_reasons_for_the_end(params: dict[str, Any], last: int, finish: str, reasons: tuple[str, Any]) -> None:
    s = state(**params)
    delta = s.process(end(last, finish))
    one = s.snapshot().outputs[0]
    assert delta is not None
    assert (delta.finish_reason, delta.stop_reason) == (one.finish_reason, one.stop_reason) == reasons


def test_a_stop_string_ends_the_request_and_asks_for_an_abort() -> None:
    outputs = OutputProcessor(DECODER, {EOS})
    inputs = InputProcessor(TOKENIZER, info())
    s = outputs.add(prepared(inputs, "he", SamplingParams(stop="ab")))
    assert outputs.process([out("xa")])[1] == []
    changed, aborts = outputs.process([TokenOutput(id="r", token_ids=[token("b"), token("c")])])
    assert aborts == ["r"]
    assert changed[0][1].finish_reason == "stop"
    one = s.snapshot().outputs[0]
    assert (one.text, one.stop_reason, one.token_ids) == ("x", "ab", TOKENIZER.encode("xab"))
    assert outputs.process([TokenOutput(id="r", finish_reason="abort")]) == ([], [])
    assert s.snapshot().outputs[0].finish_reason == "stop"


def test_a_stop_string_in_the_last_step_needs_no_abort() -> None:
    outputs = OutputProcessor(DECODER)
    s = outputs.add(prepared(InputProcessor(TOKENIZER, info()), "he", SamplingParams(stop="b")))
    assert outputs.process([out("ab", "length")])[1] == []
    assert s.snapshot().outputs[0].stop_reason == "b"


def test_text_held_back_comes_out_at_the_end() -> None:
    s = state(stop="abc")
    delta = s.process(out("xab"))
    assert delta is not None
    assert delta.text == "x"
    last = s.process(out("", "length"))
    assert last is not None
    assert (last.text, last.token_ids) == ("ab", [])
    assert s.snapshot().outputs[0].text == "xab"


def test_several_outputs_are_one_request() -> None:
    s = state(n=2)
    s.process(out("a", "length", id="r_1"))
    assert not s.finished
    assert s.unfinished_ids() == ["r_0"]
    s.process(out("b", "length", id="r_0"))
    result = s.snapshot()
    assert [o.text for o in result.outputs] == ["b", "a"]
    assert result.finished


def test_logprobs_hold_the_sampled_token_and_the_best() -> None:
    a, b, c = token("a"), token("b"), token("c")
    s = state(logprobs=2)
    delta = s.process(out("c", logprobs=[TokenLogprobs(c, -3.0, 9, [a, b], [-0.5, -1.0])]))
    assert delta is not None
    assert delta.logprobs is not None
    entry = delta.logprobs[0]
    assert {i: (p.logprob, p.rank, p.decoded_token) for i, p in entry.items()} == {
        c: (-3.0, 9, "c"),
        a: (-0.5, 1, "a"),
        b: (-1.0, 2, "b"),
    }
    s.process(out("a", "length", logprobs=[TokenLogprobs(a, -0.5, 1, [a, b], [-0.5, -1.0])]))
    one = s.snapshot().outputs[0]
    assert one.cumulative_logprob == -3.5
    assert one.logprobs is not None
    assert list(one.logprobs[1]) == [a, b]


def test_no_logprobs_unless_asked_for() -> None:
    s = state()
    s.process(out("a", "length"))
    one = s.snapshot().outputs[0]
    assert (one.logprobs, one.cumulative_logprob) == (None, None)


def test_the_only_token_of_a_prompt_has_no_logprob_but_a_place() -> None:
    s = state(prompt_logprobs=1)
    s.process(out("c"))
    assert s.snapshot().prompt_logprobs == [None]
    assert state().snapshot().prompt_logprobs is None


def test_prompt_logprobs_start_with_none_and_may_come_in_chunks() -> None:
    a, b = token("a"), token("b")
    s = state(prompt_logprobs=0)
    assert s.process(TokenOutput(id="r", prompt_logprobs=[TokenLogprobs(a, -1.0, 1, [], [])])) is None
    s.process(out("c", prompt_logprobs=[TokenLogprobs(b, -2.0, 1, [], [])]))
    logprobs = s.snapshot().prompt_logprobs
    assert logprobs is not None
    assert logprobs[0] is None
    assert [list(entry) for entry in logprobs[1:] if entry] == [[a], [b]]


def test_cached_tokens_and_times_are_reported() -> None:
    s = state()
    s.process(out("a", cached=1))
    first = s.snapshot().metrics.first_token_time
    s.process(out("b", "length"))
    result = s.snapshot()
    assert result.num_cached_tokens == 1
    assert first is not None
    assert result.metrics.finished_time is not None
    assert result.metrics.arrival_time <= first <= result.metrics.finished_time


@pytest.mark.parametrize(("status", "kind"), [(400, RequestError), (503, Overloaded), (500, OctavoError)])
def test_an_error_is_raised_by_its_status(status: int, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="no room") as raised:
        state().process(TokenOutput(id="r", finish_reason="error", error="no room", status=status))
    assert type(raised.value) is kind  # the engine is not dead for the failure of one request


def test_no_text_without_detokenize() -> None:
    s = state(detokenize=False, logprobs=0)
    s.process(out("a", "length", logprobs=[TokenLogprobs(token("a"), -1.0, 1, [], [])]))
    one = s.snapshot().outputs[0]
    assert (one.text, one.token_ids) == ("", [token("a")])
    assert one.logprobs is not None
    assert one.logprobs[0][token("a")].decoded_token is None
