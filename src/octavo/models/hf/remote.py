"""Models whose classes are Python code of their repo, which the user said to trust."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from octavo.config import ModelConfig
from octavo.errors import ModelError
from octavo.hub.remote_code import RepoCode, reference
from octavo.models.hf.backend import TransformersModel
from octavo.models.hf.build import Classes, build

if TYPE_CHECKING:
    from octavo.models.registry import Maker


def maker(config: ModelConfig, code: RepoCode) -> Maker:
    """What makes the model that ``auto_map`` of ``config`` names. Its modules are imported now.

    Raises `ModelError` HF010 without trust, HF011 for code that cannot be imported or is of another kind.
    """
    classes = classes_of_repo(config, code)

    def make(config: ModelConfig, max_len: int) -> TransformersModel:
        return TransformersModel(config, max_len, build(config, getattr(torch, config.dtype), classes))

    return make


def classes_of_repo(config: ModelConfig, code: RepoCode) -> Classes:
    """The classes that ``auto_map`` of ``config`` names; raises as `maker`."""
    config_class = _load(config, code, "AutoConfig", "PreTrainedConfig")
    return Classes(config_class, _load(config, code, "AutoModelForCausalLM", "PreTrainedModel"))


def _load(config: ModelConfig, code: RepoCode, auto_class: str, base: str) -> Any:
    """The class for ``auto_class``; a config's is the installed one of the model type if the repo has none."""
    import transformers

    named = reference(config.hf, auto_class)
    if named is None and config.model_type not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"the code of {code.source.name} has no AutoConfig, and the installed Transformers does not know model_type"
            f" {config.model_type!r}.",
            "Name the config's class in auto_map of config.json.",
            id="HF011",
        )
    if named is None:
        return transformers.CONFIG_MAPPING[config.model_type]
    found = code.load(named)
    if not (isinstance(found, type) and issubclass(found, getattr(transformers, base))):
        raise ModelError(
            f"{named} of {code.source.name} is no {base} of Transformers.",
            "Ask the authors of the repo, or name a revision of it that fits the installed Transformers.",
            id="HF011",
        )
    return found
