from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from octavo.errors import ModelError, RequestError
from octavo.hub.remote_code import RepoCode
from octavo.hub.source import Source
from octavo.hub.tokenizer import AutoTokenizerAdapter, HfTokenizer, Tokenizer, load_tokenizer
from tools import tiny

TEXTS = [
    "",
    " ",
    "The capital of France is Paris.",
    "  two  spaces\n\n\ttab \r\n",
    "don't , stop ! it 's 12345 3.14",
    "naïve café — 東京 🙂🙃 \u200d\u0301 ﬁ",
    "<|im_start|>user\nhi<|im_end|>",
    "a<|im_end|> b <|endoftext|><new> <new2>x",
    "<s>[INST] x [/INST]</s>",
    "\x00\x7f\ufffd",
]


def source(folder: Path) -> Source:
    return Source(folder.name, "folder", folder, None, "")


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "tokenizer_config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    return folder


def save(folder: Path, backend: Backend, **config: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}))
    return folder


def byte_level(folder: Path, **changes: Any) -> Path:
    tiny.tokenizer(folder)
    return edit_config(folder, **changes)


def sentencepiece(folder: Path) -> Path:
    """As Llama 2's: spaces are a letter, what has no token is spelt in bytes, a template adds the beginning."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    backend.train_from_iterator([text.replace("<s>", "") for text in TEXTS * 3], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return save(folder, backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram(folder: Path) -> Path:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS * 5, trainer)
    return save(folder, backend, eos_token="</s>", unk_token="<unk>", clean_up_tokenization_spaces=True)


def wordpiece(folder: Path) -> Path:
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False)
    backend.train_from_iterator(TEXTS * 5, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    config = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "clean_up_tokenization_spaces": True}
    return save(folder, backend, **config)


def truncating(folder: Path) -> Path:
    backend = tiny.tokenizer(folder)
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(folder / "tokenizer.json"))
    return folder


def llama3_split(folder: Path) -> Path:
    backend = tiny.tokenizer(folder)
    split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+|\p{L}+"), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]),
        ]
    )
    backend.save(str(folder / "tokenizer.json"))
    return folder


def legacy_map(folder: Path) -> Path:
    """Before added_tokens_decoder the names of special tokens were in a file of their own."""
    byte_level(folder, added_tokens_decoder=..., bos_token=..., eos_token=..., additional_special_tokens=...)
    names = {
        "bos_token": {"content": "<|endoftext|>", "lstrip": False, "normalized": False, "rstrip": False},
        "eos_token": "<|im_end|>",
        "additional_special_tokens": ["<new>"],
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return folder


def legacy_tokens(folder: Path) -> Path:
    """And added tokens were in another: their ids, by text."""
    legacy_map(folder)
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 2, "<new2>": 384}))
    return folder


def listed(id: int, content: str, **flags: bool) -> dict[str, Any]:
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": False}
    return {str(id): {"content": content, **plain, **flags}}


def more_tokens(folder: Path) -> Path:
    byte_level(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    added = {
        **config["added_tokens_decoder"],
        **listed(384, "<new>", special=True, lstrip=True),
        **listed(385, "<new2>", rstrip=True),
    }
    return edit_config(folder, added_tokens_decoder=added)


BUILDERS: dict[str, Callable[[Path], Path]] = {
    "byte level": byte_level,
    "bos": lambda folder: byte_level(folder, add_bos_token=True),
    "bos and eos": lambda folder: byte_level(folder, add_bos_token=True, add_eos_token=True),
    "bos is off": lambda folder: edit_config(llama3_split(folder), add_bos_token=False),
    "bos without a token": lambda folder: byte_level(folder, add_bos_token=True, bos_token=None),
    "template in the file": llama3_split,
    "more tokens": more_tokens,
    "new special": lambda folder: byte_level(folder, eos_token="<new>", extra_special_tokens=["<new2>"]),
    "model's own names": lambda folder: byte_level(
        folder, image_token="<new>", extra_special_tokens={"x_token": "<s>"}
    ),
    "special as object": lambda folder: byte_level(
        folder, eos_token={"__type": "AddedToken", "content": "<new>", "lstrip": True, "normalized": False}
    ),
    "split special": lambda folder: byte_level(folder, split_special_tokens=True),
    "clean up": lambda folder: byte_level(folder, clean_up_tokenization_spaces=True),
    "legacy map": legacy_map,
    "legacy tokens": legacy_tokens,
    "truncating": truncating,
    "sentencepiece": sentencepiece,
    "unigram": unigram,
    "wordpiece": wordpiece,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_results_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = BUILDERS[name](tmp_path)
    ours, theirs = load_tokenizer(source(folder)), AutoTokenizer.from_pretrained(folder)
    assert isinstance(ours, HfTokenizer)
    for text in TEXTS:
        for add in (True, False):
            ids = ours.encode(text, add_special_tokens=add)
            assert ids == theirs.encode(text, add_special_tokens=add), (text, add)
            for skip in (True, False):
                expected = theirs.decode(ids, skip_special_tokens=skip)
                assert ours.decode(ids, skip_special_tokens=skip) == expected, (text, skip)
    assert ours.vocab_size == len(theirs)
    assert ours.bos_id == theirs.bos_token_id
    assert ours.eos_id == theirs.eos_token_id
    assert ours.special_ids >= set(theirs.all_special_ids)
    assert [ours.id_to_token(i) for i in range(len(theirs))] == theirs.convert_ids_to_tokens(range(len(theirs)))
    assert ours.chat_template == theirs.chat_template
    named = {key: value for key, value in theirs.special_tokens_map.items() if isinstance(value, str)}
    assert named.items() <= ours.special_tokens.items()


@pytest.mark.parametrize("name", BUILDERS)
def test_scripts_get_the_tokenizer_that_transformers_would_load(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = BUILDERS[name](tmp_path)
    own, theirs = load_tokenizer(source(folder)), AutoTokenizer.from_pretrained(folder)
    before = [own.encode(text) for text in TEXTS]
    made = own.for_transformers()
    for text, ids in zip(TEXTS, before, strict=True):
        assert made.encode(text) == theirs.encode(text) == ids
        for skip in (True, False):
            assert made.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (made.eos_token, made.bos_token_id, len(made)) == (theirs.eos_token, theirs.bos_token_id, len(theirs))
    chat = [{"role": "user", "content": "hi"}]
    if theirs.chat_template:
        assert made.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    made(["a", "a b c"], truncation=True, max_length=1)
    assert [own.encode(text) for text in TEXTS] == before  # theirs keeps its settings to itself


@pytest.mark.parametrize("name", ["byte level", "bos", "sentencepiece"])
def test_adapter_of_transformers_gives_the_same_answers(name: str, tmp_path: Path) -> None:
    folder = BUILDERS[name](tmp_path)
    fast, adapter = load_tokenizer(source(folder)), load_tokenizer(source(folder), mode="hf")
    assert not isinstance(adapter, HfTokenizer)
    for text in TEXTS:
        ids = fast.encode(text)
        assert adapter.encode(text) == ids
        assert adapter.decode(ids) == fast.decode(ids)
        assert adapter.encode(text, add_special_tokens=False) == fast.encode(text, add_special_tokens=False)

    def view(tokenizer: Tokenizer) -> tuple[object, ...]:
        return (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.chat_template)

    assert view(adapter) == view(fast)
    assert adapter.id_to_token(7) == fast.id_to_token(7)
    assert adapter.id_to_token(10**6) is fast.id_to_token(10**6) is None
    assert adapter.token_to_id("</s>") == fast.token_to_id("</s>")
    assert adapter.token_to_id("no such token") is fast.token_to_id("no such token") is None


def test_ordinary_model_needs_neither_torch_nor_a_look_at_other_packages(tmp_path: Path) -> None:
    tiny.tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(tiny.config()))
    code = (
        "import sys\n"
        "from octavo.config import ModelOptions\n"
        "from octavo.hub.configs import model_config\n"
        "from octavo.hub.files import find_files\n"
        f"files = find_files(ModelOptions(model={str(tmp_path)!r}), weights=False)\n"
        "hf, pooler = files.read_config()\n"
        "assert pooler is None\n"
        "model_config(hf)\n"
        "files.load_tokenizer().encode('hi')\n"
        "costly = 'torch', 'transformers', 'huggingface_hub', 'importlib.metadata'\n"
        "print([name for name in costly if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


# --- chat templates ---------------------------------------------------------------------------------------------------


def test_jinja_file_wins_over_the_config(tmp_path: Path) -> None:
    tiny.tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert load_tokenizer(source(tmp_path)).chat_template == "from the file"


def test_named_templates_from_config_and_from_files(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    byte_level(tmp_path, chat_template=templates)
    assert load_tokenizer(source(tmp_path)).chat_templates == {"default": "d", "tool_use": "t"}
    edit_config(tmp_path, chat_template={"default": "d", "tool_use": "t", "odd": 5})
    assert load_tokenizer(source(tmp_path)).chat_templates == {"default": "d", "tool_use": "t"}
    (tmp_path / "chat_template.jinja").write_text("D")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    assert load_tokenizer(source(tmp_path)).chat_templates == {"default": "D", "rag": "R"}


def test_processor_template_is_the_last_resort(tmp_path: Path) -> None:
    byte_level(tmp_path)
    (tmp_path / "chat_template.json").write_text('{"chat_template": "p"}')
    assert load_tokenizer(source(tmp_path)).chat_template == tiny.CHAT_TEMPLATE
    edit_config(tmp_path, chat_template=...)
    assert load_tokenizer(source(tmp_path)).chat_template == "p"


def test_no_template_is_none(tmp_path: Path) -> None:
    byte_level(tmp_path, chat_template=...)
    assert load_tokenizer(source(tmp_path)).chat_template is None


# --- errors -----------------------------------------------------------------------------------------------------------


def test_missing_tokenizer_names_the_ways_out(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as error:
        load_tokenizer(source(tmp_path))
    assert error.value.id == "HF060"
    assert "--tokenizer" in error.value.remedy
    assert "--skip-tokenizer-init" in error.value.remedy


@pytest.mark.parametrize(("name", "text"), [("tokenizer.json", "{}"), ("tokenizer_config.json", "[")])
def test_broken_file_is_named(name: str, text: str, tmp_path: Path) -> None:
    tiny.tokenizer(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ModelError) as error:
        load_tokenizer(source(tmp_path))
    assert error.value.id == "HF002"
    assert name in error.value.cause


class Counting:
    """A tokenizer of Transformers that counts what is costly there: computed anew at every access."""

    bos_token_id, eos_token_id, chat_template = 0, 1, None
    special_tokens_map = {"eos_token": "</s>"}

    def __init__(self) -> None:
        self.computed = 0

    @property
    def all_special_ids(self) -> list[int]:
        self.computed += 1
        return [0, 1]

    def get_vocab(self) -> dict[str, int]:
        self.computed += 1
        return {"<s>": 0, "</s>": 1, "a": 2}

    def __len__(self) -> int:
        self.computed += 1
        return 3


def test_costly_attributes_are_computed_once() -> None:
    inner = Counting()
    tokenizer = AutoTokenizerAdapter(inner)
    once = inner.computed
    for _ in range(100):
        assert (tokenizer.vocab_size, tokenizer.special_ids, tokenizer.eos_id) == (3, frozenset({0, 1}), 1)
        assert (tokenizer.token_to_id("a"), tokenizer.id_to_token(2)) == (2, "a")
    assert inner.computed == once


def test_a_tokenizer_that_found_no_vocabulary_is_refused(tmp_path: Path) -> None:
    """Transformers' class for Qwen3.5 reads tokenizer.json alone, and makes an empty tokenizer of other files."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_5"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen3_5Tokenizer"}')
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b")
    with pytest.raises(ModelError, match="finds no vocabulary") as error:
        load_tokenizer(source(tmp_path))
    assert error.value.id == "HF060"


@pytest.mark.parametrize("bad", [{"x": {"content": "y"}}, [1], {"384": {}}, {"384": "<new>"}])
def test_broken_settings_are_an_error_not_a_crash(bad: Any, tmp_path: Path) -> None:
    byte_level(tmp_path, added_tokens_decoder=bad)
    with pytest.raises(ModelError) as error:
        load_tokenizer(source(tmp_path))
    assert error.value.id == "HF002"


def test_long_texts_leave_the_interpreter_to_other_threads_and_are_no_different(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(source(byte_level(tmp_path)))
    text = "Hello, wörld 中! " * 40_000
    ticks = 0
    done = threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not done.wait(0.005):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    ids = tokenizer.encode(text)
    done.set()
    thread.join()
    assert ticks >= 5  # dozens where nothing else runs, and one if the interpreter is held all the time
    assert ids == tokenizer.encode("Hello, wörld 中! ") * 40_000
    assert tokenizer.decode(ids) == text
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode(text + "\ud800")


def test_half_a_surrogate_pair_is_the_request_s_fault(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(source(byte_level(tmp_path)))
    with pytest.raises(RequestError) as error:
        tokenizer.encode("a\ud800b")
    assert error.value.param == "prompt"


def test_texts_encoded_together_are_as_each_alone(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(source(sentencepiece(tmp_path)))
    texts = TEXTS * 30  # more than one call of the library
    for special in (True, False):
        alone = [tokenizer.encode(text, add_special_tokens=special) for text in texts]
        assert tokenizer.encode_all(texts, add_special_tokens=special) == alone


def test_half_a_surrogate_pair_among_several_texts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        load_tokenizer(source(byte_level(tmp_path))).encode_all(["fine", "\ud800"])


# --- remote code ------------------------------------------------------------------------------------------------------


def trapped(folder: Path, *, with_json: bool) -> Path:
    """A repo whose Python files leave a mark when they are imported."""
    code = f"open({str(folder / 'ran')!r}, 'w').close()\nclass Trap: pass\nclass TrapConfig: pass\n"
    for name in ("configuration_trap.py", "tokenization_trap.py", "modeling_trap.py"):
        (folder / name).write_text(code)
    auto_map = {"AutoConfig": "configuration_trap.TrapConfig", "AutoTokenizer": ["tokenization_trap.Trap", None]}
    (folder / "config.json").write_text(json.dumps({**tiny.config(), "model_type": "trap", "auto_map": auto_map}))
    byte_level(folder, auto_map=auto_map, tokenizer_class="Trap")
    if not with_json:
        (folder / "tokenizer.json").unlink()
    return folder


def test_code_of_the_repo_does_not_run_where_it_is_not_needed(tmp_path: Path) -> None:
    from octavo.hub.configs import model_config, read_hf_dict

    folder = trapped(tmp_path, with_json=True)
    assert load_tokenizer(source(folder)).encode("hi")
    assert model_config(read_hf_dict(source(folder))).architecture == "LlamaForCausalLM"
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("mode", ["auto", "hf", "slow"])
def test_code_of_the_repo_is_refused_without_the_flag(mode: str, tmp_path: Path) -> None:
    folder = trapped(tmp_path, with_json=False)
    with pytest.raises(ModelError) as error:
        load_tokenizer(source(folder), mode=mode)
    assert error.value.id == "HF010"
    assert "tokenization_trap.Trap" in error.value.cause
    assert "--trust-remote-code" in error.value.remedy
    assert not (folder / "ran").exists()


def test_mode_hf_does_not_run_code_of_the_repo_either(tmp_path: Path) -> None:
    folder = trapped(tmp_path, with_json=True)
    with contextlib.suppress(ModelError):  # whether Transformers can do without it is its own affair
        load_tokenizer(source(folder), mode="hf")
    assert not (folder / "ran").exists()


def test_code_of_the_repo_runs_with_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = trapped(tmp_path, with_json=False)
    with pytest.raises(ModelError):  # the trap is no tokenizer
        load_tokenizer(source(folder), code=RepoCode(source(folder), trusted=True))
    assert (folder / "ran").exists()
