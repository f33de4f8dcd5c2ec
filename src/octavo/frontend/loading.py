"""What the text side needs of a model: its tokenizer, what ends a text, how it wants to be sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo.config import EngineConfig, ModelOptions
from octavo.hub.configs import generation_config, model_config, read_hf_dict, sampling_defaults
from octavo.hub.resolve import resolve
from octavo.hub.source import Source
from octavo.hub.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class TextModel:
    """``tokenizer`` is None with ``skip_tokenizer_init``; ``defaults`` are fields of `SamplingParams`."""

    tokenizer: Tokenizer | None
    eos_ids: frozenset[int] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)


def load_text_model(config: EngineConfig) -> TextModel:
    """Reads everything but the weights; raises `ModelError`. Imports neither torch nor, ordinarily, transformers."""
    options = config.model
    source = _resolve(options, options.model, options.revision)
    generation = generation_config(source)
    ends = set(model_config(read_hf_dict(source, options.hf_overrides), generation=generation).eos_ids)
    tokenizer = None if options.skip_tokenizer_init else _tokenizer(options, source)
    if tokenizer is not None and tokenizer.eos_id is not None:
        ends.add(tokenizer.eos_id)
    return TextModel(tokenizer, frozenset(ends), _defaults(options, generation))


def _tokenizer(options: ModelOptions, source: Source) -> Tokenizer:
    if options.tokenizer is not None:
        source = _resolve(options, options.tokenizer, options.tokenizer_revision)
    elif options.tokenizer_revision not in (None, options.revision):
        source = _resolve(options, options.model, options.tokenizer_revision)
    return load_tokenizer(source, mode=options.tokenizer_mode, trust_remote_code=options.trust_remote_code)


def _defaults(options: ModelOptions, generation: Mapping[str, Any]) -> dict[str, Any]:
    if options.generation_config == "vllm":
        return {}
    if options.generation_config != "auto":
        generation = generation_config(_resolve(options, options.generation_config, None))
    return sampling_defaults(generation)


def _resolve(options: ModelOptions, name: str, revision: str | None) -> Source:
    return resolve(name, revision=revision, token=options.hf_token, download_dir=options.download_dir, weights=False)
