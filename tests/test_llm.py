"""`LLM` over the real scheduler and a worker that needs no model."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo.config import EngineConfig
from octavo.core.engine import EngineCore
from octavo.errors import ConfigError, EngineDead, OctavoError, RequestError
from octavo.frontend.inputs import TextPrompt, TokensPrompt
from octavo.frontend.loading import TextModel
from octavo.llm import LLM, engine_config
from octavo.runtime.stub import StubWorker
from octavo.sampling_params import SamplingParams
from octavo.vllm_options import METHODS
from tests.frontend.fakes import byte_level
from tools import tiny

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ '>' if add_generation_prompt }}"
EOS = 40


def make(tokenizer: Any = "default", **options: Any) -> LLM:
    config = EngineConfig.of(**{"model": "stub", "max_num_seqs": 4, "max_num_batched_tokens": 32, **options})
    made = byte_level(chat_template=TEMPLATE) if tokenizer == "default" else tokenizer
    core = EngineCore(config, StubWorker(num_pages=200, max_len=200))
    return LLM.over(core, TextModel(made, frozenset({EOS}), {"temperature": 0.5}), config)


@pytest.fixture
def llm() -> Iterator[LLM]:
    with make() as llm:
        yield llm


def ids(llm: LLM, prompts: Any, **params: Any) -> list[list[int]]:
    results = llm.generate(prompts, SamplingParams(ignore_eos=True, **params), use_tqdm=False)
    return [r.outputs[0].token_ids for r in results]


def test_results_are_in_the_order_of_prompts_and_do_not_depend_on_the_batch(llm: LLM) -> None:
    prompts = [[i % 7] * (1 + 3 * i) for i in range(12)]
    together = ids(llm, prompts, max_tokens=9)
    assert together == [ids(llm, prompt, max_tokens=9)[0] for prompt in prompts]
    assert [len(one) for one in together] == [9] * 12


def test_every_form_of_prompt_is_taken(llm: LLM) -> None:
    encoded = llm.get_tokenizer().encode("ax")
    forms: list[Any] = ["ax", TextPrompt(prompt="ax"), TokensPrompt(prompt_token_ids=encoded), encoded]
    answers = ids(llm, forms)
    assert answers == [answers[0]] * 4
    assert [ids(llm, form) for form in forms] == [[answers[0]]] * 4
    assert llm.generate([], use_tqdm=False) == []


def test_prompts_of_lower_priority_numbers_run_first() -> None:
    with make(max_num_seqs=1) as llm:
        added: list[int] = []
        core = llm._engine()
        add = core.add
        core.add = lambda request: (added.append(request.priority), add(request))[1]  # type: ignore[method-assign]
        results = llm.generate(["a", "b"], SamplingParams(max_tokens=2), priority=[5, -1], lora_request=None)
        assert added == [5, -1]
        assert [result.prompt for result in results] == ["a", "b"]
        with pytest.raises(RequestError, match="2 prompts and 1 priorities"):
            llm.generate(["a", "b"], priority=[1])


def test_an_adapter_is_refused(llm: LLM) -> None:
    for call in (llm.generate, llm.chat):
        with pytest.raises(RequestError, match="adapter"):
            call([{"role": "user", "content": "a"}], lora_request=1)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["llm_engine", "sleep", "wake_up", "collective_rpc", "no_such_thing"])
def test_what_is_missing_says_what_to_do_instead(llm: LLM, name: str) -> None:
    assert not hasattr(llm, name)
    with pytest.raises(AttributeError, match=re.escape(METHODS.get(name, f"LLM has no {name}"))):
        getattr(llm, name)


def test_the_engine_tells_its_limits(llm: LLM) -> None:
    assert (llm.info.max_model_len, llm.info.max_num_seqs) == (200, 4)


def test_each_prompt_can_have_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 5)]
    results = llm.generate([[1], [2]], params, use_tqdm=False)
    assert [len(r.outputs[0].token_ids) for r in results] == [1, 5]
    with pytest.raises(RequestError, match="2 prompts and 1 sampling_params"):
        llm.generate([[1], [2]], params[:1], use_tqdm=False)


@pytest.mark.parametrize(
    ("prompts", "params"),
    [(None, None), (3, None), (b"ax", None), (["ax", 1], None), ("ax", {"max_tokens": 1}), ("ax", [None])],
)
def test_arguments_of_a_wrong_type_are_refused_and_the_next_call_works(llm: LLM, prompts: Any, params: Any) -> None:
    with pytest.raises(RequestError, match="is of type"):
        llm.generate(prompts, params, use_tqdm=False)
    assert len(ids(llm, "ax")) == 1


@pytest.mark.parametrize("params", [{"stop": [1]}, {"detokenize": None}, {"bad_words": [1]}, {"min_tokens": 1.5}])
def test_parameters_of_a_wrong_type_do_not_end_the_engine(llm: LLM, params: Any) -> None:
    with pytest.raises(RequestError, match="Expected"):
        llm.generate("ax", SamplingParams(**params), use_tqdm=False)
    assert len(ids(llm, "ax")) == 1


def test_a_stop_string_ends_an_answer_and_frees_its_place(llm: LLM) -> None:
    whole = llm.generate("ax", SamplingParams(max_tokens=40, ignore_eos=True), use_tqdm=False)[0].outputs[0]
    stop = whole.text[10:12]
    one = llm.generate("ax", SamplingParams(max_tokens=40, ignore_eos=True, stop=stop), use_tqdm=False)[0].outputs[0]
    assert one.text == whole.text[: whole.text.index(stop)]
    assert (one.finish_reason, one.stop_reason) == ("stop", stop)
    ids(llm, "x")
    assert llm._engine().stats().running == 0


def test_several_outputs_of_one_prompt(llm: LLM) -> None:
    result = llm.generate("ax", SamplingParams(n=3, max_tokens=4, ignore_eos=True), use_tqdm=False)[0]
    assert [o.index for o in result.outputs] == [0, 1, 2]
    assert all(len(o.token_ids) == 4 for o in result.outputs)


def test_as_many_log_probabilities_as_the_engine_allows() -> None:
    for limit in (0, 2, 30):
        with make(max_logprobs=limit) as llm:
            assert llm.generate("ab", SamplingParams(logprobs=limit, prompt_logprobs=limit), use_tqdm=False)[0].finished
            for name in ("logprobs", "prompt_logprobs"):
                with pytest.raises(RequestError, match=f"{name} is {limit + 1}") as caught:
                    llm.generate("ab", SamplingParams(**{name: limit + 1}), use_tqdm=False)  # type: ignore[arg-type]
                assert "--max-logprobs" in caught.value.remedy


@pytest.mark.parametrize("options", [{"max_logprobs": 1025}, {"max_logprobs": -1}])
def test_more_log_probabilities_than_a_step_can_send_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="max_logprobs"):
        make(**options)
    with pytest.raises(ConfigError, match=r"outside \[0, 16\]"):
        make(max_num_batched_tokens=1 << 20)


def test_an_answer_that_would_outgrow_the_context_is_cut_at_its_end(llm: LLM) -> None:
    result = llm.generate([[1] * 190], SamplingParams(max_tokens=100, ignore_eos=True), use_tqdm=False)[0]
    assert (len(result.outputs[0].token_ids), result.outputs[0].finish_reason) == (10, "length")


def test_one_bad_prompt_is_an_error_and_the_next_call_works(llm: LLM) -> None:
    with pytest.raises(RequestError, match="999"):
        llm.generate([[1], [999]], use_tqdm=False)
    assert ids(llm, [[1]])


def test_a_repeated_prompt_comes_from_the_prefix_cache(llm: LLM) -> None:
    prompt = list(range(64))
    first = llm.generate([prompt], use_tqdm=False)[0]
    again = llm.generate([prompt], use_tqdm=False)[0]
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, 48)
    assert llm.reset_prefix_cache()
    assert llm.generate([prompt], use_tqdm=False)[0].num_cached_tokens == 0


def test_more_prompts_than_may_wait_are_all_served() -> None:
    with make(max_waiting=2) as llm:
        assert len(ids(llm, [[i] for i in range(30)], max_tokens=2)) == 30


def test_chat_renders_with_the_models_template(llm: LLM) -> None:
    one = [{"role": "user", "content": "ax"}]
    result = llm.chat(one, SamplingParams(max_tokens=2), use_tqdm=False)[0]
    assert result.prompt == "user: ax\n>"
    results = llm.chat([one, [*one, *one]], use_tqdm=False, add_generation_prompt=False)
    assert [r.prompt for r in results] == ["user: ax\n", "user: ax\nuser: ax\n"]
    assert llm.chat(one, use_tqdm=False, chat_template="{{ 'abc' }}")[0].prompt == "abc"


def test_defaults_are_the_models(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.5)


def test_without_a_tokenizer_ids_go_in_and_out() -> None:
    with make(None) as llm:
        assert (
            llm.generate([[1, 2]], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)[0].outputs[0].text
            == ""
        )
        with pytest.raises(RequestError, match="without a tokenizer"):
            llm.generate("text", use_tqdm=False)
        with pytest.raises(ConfigError, match="no tokenizer"):
            llm.get_tokenizer()


def test_a_closed_llm_says_so(llm: LLM) -> None:
    llm.close()
    llm.close()
    with pytest.raises(EngineDead, match="closed"):
        llm.generate("ax", use_tqdm=False)


def test_a_step_that_fails_closes_the_engine() -> None:
    worker = StubWorker(num_pages=200, max_len=200)
    config = EngineConfig.of(model="stub")
    llm = LLM.over(EngineCore(config, worker), TextModel(None), config)
    worker.fail_at = 3
    with pytest.raises(RuntimeError, match="told to fail"):
        ids(llm, [[1]], max_tokens=10)
    with pytest.raises(EngineDead, match="closed"):
        ids(llm, [[1]])


def test_the_progress_bar_counts_prompts(llm: LLM) -> None:
    calls: list[tuple[str, Any]] = []

    class Bar:
        def __init__(self, total: int, **_: Any) -> None:
            calls.append(("total", total))

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            assert "tokens/s" in text

        def update(self, count: int) -> None:
            calls.append(("update", count))

        def close(self) -> None:
            calls.append(("close", None))

    llm.generate(["a", "b"], use_tqdm=Bar)
    assert calls == [("total", 2), ("update", 1), ("update", 1), ("close", None)]


def test_ctrl_c_ends_the_call_between_steps_and_the_next_call_works(llm: LLM) -> None:
    core = llm._engine()
    step, calls = core.step, []

    def interrupted() -> Any:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step()

    core.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        ids(llm, [[1], [2]], max_tokens=100)
    assert len(calls) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(ids(llm, [[1]], max_tokens=5)[0]) == 5
    assert core.stats().running == 0


def test_it_works_in_a_thread(llm: LLM) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(ids(llm, [[1]], max_tokens=2)))
    thread.start()
    thread.join()
    assert len(found) == 1


def test_options_of_vllm_without_effect_are_accepted() -> None:
    config = engine_config("m", {"tensor_parallel_size": 1, "swap_space": 4, "disable_log_stats": True, "seed": 3})
    assert config.model.seed == 3
    for backend in (None, "uni", "mp"):
        config = engine_config("m", {"distributed_executor_backend": backend, "data_parallel_size": 2})
        assert config.parallel.data_parallel_size == 2


@pytest.mark.parametrize(
    "options",
    [
        {"pipeline_parallel_size": 2},
        {"quantization": "hqq"},
        {"no_such_option": 1},
        {"dtype": "int8"},
        {"distributed_executor_backend": "ray"},
        {"compilation_config": 3},
        {"limit_mm_per_prompt": {"image": 1}},
    ],
)
def test_options_that_octavo_does_not_have_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        engine_config("m", options)
    assert caught.value.remedy


def test_an_option_of_vllm_that_octavo_lacks_is_answered_as_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match="octavo has no compilation_config") as caught:
        engine_config("m", {"compilation_config": 3})
    assert caught.value.remedy == "Leave it out; --enforce-eager turns CUDA graphs off."
    assert engine_config("m", {"served_model_name": "x"}) == engine_config("m", {})


def test_a_misspelt_option_is_answered_with_the_one_that_was_meant() -> None:
    with pytest.raises(ConfigError) as caught:
        engine_config("m", {"max_modle_len": 64})
    assert caught.value.remedy == "Did you mean max_model_len?"


def test_a_function_may_change_the_config_of_a_model_with_a_name(tmp_path: Path) -> None:
    folder = tiny.make(tmp_path / "llama", dtype="float32")
    with LLM(folder, device="cpu", hf_overrides=lambda hf: hf | {"max_position_embeddings": 48}) as llm:
        assert llm.config.model.hf_overrides == {"max_position_embeddings": 48}
        with pytest.raises(RequestError, match="48"):
            llm.generate([5] * 48, use_tqdm=False)
    with pytest.raises(ConfigError, match="is a function"):
        EngineConfig.of(model="m", hf_overrides=lambda hf: hf)


def test_a_torch_dtype_is_taken_by_its_name() -> None:
    class Dtype:
        def __str__(self) -> str:
            return "torch.float32"

    assert engine_config("m", {"dtype": Dtype()}).model.dtype == "float32"


def test_a_model_that_is_no_name_is_refused() -> None:
    with pytest.raises(OctavoError, match="type int"):
        LLM(5)  # type: ignore[arg-type]
