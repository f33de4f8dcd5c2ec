from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from octavo.errors import ModelError
from octavo.hub.generation import generation_config, sampling_defaults
from octavo.hub.source import Source


def test_sampling_defaults_have_our_names() -> None:
    got = sampling_defaults(
        {"do_sample": True, "temperature": 0.6, "top_k": 20, "max_new_tokens": 99, "bos_token_id": 1, "top_p": None}
    )
    assert got == {"temperature": 0.6, "top_k": 20, "max_tokens": 99}


@pytest.mark.parametrize(
    ("generation", "got"),
    [
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.7}),
        ({}, {}),
    ],
)
def test_do_sample_false_means_greedy_unless_a_temperature_is_given(generation: dict[str, Any], got: Any) -> None:
    assert sampling_defaults(generation) == got


@pytest.mark.parametrize("bad", [{"temperature": "hot"}, {"top_p": 7.0}, {"max_new_tokens": -1}])
def test_bad_generation_default_is_an_error(bad: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as error:
        sampling_defaults(bad)
    assert error.value.id == "HF002"


def test_settings_of_generation_that_are_not_applied_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    idle = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None, "pad_token_id": 0}
    with caplog.at_level("WARNING"):
        sampling_defaults(idle)
        assert not caplog.records
        assert sampling_defaults({**idle, "no_repeat_ngram_size": 3, "suppress_tokens": [5]}) == {}
    assert "sets suppress_tokens, no_repeat_ngram_size, which octavo does not apply" in caplog.text


def test_missing_generation_config_is_empty(tmp_path: Path) -> None:
    assert generation_config(Source("m", "folder", tmp_path, None, "")) == {}
