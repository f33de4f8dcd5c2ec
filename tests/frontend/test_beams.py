"""Beam search: against a plain one over Transformers' logits, and how the endpoints take it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from octavo.errors import RequestError
from octavo.frontend.beams import BeamSearchParams
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from tests.server.fake import CHAT, TEXT, Server, events, run
from tools import tiny

PROMPTS = ([5, 9, 33, 7, 61], [12, 40] * 9, [70])  # the second one is more than a page


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("beams"), "llama")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), dtype="float32", max_num_seqs=8, kv_cache_memory_bytes=2**20) as llm:
        yield llm


@torch.inference_mode()
def plain_search(
    folder: Path, prompt: list[int], width: int, steps: int, penalty: float, ends: set[int]
) -> list[tuple[list[int], float]]:
    """The best beams and their sums of log-probabilities, by definition: every prefix is computed whole."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def score(beam: tuple[list[int], float]) -> float:
        return beam[1] / (len(beam[0]) - (beam[0][-1] in ends and len(beam[0]) > len(prompt))) ** penalty

    beams, ended = [(prompt, 0.0)], []
    for _ in range(steps):
        longer = []
        for tokens, total in beams:
            best = torch.log_softmax(model(torch.tensor([tokens])).logits[0, -1], -1).topk(2 * width)
            for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                (ended if token in ends else longer).append(([*tokens, token], total + value))
        beams = sorted(longer, key=score, reverse=True)[:width]
    return sorted([*ended, *beams], key=score, reverse=True)[:width]


@pytest.mark.parametrize(("width", "penalty"), [(1, 1.0), (3, 1.0), (4, 0.0), (4, 2.0)])
def test_beams_are_those_of_a_search_over_transformers_logits(
    llm: LLM, folder: Path, width: int, penalty: float
) -> None:
    first = plain_search(folder, PROMPTS[0], width, 2, penalty, set())
    ends = {first[-1][0][-1]}  # a token that is likely to come: some beams end early
    llm._inputs.eos_ids = frozenset(ends)
    params = BeamSearchParams(beam_width=width, max_tokens=6, length_penalty=penalty)
    results = llm.beam_search(list(PROMPTS), params)
    assert any(one.finish_reason == "stop" for found in results for one in found.sequences)
    for prompt, found in zip(PROMPTS, results, strict=True):
        wanted = plain_search(folder, prompt, width, 6, penalty, ends)
        assert [one.tokens for one in found.sequences] == [tokens for tokens, _ in wanted]
        assert [one.cum_logprob for one in found.sequences] == pytest.approx([total for _, total in wanted], abs=1e-4)
        for one in found.sequences:
            assert one.finish_reason == ("stop" if one.tokens[-1] in ends else "length")
            answer = one.tokens[len(prompt) :]
            assert sum(entry[token].logprob for token, entry in zip(answer, one.logprobs, strict=True)) == (
                pytest.approx(one.cum_logprob)
            )


def test_a_text_holds_its_prompt_and_the_end_token_if_that_is_wanted(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    prompt = tokenizer.encode("hello")
    for shown in (False, True):
        params = BeamSearchParams(2, 3, include_stop_str_in_output=shown)
        llm._inputs.eos_ids = frozenset()
        free = llm.beam_search("hello", params)[0].sequences[0].tokens
        llm._inputs.eos_ids = frozenset({free[len(prompt)]})
        found = llm.beam_search({"prompt": "hello"}, params)[0].sequences
        ended = next(one for one in found if one.finish_reason == "stop")
        assert ended.tokens[: len(prompt)] == prompt
        assert ended.text == tokenizer.decode(ended.tokens if shown else ended.tokens[:-1], skip_special_tokens=False)


def test_a_search_ends_where_the_context_does(llm: LLM) -> None:
    length = llm._engine().info.max_model_len
    (found,) = llm.beam_search([[5] * (length - 2)], BeamSearchParams(2, 10, ignore_eos=True))
    assert [len(one.tokens) for one in found.sequences] == [length, length]


@pytest.mark.parametrize(
    ("options", "param", "remedy"),
    [
        ({"beam_width": 0}, "beam_width", ""),
        ({"beam_width": 11}, "beam_width", "--max-logprobs to 22"),
        ({"beam_width": 2.5}, "beam_width", ""),
        ({"max_tokens": 0}, "max_tokens", ""),
        ({"length_penalty": float("nan")}, "length_penalty", ""),
        ({"temperature": -1.0}, "temperature", ""),
    ],
)
def test_a_parameter_out_of_range_is_named(llm: LLM, options: dict[str, Any], param: str, remedy: str) -> None:
    with pytest.raises(RequestError, match=param) as caught:
        llm.beam_search("a", BeamSearchParams(**({"beam_width": 2, "max_tokens": 2} | options)))
    assert caught.value.param == param
    assert remedy in caught.value.remedy


def test_parameters_of_sampling_are_none_of_a_search(llm: LLM) -> None:
    with pytest.raises(RequestError, match="params is of type SamplingParams"):
        llm.beam_search("a", SamplingParams())  # type: ignore[arg-type]


# --- over HTTP: an engine that always says one token, and gives those below it less and less --------------------------

IDS = {"return_tokens_as_token_ids": True}  # their texts are not all different
BEAMS = {"use_beam_search": True, "n": 2, "max_tokens": 3}


def answered(path: str, body: dict[str, Any], server: Server | None = None) -> Any:
    server = server or Server()
    answers: list[Any] = []

    async def work() -> None:
        answer = await server.post(path, body)
        answers.append(events(answer.text) if body.get("stream") and answer.is_success else answer.json())

    run(work)
    return answers[0]


def test_the_choices_are_the_best_answers_the_best_first() -> None:
    server = Server()
    said = server.tokenizer.encode("hello world")[0]
    made = answered("/v1/completions", TEXT | BEAMS | {"logprobs": 1, "return_token_ids": True}, server)
    assert [choice["index"] for choice in made["choices"]] == [0, 1]
    assert made["choices"][0]["token_ids"] == [said] * 3
    assert sorted(made["choices"][1]["token_ids"]) == [said - 1, said, said]
    assert made["choices"][0]["logprobs"]["token_logprobs"] == [-0.5] * 3
    assert [len(top) for top in made["choices"][0]["logprobs"]["top_logprobs"]] == [1] * 3
    assert {choice["finish_reason"] for choice in made["choices"]} == {"length"}
    assert made["usage"]["completion_tokens"] == 6
    assert [len(request.token_ids) // 4 for request in server.fake.requests] == [1, 2, 2, 3, 3]
    assert {request.sampling.logprobs for request in server.fake.requests} == {4}


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", TEXT), ("/v1/chat/completions", CHAT)])
def test_a_stream_brings_the_answers_at_its_end(path: str, body: dict[str, Any]) -> None:
    whole = answered(path, body | BEAMS)["choices"]
    texts = {choice["index"]: choice.get("text") or choice["message"]["content"] for choice in whole}
    streamed = dict.fromkeys(texts, "")
    for event in answered(path, body | BEAMS | {"stream": True}):
        for choice in event["choices"]:
            streamed[choice["index"]] += choice.get("text") or choice.get("delta", {}).get("content") or ""
    assert streamed == texts


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"n": 11}, "n"),
        ({"top_p": 0.5}, "top_p"),
        ({"stop": "x"}, "stop"),
        ({"repetition_penalty": 1.5}, "repetition_penalty"),
        ({"guided_choice": ["a"]}, "structured_outputs"),
        ({"length_penalty": 51}, "length_penalty"),
        ({"use_beam_search": False, "length_penalty": 1.0}, "length_penalty"),
    ],
)
def test_what_a_search_does_not_know_is_refused(change: dict[str, Any], param: str) -> None:
    assert answered("/v1/completions", TEXT | BEAMS | change)["error"]["param"] == param


def test_more_log_probabilities_than_a_search_needs_change_nothing_else() -> None:
    few, many = (answered("/v1/completions", TEXT | BEAMS | IDS | {"logprobs": n})["choices"] for n in (1, 9))
    assert [choice["text"] for choice in few] == [choice["text"] for choice in many]
    assert {len(top) for choice in many for top in choice["logprobs"]["top_logprobs"]} == {9}


def test_a_call_that_is_forced_is_refused() -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    made = answered(
        "/v1/chat/completions", CHAT | BEAMS | {"tools": tools, "tool_choice": "required"}, Server(max_model_len=4096)
    )
    assert made["error"]["param"] == "use_beam_search"


def test_the_models_own_defaults_do_not_stand_in_the_way() -> None:
    server = Server()
    server.llm.inputs._defaults = {"top_p": 0.5, "temperature": 0.7}
    assert len(answered("/v1/completions", TEXT | BEAMS, server)["choices"]) == 2
    assert {request.sampling.temperature for request in server.fake.requests} == {0.0}
