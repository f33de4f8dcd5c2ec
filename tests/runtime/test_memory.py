"""What a step reads of a model's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from octavo.hub.checkpoint import open_checkpoint
from octavo.hub.configs import model_config, read_hf_dict
from octavo.hub.resolve import resolve
from octavo.models import registry
from octavo.runtime import loader
from octavo.runtime.memory import step_bytes
from tools import tiny


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_of_experts_a_step_reads_those_that_a_token_chooses(impl: str, dtype: str, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path, "qwen3_moe")  # 3 of 8 experts in two of three layers
    source = resolve(str(folder))
    config = model_config(read_hf_dict(source, {}), dtype=dtype, generation={}, traced=impl == "transformers")
    model = registry.choose(config, impl)[0](config, 64)
    checkpoint = open_checkpoint(source)
    loader.load(model, checkpoint, torch.device("cpu"))
    sizes = {name: info.nbytes for name, info in checkpoint.tensors().items() if "embed_tokens" not in name}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    stored = next(iter(checkpoint.tensors().values())).dtype
    width = getattr(torch, dtype).itemsize / getattr(torch, stored).itemsize
    expected = width * (sum(sizes.values()) - experts * 5 / 8)
    assert step_bytes(model) == pytest.approx(expected, rel=0.02)  # packed weights are padded
