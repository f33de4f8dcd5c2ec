from __future__ import annotations

import pytest

from octavo.config import EngineConfig, ModelConfig
from octavo.core.vocabulary import Vocabulary, load_vocabulary
from octavo.errors import ConfigError
from octavo.runtime.stub import StubWorker
from tests.frontend.fakes import FakeTokenizer, byte_level, sentencepiece

TEXT = "hello world, é 🙂 <tool> end"


def vocabulary(tokenizer: FakeTokenizer, size: int | None = None) -> Vocabulary:
    return Vocabulary.of(tokenizer, size or tokenizer.vocab_size, {tokenizer.eos_id})


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_bytes_of_tokens_add_up_to_the_text(make: object) -> None:
    tokenizer = make()  # type: ignore[operator]
    tokens = vocabulary(tokenizer).tokens
    made = b"".join(tokens[i] for i in tokenizer.encode(TEXT, add_special_tokens=False))
    assert made.decode().strip() == TEXT


def test_a_space_before_a_word_of_sentencepiece_is_kept() -> None:
    tokenizer = sentencepiece()
    tokens = vocabulary(tokenizer).tokens
    assert tokens[tokenizer.token_to_id("▁he")] == b" he"
    assert tokens[tokenizer.token_to_id("<0x0A>")] == b"\n"


def test_parts_of_characters_are_their_bytes() -> None:
    tokenizer = byte_level()
    tokens = vocabulary(tokenizer).tokens
    assert tokens[tokenizer.token_to_id("ðŁ")] == "🙂".encode()[:2]


def test_special_tokens_and_ids_without_a_token_stand_for_no_text() -> None:
    tokenizer = byte_level()
    made = vocabulary(tokenizer, tokenizer.vocab_size + 8)
    assert set(made.special) == tokenizer.special_ids | set(range(tokenizer.vocab_size, tokenizer.vocab_size + 8))
    assert made.ends == [tokenizer.eos_id]


def test_logits_fewer_than_tokens_cut_the_vocabulary() -> None:
    made = vocabulary(byte_level(), 256)
    assert (len(made.tokens), made.ends) == (256, [])


def test_without_a_tokenizer_there_is_no_vocabulary() -> None:
    config = EngineConfig.of(model="stub", skip_tokenizer_init=True)
    model: ModelConfig = StubWorker().init(config)
    with pytest.raises(ConfigError, match="skip_tokenizer_init"):
        load_vocabulary(config, model)
