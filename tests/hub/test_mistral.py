"""Repos in Mistral's own format: params.json, consolidated*.safetensors, tekken.json or tokenizer.model.v*."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file
from tokenizers import Regex, pre_tokenizers

from octavo.errors import ModelError, UnsupportedModel
from octavo.frontend.chat import ChatRenderer
from octavo.hub.bpe import TEKKEN_SPLIT
from octavo.hub.checkpoint import open_checkpoint
from octavo.hub.configs import model_config, read_hf_dict
from octavo.hub.mistral_chat import template_for
from octavo.hub.mistral_config import config_from_params
from octavo.hub.mistral_weights import hf_name
from octavo.hub.source import Source, missing_files, wanted_files
from octavo.hub.tokenizer import HfTokenizer, load_tokenizer
from octavo.llm import LLM
from octavo.sampling_params import SamplingParams
from tests.mistral_files import RESERVED, mistral_repo, write_params, write_tekken
from tools import tiny

OPTIONS: dict[str, Any] = {"device": "cpu", "max_num_seqs": 2, "kv_cache_memory_bytes": 1 << 22}


def source(folder: Path) -> Source:
    return Source(folder.name, "folder", folder, None, "")


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("mistral") / "hf", "mistral")


@pytest.fixture(scope="module")
def repo(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mistral_repo(hf, tmp_path_factory.mktemp("mistral") / "own", shards=2)


# --- config -----------------------------------------------------------------------------------------------------------


def test_params_say_what_the_config_says(hf: Path, repo: Path) -> None:
    ours, theirs = (model_config(read_hf_dict(source(folder))) for folder in (repo, hf))
    for field in ("architecture", "vocab_size", "hidden_size", "intermediate_size", "layers", "max_len", "norm_eps"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.dtype == theirs.dtype == "float32"
    assert ours.eos_ids == (2,)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"rope_theta": ..., "sliding_window": ...}, {"theta": 1e6}),
        ({"rope_theta": ..., "sliding_window": 16}, {"theta": 1e4}),
        (
            {
                "yarn": {
                    "factor": 4,
                    "original_max_position_embeddings": 64,
                    "beta": 32,
                    "alpha": 1,
                    "apply_scale": False,
                }
            },
            {"kind": "yarn", "attention_factor": 1.0, "beta_fast": 32, "beta_slow": 1},
        ),
        ({"sliding_window": [None, 16]}, {"windows": [None, 16, None]}),
    ],
)
def test_rope_and_windows_are_read_from_params(
    params: dict[str, Any], expected: dict[str, Any], hf: Path, tmp_path: Path
) -> None:
    write_params(tmp_path, json.loads((hf / "config.json").read_text()), **params)
    found = model_config(read_hf_dict(source(tmp_path)))
    rope = found.layers[0].rope
    assert rope is not None
    known = {"theta": rope.theta, "kind": rope.kind, "windows": [layer.window for layer in found.layers], **rope.params}
    assert {key: known[key] for key in expected} == expected


def test_a_length_that_is_not_named_is_a_guess_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8, "vocab_size": 8}
    assert config_from_params(params, tmp_path / "params.json")["max_position_embeddings"] == 32_768
    assert "32768" in caplog.text
    yarn = {"factor": 2.0, "original_max_position_embeddings": 100}
    assert config_from_params({**params, "yarn": yarn}, tmp_path)["max_position_embeddings"] == 200
    with pytest.raises(ModelError, match="max_position_embeddings is inf"):
        model_config(config_from_params({**params, "yarn": {**yarn, "factor": 1e308}}, tmp_path))


@pytest.mark.parametrize(
    "params",
    [
        {"model_type": "mamba"},
        {"multimodal": {"whisper_model_args": {}}},
        {"moe": {"num_experts": 4, "num_shared_experts": 1}},
    ],
)
def test_other_kinds_of_models_are_refused(params: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="Mistral's format"):
        config_from_params({"dim": 8, **params}, tmp_path / "params.json")


def test_experts_and_scaled_positions_are_other_architectures(tmp_path: Path) -> None:
    params = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8, "vocab_size": 8, "max_seq_len": 64}
    moe = config_from_params({**params, "moe": {"num_experts": 4, "num_experts_per_tok": 2}}, tmp_path)
    assert (moe["architectures"], moe["num_local_experts"]) == (["MixtralForCausalLM"], 4)
    scaled = config_from_params({**params, "llama_4_scaling": {"beta": 0.1}}, tmp_path)
    assert scaled["architectures"] == ["Ministral3ForCausalLM"]
    assert scaled["rope_parameters"]["llama_4_scaling_beta"] == 0.1
    quantised = config_from_params({**params, "quantization": {"qformat_weight": "fp8_e4m3"}}, tmp_path)
    assert quantised["quantization_config"]["quant_method"] == "fp8"


@pytest.mark.parametrize("text", ['{"dim": 8}', "[]", "{"])
def test_broken_params_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(text)
    with pytest.raises(ModelError) as error:
        read_hf_dict(source(tmp_path))
    assert error.value.id == "HF002"
    assert "params.json" in error.value.cause


def test_config_format_chooses_between_the_two(hf: Path, tmp_path: Path) -> None:
    shutil.copy(hf / "config.json", tmp_path)
    hidden = json.loads((hf / "config.json").read_text())
    write_params(tmp_path, {**hidden, "vocab_size": 7})
    assert read_hf_dict(source(tmp_path))["vocab_size"] == 384
    assert read_hf_dict(source(tmp_path), config_format="mistral")["vocab_size"] == 7
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_hf_dict(source(tmp_path), config_format="hf")


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_the_other_format(hf: Path, repo: Path) -> None:
    expected = load_file(hf / "model.safetensors")
    checkpoint = open_checkpoint(source(repo))
    assert set(checkpoint.tensors()) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(checkpoint.read(name).data, tensor, err_msg=name)
        assert checkpoint.tensors()[name].shape == tensor.shape


@pytest.mark.parametrize(
    "rows", [slice(0, 16), slice(16, 64), slice(3, 37), slice(40, 41), slice(5, None), slice(7, 7)]
)
def test_any_rows_of_a_projection_can_be_read(rows: slice, hf: Path, repo: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    expected = load_file(hf / "model.safetensors")[name]
    checkpoint = open_checkpoint(source(repo))
    np.testing.assert_array_equal(checkpoint.read(name, (rows,)).data, expected[rows])
    np.testing.assert_array_equal(checkpoint.read(name, (rows, slice(8, 24))).data, expected[rows, 8:24])


def test_turning_neighbours_is_turning_halves_of_what_is_read(repo: Path) -> None:
    """The definition of the two layouts: mistral-inference turns (0, 1), (2, 3) …; Transformers (0, d/2), (1, …) …."""
    size, name = 16, "model.layers.0.self_attn.k_proj.weight"
    own = load_file(repo / "consolidated-00001-of-00002.safetensors") | load_file(
        repo / "consolidated-00002-of-00002.safetensors"
    )
    x = np.random.default_rng(0).normal(size=64)
    neighbours = (own["layers.0.attention.wk.weight"] @ x).reshape(-1, size)
    halves = (open_checkpoint(source(repo)).read(name).data @ x).reshape(-1, size)
    angles = 3.0 * 10_000.0 ** -(np.arange(0, size, 2) / size)
    pairs = (neighbours[:, 0::2] + 1j * neighbours[:, 1::2]) * np.exp(1j * angles)
    turned = (halves[:, : size // 2] + 1j * halves[:, size // 2 :]) * np.exp(1j * angles)
    np.testing.assert_allclose(turned, pairs)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.3.feed_forward.experts.1.w2.weight", "model.layers.3.block_sparse_moe.experts.1.w2.weight"),
        ("layers.3.feed_forward.gate.weight", "model.layers.3.block_sparse_moe.gate.weight"),
        ("layers.0.attention.wo.qscale_weight", "model.layers.0.self_attn.o_proj.weight_scale"),
        ("layers.0.attention.no_such.weight", "layers.0.attention.no_such.weight"),
        ("output.weight", "lm_head.weight"),
        ("something.else", "something.else"),
    ],
)
def test_tensors_get_the_names_of_hugging_face(name: str, expected: str) -> None:
    assert hf_name(name) == expected


def test_the_language_part_alone_of_a_model_that_sees(
    repo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.numpy import save_file

    folder = tmp_path / "seeing"
    shutil.copytree(repo, folder)
    path = folder / "consolidated-00001-of-00002.safetensors"
    save_file({**load_file(path), "vision_encoder.patch_conv.weight": np.zeros(4, np.float32)}, path)
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, "vision_encoder": {"hidden_size": 8}}))
    assert set(open_checkpoint(source(folder)).tensors()) == set(open_checkpoint(source(repo)).tensors())
    read_hf_dict(source(folder))
    assert "sees images" in caplog.text


def test_load_format_chooses_between_the_two(hf: Path, repo: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(repo, both)
    shutil.copy(hf / "model.safetensors", both)
    (both / "params.json").write_text(json.dumps({"n_heads": 4, "n_kv_heads": 2, "head_dim": 16}))
    for index in range(2):
        (both / f"consolidated-0000{index + 1}-of-00002.safetensors").write_bytes(b"damaged")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert open_checkpoint(source(both)).read(name).data.any()  # the damaged files are not looked at
    with pytest.raises(ModelError) as error:
        open_checkpoint(source(both), "mistral")
    assert error.value.id == "HF041"
    with pytest.raises(ModelError) as error:
        open_checkpoint(source(hf), "mistral")
    assert error.value.id == "HF040"


def test_weights_without_params_cannot_be_read(repo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    shutil.copytree(repo, folder)
    (folder / "params.json").unlink()
    with pytest.raises(ModelError) as error:
        open_checkpoint(source(folder))
    assert error.value.id == "HF040"
    assert "params.json" in error.value.cause


def test_files_of_a_repo() -> None:
    own = ["params.json", "consolidated.safetensors", "tekken.json"]
    assert set(wanted_files(own)) == set(own)
    both = [*own, "config.json", "model.safetensors"]
    assert set(wanted_files(both)) == {*both} - {"consolidated.safetensors"}
    assert set(wanted_files(both, load_format="mistral")) == {*both} - {"model.safetensors"}
    assert "x.pt" in wanted_files(["config.json", "model.safetensors", "x.pt"], load_format="pt")


def test_a_snapshot_of_it_is_complete(repo: Path, tmp_path: Path) -> None:
    assert missing_files(repo, True) == []
    folder = tmp_path / "half"
    shutil.copytree(repo, folder)
    (folder / "consolidated-00002-of-00002.safetensors").unlink()
    assert missing_files(folder, True) == ["consolidated-00002-of-00002.safetensors"]
    assert missing_files(folder, False) == []


# --- tokenizer --------------------------------------------------------------------------------------------------------

TEXTS = [
    *("", " ", "the quick brown fox", "  two  spaces\n\n\ttab \r\n", "naïve café — 東京 🙂🙃 \u200d\u0301 ﬁ"),
    *("def add(a, b):\n    return a + b // 2\n", '{"name": "get_weather", "city": "São"}', "12345 CamelCase ABCdef"),
]


def by_rank(piece: bytes, rank: dict[bytes, int]) -> list[int]:
    """BPE as tiktoken has it: of all neighbours that make a token, those of the lowest rank merge first."""
    parts = [bytes([byte]) for byte in piece]
    while len(parts) > 1 and piece not in rank:
        pairs = [rank.get(left + right, 1 << 30) for left, right in itertools.pairwise(parts)]
        if min(pairs) == 1 << 30:
            break
        at = pairs.index(min(pairs))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [rank[piece]] if piece in rank else [rank[part] for part in parts]


@pytest.mark.parametrize("listed", [True, False])
def test_tekken_encodes_by_rank(listed: bool, tmp_path: Path) -> None:
    ranks = write_tekken(tmp_path / "tekken.json", version="v3", listed=listed)
    rank = {token: i for i, token in enumerate(ranks)}
    split = pre_tokenizers.Split(Regex(TEKKEN_SPLIT), behavior="isolated")
    tokenizer = load_tokenizer(source(tmp_path))
    assert isinstance(tokenizer, HfTokenizer)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (384, 1, 2)
    assert tokenizer.id_to_token(RESERVED - 1) == f"<SPECIAL_{RESERVED - 1}>"
    assert set(range(RESERVED)) == tokenizer.special_ids
    for text in TEXTS:
        pieces = [piece for piece, _ in split.pre_tokenize_str(text)]
        expected = [RESERVED + i for piece in pieces for i in by_rank(piece.encode(), rank)]
        assert tokenizer.encode(text) == [1, *expected], text
        assert tokenizer.encode(text, add_special_tokens=False) == expected
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("[INST]x[/INST]")[1] == 3


SPM_SPECIAL = ["[INST]", "[/INST]", "[TOOL_CALLS]"]


def write_spm(path: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    corpus = path.parent / "corpus.txt"
    corpus.write_text("\n".join(TEXTS[2:]) * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(path.parent / "spm"),
        vocab_size=320,
        **{
            "model_type": "bpe",
            "byte_fallback": True,
            "control_symbols": SPM_SPECIAL if path.suffix != ".v1" else [],
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "minloglevel": 9,
            **options,
        },
    )
    (path.parent / "spm.model").rename(path)
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_sentencepiece_model_encodes_as_its_own_library(tmp_path: Path) -> None:
    theirs = write_spm(tmp_path / "tokenizer.model.v3")
    ours = load_tokenizer(source(tmp_path))
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (320, 1, 2)
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ours.encode(text) == [1, *ids], text
        assert ours.decode(ids) == theirs.decode(ids) == text
    assert ours.encode("[INST] fox")[1] == 3
    assert ours.chat_template == template_for(3)


def test_nothing_goes_before_a_text_where_the_model_has_no_beginning(tmp_path: Path) -> None:
    theirs = write_spm(tmp_path / "tokenizer.model.v3", bos_id=-1, eos_id=1)
    ours = load_tokenizer(source(tmp_path))
    assert ours.bos_id is None
    assert ours.encode(TEXTS[2]) == theirs.encode(TEXTS[2])


def test_latest_version_counts_and_a_bare_model_only_if_asked_for(tmp_path: Path) -> None:
    write_spm(tmp_path / "tokenizer.model")
    for version in ("v3", "v7m1"):
        shutil.copy(tmp_path / "tokenizer.model", tmp_path / f"tokenizer.model.{version}")
    assert load_tokenizer(source(tmp_path)).chat_template == template_for(7)
    for version in ("v3", "v7m1"):
        (tmp_path / f"tokenizer.model.{version}").unlink()
    assert load_tokenizer(source(tmp_path), mode="mistral").chat_template == template_for(1)


@pytest.mark.parametrize("options", [{"model_type": "unigram"}, {"remove_extra_whitespaces": True}])
def test_another_kind_of_sentencepiece_model_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    write_spm(tmp_path / "tokenizer.model.v3", **options)
    with pytest.raises(ModelError) as error:
        load_tokenizer(source(tmp_path))
    assert error.value.id == "HF060"


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model.v3"])
@pytest.mark.parametrize(
    "content", [b"", b"{}", b"\x0a\xff\xff\xff\xff\x0f", b"\x07", b"\x0a\x02\x0a\x09", b"\xff" * 80]
)
def test_damaged_tokenizer_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError) as error:
        load_tokenizer(source(tmp_path))
    assert error.value.id == "HF002"
    assert name in error.value.cause


@pytest.mark.parametrize(
    "change",
    [
        {"vocab": []},
        {"vocab": [{"rank": 0, "token_bytes": "!"}] * 400},
        {"vocab": [{"rank": 9, "token_bytes": "AA=="}] * 400},
        {"special_tokens": [{"rank": 1 << 40, "token_str": "x"}]},
        {"special_tokens": [1]},
        {"config": {"default_vocab_size": 1 << 40, "default_num_special_tokens": 1 << 40, "version": "v3"}},
        {"config": {}},
    ],
)
def test_senseless_tekken_is_an_error_not_a_crash(change: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "tekken.json"
    write_tekken(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError) as error:
        load_tokenizer(source(tmp_path))
    assert error.value.id == "HF002"


def test_mode_mistral_takes_tekken_before_tokenizer_json_and_says_if_there_is_none(tmp_path: Path) -> None:
    tiny.tokenizer(tmp_path)
    with pytest.raises(ModelError) as error:
        load_tokenizer(source(tmp_path), mode="mistral")
    assert error.value.id == "HF060"
    write_tekken(tmp_path / "tekken.json")
    assert load_tokenizer(source(tmp_path)).eos_id == tiny.EOS
    assert load_tokenizer(source(tmp_path), mode="mistral").token_to_id("[INST]") == 3


# --- chat -------------------------------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
TOOL_TEXT = '[{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}]'
CALLS = [{"id": "call_123456789", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "A"},
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "call_123456789", "content": "warm"},
    {"role": "assistant", "content": "B"},
    {"role": "user", "content": "C"},
]
AT_THE_END = f"[AVAILABLE_TOOLS]{TOOL_TEXT}[/AVAILABLE_TOOLS]"
RENDERED = {  # as mistral-common renders them (1.13)
    3: "<s>[INST]A[/INST]"
    '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}, "id": "123456789"}]</s>'
    '[TOOL_RESULTS]{"content": "warm", "call_id": "123456789"}[/TOOL_RESULTS]'
    f"B</s>{AT_THE_END}[INST]S\n\nC[/INST]",
    7: "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]A[/INST]"
    '[TOOL_CALLS][{"name": "f", "arguments": {"x": 1}, "id": "123456789"}]</s>'
    f"[TOOL_RESULTS]123456789[TOOL_CONTENT]warm[/TOOL_RESULTS]B</s>{AT_THE_END}[INST]C[/INST]",
    11: '<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]A[/INST][TOOL_CALLS]f[CALL_ID]123456789[ARGS]{"x": 1}</s>'
    f"[TOOL_RESULTS]123456789[TOOL_CONTENT]warm[/TOOL_RESULTS]B</s>{AT_THE_END}[INST]C[/INST]",
    13: f'<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT]{AT_THE_END}[INST]A[/INST][TOOL_CALLS]f[ARGS]{{"x": 1}}</s>'
    "[TOOL_RESULTS]warm[/TOOL_RESULTS]B</s>[INST]C[/INST]",
}


@pytest.mark.parametrize("version", RENDERED)
def test_conversations_are_rendered_as_their_version_has_them(version: int, tmp_path: Path) -> None:
    write_tekken(tmp_path / "tekken.json", version=f"v{version}")
    renderer = ChatRenderer.of(load_tokenizer(source(tmp_path)))
    assert renderer.render(TURNS, tools=[TOOL]) == RENDERED[version]


@pytest.mark.parametrize(
    ("version", "pieces"),
    [
        (1, ["<s>", "[INST] S\n\nA [/INST] B", "</s>", "[INST] C [/INST]"]),
        (3, ["<s>", "[INST]", "A", "[/INST]", "B", "</s>", "[INST]", "S\n\nC", "[/INST]"]),
    ],
)
def test_sentencepiece_models_take_the_texts_between_their_tokens_apart(
    version: int, pieces: list[str], tmp_path: Path
) -> None:
    theirs = write_spm(tmp_path / f"tokenizer.model.v{version}")
    special = {"<s>", "</s>", *(SPM_SPECIAL if version > 1 else ())}
    ids = [[theirs.piece_to_id(piece)] if piece in special else theirs.encode(piece) for piece in pieces]
    tokenizer = load_tokenizer(source(tmp_path))
    text = ChatRenderer.of(tokenizer).render([TURNS[0], TURNS[1], TURNS[4], TURNS[5]])
    assert tokenizer.encode(text, add_special_tokens=False) == [id for part in ids for id in part]


def test_a_version_that_is_not_known_has_no_template_and_the_repo_s_own_counts_first(tmp_path: Path) -> None:
    write_tekken(tmp_path / "tekken.json", version="v99")
    assert load_tokenizer(source(tmp_path)).chat_template is None
    (tmp_path / "chat_template.jinja").write_text("own")
    assert load_tokenizer(source(tmp_path)).chat_template == "own"


# --- all of it --------------------------------------------------------------------------------------------------------


def test_both_formats_of_a_model_give_the_same_tokens(hf: Path, repo: Path) -> None:
    prompts = [{"prompt_token_ids": list(range(30, 30 + n))} for n in (3, 20)]
    answers = []
    for folder in (hf, repo):
        llm = LLM(str(folder), **OPTIONS)
        params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
        answers.append([out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)])
        llm.close()
    assert answers[0] == answers[1]


def yarn(factor: float, trained: int) -> dict[str, Any]:
    return {"factor": factor, "original_max_position_embeddings": trained, "beta": 32.0, "alpha": 1.0}


FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # further keys of config.json, of params.json
    "Mixtral": (
        {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_theta": 10000.0}},
        {"moe": {"num_experts": 4, "num_experts_per_tok": 2}},
    ),
    "Ministral3": (
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
                "max_position_embeddings": 256,
            }
        },
        {
            "yarn": {**yarn(16.0, 16), "apply_scale": False},
            "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 16},
        },
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_transformers_runs_are_read_too(family: str, tmp_path: Path) -> None:
    import torch
    import transformers

    further, params = FAMILIES[family]
    sizes = {key: value for key, value in tiny.config("mistral").items() if key.endswith(("size", "heads", "layers"))}
    config = getattr(transformers, f"{family}Config")(
        **sizes, head_dim=16, sliding_window=None, max_position_embeddings=256, **further
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    model.save_pretrained(tmp_path / "hf")
    tiny.tokenizer(tmp_path / "hf")
    answers = []
    for folder in (tmp_path / "hf", mistral_repo(tmp_path / "hf", tmp_path / "own", **params)):
        llm = LLM(str(folder), **OPTIONS)
        greedy = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
        (answer,) = llm.generate({"prompt_token_ids": list(range(30, 50))}, greedy, use_tqdm=False)
        answers.append(answer.outputs[0].token_ids)
        llm.close()
    assert answers[0] == answers[1]


def test_a_pattern_of_tekken_that_is_none_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "tekken.json"
    write_tekken(path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "config": {**content["config"], "pattern": "[a"}}))
    with pytest.raises(ModelError, match="is no pattern") as error:
        load_tokenizer(source(tmp_path))
    assert error.value.id == "HF002"


def test_a_pattern_of_windows_may_be_empty(tmp_path: Path) -> None:
    params = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8, "vocab_size": 8, "max_seq_len": 64}
    assert config_from_params({**params, "sliding_window": []}, tmp_path)["sliding_window"] is None
