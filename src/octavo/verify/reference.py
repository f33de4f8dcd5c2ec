"""The oracle: the model as Transformers alone loads and runs it, with eager attention."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from octavo.config import ModelConfig
from octavo.errors import ModelError
from octavo.hub.checkpoint import open_checkpoint
from octavo.hub.files import ModelFiles
from octavo.hub.quantised.checkpoint import unquantised
from octavo.hub.remote_code import reference
from octavo.hub.source import Source
from octavo.models.base import as_tensor
from octavo.models.hf.build import Classes, config_of, installed_classes
from octavo.models.hf.remote import classes_of_repo
from octavo.runtime.torch_checkpoint import PyTorchCheckpoint


class Reference:
    """The model of ``files`` in Transformers. Raises `ModelError` HF045 if Transformers cannot load it."""

    def __init__(self, files: ModelFiles, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        from transformers import GenerationConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        classes = _classes(files, config)
        source, options = files.weights, files.options
        folder: str | None = str(source.path)
        more: dict[str, Any] = {}
        few_bits = source.kind == "gguf" or bool(config.hf.get("quantization_config"))
        if few_bits:
            folder, more = None, {"state_dict": _dequantised(source, config)}
        if few_bits or options.hf_overrides or options.hf_config_path:
            more["config"] = config_of(classes.config, config.hf)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.model: Any = classes.model.from_pretrained(
                    folder,
                    dtype=dtype,
                    attn_implementation="eager",
                    local_files_only=True,
                    trust_remote_code=False,  # for a custom_generate in the repo, about which it would ask otherwise
                    **more,
                )
        except Exception as error:  # what a checkpoint can be wrong in is not one class of errors there
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            raise ModelError(
                f"Transformers cannot load {source.name}, to compare with: {type(error).__name__}: {first}",
                "Without it there is nothing to verify against.",
                id="HF045",
            ) from error
        self.model.to(device).eval()
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # nothing ends a text

    @torch.inference_mode()
    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The ``count`` likeliest tokens after ``prompt``, one after the other, past any end of text."""
        ids = torch.tensor([prompt], device=self.model.device)
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count)
        tokens: list[int] = output[0, len(prompt) :].tolist()
        return tokens

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """``[T, vocab]`` in float32 on the CPU, computed without a cache."""
        ids = torch.tensor([tokens], device=self.model.device)
        found: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits[0].float().cpu()
        return found


def _dequantised(source: Source, config: ModelConfig) -> dict[str, torch.Tensor]:
    """All weights of a GGUF file or a quantised checkpoint by their Transformers names, as floats."""
    checkpoint = unquantised(open_checkpoint(source, pytorch=PyTorchCheckpoint), config.hf)
    return {name: as_tensor(checkpoint.read(name)) for name in checkpoint.tensors()}


def _classes(files: ModelFiles, config: ModelConfig) -> Classes:
    if files.options.trust_remote_code and reference(config.hf, "AutoModelForCausalLM"):
        return classes_of_repo(config, files.code())
    return installed_classes(config)
