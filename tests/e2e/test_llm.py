"""`LLM` and `AsyncLLM` on a tiny real model, through files, tokenizer, worker and process."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from octavo import LLM, AsyncLLM, EngineConfig, SamplingParams
from octavo.errors import EngineDead, ModelError
from octavo.frontend.loading import load_text_model
from tests.waiting import PATIENCE, children
from tools import tiny

LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 4 << 20, "device": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture(scope="module")
def llm(model: Path) -> LLM:
    return LLM(model, dtype="float32", **LIMITS)


def test_text_is_the_decoded_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24, logprobs=2)
    results = llm.generate(["There was a time", "é 中"], params, use_tqdm=False)
    assert [len(result.outputs) for result in results] == [1, 1]
    for result in results:
        one = result.outputs[0]
        assert one.token_ids
        tokenizer = llm.get_tokenizer()
        whole = tokenizer.decode(result.prompt_token_ids + one.token_ids)
        assert whole == tokenizer.decode(result.prompt_token_ids) + one.text
        assert one.logprobs is not None
        assert len(one.logprobs) == len(one.token_ids)
        assert all(entry[token].rank == 1 for entry, token in zip(one.logprobs, one.token_ids, strict=True))


def test_prompt_logprobs_cover_the_prompt(llm: LLM) -> None:
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    result = llm.generate("There was a time when", params, use_tqdm=False)[0]
    assert result.prompt_logprobs is not None
    assert result.prompt_logprobs[0] is None
    assert len(result.prompt_logprobs) == len(result.prompt_token_ids)
    assert all(
        i in entry for i, entry in zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True) if entry
    )


def test_a_seed_gives_the_same_text_whatever_else_runs(llm: LLM) -> None:
    params = SamplingParams(seed=7, max_tokens=12)
    alone = llm.generate("a", params, use_tqdm=False)[0].outputs[0].token_ids
    others = [SamplingParams(max_tokens=12)] * 3
    among = llm.generate(["b", "c", "d", "a"], [*others, params], use_tqdm=False)[3].outputs[0].token_ids
    assert alone == among


def test_chat_uses_the_template_of_the_folder(llm: LLM) -> None:
    result = llm.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=2), use_tqdm=False)[0]
    assert result.prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert result.prompt_token_ids[0] == tiny.IM_START


def test_the_models_generation_config_sets_the_defaults(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.25, "eos_token_id": [2, 5]}))
    text = load_text_model(EngineConfig.of(model=str(folder)))
    assert text.eos_ids == {2, 5}
    assert text.defaults == {"temperature": 0.25}
    assert load_text_model(EngineConfig.of(model=str(folder), generation_config="vllm")).defaults == {}
    other = load_text_model(EngineConfig.of(model=str(model), generation_config=str(folder)))
    assert other.defaults == {"temperature": 0.25}


def test_without_a_tokenizer_the_folder_needs_none(model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    text = load_text_model(EngineConfig.of(model=str(tmp_path), skip_tokenizer_init=True))
    assert (text.tokenizer, text.eos_ids) == (None, {tiny.EOS})
    named = load_text_model(EngineConfig.of(model=str(tmp_path), tokenizer=str(model)))
    assert named.tokenizer is not None


def test_the_text_side_imports_neither_torch_nor_transformers(model: Path) -> None:
    code = (
        "import sys; from octavo import EngineConfig, AsyncLLM, LLM;"
        "from octavo.frontend.loading import load_text_model;"
        f"load_text_model(EngineConfig.of(model={str(model)!r}));"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_async_llm_starts_a_process_and_ends_it(model: Path) -> None:
    async def work() -> None:
        async with await AsyncLLM.start(EngineConfig.of(model=str(model), **LIMITS), worker="stub") as llm:
            outputs = [o async for o in llm.generate([5, 6], SamplingParams(max_tokens=5, ignore_eos=True))]
            assert len(outputs[-1].outputs[0].token_ids) == 5
            assert (await llm.health()).running == 0
            client = llm.client
        with pytest.raises(EngineDead):
            await client.health()

    asyncio.run(asyncio.wait_for(work(), PATIENCE))


def test_a_start_that_is_cancelled_leaves_no_process(model: Path) -> None:
    async def work() -> None:
        before = set(children())
        task = asyncio.create_task(AsyncLLM.start(EngineConfig.of(model=str(model), **LIMITS)))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert set(children()) <= before

    asyncio.run(asyncio.wait_for(work(), PATIENCE))


def test_async_llm_that_cannot_start_says_why_and_leaves_no_process(tmp_path: Path) -> None:
    async def work() -> None:
        before = set(children())
        with pytest.raises(ModelError):
            await AsyncLLM.start(EngineConfig.of(model=str(tmp_path)))
        assert set(children()) <= before

    asyncio.run(asyncio.wait_for(work(), PATIENCE))
