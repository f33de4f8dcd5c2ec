"""Embeddings of the real engine: those of Transformers, however the texts were put into steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, PoolingParams
from octavo.errors import ConfigError, RequestError
from octavo.models.base import Model
from octavo.platforms.cpu import CpuPlatform
from tools import tiny

Vectors = list[list[float]]
PROMPTS = [[(7 * i + 13 * n) % 300 + 4 for i in range(n)] for n in (1, 5, 16, 33, 70, 130, 2, 48)]
SMALL = {"device": "cpu", "dtype": "float32", "kv_cache_memory_bytes": 1 << 22, "max_num_seqs": 8}


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("tiny") / request.param, request.param)


@pytest.fixture(scope="module")
def states(folder: Path) -> list[torch.Tensor]:
    """Hidden states ``[T, C]`` of each of `PROMPTS`, by Transformers."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).last_hidden_state[0] for prompt in PROMPTS]


@contextmanager
def embedder(folder: Path, **options: Any) -> Iterator[Callable[..., Vectors]]:
    with LLM(folder, **{"runner": "pooling", "skip_tokenizer_init": True, **SMALL, **options}) as llm:

        def embed(prompts: list[list[int]] = PROMPTS, **params: Any) -> Vectors:
            results = llm.embed(prompts, use_tqdm=False, pooling_params=PoolingParams(**params))
            return [result.outputs.embedding for result in results]

        yield embed


def assert_close(found: Vectors, wanted: list[torch.Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(torch.tensor(one), other, atol=2e-6, rtol=1e-5)


POOLED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "LAST": lambda hidden: hidden[-1],
    "MEAN": lambda hidden: hidden.mean(0),
    "CLS": lambda hidden: hidden[0],
}


@pytest.mark.parametrize("kind", POOLED)
@pytest.mark.parametrize("impl", ["native", "transformers"])
def test_embeddings_are_those_of_transformers(folder: Path, states: list[torch.Tensor], kind: str, impl: str) -> None:
    wanted = [torch.nn.functional.normalize(POOLED[kind](hidden), dim=0) for hidden in states]
    options = {"pooler_config": {"pooling_type": kind}, "model_impl": impl}
    with embedder(folder, **options) as embed:
        assert_close(embed(), wanted)
        assert_close(embed(), wanted)  # of the first tokens K and V are known now
        assert_close([embed([prompt])[0] for prompt in PROMPTS], wanted)
    with embedder(folder, **options, max_num_batched_tokens=24) as embed:  # in chunks
        assert_close(embed(), wanted)


def test_an_embedding_of_plain_length_and_one_of_fewer_numbers(folder: Path, states: list[torch.Tensor]) -> None:
    with embedder(folder, hf_overrides={"is_matryoshka": True}) as embed:
        assert_close(embed(use_activation=False), [hidden[-1] for hidden in states])
        cut = [torch.nn.functional.normalize(hidden[-1, :24], dim=0) for hidden in states]
        assert_close(embed(dimensions=24), cut)
        with pytest.raises(RequestError, match="1 to 64"):
            embed(dimensions=65)


def test_an_embedding_does_not_depend_on_the_batch(folder: Path) -> None:
    for kind in POOLED:
        options = {"pooler_config": {"pooling_type": kind}, "enable_prefix_caching": False}
        with embedder(folder, **options) as embed:
            alone = torch.tensor([embed([prompt])[0] for prompt in PROMPTS])
            for together in (embed(), embed(PROMPTS[::-1])[::-1]):
                torch.testing.assert_close(torch.tensor(together), alone, atol=5e-7, rtol=0)


@pytest.mark.parametrize("kind", POOLED)
@pytest.mark.parametrize("budget", [24, 512])
def test_captured_steps_launched_ahead_give_the_same(
    folder: Path, states: list[torch.Tensor], kind: str, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuPlatform, "captures", True)  # "replays" by running the work again on the same memory
    monkeypatch.setattr(CpuPlatform, "overlaps", True)
    with embedder(folder, pooler_config={"pooling_type": kind}, max_num_batched_tokens=budget) as embed:
        monkeypatch.setattr("octavo.runtime.runner.send", None)  # an eager step fails
        assert_close(embed(), [torch.nn.functional.normalize(POOLED[kind](hidden), dim=0) for hidden in states])


def test_a_checkpoint_without_a_head_embeds_by_itself(folder: Path, states: list[torch.Tensor], tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(folder, dtype=torch.float32).save_pretrained(tmp_path)
    names = tiny_names(tmp_path)
    assert "embed_tokens.weight" in names and not any(name.startswith(("model.", "lm_head")) for name in names)
    wanted = [torch.nn.functional.normalize(hidden[-1], dim=0) for hidden in states]
    for impl in ("native", "transformers"):
        with embedder(tmp_path, runner="auto", model_impl=impl) as embed:
            assert_close(embed(), wanted)


def test_a_head_is_neither_built_nor_read(folder: Path) -> None:
    for impl in ("native", "transformers"):
        with LLM(folder, runner="pooling", skip_tokenizer_init=True, model_impl=impl, **SMALL) as llm:
            model: Model = llm._engine()._worker.model  # type: ignore[attr-defined]
            heads = [module for name, module in model.named_modules() if name.endswith("lm_head")]
            assert all(isinstance(head, torch.nn.Identity) for head in heads)
            assert all(getattr(module, "tied", None) in (None, False) for module in model.modules())


def test_a_model_of_the_transformers_backend_alone_embeds(tmp_path: Path) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 256}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)).eval()
    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        hidden = [model.gpt_neox(torch.tensor([prompt])).last_hidden_state[0, -1] for prompt in PROMPTS]
    with embedder(tmp_path) as embed:
        assert_close(embed(), [torch.nn.functional.normalize(one, dim=0) for one in hidden])


def test_engines_refuse_what_the_other_kind_does(folder: Path) -> None:
    with LLM(folder, runner="pooling", **SMALL) as llm:
        with pytest.raises(RequestError, match="--runner generate"):
            llm.generate("a")
        with pytest.raises(RequestError, match="--runner generate"):
            llm.chat([{"role": "user", "content": "a"}])
    with LLM(folder, **SMALL) as llm, pytest.raises(RequestError, match="--runner pooling"):
        llm.embed("a")


def test_a_prompt_may_fill_the_context_and_is_cut_only_if_asked(folder: Path) -> None:
    with LLM(folder, runner="pooling", max_model_len=32, **SMALL) as llm:
        tokenizer = llm.get_tokenizer()
        text = "the quick brown fox jumps over the lazy dog. " * 8
        ids = tokenizer.encode(text)
        assert len(ids) > 32
        (full,) = llm.embed({"prompt_token_ids": ids[:32]}, use_tqdm=False)
        with pytest.raises(RequestError, match="truncate_prompt_tokens"):
            llm.embed(text)
        (cut,) = llm.embed(text, pooling_params=PoolingParams(truncate_prompt_tokens=-1), use_tqdm=False)
        assert cut.prompt_token_ids == ids[:32] and cut.outputs.embedding == full.outputs.embedding
        (few,) = llm.embed(text, pooling_params=PoolingParams(truncate_prompt_tokens=5), use_tqdm=False)
        assert few.prompt_token_ids == ids[:5]


def test_a_loaded_model_does_not_embed(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with pytest.raises(ConfigError, match="runner is 'pooling'"):
        LLM(model, runner="pooling")


def tiny_names(folder: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())
