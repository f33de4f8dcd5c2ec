"""``speculative_config``, as vLLM has it."""

from __future__ import annotations

from typing import Any

import pytest

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.options import Parser, add_engine_options, engine_config
from octavo.speculation import Speculation


@pytest.mark.parametrize(
    ("given", "most", "least"),
    [
        ({}, 5, 5),
        ({"prompt_lookup_max": 4, "prompt_lookup_min": 2}, 4, 2),
        ({"prompt_lookup_max": 3}, 3, 3),
        ({"prompt_lookup_min": 2}, 2, 2),
    ],
)
def test_defaults_are_those_of_vllm(given: dict[str, Any], most: int, least: int) -> None:
    config = EngineConfig.of(model="m", speculative_config={"method": "ngram", "num_speculative_tokens": 3, **given})
    assert config.speculation.chosen() == Speculation(3, most, least)


def test_without_it_there_are_no_drafts() -> None:
    assert EngineConfig.of(model="m").speculation.chosen() is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("ngram", "'ngram'"),
        ({}, "method is None"),
        ({"method": "eagle", "model": "x"}, "'eagle'.*n-grams"),
        ({"method": "draft_model", "num_speculative_tokens": 3}, "'draft_model'"),
        ({"method": "ngram"}, "num_speculative_tokens is None"),
        ({"method": "ngram", "num_speculative_tokens": 0}, "num_speculative_tokens is 0"),
        ({"method": "ngram", "num_speculative_tokens": True}, "num_speculative_tokens is True"),
        ({"method": "ngram", "num_speculative_tokens": "5"}, "num_speculative_tokens is '5'"),
        ({"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 65}, "prompt_lookup_max is 65"),
        (
            {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3, "prompt_lookup_min": 0},
            "prompt_lookup_min is 0",
        ),
        (
            {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 4, "prompt_lookup_max": 3},
            "prompt_lookup_min is 4, more than prompt_lookup_max, 3",
        ),
        ({"method": "ngram", "num_speculative_tokens": 5, "draft_tensor_parallel_size": 1}, "draft_tensor_parallel"),
    ],
)
def test_what_is_not_known_is_refused_by_name(given: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig.of(model="m", speculative_config=given)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 4}'],
        ["--speculative_config.method", "ngram", "--speculative-config.num_speculative_tokens=4"],
    ],
)
def test_the_command_line_takes_it_as_json_or_by_dots(arguments: list[str]) -> None:
    parser = Parser()
    add_engine_options(parser)
    config = engine_config(parser.parse_args(["m", *arguments]))
    assert config.speculation.chosen() == Speculation(4, 5, 5)
