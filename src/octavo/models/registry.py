"""From an architecture's name in config.json to the class that runs it.

Packages add models of their own through the entry point group ``octavo.models``: the name of an entry point is the
architecture, its value ``module:class`` a `models.base.Model`. Nothing is imported before it is chosen.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.config import MODEL_ENTRY_POINTS, ModelConfig
from octavo.errors import UnsupportedModel
from octavo.hub.quantised import settings
from octavo.hub.remote_code import RepoCode, reference

if TYPE_CHECKING:
    from octavo.models.base import Model

    Maker = Callable[[ModelConfig, int], Model]  # of a config and the longest sequence

TRANSFORMERS = "octavo.models.hf.backend:TransformersModel"
OF_REPO = "octavo.models.hf.remote:maker"

LLAMA = "octavo.models.llama:LlamaForCausalLM"
MOE = "octavo.models.moe:MoeForCausalLM"

# Architecture -> "module:class", imported when chosen.
NATIVE = {
    "LlamaForCausalLM": LLAMA,
    "LLaMAForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "MixtralForCausalLM": MOE,
    "Qwen2ForCausalLM": LLAMA,
    "Qwen3ForCausalLM": LLAMA,
    "Qwen3MoeForCausalLM": MOE,
    "SmolLM3ForCausalLM": LLAMA,
}

# The ``hidden_act`` that native models know (`layers.activation`); one with another runs on the Transformers backend.
ACTIVATIONS = frozenset(("gelu_new", "gelu_pytorch_tanh", "silu", "swish"))


def choose(
    config: ModelConfig, impl: str = "auto", code: RepoCode | None = None, weights: Path | None = None
) -> tuple[Maker, str]:
    """What makes the model of ``config``, and the reason, one line for the log.

    ``impl`` is an option's value (``--model-impl``), ``code`` the Python code of the model's repo, ``weights`` the
    folder of its weights if they are plain floats that are loaded as they are. Raises
    `UnsupportedModel`: HF030 if nothing can run the architecture or the package that should is broken, HF050 for
    weights that are quantised in a way that is not read; `ModelError`: HF010 if only code of the repo could, which is
    not trusted, HF011 if that code cannot be imported.
    """
    address, reason = find(config, impl, trusts_code=code is not None and code.trusted)
    module, _, name = address.partition(":")
    if address == OF_REPO:
        if code is None:
            raise UnsupportedModel(f"{reason}, which is not run here.", "Start the model with --trust-remote-code.")
        from octavo.models.hf.remote import maker

        return maker(config, code), reason
    if address == TRANSFORMERS and NATIVE.get(config.architecture) == LLAMA and weights is not None:
        from octavo.models.hf import records

        return records.maker(weights), reason
    try:
        model: type[Model] = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        if module.startswith("octavo."):
            raise
        raise UnsupportedModel(
            f"{reason}, but {address} cannot be imported: {error}.", "Repair or remove that package."
        ) from error
    return model, reason


def find(config: ModelConfig, impl: str = "auto", *, trusts_code: bool = False) -> tuple[str, str]:
    """As `choose`, with the address ``module:class`` in place of the class; imports neither it nor torch."""
    settings.check(config.hf)
    named = reference(config.hf, "AutoModelForCausalLM")
    if impl == "transformers" and named and (trusts_code or not _in_transformers(config.architecture)):
        return OF_REPO, f"Transformers backend for {config.architecture}: asked for; {named} of its repo"
    if impl == "transformers":
        return TRANSFORMERS, f"Transformers backend for {config.architecture}: asked for"
    installed = {point.name: point for point in metadata.entry_points(group=MODEL_ENTRY_POINTS)}
    own = installed.get(config.architecture)
    if own is not None:  # before the native one: whoever installs it wants it
        package = own.dist.name if own.dist is not None else own.module
        return own.value, f"{own.attr} of package {package} for {config.architecture}"
    address, lacking = NATIVE.get(config.architecture), "no native model of it"
    if address is not None and impl == "auto" and config.hidden_act not in ACTIVATIONS:
        address, lacking = None, f"the native model of it has no hidden_act {config.hidden_act!r}"
    if address is None and impl == "auto" and named and (trusts_code or not _in_transformers(config.architecture)):
        return OF_REPO, f"Transformers backend for {config.architecture}: {lacking}; {named} of its repo"
    if address is None and impl == "auto" and _in_transformers(config.architecture):
        return TRANSFORMERS, f"Transformers backend for {config.architecture}: {lacking}"
    if address is None:
        known = [*NATIVE, *installed]
        nearest = difflib.get_close_matches(config.architecture, known, n=3, cutoff=0.0)
        tried = "the installed Transformers lacks it" if impl == "auto" else f"--model-impl {impl} was asked for"
        code = " Its repo has Python code for it, but no AutoModelForCausalLM." if config.hf.get("auto_map") else ""
        raise UnsupportedModel(
            f"Architecture {config.architecture!r} (model_type {config.model_type!r}) has no native model, no installed"
            f" package brings one (entry points {MODEL_ENTRY_POINTS}), and {tried}.{code}",
            f"The nearest native ones are {', '.join(nearest)}.",
        )
    return address, f"native {address.partition(':')[2]} for {config.architecture}"


def is_traced(hf: Mapping[str, Any], impl: str) -> bool:
    """Whether the Transformers backend would run the config ``hf``: it finds out the layers itself."""
    names = hf.get("architectures") or ()
    own = {*NATIVE, *(point.name for point in metadata.entry_points(group=MODEL_ENTRY_POINTS))}
    return impl == "transformers" or not own.intersection(names[:1])


def _in_transformers(architecture: str) -> bool:
    import transformers  # its names come without torch and the models

    return architecture in dir(transformers)
