"""What was proven of a model is kept on disk, so that later starts need not import Transformers to prove it again.

Importing Transformers takes more processor time than loading a small model. Where its model of a config was proven to
compute what the engine's native model of that config does, layer by layer, and to take the same tensors by the same
names, the native model runs at the next start. A record is a file whose name is a digest of all that the proof was
about: config, type and length, the files of weights, the versions and files of Transformers, torch and octavo.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from octavo.config import ModelConfig
from octavo.layers.activation import GatedActivation
from octavo.layers.attention import Attention
from octavo.layers.base import Layer
from octavo.layers.norm import RMSNorm
from octavo.layers.rotary import Rotary
from octavo.log import get_logger
from octavo.models.base import Model
from octavo.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from octavo.parallel.group import current

if TYPE_CHECKING:
    from octavo.models.hf.proof import Proven
    from octavo.models.hf.weights import Group

FOLDER = "OCTAVO_CACHE"
"""The environment variable that names where records are; ``octavo`` in the user's folder for caches otherwise."""


@dataclass(frozen=True)
class Record:
    """``basis`` is what the proof is about, as JSON."""

    basis: str

    @classmethod
    def of(cls, config: ModelConfig, max_len: int, weights: Path) -> Record:
        """For the model in the folder ``weights``, with sequences of up to ``max_len`` tokens."""
        basis = {
            "config": {name: value for name, value in config.hf.items() if not name.startswith("_")},
            "dtype": config.dtype,
            "max_len": max_len,
            "weights": [str(weights), *_stamps(weights, "*.safetensors", "*.bin", "*.pt")],
            "code": _code(config.model_type),
        }
        return cls(json.dumps(basis, sort_keys=True, default=str))

    @property
    def path(self) -> Path:
        base = os.environ.get(FOLDER) or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "octavo"
        return Path(base) / "proven" / f"{hashlib.sha256(self.basis.encode()).hexdigest()}.json"

    def is_kept(self) -> bool:
        """Whether the proof succeeded before."""
        try:
            return self.path.read_text(encoding="utf-8") == self.basis
        except (OSError, ValueError, RuntimeError):  # RuntimeError: there is no home
            return False

    def keep(self) -> None:
        """For later starts; where nothing can be written they prove it again."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(f".{os.getpid()}")
            part.write_text(self.basis, encoding="utf-8")
            part.replace(self.path)
        except (OSError, RuntimeError) as error:
            get_logger().debug("the proof was not kept: %s", error)


def maker(weights: Path) -> Callable[[ModelConfig, int], Model]:
    """What makes the model of a config that has a native model, too: that, where it was proven to be the same."""

    def make(config: ModelConfig, max_len: int) -> Model:
        from octavo.models.hf.backend import TransformersModel

        if current().size > 1:
            return TransformersModel(config, max_len)
        record = Record.of(config, max_len, weights)
        if not record.is_kept():
            return TransformersModel(config, max_len, record=record)
        get_logger().info("transformers: not imported; proven before: the native model computes the same")
        return LlamaForCausalLM(config, max_len)

    return make


def _stamps(folder: Path, *patterns: str) -> list[str]:
    """Names, sizes and times of change of files."""
    found = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in found]


@cache
def _code(model_type: str) -> list[str]:
    """Versions, and what would show a change of the code in place."""
    stamps = [f"{name} {metadata.version(name)}" for name in ("transformers", "torch")]
    spec = util.find_spec("transformers")
    if spec is not None and spec.origin is not None:
        installed = Path(spec.origin).parent
        stamps += _stamps(installed, "modeling_*.py", "masking_utils.py", "cache_utils.py", "activations.py")
        stamps += _stamps(installed / "models" / model_type, "*.py")
    own = Path(__file__).parents[1]
    return stamps + _stamps(own, "*.py") + _stamps(own / "hf", "*.py") + _stamps(own.parent / "layers", "*.py")


def is_native(model: Any, proven: Proven, groups: list[Group], native: LlamaForCausalLM) -> bool:
    """Whether ``native`` has the layers that were ``proven`` for the Transformers model ``model``, embedding and head
    like its, and takes the tensors of ``groups`` as they are to the same places."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is not nn.Linear or getattr(head, "bias", None) is not None or type(embedding) is not nn.Embedding:
        return False
    if any(group.transform is not None or [name for name, _ in group.sources] != group.targets for group in groups):
        return False
    ends = {"model.embed_tokens.weight", *(() if native.tied else ("lm_head.weight",))}
    if {target for group in groups for target in group.targets} - ends != set(proven.slots):
        return False
    ours, theirs = native.model, proven.decoder
    if [*_described(ours.layers), *_described(ours.norm)] != [*_described(theirs.layers), *_described(theirs.norm)]:
        return False
    rules = {
        rule.source: (name, rule.parameter, rule.start)
        for name, module in ours.named_modules()
        if isinstance(module, Layer) and module is not ours.embed_tokens
        for rule in module.load_rules(f"model.{name}")
    }
    names = {module: name for name, module in theirs.named_modules()}
    slots = {source: (names[s.layer], s.parameter, s.start) for source, s in proven.slots.items() if not s.add}
    return rules == slots


def _described(part: nn.Module) -> Iterator[tuple[Any, ...]]:
    """What native layers compute, apart from the values of their parameters."""
    for name, module in part.named_modules():
        yield name, type(module)
        for kind, parameter in module.named_parameters(recurse=False):
            yield kind, parameter.shape, parameter.dtype
        match module:
            case LlamaDecoderLayer():
                yield module.spec.heads, module.spec.kv_heads, module.spec.head_dim
            case RMSNorm():
                yield (module.eps,)
            case Attention():
                yield module.layer, module.scale, module.window, module.softcap
            case GatedActivation():
                yield (module.operator,)
            case Rotary():
                yield module.spec, module.max_len
