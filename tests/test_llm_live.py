"""`LLM` over a Transformers model that is loaded already: it shares the parameters and leaves the model as it was."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from octavo import LLM, SamplingParams
from octavo.errors import ConfigError, ModelError, UnsupportedModel
from octavo.structured import StructuredOutputsParams
from tools import sweep, tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # of Transformers' own code

PROMPTS = [list(range(7, 50)), list(range(7, 60)), [9, 8]]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def answers(llm: LLM) -> list[list[int]]:
    return [list(result.outputs[0].token_ids) for result in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


def expected(model: Any) -> list[list[int]]:
    """Greedy continuations by the model itself, one prompt at a time."""
    training = model.training
    model.eval()
    made = [
        model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=False)
        for ids in PROMPTS
    ]
    model.train(training)
    return [output[0, len(ids) :].tolist() for ids, output in zip(PROMPTS, made, strict=True)]


def loaded(model_type: str = "llama", **overrides: Any) -> Any:
    return sweep.reference(sweep.tiny_config(model_type, **overrides))


def over(model: Any, **options: Any) -> LLM:
    return LLM(model, skip_tokenizer_init=True, max_model_len=128, **options)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "gpt2", "mixtral", "bloom"])
def test_a_change_of_weights_in_place_changes_the_next_answer(model_type: str) -> None:
    model = loaded(model_type)
    with over(model) as llm:
        before = answers(llm)
        assert before == expected(model)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        after = answers(llm)
    assert after == expected(model)
    assert after != before


def test_a_step_of_an_optimizer_between_two_calls_is_seen() -> None:
    model = loaded().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with over(model) as llm:
        before = answers(llm)
        ids = torch.tensor([PROMPTS[0]])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        assert answers(llm) == expected(model) != before


def test_the_engine_holds_the_parameters_themselves() -> None:
    model = loaded()
    with over(model) as llm:
        held = {parameter.data_ptr() for parameter in llm._core._worker._model.parameters()}  # type: ignore[union-attr]
    assert held == {parameter.data_ptr() for parameter in model.parameters()}


def test_the_model_is_left_as_it_was() -> None:
    model, calls = loaded().train(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    modules = [type(module) for module in model.modules()]
    attention = model.config._attn_implementation
    with over(model) as llm:
        answers(llm)
    assert model.training
    assert not calls
    assert model.config._attn_implementation == attention
    assert [type(module) for module in model.modules()] == modules
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_closed_llm_keeps_nothing_of_the_model_alive() -> None:
    model = loaded()
    weight = weakref.ref(model.lm_head.weight)
    llm = over(model)
    answers(llm)
    llm.close()
    del llm, model
    gc.collect()
    assert weight() is None


@pytest.fixture
def tokenizer(tmp_path: Path) -> PreTrainedTokenizerFast:
    tiny.tokenizer(tmp_path)
    return PreTrainedTokenizerFast.from_pretrained(tmp_path)


def test_a_tokenizer_object_serves_text_chat_and_grammars(tokenizer: PreTrainedTokenizerFast) -> None:
    model = loaded(vocab_size=tiny.VOCAB_SIZE)
    with LLM(model, tokenizer=tokenizer, max_model_len=128) as llm:
        (result,) = llm.generate("the quick brown fox", GREEDY, use_tqdm=False)
        assert result.prompt_token_ids == tokenizer.encode("the quick brown fox")
        assert result.outputs[0].text == tokenizer.decode(result.outputs[0].token_ids, skip_special_tokens=True)
        (chat,) = llm.chat([{"role": "user", "content": "hi"}], GREEDY, use_tqdm=False)
        assert chat.prompt_token_ids
        choice = StructuredOutputsParams(choice=["red", "green"])
        held = SamplingParams(max_tokens=40, structured_outputs=choice, seed=1)
        assert llm.generate("a", held, use_tqdm=False)[0].outputs[0].text in ("red", "green")


def test_without_a_tokenizer_that_of_the_name_the_model_was_loaded_by_is_used(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny.make(tmp_path, "llama")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with LLM(model) as live, LLM(folder, dtype="float32") as files:
        assert answers(live) == answers(files)
        assert live.get_tokenizer().encode("the fox") == files.get_tokenizer().encode("the fox")
        assert live.get_default_sampling_params() == files.get_default_sampling_params()


def test_no_tokenizer_to_be_found_is_an_error_with_a_remedy() -> None:
    with pytest.raises(ModelError, match="no tokenizer is given") as raised:
        LLM(loaded())
    assert "skip_tokenizer_init" in raised.value.remedy


@pytest.mark.parametrize(
    "option",
    [
        {"revision": "main"},
        {"hf_overrides": {"rope_theta": 1.0}},
        {"load_format": "dummy"},
        {"model_impl": "native"},
        {"dtype": "bfloat16"},
        {"generation_config": "folder"},
        {"device": "cuda"},
    ],
    ids=json.dumps,
)
def test_an_option_that_would_need_another_load_is_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        over(loaded(), **option)


def test_dtype_may_name_the_type_that_the_model_has() -> None:
    with over(loaded(), dtype=torch.float32) as llm:
        assert llm.config.model.dtype == "float32"


def test_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = type(loaded())(sweep.tiny_config("llama"))
    with pytest.raises(ConfigError, match="parameters are on meta"):
        over(model)


def test_quantised_weights_are_refused_by_method() -> None:
    model = loaded()
    model.quantization_method = "awq"
    with pytest.raises(UnsupportedModel, match="awq") as raised:
        over(model)
    assert raised.value.id == "HF050"
