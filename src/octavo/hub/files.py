"""Where the parts of a model are: config, generation config and tokenizer may each be from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from octavo.config import ModelOptions
from octavo.hub.configs import read_hf_dict
from octavo.hub.generation import generation_config, sampling_defaults
from octavo.hub.patches import Hf
from octavo.hub.pooling import Pooler, causal, pooler_of
from octavo.hub.remote_code import RepoCode, completed
from octavo.hub.resolve import resolve
from octavo.hub.source import Source
from octavo.hub.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class ModelFiles:
    """``weights`` is what MODEL names, ``config`` what ``--hf-config-path`` names, else the same.

    ``generation`` is the generation config that ``--generation-config`` means; "vllm" takes only the ends of a text
    from the model's own.
    """

    options: ModelOptions
    weights: Source
    config: Source
    generation: Mapping[str, Any]

    def hf_dict(self) -> Hf:
        """See `hub.configs.read_hf_dict`; what only code of the repo tells is asked of that code, if it is trusted."""
        return completed(read_hf_dict(self.config, self.options.hf_overrides, self.options.config_format), self.code())

    def read_config(self) -> tuple[Hf, Pooler | None]:
        """`hf_dict`, and how the model embeds if it does; its architecture is then one with a head.

        Raises as `hub.pooling.pooler_of`.
        """
        hf = self.hf_dict()
        pooler = pooler_of(hf, self.weights, self.options)
        return hf if pooler is None else causal(hf), pooler

    def sampling_defaults(self) -> dict[str, Any]:
        """Fields of `SamplingParams` that hold for requests which do not set them; raises `ModelError` HF002."""
        own = {} if self.options.generation_config == "vllm" else self.generation
        return sampling_defaults({**own, **self.options.override_generation_config})

    def tokenizer(self) -> Source:
        """Where the tokenizer is; another revision or repo than the model's is looked up, and fetched if need be."""
        options = self.options
        if options.tokenizer is not None:
            return _resolve(options, options.tokenizer, options.tokenizer_revision)
        if options.tokenizer_revision not in (None, options.revision):
            return _resolve(options, options.model, options.tokenizer_revision)
        return self.weights

    def code(self) -> RepoCode:
        """The Python code beside the config."""
        return self._code_of(self.config)

    def _code_of(self, source: Source) -> RepoCode:
        """What ``source`` takes from another repo is at ``--code-revision``."""
        options = self.options
        return RepoCode(source, options.trust_remote_code, lambda repo: _resolve(options, repo, options.code_revision))

    def load_tokenizer(self) -> Tokenizer:
        """See `hub.tokenizer.load_tokenizer`."""
        source = self.tokenizer()
        return load_tokenizer(source, mode=self.options.tokenizer_mode, code=self._code_of(source))


def find_files(options: ModelOptions, *, weights: bool) -> ModelFiles:
    """Resolves the model, with or without its weights, and what belongs to it; raises `ModelError`."""
    source = _resolve(options, options.model, options.revision, weights=weights)
    return files_of(options, source)


def files_of(options: ModelOptions, source: Source) -> ModelFiles:
    """As `find_files`, for a model that is found already."""
    config = source if options.hf_config_path is None else _resolve(options, options.hf_config_path, None)
    named = options.generation_config
    generation = config if named in ("auto", "vllm") else _resolve(options, named, None)
    return ModelFiles(options, source, config, generation_config(generation))


def _resolve(options: ModelOptions, name: str, revision: str | None, *, weights: bool = False) -> Source:
    return resolve(
        name,
        revision=revision,
        token=options.hf_token,
        download_dir=options.download_dir,
        weights=weights,
        code=options.trust_remote_code,
        load_format=options.load_format if weights else "auto",
    )
