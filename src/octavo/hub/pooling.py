"""Whether a model embeds texts in place of writing them, and how an embedding is made of its hidden states.

Options come first, then the files of sentence-transformers (``modules.json``, which names the folder of a module
``Pooling``) or what a GGUF file says, then the name of the architecture: one without a head embeds. The rules are
vLLM's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Final

from octavo.config import MODEL_ENTRY_POINTS, ModelOptions
from octavo.errors import ConfigError, ModelError, RequestError, UnsupportedModel
from octavo.hub.geometry import lookup, text_config
from octavo.hub.patches import Hf
from octavo.hub.remote_code import reference
from octavo.hub.source import Source
from octavo.types import Pooling, PoolingKind

MODULES: Final = "modules.json"
GGUF_POOLING: Final = "gguf_pooling"  # the key of a config made from a GGUF file: llama.cpp's number of a kind

_KINDS: Final[Mapping[str, PoolingKind]] = {
    "lasttoken": "last",
    "pooling_mode_lasttoken": "last",
    "mean": "mean",
    "pooling_mode_mean_tokens": "mean",
    "cls": "cls",
    "pooling_mode_cls_token": "cls",
}
_GGUF_KINDS: Final[Mapping[int, PoolingKind]] = {1: "mean", 2: "cls", 3: "last"}  # 0 is none, and 4 ranks
_HEADLESS: Final = ("ForTextEncoding", "EmbeddingModel", "Model")
_CAUSAL: Final = {"GPT2Model": "GPT2LMHeadModel", "Gemma3TextModel": "Gemma3ForCausalLM"}
_ENCODERS: Final = frozenset(
    (
        *("albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "eurobert", "mpnet"),
        *("modernbert", "new", "nomic_bert", "roberta", "t5", "xlm-roberta"),
    )
)
_SETTINGS: Final = {  # of --pooler-config; former names of vLLM's, too
    "pooling_type": "pooling_type",
    "seq_pooling_type": "pooling_type",
    "use_activation": "use_activation",
    "normalize": "use_activation",
    "dimensions": "dimensions",
}


@dataclass(frozen=True)
class Pooler:
    """``kind`` of pooling; ``normalize`` and ``dimensions`` are the defaults of requests.

    An embedding has ``size`` numbers, or fewer where the model was trained for that: ``nested`` lists how many, and is
    True for any.
    """

    kind: PoolingKind
    normalize: bool
    size: int
    nested: tuple[int, ...] | bool
    dimensions: int | None
    reason: str

    def __str__(self) -> str:
        return f"{self.kind}, {'of length 1' if self.normalize else 'of any length'} ({self.reason})"

    def pooling(self, dimensions: int | None, normalize: bool | None) -> Pooling:
        """That of a request, whose None are the defaults; raises `RequestError` for a size that cannot be had."""
        dimensions = self.dimensions if dimensions is None else dimensions
        if dimensions is not None and not self.nested:
            raise RequestError(
                f"dimensions is {dimensions}, but this model's embeddings have {self.size} numbers and no fewer.",
                "Leave it out; --hf-overrides.is_matryoshka true says that the model was trained for fewer.",
                param="dimensions",
            )
        allowed = self.nested if isinstance(self.nested, tuple) else range(1, self.size + 1)
        if dimensions is not None and dimensions not in allowed:
            shown = ", ".join(map(str, allowed)) if isinstance(allowed, tuple) else f"1 to {self.size}"
            raise RequestError(f"dimensions is {dimensions}.", f"It may be {shown}.", param="dimensions")
        return Pooling(self.kind, dimensions, self.normalize if normalize is None else normalize)


def pooler_of(hf: Hf, source: Source, options: ModelOptions) -> Pooler | None:
    """How the model with the config ``hf`` beside ``source`` embeds; None for one that generates text.

    Raises `ConfigError` for options at odds with each other, `ModelError` HF002 for files that cannot be read, and
    `UnsupportedModel` HF031 for an embedding that octavo does not compute.
    """
    modules = _modules(source)
    reason = _reason(hf, modules, options)
    if reason is None:
        if options.pooler_config:
            raise ConfigError("pooler_config is set, but this model generates text.", "Add --runner pooling.")
        return None
    _check_causal(hf)
    given = _given(options.pooler_config)
    kind: PoolingKind | None = "last"
    normalize = True
    if modules:
        kind, normalize = _of_modules(source, modules)
    elif hf.get(GGUF_POOLING):
        kind = _GGUF_KINDS.get(hf[GGUF_POOLING])
    wanted = given.get("pooling_type", kind)
    if wanted is None:
        raise _refused("its files name a pooling that octavo does not have", "Name one with --pooler-config.")
    size = lookup(text_config(hf), "hidden_size") or 0
    sizes = hf.get("matryoshka_dimensions")
    return Pooler(
        kind=wanted,
        normalize=given.get("use_activation", normalize),
        size=size,
        nested=tuple(sizes) if isinstance(sizes, list) and sizes else bool(hf.get("is_matryoshka")),
        dimensions=given.get("dimensions"),
        reason=reason,
    )


def causal(hf: Hf) -> Hf:
    """``hf`` with the architecture that has a head in the place of one that has none."""
    name = _architecture(hf)
    if not name.endswith("Model") or name.endswith("LMHeadModel"):
        return hf
    return {**hf, "architectures": [_CAUSAL.get(name) or f"{name.removesuffix('Model')}ForCausalLM"]}


def pooling_folders(modules: object) -> list[str]:
    """The folders of modules ``Pooling`` among those of a ``modules.json``."""
    named = [module for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    return [str(module.get("path")) for module in named if _kind_of(module) == "Pooling"]


def _reason(hf: Hf, modules: list[Any] | None, options: ModelOptions) -> str | None:
    """Why the model embeds; None if it does not."""
    runner, convert = options.runner, options.convert
    if (runner, convert) in (("generate", "embed"), ("pooling", "none")):
        raise ConfigError(f"runner is {runner} and convert is {convert}.", "Leave one of them out.")
    if runner == "pooling" or convert == "embed":
        return "asked for"
    if runner == "generate" or convert == "none":
        return None
    if modules and pooling_folders(modules):
        return f"{MODULES} names a module Pooling; --runner generate generates text"
    if hf.get(GGUF_POOLING):
        return "the GGUF file names a pooling; --runner generate generates text"
    name = _architecture(hf)
    if name.endswith("LMHeadModel") or not name.endswith(_HEADLESS) or _is_installed(name):
        return None
    if reference(hf, "AutoModelForCausalLM"):
        return None
    return f"{name} has no head"


def _is_installed(name: str) -> bool:
    """Whether a package brings a model called ``name``."""
    from importlib import metadata  # looks into every package: a start does without where it can

    return any(point.name == name for point in metadata.entry_points(group=MODEL_ENTRY_POINTS))


def _check_causal(hf: Hf) -> None:
    text = text_config(hf)
    both = hf.get("is_causal") is False or text.get("use_bidirectional_attention")
    if str(hf.get("model_type")) in _ENCODERS or hf.get("is_encoder_decoder") or both:
        raise _refused(
            f"{_architecture(hf)} ({hf.get('model_type')}) attends in both directions, and octavo embeds with "
            "decoders, whose tokens see those before them",
            "Choose an embedding model that is a decoder, such as Qwen/Qwen3-Embedding-0.6B.",
        )
    if _architecture(hf).endswith(("Classification", "RewardModel", "ForRewardModeling")):
        raise _refused(
            f"{_architecture(hf)} classifies or scores, and octavo generates and embeds",
            "Choose an embedding model.",
        )


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``--pooler-config`` under vLLM's present names, checked; raises `ConfigError`."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in _SETTINGS:
            known = "pooling_type, use_activation, dimensions"
            raise ConfigError(f"pooler_config has {name!r}, which octavo does not have.", f"It may have {known}.")
        if value is not None:
            found[_SETTINGS[name]] = value
    kind, dimensions = found.get("pooling_type"), found.get("dimensions")
    if kind is not None:
        if str(kind).lower() not in ("last", "mean", "cls"):
            raise ConfigError(f"pooler_config has pooling_type {kind!r}.", "Give one of LAST, MEAN, CLS.")
        found["pooling_type"] = str(kind).lower()
    if type(found.get("use_activation", True)) is not bool:
        raise ConfigError(f"pooler_config has use_activation {found['use_activation']!r}.", "Give true or false.")
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise ConfigError(f"pooler_config has dimensions {dimensions!r}.", "Give a number of at least 1.")
    return found


def _of_modules(source: Source, modules: list[Any]) -> tuple[PoolingKind | None, bool]:
    """(kind of pooling, None for one that octavo does not have; whether embeddings are normalised)."""
    kinds = [_kind_of(module) for module in modules]
    for kind in kinds:
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise _refused(f"{MODULES} has a module {kind}, which octavo does not have", "Choose another model.")
    folders = pooling_folders(modules)
    if not folders:
        return "last", True
    settings = _read(source, str(PurePosixPath(folders[0]) / "config.json"))
    modes = [name for name, value in settings.items() if name.startswith("pooling_mode_") and value is True]
    modes = modes or [str(settings.get("pooling_mode", "lasttoken"))]
    return (_KINDS.get(modes[0]) if len(modes) == 1 else None), "Normalize" in kinds


def _modules(source: Source) -> list[Any] | None:
    if source.file(MODULES) is None:
        return None
    found = _read(source, MODULES)
    if not isinstance(found, list) or not all(isinstance(module, dict) for module in found):
        raise ModelError(f"{source.path / MODULES} is no list of modules.", "Download it again.", id="HF002")
    return found


def _read(source: Source, name: str) -> Any:
    path, inside = source.file(name), PurePosixPath(name)
    if path is None or inside.is_absolute() or ".." in inside.parts:
        raise ModelError(f"{source.path} has no {name}, which {MODULES} names.", "Download it.", id="HF002")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", "Download it again.", id="HF002") from None


def _kind_of(module: Mapping[str, Any]) -> str:
    """``sentence_transformers.models.Pooling`` -> Pooling, as are the longer paths of later versions."""
    return str(module.get("type")).rpartition(".")[2]


def _architecture(hf: Hf) -> str:
    names = hf.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _refused(cause: str, remedy: str) -> UnsupportedModel:
    return UnsupportedModel(f"{cause}.", remedy, id="HF031")
