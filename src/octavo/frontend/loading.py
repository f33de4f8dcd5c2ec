"""What the text side needs of a model: its tokenizer, what ends a text, how it wants to be sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from octavo.config import EngineConfig
from octavo.hub.configs import model_config
from octavo.hub.files import find_files
from octavo.hub.live import LiveModel
from octavo.hub.pooling import Pooler
from octavo.hub.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextModel:
    """``tokenizer`` is None with ``skip_tokenizer_init``; ``defaults`` are fields of `SamplingParams`.

    ``pooler`` is that of a model that embeds.
    """

    tokenizer: Tokenizer | None
    eos_ids: frozenset[int] = frozenset()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    architecture: str = ""
    pooler: Pooler | None = None


def load_text_model(config: EngineConfig, live: LiveModel | None = None) -> TextModel:
    """Reads everything but the weights; raises `ModelError`. Imports neither torch nor, ordinarily, transformers.

    With a ``live`` model nothing is read.
    """
    options = config.model
    files = live or find_files(options, weights=False)
    hf, pooler = files.read_config()
    model = model_config(hf, generation=files.generation, traced=True)  # the worker is strict
    ends = set(model.eos_ids)
    tokenizer = None if options.skip_tokenizer_init else files.load_tokenizer()
    if tokenizer is not None and tokenizer.eos_id is not None:
        ends.add(tokenizer.eos_id)
    return TextModel(tokenizer, frozenset(ends), files.sampling_defaults(), model.architecture, pooler)
