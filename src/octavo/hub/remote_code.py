"""Python code out of a model's repo: the one place that loads it, and only where the user said so.

Nothing else may call Transformers' ``get_class_from_dynamic_module`` or ask it to trust remote code; a test searches
the source for both. The gate is here and not with the callers, since Transformers' function has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from octavo.errors import ModelError
from octavo.hub.geometry import lookup, text_config
from octavo.hub.patches import Hf
from octavo.hub.resolve import resolve
from octavo.hub.source import Source


def reference(config: Mapping[str, Any], auto_class: str) -> str | None:
    """What ``auto_map`` names for ``auto_class`` ("AutoTokenizer"): ``module.Class`` or ``owner/name--module.Class``.

    Of a pair (slow, fast) it is the fast one.
    """
    named = config.get("auto_map")
    if isinstance(named, Mapping):
        named = named.get(auto_class)
    if isinstance(named, (list, tuple)):
        named = next((name for name in reversed(named) if name), None)
    return str(named) if named else None


def _resolved(repo: str) -> Source:
    return resolve(repo, weights=False, code=True)


@dataclass(frozen=True)
class RepoCode:
    """The Python code of the repo or folder ``source``; ``trusted`` is what the user said of it.

    ``find_repo`` resolves another repo that ``source`` takes code from.
    """

    source: Source
    trusted: bool = False
    find_repo: Callable[[str], Source] = _resolved

    def load(self, reference: str) -> Any:
        """The class ``module.Class``, of another repo if it is ``owner/name--module.Class``; this runs its module.

        Raises `ModelError`: HF010 without trust, before anything is read; HF011 for code that cannot be found or
        imported.
        """
        source = self.source
        repo, _, inside = reference.rpartition("--")
        file = inside.rpartition(".")[0].replace(".", "/") + ".py"
        if self.trusted is not True:
            raise ModelError(
                f"{source.name} needs {inside}, which is Python code of {repo or 'its repo'} ({file}),"
                f" at {source.commit or source.path}.",
                "Read that code, then allow it with --trust-remote-code (trust_remote_code=True), or take a model and a"
                " tokenizer (--tokenizer) without code of their own.",
                id="HF010",
            )
        if repo:
            source = self.find_repo(repo)
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        try:
            return get_class_from_dynamic_module(inside, str(source.path), local_files_only=True)
        except Exception as error:  # it is any code
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            raise ModelError(
                f"{file} of {repo or source.name} cannot be imported: {type(error).__name__}: {first}.",
                "Install what it needs, or name the revision that fits the installed packages.",
                id="HF011",
            ) from error


# What the engine asks of a config, by the names that Transformers' classes have in common.
_COMMON = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings"),
)


def completed(hf: Hf, code: RepoCode) -> Hf:
    """``hf``, and if it lacks a size, the common names as the repo's own config class has them.

    Such a class may have names of its own, and defaults that no file tells. Raises as `RepoCode.load`, and HF011 for a
    class that does not take the config.
    """
    text, named = text_config(hf), reference(hf, "AutoConfig")
    if named is None or all(lookup(text, name) is not None for name in ("vocab_size", "hidden_size")):
        return hf
    config_class = code.load(named)
    try:
        config = config_class.from_dict(hf).get_text_config()
        found = {name: getattr(config, name) for name in _COMMON if getattr(config, name, None) is not None}
    except Exception as error:  # it is any code
        raise ModelError(
            f"{named} of {code.source.name} does not take the config: {type(error).__name__}: {error}.",
            "Name the revision of the repo that fits the installed Transformers.",
            id="HF011",
        ) from error
    return {**found, **hf}
