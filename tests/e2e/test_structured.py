"""Structured output on a tiny model with random weights, which left alone writes nothing like JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from octavo import LLM, SamplingParams, StructuredOutputsParams
from octavo.errors import RequestError
from tests.e2e.serving import Server, running
from tests.waiting import PATIENCE
from tools import tiny

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog", None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,3}$"}, "maxItems": 2},
        "at": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]},
    },
    "required": ["name", "age", "kind", "tags", "at"],
    "additionalProperties": False,
}
SCHEMA["properties"]["at"]["additionalProperties"] = False
COMPACT = {**SCHEMA, "x-guidance": {"whitespace_flexible": False}}
LONG = 190  # tokens: more than any text of these grammars


def check(text: str) -> None:
    """That ``text`` is JSON of `SCHEMA`."""
    value = json.loads(text)
    assert value.keys() == SCHEMA["properties"].keys()
    assert isinstance(value["name"], str) and len(value["name"]) <= 5
    assert type(value["age"]) is int and 0 <= value["age"] <= 120
    assert value["kind"] in ("cat", "dog", None)
    assert len(value["tags"]) <= 2 and all(re.fullmatch("[a-z]{1,3}", tag) for tag in value["tags"])
    assert value["at"].keys() == {"x"} and type(value["at"]["x"]) is bool


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("structured") / "tiny-llama")


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 4 << 20, "device": "cpu"}
    with LLM(model, dtype="float32", **limits) as made:
        yield made


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = ["-m", "octavo", "serve", str(model), "--port", "0", "--dtype", "float32", "--max-num-seqs", "8"]
    command += ["--kv-cache-memory-bytes", "8M", "--device", "cpu"]
    with running(command, tmp_path_factory.mktemp("log") / "log") as made:
        yield made


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def generate(llm: LLM, given: dict[str, Any], **params: Any) -> list[str]:
    """Texts of one prompt; all must have ended by themselves."""
    outputs = StructuredOutputsParams(**given)
    settings = SamplingParams(**{"max_tokens": LONG, "structured_outputs": outputs, **params})
    (result,) = llm.generate("There was a time", settings, use_tqdm=False)
    assert {(o.finish_reason, o.stop_reason) for o in result.outputs} == {("stop", None)}
    return [output.text for output in result.outputs]


# --- LLM --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 2.0, "seed": 2, "top_p": 0.8, "repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 3, "top_k": 1, "presence_penalty": 1.0},
        {"temperature": 1.0, "seed": 4, "min_p": 0.3, "logit_bias": {5: 50.0}},
    ],
)
def test_any_way_of_sampling_keeps_to_the_schema(llm: LLM, sampling: dict[str, Any]) -> None:
    for text in generate(llm, {"json": COMPACT}, n=3 if sampling["temperature"] else 1, **sampling):
        check(text)


def test_regex_choice_and_grammars_hold(llm: LLM) -> None:
    for seed in range(3):
        (text,) = generate(llm, {"regex": r"[a-z]{2,6}@[a-z]{2,6}\.(com|org)"}, seed=seed)
        assert re.fullmatch(r"[a-z]{2,6}@[a-z]{2,6}\.(com|org)", text)
        (text,) = generate(llm, {"choice": ["positive", "negative", "pos"]}, seed=seed)
        assert text in ("positive", "negative", "pos")
        (text,) = generate(llm, {"grammar": 'start: A ("," A){0,4}\nA: /[0-9]{1,3}/'}, seed=seed)
        assert re.fullmatch(r"\d{1,3}(,\d{1,3}){0,4}", text)
        (text,) = generate(llm, {"grammar": 'root ::= ("ab" | "cd"){1,3} "."'}, seed=seed)
        assert re.fullmatch(r"(ab|cd){1,3}\.", text)


def test_a_text_may_end_only_where_the_grammar_does(llm: LLM) -> None:
    """The end token is likely, and yet comes after two to six letters."""
    for seed in range(4):
        (text,) = generate(llm, {"regex": "[a-z]{2,6}"}, seed=seed, logit_bias={tiny.EOS: 100.0})
        assert re.fullmatch("[a-z]{2,6}", text)
        (text,) = generate(llm, {"regex": "[a-z]{2,6}"}, seed=seed, ignore_eos=True)
        assert re.fullmatch("[a-z]{2,6}", text)


def test_a_seed_gives_the_same_text_alone_and_among_others(llm: LLM) -> None:
    params = SamplingParams(seed=7, max_tokens=LONG, structured_outputs=StructuredOutputsParams(json=COMPACT))
    plain = SamplingParams(seed=8, max_tokens=40, ignore_eos=True)
    alone = [llm.generate("a", one, use_tqdm=False)[0].outputs[0].text for one in (params, plain)]
    among = llm.generate(["b", "c", "a", "a", "d"], [params, plain, params, plain, params], use_tqdm=False)
    assert [among[2].outputs[0].text, among[3].outputs[0].text] == alone


def test_a_bad_schema_raises_its_reason_and_the_next_request_works(llm: LLM) -> None:
    with pytest.raises(RequestError, match="uniqueItems"):
        generate(llm, {"json": {"type": "array", "uniqueItems": True}})
    assert generate(llm, {"choice": ["ok"]}) == ["ok"]


def test_without_a_tokenizer_a_grammar_is_refused(model: Path) -> None:
    options = {"skip_tokenizer_init": True, "kv_cache_memory_bytes": 1 << 20, "device": "cpu", "load_format": "dummy"}
    params = SamplingParams(structured_outputs=StructuredOutputsParams(json_object=True))
    with LLM(model, dtype="float32", **options) as llm, pytest.raises(RequestError, match="without one"):
        llm.generate([5, 6], params, use_tqdm=False)


# --- HTTP -------------------------------------------------------------------------------------------------------------

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]


def response_format(schema: dict[str, Any]) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


def test_the_openai_client_gets_what_a_strict_schema_describes(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny-llama", messages=MESSAGES, response_format=response_format(COMPACT), max_tokens=LONG, n=2, seed=3
    )
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    for choice in answer.choices:
        check(choice.message.content or "")


def test_a_stream_of_json_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "tiny-llama", "messages": MESSAGES, "max_tokens": LONG, "seed": 5}
    ask["response_format"] = response_format(COMPACT)
    whole = client.chat.completions.create(**ask).choices[0].message.content
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == whole
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["stop"]
    check(whole or "")


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"structured_outputs": {"choice": ["red", "green"]}}, "red|green"),
        ({"structured_outputs": {"grammar": 'root ::= "x" "y"?'}}, "xy?"),
        ({"structured_outputs": {"json": {"type": "boolean"}}}, "true|false"),
        ({"guided_regex": "[ab]{3}"}, "[ab]{3}"),
        ({"guided_choice": ["red", "green"]}, "red|green"),
        ({"guided_json": {"enum": [1, 2]}}, "1|2"),
        ({"guided_grammar": 'start: "x"'}, "x"),
        ({"response_format": response_format({"enum": ["a"]})}, '"a"'),
    ],
)
def test_both_endpoints_take_every_form(client: openai.OpenAI, extra: dict[str, Any], pattern: str) -> None:
    chat = client.chat.completions.create(model="tiny-llama", messages=MESSAGES, extra_body=extra)
    plain = client.completions.create(model="tiny-llama", prompt="Hi", extra_body=extra)
    for text in (chat.choices[0].message.content, plain.choices[0].text):
        assert re.fullmatch(pattern, text or "")


def test_json_object_makes_an_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny-llama",
        messages=MESSAGES,
        response_format={"type": "json_object"},
        temperature=0,
        max_tokens=LONG,
        logit_bias={str(client_token): 12 for client_token in tokens_of(client, "{}")},
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)


def tokens_of(client: openai.OpenAI, text: str) -> list[int]:
    url = str(client.base_url).replace("/v1/", "/tokenize")
    body = {"prompt": text, "add_special_tokens": False}
    return list(httpx.post(url, json=body, timeout=PATIENCE).json()["tokens"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"response_format": response_format({"type": "object", "uniqueItems": True})}, "uniqueItems"),
        ({"response_format": {"type": "json_schema"}}, "no schema"),
        ({"response_format": {"type": "xml"}}, "xml"),
        ({"structured_outputs": {"regex": "("}}, "unclosed"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "regex and choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
        ({"guided_json": {}, "response_format": {"type": "json_object"}}, "both set"),
    ],
)
def test_a_bad_request_is_a_400_and_the_next_one_works(
    client: openai.OpenAI, extra: dict[str, Any], words: str, stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(model="tiny-llama", messages=MESSAGES, stream=stream, extra_body=extra)
    answer = client.chat.completions.create(model="tiny-llama", messages=MESSAGES, extra_body={"guided_choice": ["ok"]})
    assert answer.choices[0].message.content == "ok"


def test_a_grammar_bomb_leaves_the_server_serving(client: openai.OpenAI, server: Server) -> None:
    chain = "start: r0\n" + "".join(f'r{i}: "x" r{i + 1}\n' for i in range(2000)) + 'r2000: "y"\n'
    answer = client.completions.create(
        model="tiny-llama", prompt="Hi", max_tokens=3, extra_body={"structured_outputs": {"grammar": chain}}
    )
    assert answer.choices[0].text == "xxx"
    assert server.get("/health").status_code == 200
