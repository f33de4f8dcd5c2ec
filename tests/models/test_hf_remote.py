"""Models whose classes are code of their repo: they run where they are trusted and follow the attention interface."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from octavo.config import EngineConfig
from octavo.core.engine import EngineCore
from octavo.errors import ModelError, OctavoError, UnsupportedModel
from octavo.runtime.worker import Worker
from tests.core.stub_engine import collect, make_request, run
from tools import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # of Transformers' own code

CONFIGURATION = """
from transformers import PreTrainedConfig

class ParrotConfig(PreTrainedConfig):
    model_type = "parrot"
    attribute_map = {"hidden_size": "width", "num_hidden_layers": "depth"}

    def __init__(self, vocab_size=320, width=32, depth=2, heads=4, num_attention_heads=4, max_position_embeddings=128,
                 **kwargs):
        self.vocab_size, self.width, self.depth = vocab_size, width, depth
        self.num_attention_heads, self.max_position_embeddings = num_attention_heads, max_position_embeddings
        super().__init__(**kwargs)
"""

# Parallel attention and MLP under one LayerNorm, learnt positions: no native layer is like it.
MODELLING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_parrot import ParrotConfig


def eager(module, query, key, value, attention_mask, scaling, **kwargs):
    scores = query @ key.transpose(2, 3) * scaling + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


class ParrotAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.heads, self.head_dim = config.num_attention_heads, config.width // config.num_attention_heads
        self.is_causal = True
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], self.heads, self.head_dim)
        q, k, v = (x.view(shape).transpose(1, 2) for x in self.qkv(hidden_states).chunk(3, dim=-1))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ATTENTION
        found, _ = attend(self, q, k, v, attention_mask, scaling=self.head_dim**-0.5, **kwargs)
        return self.out(found.flatten(2))


class ParrotLayer(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.attention = ParrotAttention(config, layer_idx)
        self.mlp = nn.Sequential(nn.Linear(config.width, 64), nn.GELU(), nn.Linear(64, config.width))

    def forward(self, x, attention_mask=None, **kwargs):
        normed = self.norm(x)
        return x + self.attention(normed, attention_mask, **kwargs) + self.mlp(normed)


class ParrotPreTrainedModel(PreTrainedModel):
    config_class = ParrotConfig
    base_model_prefix = "model"
    _supports_attention_backend = SUPPORTS
    _supports_sdpa = SUPPORTS
    _no_split_modules = ["ParrotLayer"]


class ParrotModel(ParrotPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.max_position_embeddings, config.width)
        self.layers = nn.ModuleList(ParrotLayer(config, i) for i in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.post_init()

    def get_input_embeddings(self):
        return self.tokens

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                use_cache=None, **kwargs):
        x = self.tokens(input_ids)
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length()
            position_ids = torch.arange(past, past + x.shape[1], device=x.device).unsqueeze(0)
        mask = create_causal_mask(config=self.config, inputs_embeds=x, attention_mask=attention_mask,
                                  past_key_values=past_key_values, position_ids=position_ids)
        x = x + self.positions(position_ids)
        for layer in self.layers:
            x = layer(x, mask, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class ParrotForCausalLM(ParrotPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = ParrotModel(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, logits_to_keep=0, **kwargs):
        output = self.model(input_ids=input_ids, **kwargs)
        return CausalLMOutputWithPast(logits=self.lm_head(output.last_hidden_state))
"""

RIGHT = {
    "ATTENTION": "ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)",
    "SUPPORTS": "True",
}
IGNORES = {"ATTENTION": "eager", "SUPPORTS": "False"}
AUTO_MAP = {
    "AutoConfig": "configuration_parrot.ParrotConfig",
    "AutoModelForCausalLM": "modeling_parrot.ParrotForCausalLM",
}
PROMPTS = {"a": list(range(7, 30)), "b": list(range(7, 45)), "c": [9]}


def write(folder: Path, substitutes: dict[str, str], *, head: str = "", **config: Any) -> Path:
    """A repo with the code above; ``head`` goes before it."""
    folder.mkdir(exist_ok=True)
    modelling = MODELLING
    for name, text in substitutes.items():
        modelling = modelling.replace(f"= {name}\n", f"= {text}\n")
    (folder / "configuration_parrot.py").write_text(CONFIGURATION)
    (folder / "modeling_parrot.py").write_text(head + modelling)
    settings = {
        "model_type": "parrot",
        "architectures": ["ParrotForCausalLM"],
        "auto_map": AUTO_MAP,
        "vocab_size": tiny.VOCAB_SIZE,
        "width": 32,
        "depth": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "dtype": "float32",
        "eos_token_id": 2,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    tiny.tokenizer(folder)
    return folder


def weights(folder: Path) -> Any:
    """Writes random weights for the repo in ``folder``; returns the model with them, by Transformers alone."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    config_class = get_class_from_dynamic_module(AUTO_MAP["AutoConfig"], str(folder))
    model_class = get_class_from_dynamic_module(AUTO_MAP["AutoModelForCausalLM"], str(folder))
    model = model_class._from_config(config_class.from_pretrained(folder), attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return model


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Transformers copies code into a cache of modules, and Python keeps what it imported."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def core(folder: Path, **options: Any) -> EngineCore:
    options = {
        "trust_remote_code": True,
        "max_model_len": 128,
        "max_num_batched_tokens": 16,
        "max_num_seqs": 4,
        **options,
    }
    return EngineCore(EngineConfig.of(model=str(folder), kv_cache_memory_bytes=1 << 20, **options), Worker())


@pytest.mark.parametrize("code", [RIGHT, IGNORES], ids=["right", "ignores"])
def test_a_repo_answers_as_its_own_model_does(code: dict[str, str], tmp_path: Path) -> None:
    folder = write(tmp_path / "repo", code)
    model = weights(folder)
    engine = core(folder)
    for id, prompt in PROMPTS.items():
        engine.add(make_request(engine, id, prompt, max_tokens=6, temperature=0.0))
    found = collect(run(engine))
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": False, "eos_token_id": None}
    for id, prompt in PROMPTS.items():
        assert found[id] == model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()


def test_a_repo_that_ignores_the_attention_interface_runs_on_the_slow_path_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write(tmp_path / "ignores", IGNORES)
    weights(folder)
    with caplog.at_level("INFO", "octavo"):
        core(folder)
    assert "slow path" in caplog.text
    assert "does not go through Transformers' attention interface" in caplog.text


def test_without_trust_it_is_refused_before_any_code_runs(tmp_path: Path) -> None:
    folder = write(tmp_path / "trap", RIGHT, head=f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ModelError, match=r"modeling_parrot\.py|configuration_parrot\.py") as raised:
        core(folder, trust_remote_code=False)
    assert raised.value.id == "HF010"
    assert "--trust-remote-code" in raised.value.remedy
    assert not (tmp_path / "ran").exists()


def test_native_was_asked_for_so_code_is_not_even_considered(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="--model-impl native") as raised:
        core(write(tmp_path / "right", RIGHT), model_impl="native")
    assert raised.value.id == "HF030"


def test_code_that_breaks_on_import_is_named_with_what_it_said(tmp_path: Path) -> None:
    folder = write(tmp_path / "broken", RIGHT, head="raise RuntimeError('no such luck')\n")
    with pytest.raises(ModelError, match=r"modeling_parrot\.py .*RuntimeError: no such luck") as raised:
        core(folder)
    assert raised.value.id == "HF011"


def test_a_setting_that_the_code_reads_and_the_config_lacks_is_named(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "lacks", {**RIGHT, "SUPPORTS": "True\n\n    def post_init(self):\n        self.config.plumage"}
    )
    with pytest.raises(ModelError, match=r"AttributeError: .*plumage") as raised:
        core(folder)
    assert raised.value.id == "HF002"


def test_a_class_of_another_kind_is_refused(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "kind", RIGHT, auto_map={**AUTO_MAP, "AutoModelForCausalLM": "modeling_parrot.ParrotAttention"}
    )
    with pytest.raises(ModelError, match="no PreTrainedModel") as raised:
        core(folder)
    assert raised.value.id == "HF011"


def test_a_config_class_that_is_nowhere_is_asked_for(tmp_path: Path) -> None:
    names = {"AutoModelForCausalLM": AUTO_MAP["AutoModelForCausalLM"]}
    folder = write(tmp_path / "noconfig", RIGHT, auto_map=names, hidden_size=32)
    with pytest.raises(ModelError, match="no AutoConfig") as raised:
        core(folder)
    assert raised.value.id == "HF011"


def test_code_for_other_tasks_only_is_said_to_be_no_language_model(tmp_path: Path) -> None:
    folder = write(tmp_path / "other", RIGHT, auto_map={"AutoConfig": AUTO_MAP["AutoConfig"], "AutoModel": "x.Y"})
    with pytest.raises(OctavoError, match="no AutoModelForCausalLM") as raised:
        core(folder)
    assert raised.value.id == "HF030"
