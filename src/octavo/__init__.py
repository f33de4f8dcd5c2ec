"""octavo: serve any Hugging Face language model, fast, on CPU and NVIDIA GPU.

Only names are exported here; each is imported on first use, so that ``import octavo`` costs milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from octavo.async_llm import AsyncLLM
    from octavo.config import EngineConfig
    from octavo.frontend.beams import BeamSearchParams
    from octavo.frontend.inputs import TextPrompt, TokensPrompt
    from octavo.llm import LLM
    from octavo.sampling_params import PoolingParams, SamplingParams
    from octavo.structured import StructuredOutputsParams
    from octavo.types import CompletionOutput, EmbeddingRequestOutput, RequestOutput

__version__ = "0.1.0"

_HOMES = {
    "LLM": "octavo.llm",
    "AsyncLLM": "octavo.async_llm",
    "BeamSearchParams": "octavo.frontend.beams",
    "TextPrompt": "octavo.frontend.inputs",
    "TokensPrompt": "octavo.frontend.inputs",
    "EngineConfig": "octavo.config",
    "SamplingParams": "octavo.sampling_params",
    "PoolingParams": "octavo.sampling_params",
    "RequestOutput": "octavo.types",
    "EmbeddingRequestOutput": "octavo.types",
    "CompletionOutput": "octavo.types",
    "StructuredOutputsParams": "octavo.structured",
}
__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "EmbeddingRequestOutput",
    "EngineConfig",
    "PoolingParams",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'octavo' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
