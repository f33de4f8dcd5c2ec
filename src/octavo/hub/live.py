"""A Transformers model of this process in place of files: its config, generation config and tokenizer."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import TypeIs

from octavo.config import ModelOptions
from octavo.errors import ConfigError, ModelError
from octavo.hub.configs import DTYPES, override
from octavo.hub.files import find_files
from octavo.hub.generation import sampling_defaults
from octavo.hub.patches import Hf
from octavo.hub.pooling import Pooler
from octavo.hub.tokenizer import AutoTokenizerAdapter, Tokenizer

# Options about files, which a loaded model does not come from, with the values that ask for nothing.
_OF_FILES: Mapping[str, tuple[Any, ...]] = {
    "runner": ("auto", "generate"),
    "convert": ("auto", "none"),
    "pooler_config": ({},),
    "revision": (None,),
    "code_revision": (None,),
    "hf_config_path": (None,),
    "hf_overrides": ({},),
    "load_format": ("auto",),
    "model_impl": ("auto", "transformers"),
    "generation_config": ("auto", "vllm"),
    "tokenizer_mode": ("auto", "hf", "slow"),
}


def device_of(model: PreTrainedModel) -> str:
    """The kind of device that all parameters are on, "cpu" or "cuda"; raises `ConfigError` if there are several."""
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) != 1 or devices == ["meta"]:
        raise ConfigError(
            f"the model's parameters are on {', '.join(devices) or 'no device'}.", "Load the model on one device."
        )
    return devices[0].partition(":")[0]


def is_loaded(model: object) -> TypeIs[PreTrainedModel]:
    """Whether ``model`` is a ``transformers.PreTrainedModel``; imports nothing."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and "torch" in sys.modules and isinstance(model, transformers.PreTrainedModel)


@dataclass(frozen=True)
class LiveModel:
    """What `hub.files.ModelFiles` tells of files, for a model that is loaded already.

    ``tokenizer`` is one of Transformers' objects or the name of one; None: that of the name the model was loaded by.
    """

    options: ModelOptions
    model: PreTrainedModel
    tokenizer: Any

    def check(self) -> None:
        """Raises `ConfigError` for options that could only be followed by loading the model again."""
        for name, neutral in _OF_FILES.items():
            value = getattr(self.options, name)
            if value not in neutral:
                raise ConfigError(
                    f"{name} is {value!r}, but the model is loaded already.",
                    "Leave it out, or give the model's name in place of the model.",
                )
        if DTYPES[self.options.dtype] != self.dtype:
            raise ConfigError(
                f"dtype is {self.options.dtype}, but the loaded model is in {self.dtype}.",
                "Leave dtype out, or convert the model first.",
            )

    @property
    def dtype(self) -> str:
        """The type of the model's weights."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def generation(self) -> Mapping[str, Any]:
        """What the model's generation config sets."""
        config = getattr(self.model, "generation_config", None)
        return {} if config is None else config.to_diff_dict()

    def hf_dict(self) -> Hf:
        """The config in the shape that `hub.patches` makes; the architecture is the model's class."""
        hf = {**self.model.config.to_dict(), "architectures": [type(self.model).__name__]}
        return override(hf, {})

    def read_config(self) -> tuple[Hf, Pooler | None]:
        """`hf_dict`; a loaded model generates text."""
        return self.hf_dict(), None

    def sampling_defaults(self) -> dict[str, Any]:
        """As `hub.files.ModelFiles.sampling_defaults`."""
        own = {} if self.options.generation_config == "vllm" else self.generation
        return sampling_defaults({**own, **self.options.override_generation_config})

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer behind the engine's interface; raises `ModelError` HF060 if there is none."""
        named = self.model.name_or_path if self.tokenizer is None else self.tokenizer
        if not named:
            raise ModelError(
                "no tokenizer is given for the loaded model, and it has no name to find one by.",
                "Pass tokenizer=, an object or a name, or skip_tokenizer_init=True to work with token ids alone.",
                id="HF060",
            )
        if isinstance(named, str):
            return find_files(replace(self.options, model=named), weights=False).load_tokenizer()
        return AutoTokenizerAdapter(named)
