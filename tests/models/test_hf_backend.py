"""The Transformers backend against the same models, unmodified, with eager attention."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bench.gpu_reference import Reference
from octavo.config import EngineConfig
from octavo.core.engine import EngineCore
from octavo.errors import ModelError, UnsupportedModel
from octavo.kernels import select
from octavo.models.hf.backend import TransformersModel
from octavo.models.hf.build import config_of
from octavo.models.hf.norms import NormFormula, native_norm, norm_formula
from octavo.models.hf.probe import Call
from octavo.runtime.worker import Worker
from tests.core.stub_engine import collect, make_request, run
from tests.models.harness import Paged
from tools import sweep, tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # of Transformers' own code

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2 window in upper layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", {}),
    "gemma3_text": ("gemma3_text", {}),
    "mistral with a window": ("mistral", {"sliding_window": 12}),
    "mistral without": ("mistral", {"sliding_window": None}),
    "glm4": ("glm4", {}),
    "olmo2": ("olmo2", {}),
    "cohere": ("cohere", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt2": ("gpt2", {}),
    "starcoder2": ("starcoder2", {"sliding_window": 12}),
    "stablelm": ("stablelm", {}),
    "granite": ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "olmoe": ("olmoe", {}),
    "gpt_oss": ("gpt_oss", {}),
    "deepseek_v3": ("deepseek_v3", {}),
    "roberta": ("roberta", {}),  # positions from 4 on
    "opt": ("opt", {}),
    "gemma3n_text": ("gemma3n_text", {}),
    "gemma4_text": ("gemma4_text", {}),  # K and V of two shapes
    "minicpm3": ("minicpm3", {}),
    "longcat_flash": ("longcat_flash", {}),
    "dbrx": ("dbrx", {}),
    "jetmoe": ("jetmoe", {}),
    "minimax_m2": ("minimax_m2", {}),
    "modernbert-decoder": ("modernbert-decoder", {}),
    "emu3": ("emu3", {}),  # the text part of a larger model
}


def saved(folder: Path, model_type: str, **overrides: Any) -> Any:
    """The unmodified tiny model of a type, also written to ``folder``."""
    wanted = sweep.reference(sweep.tiny_config(model_type, **overrides))
    wanted.config.architectures = [type(wanted).__name__]
    wanted.save_pretrained(folder)
    return wanted


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_equal_eager(name: str, tmp_path: Path) -> None:
    model_type, overrides = CASES[name]
    wanted = saved(tmp_path, model_type, **overrides)
    error, case = sweep.divergence(sweep.adopted(tmp_path), wanted)
    assert error < 2e-5, case


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    edit_config(tmp_path, is_encoder_decoder=True)
    with pytest.raises(UnsupportedModel) as error:
        sweep.adopted(tmp_path)
    assert error.value.id == "HF031"
    assert "an encoder and a decoder" in error.value.cause


def test_an_encoder_is_refused_unless_it_is_a_decoder(tmp_path: Path) -> None:
    saved(tmp_path, "bert")
    edit_config(tmp_path, is_decoder=False)
    with pytest.raises(UnsupportedModel) as error:
        sweep.adopted(tmp_path)
    assert error.value.id == "HF031"
    assert "attend to later ones" in error.value.cause


def test_windows_are_those_of_the_masks_and_not_of_keywords(tmp_path: Path) -> None:
    saved(tmp_path, "gemma2", sliding_window=12)
    assert [layer.window for layer in sweep.adopted(tmp_path).config.layers] == [12, None, 12, None]
    # Transformers hands OLMoE's window to attention, but makes its masks without one.
    saved(tmp_path, "olmoe", sliding_window=12)
    assert {layer.window for layer in sweep.adopted(tmp_path).config.layers} == {None}


def test_no_mask_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AttentionInterface

    from octavo.models.hf import attention

    masks = []

    def watching(module: Any, q: Any, k: Any, v: Any, mask: Any = None, **rest: Any) -> Any:
        masks.append(mask)
        return attention.attend(module, q, k, v, mask, **rest)

    saved(tmp_path, "gpt_neox")
    model = sweep.adopted(tmp_path)
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, watching)
    paged = Paged(model)
    paged.step({paged.start(): list(range(4, 40))})
    assert masks == [None] * 4


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_a_long_sequence_does_not_change_a_short_one(rope: str, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path, "llama", rope=rope)
    alone, together = Paged(sweep.adopted(folder, 200)), Paged(sweep.adopted(folder, 200))
    short, long = list(range(4, 24)), list(range(4, 134))
    row = alone.start()
    expected = alone.step({row: short})[row]
    other, row = together.start(), together.start()
    together.step({other: long[:100]})
    assert torch.allclose(together.step({row: short, other: long[100:]})[row], expected, atol=1e-5)


@pytest.mark.parametrize("rope", ["dynamic", "longrope", "yarn", "llama3", "linear"])
def test_rotary_frequencies_are_those_of_the_native_model(rope: str, tmp_path: Path) -> None:
    from tests.models.harness import native

    folder = tiny.make(tmp_path, "llama", rope=rope)
    ours, backend = Paged(native(folder, 128)), Paged(sweep.adopted(folder, 128))
    tokens = list(range(4, 104))
    expected, found = (paged.step({paged.start(): tokens}) for paged in (ours, backend))
    (expected,), (found,) = expected.values(), found.values()
    assert torch.allclose(found, expected, atol=1e-3)


def test_a_tied_head_has_no_weight_of_its_own(tmp_path: Path) -> None:
    saved(tmp_path, "llama", tie_word_embeddings=True)
    model = sweep.adopted(tmp_path).model
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def rewrite(folder: Path, edit: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_tensor_is_named_before_anything_is_read(tmp_path: Path) -> None:
    saved(tmp_path, "gpt_neox")
    rewrite(tmp_path, lambda tensors: tensors.pop("gpt_neox.layers.1.mlp.dense_h_to_4h.bias"))
    with pytest.raises(ModelError) as error:
        sweep.adopted(tmp_path)
    assert error.value.id == "HF043"
    assert "gpt_neox.layers.1.mlp.dense_h_to_4h.bias" in error.value.cause


def test_a_missing_expert_is_found(tmp_path: Path) -> None:
    saved(tmp_path, "qwen3_moe")
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.2.mlp.experts.3.up_proj.weight"))
    with pytest.raises(ModelError) as error:
        sweep.adopted(tmp_path)
    assert error.value.id == "HF044"
    assert "model.layers.2.mlp.experts.gate_up_proj" in error.value.cause


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    saved(tmp_path, "gpt_neox")
    rewrite(tmp_path, lambda tensors: tensors.update({"gpt_neox.layers.1.extra.weight": torch.zeros(2)}))
    with pytest.raises(ModelError) as error:
        sweep.adopted(tmp_path)
    assert error.value.id == "HF042"
    assert "gpt_neox.layers.1.extra.weight" in error.value.cause


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    saved(tmp_path, "gpt_neox")
    rewrite(tmp_path, lambda tensors: tensors.update({"embed_out.weight": torch.zeros(5, 64)}))
    with pytest.raises(ModelError) as error:
        sweep.adopted(tmp_path)
    assert error.value.id == "HF044"
    assert "embed_out.weight is [5, 64]" in error.value.cause


def test_a_class_that_is_no_language_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    edit_config(tmp_path, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(UnsupportedModel) as error:
        sweep.adopted(tmp_path)
    assert "LlamaForCausalLM" in error.value.cause


@pytest.mark.parametrize("kind", [("clip", "CLIPModel"), ("t5", "T5ForConditionalGeneration")])
def test_a_model_of_another_kind_is_not_blamed_on_the_version(kind: tuple[str, str], tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    edit_config(tmp_path, model_type=kind[0], architectures=[kind[1]])
    with pytest.raises(UnsupportedModel) as error:
        sweep.adopted(tmp_path)
    assert error.value.id == "HF031"
    assert "octavo serves no other kind" in error.value.cause
    assert "newer" not in error.value.remedy


def test_a_model_newer_than_transformers_is_told_both_versions(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    edit_config(tmp_path, model_type="llama9", architectures=["Llama9ForCausalLM"], transformers_version="99.1.0")
    with pytest.raises(UnsupportedModel) as error:
        sweep.adopted(tmp_path)
    assert error.value.id == "HF030"
    assert "'llama9'; config.json was written by Transformers 99.1.0" in error.value.cause
    assert "Install a newer Transformers" in error.value.remedy


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden_act": "silly"}, "GPTNeoXForCausalLM cannot be built from this config: KeyError"),
        ({"num_attention_heads": 5}, "GPTNeoX"),
    ],
)
def test_a_config_that_the_class_cannot_be_made_of_is_told_with_what_it_said(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    saved(tmp_path, "gpt_neox")
    edit_config(tmp_path, **change)
    with pytest.raises(ModelError) as error:
        sweep.adopted(tmp_path)
    assert error.value.id == "HF002"
    assert said in error.value.cause


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mixtral", "its decoder stays: MixtralDecoderLayer has other parts than a native layer"),
        ("gemma2", "its decoder stays: Gemma2DecoderLayer has other parts than a native layer"),
        ("cohere", "its decoder stays: CohereDecoderLayer has other parts than a native layer"),
        ("gpt_neox", "its decoder stays: GPTNeoXModel has 0 norms with one weight beside its layers"),
    ],
)
def test_the_log_says_what_was_replaced_and_why_the_decoder_was_not(
    model_type: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, model_type)
    with caplog.at_level("INFO", logger="octavo"):
        sweep.adopted(tmp_path)
    (line,) = [record.getMessage() for record in caplog.records if "replaced by our own" in record.getMessage()]
    assert line.endswith(reason)


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma", "granite", "qwen2", "qwen3", "smollm3"])
def test_a_decoder_that_is_as_llamas_is_replaced_as_a_whole(model_type: str, tmp_path: Path) -> None:
    saved(tmp_path, model_type)
    model = sweep.adopted(tmp_path)
    assert model._native is not None
    assert not any(hasattr(module, "layer_idx") for module in model.modules())  # the old layers are gone


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("granite", {"residual_multiplier": 0.98}),
        ("granite", {"embedding_multiplier": 1.01}),
        ("gemma2", {}),
        ("mixtral", {}),
        ("llama", {"hidden_act": "gelu"}),
    ],
)
def test_a_decoder_that_differs_a_little_is_not_replaced(
    model_type: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    wanted = saved(tmp_path, model_type, **overrides)
    model = sweep.adopted(tmp_path)
    assert model._native is None
    assert sweep.divergence(model, wanted)[0] < 2e-5


def one_layer_louder(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    return hidden * 1.001 if layer.self_attn.layer_idx == 2 else hidden


def every_layer_clips(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    return hidden.clamp(-20, 20)


def the_last_layer_adds_a_little(layer: Any, hidden: torch.Tensor) -> torch.Tensor:
    return hidden + 1e-2 if layer.self_attn.layer_idx == 3 else hidden


@pytest.mark.parametrize("change", [one_layer_louder, every_layer_clips, the_last_layer_adds_a_little])
def test_a_class_with_the_parts_of_llama_that_does_something_else_keeps_its_decoder(
    change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    original = LlamaDecoderLayer.forward
    wanted = saved(tmp_path, "llama")
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, *a, **k: change(self, original(self, *a, **k)))
    model = sweep.adopted(tmp_path)
    assert model._native is None
    assert sweep.divergence(model, wanted)[0] < 2e-5


def test_what_happens_between_layers_keeps_the_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    original = LlamaDecoderLayer.__call__

    def nudged(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, hidden + 1e-5 if self.self_attn.layer_idx == 1 else hidden, *args, **kwargs)

    wanted = saved(tmp_path, "llama")
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", nudged)
    model = sweep.adopted(tmp_path)
    assert "hidden states change after its layer 0" in model.swapped
    assert sweep.divergence(model, wanted)[0] < 2e-5


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "olmo2", "qwen3_moe"])
def test_bfloat16_is_as_close_to_float32_as_eager_bfloat16_is(model_type: str, tmp_path: Path) -> None:
    exact = saved(tmp_path, model_type)
    eager = type(exact).from_pretrained(tmp_path, dtype=torch.bfloat16, attn_implementation="eager")
    tokens = list(range(4, 44))
    expected = sweep.oracle(exact, tokens)
    paged = Paged(sweep.adopted(tmp_path, dtype="bfloat16"))
    row = paged.start()
    found = torch.cat([paged.step({row: tokens[:9]})[row], paged.step({row: tokens[9:]})[row]])
    assert (found - expected).norm() < 1.5 * (sweep.oracle(eager, tokens) - expected).norm()


def core(folder: Path, **options: Any) -> EngineCore:
    flat = {"model": str(folder), "device": "cpu", "dtype": "float32", "max_num_seqs": 4, "max_model_len": 192}
    return EngineCore(EngineConfig.of(**flat, **options), Worker())


def answers(engine: EngineCore) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(3)
    for count in (1, 17, 40, 100, 33):
        tokens = torch.randint(4, 380, (count,), generator=generator).tolist()
        assert engine.add(make_request(engine, f"r{count}", tokens, max_tokens=20, temperature=0.0)) is None
    return collect(run(engine))


@pytest.mark.parametrize("budget", [2048, 13])
def test_an_engine_answers_as_with_the_native_model(budget: int, tmp_path: Path) -> None:
    folder = tiny.make(tmp_path, "llama")
    backend = core(folder, model_impl="transformers", max_num_batched_tokens=budget)
    assert isinstance(backend._worker._model, TransformersModel)
    assert answers(backend) == answers(core(folder))


def test_an_engine_falls_back_to_the_backend_and_takes_dummy_weights(tmp_path: Path) -> None:
    saved(tmp_path, "gpt_neox")
    tiny.tokenizer(tmp_path)
    first, second = (answers(core(tmp_path, load_format="dummy", seed=seed)) for seed in (1, 2))
    assert first != second
    assert first == answers(core(tmp_path, load_format="dummy", seed=1))


@pytest.mark.parametrize("tied", [True, False])
def test_dummy_weights_are_one_for_parameters_that_are_tied(tied: bool, tmp_path: Path) -> None:
    config = {**tiny.config("llama"), "tie_word_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tiny.tokenizer(tmp_path)
    backend = core(tmp_path, model_impl="transformers", load_format="dummy", seed=0)
    reference = Reference(config, backend._worker._model, "transformers")
    tokens = list(range(5, 40))
    backend.add(make_request(backend, "r", tokens, max_tokens=20, temperature=0.0))
    verdict = reference.judge(tokens, collect(run(backend))["r"])
    assert verdict.equal == verdict.tokens, verdict


@pytest.mark.parametrize(
    ("changes", "formula"),
    [({}, NormFormula(1e-6, 0.0)), ({"variance_epsilon": 1e-5}, NormFormula(1e-5, 0.0))],
)
def test_the_epsilon_of_a_norm_is_found_by_trying(changes: dict[str, float], formula: NormFormula) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(32, eps=1e-6)
    vars(norm).update(changes)
    assert norm_formula(norm) == formula


def test_a_norm_that_adds_one_to_its_weight_is_as_exact_as_its_own_code() -> None:
    """In bfloat16 the sum would lose up to seven bits of a small weight."""
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    generator = torch.Generator().manual_seed(1)
    norm = Gemma2RMSNorm(256, eps=1e-6).bfloat16()
    norm.weight = torch.nn.Parameter(0.1 * torch.randn(256, generator=generator).bfloat16(), requires_grad=False)
    x = torch.randn(1, 40, 256, generator=generator).bfloat16()
    made = native_norm(norm, Call((x,), {}, norm(x)), select.ops(x.device, x.dtype), {})
    assert made is not None
    assert (made(x) != norm(x)).float().mean() < 0.01


def test_a_norm_that_also_subtracts_the_mean_is_no_rms_norm() -> None:
    assert norm_formula(torch.nn.LayerNorm(32, bias=False)) is None


@pytest.mark.parametrize(
    ("model_type", "overrides", "plain"), [("llama", {}, True), ("granite", {"logits_scaling": 1.01}, False)]
)
def test_a_head_is_called_by_itself_only_if_nothing_follows_it(
    model_type: str, overrides: dict[str, Any], plain: bool, tmp_path: Path
) -> None:
    wanted = saved(tmp_path, model_type, **overrides)
    model = sweep.adopted(tmp_path)
    assert model._native is not None
    assert (model._plain_head is not None) == plain
    assert sweep.divergence(model, wanted)[0] < 2e-5


def test_a_config_that_its_class_refuses_is_an_error_of_one_line() -> None:
    with pytest.raises(ModelError, match="LlamaConfig refuses the config") as caught:
        config_of(transformers.LlamaConfig, {"model_type": "llama", "hidden_act": ["silu"]})
    assert caught.value.id == "HF002"
    assert "\n" not in caught.value.cause


def test_the_program_ends_without_a_word(tmp_path: Path) -> None:
    """The extension's objects are gone before it is, although Transformers keeps modules alive."""
    folder = tiny.make(tmp_path / "llama", "llama")
    program = (
        "import sys; from octavo import LLM, SamplingParams\n"
        "with LLM(sys.argv[1], dtype='bfloat16', model_impl='transformers') as llm:\n"
        "    llm.generate([[5, 6]], SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, folder], capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert "leaked" not in ended.stderr
