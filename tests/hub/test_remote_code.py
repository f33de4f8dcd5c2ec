"""Python code in a model's repo runs only where the user said so, whatever loads the model and under ``python -O``."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.errors import ModelError
from octavo.hub.remote_code import RepoCode, reference
from octavo.hub.source import Source
from tools import tiny

SOURCE = Path(__file__).parent.parent.parent / "src"
TRAP = "import pathlib\n(pathlib.Path({folder!r}) / 'ran').touch()\n{body}"
AUTO_MAP = {
    "AutoConfig": "trap.Trap",
    "AutoModel": "trap.Trap",
    "AutoModelForCausalLM": "trap.Trap",
    "AutoTokenizer": ["trap.Trap", "trap.Trap"],
    "AutoProcessor": "trap.Trap",
    "AutoImageProcessor": "trap.Trap",
    "AutoFeatureExtractor": "trap.Trap",
    "AutoVideoProcessor": "trap.Trap",
    "GenerationConfig": "trap.Trap",
}
ATTACK = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% for m in messages %}{{ m.content }}{% endfor %}"

# Everything of octavo that reads files of a model, each in turn, errors or not.
LOADERS = """
import json, sys
from octavo.cli import main
from octavo.config import EngineConfig
from octavo.errors import OctavoError
from octavo.frontend.chat import ChatRenderer
from octavo.frontend.loading import load_text_model
from octavo.hub.configs import model_config, read_hf_dict
from octavo.hub.generation import generation_config
from octavo.hub.files import find_files
from octavo.hub.peek import peek
from octavo.hub.plan import make_plan
from octavo.hub.machines import named
from octavo.hub.resolve import resolve
from octavo.hub.tokenizer import load_tokenizer
from octavo.llm import LLM
from octavo.models.registry import choose
from octavo.plan_command import Models

def load_everything(folder):
    config = EngineConfig.of(model=folder, **options)
    source = resolve(folder)

    def plan():
        with peek(folder) as peeked:
            make_plan(peeked, config, named("l4"), Models())

    def chat():
        messages = [{"role": "user", "content": "hi"}]
        ChatRenderer.of(load_text_model(config).tokenizer).render(messages)

    calls = {
        "config": lambda: model_config(read_hf_dict(source)),
        "model class": lambda: choose(model_config(read_hf_dict(source))),
        "generation config": lambda: generation_config(source),
        **{f"tokenizer {mode}": lambda mode=mode: load_tokenizer(source, mode=mode) for mode in MODES},
        "whole config": lambda: find_files(config.model, weights=False).hf_dict(),
        "text": lambda: load_text_model(config),
        "chat template": chat,
        "plan": plan,
        "engine": lambda: LLM(folder, **options).generate("hi", use_tqdm=False),
        "transformers backend": lambda: LLM(folder, **options, model_impl="transformers"),
        "verify": lambda: main(["verify", folder, "--device", "cpu", "--max-tokens", "1"]),
        "plan of the command line": lambda: main(["plan", folder, "--gpu", "l4", "--model-impl", "transformers"]),
    }
    outcomes = {}
    for name, call in calls.items():
        try:
            call()
            outcomes[name] = "ok"
        except OctavoError as error:
            outcomes[name] = error.id
    return outcomes

MODES = ("auto", "hf", "slow", "mistral")
options = {"device": "cpu", "max_num_seqs": 2, "kv_cache_memory_bytes": 1 << 22}
print(json.dumps([load_everything(folder) for folder in sys.argv[1:]]))
"""


def booby_trapped(folder: Path, *, known: bool, nameless: bool = False) -> Path:
    """A model whose every file asks for code; with ``known``, of a kind that needs none of it.

    With ``nameless`` the config tells no sizes: only code could.
    """
    tiny.make(folder, "llama")
    hf = json.loads((folder / "config.json").read_text())
    if not known:
        hf |= {"model_type": "trap", "architectures": ["TrapForCausalLM"]}
    if nameless:
        hf = {key: hf[key] for key in ("model_type", "architectures")}
    for name, content in {
        "config.json": hf,
        "generation_config.json": {"custom_generate": "trap.Trap", "eos_token_id": 2},
        "tokenizer_config.json": {"tokenizer_class": "Trap", "chat_template": ATTACK},
        "processor_config.json": {"processor_class": "Trap"},
        "preprocessor_config.json": {"image_processor_type": "Trap"},
        "video_preprocessor_config.json": {},
    }.items():
        (folder / name).write_text(json.dumps({**content, "auto_map": AUTO_MAP}))
    (folder / "additional_chat_templates").mkdir()
    for template in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (folder / template).write_text(ATTACK)
    (folder / "custom_generate").mkdir()
    trap = TRAP.format(folder=str(folder), body="class Trap: pass\n")
    for file in (
        "trap.py",
        "tokenizer.py",
        "modeling_trap.py",
        "custom_generate/generate.py",
        "__init__.py",
        "torch.py",
    ):
        (folder / file).write_text(trap)
    if not known:
        (folder / "tokenizer.json").unlink()
    return folder


@pytest.mark.slow
def test_no_loader_runs_code_of_the_repo_without_the_flag(tmp_path: Path) -> None:
    """Without asserts, which can only keep code from running: so it holds with them, too."""
    names = ("known", "unknown", "nameless")
    folders = [booby_trapped(tmp_path / n, known=n == "known", nameless=n == "nameless") for n in names]
    env = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-O", "-c", LOADERS, *map(str, folders)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [folder.name for folder in folders if (folder / "ran").exists()] == [], done.stdout
    known, unknown, nameless = json.loads(done.stdout.splitlines()[-1])
    assert known["engine"] == known["text"] == known["tokenizer auto"] == known["generation config"] == "ok"
    assert known["chat template"] == "REQ001"  # the sandbox stops the template
    assert unknown["tokenizer auto"] == unknown["text"] == nameless["whole config"] == "HF010"
    assert known["tokenizer mistral"] == "HF060"


def test_code_runs_with_the_flag_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = booby_trapped(tmp_path / "trap", known=True)
    source = Source("trap", "folder", folder, None, "")
    with pytest.raises(ModelError) as refused:
        RepoCode(source, trusted=False).load("trap.Trap")
    assert refused.value.id == "HF010"
    assert "trap.py" in refused.value.cause
    assert not (folder / "ran").exists()
    assert RepoCode(source, trusted=True).load("trap.Trap").__name__ == "Trap"
    assert (folder / "ran").exists()


@pytest.mark.parametrize("truthy", [1, "no", [False]])
def test_only_true_is_trust(truthy: object, tmp_path: Path) -> None:
    source = Source("trap", "folder", tmp_path, None, "")
    with pytest.raises(ModelError) as refused:
        RepoCode(source, trusted=truthy).load("trap.Trap")  # type: ignore[arg-type]
    assert refused.value.id == "HF010"


def test_code_that_cannot_be_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "bad.py").write_text("import no_such_package_at_all\nclass Bad: pass\n")
    source = Source("broken", "folder", folder, None, "")
    for name in ("bad.Bad", "absent.Bad"):
        with pytest.raises(ModelError) as caught:
            RepoCode(source, trusted=True).load(name)
        assert caught.value.id == "HF011"
    with pytest.raises(ModelError, match="no_such_package_at_all"):
        RepoCode(source, trusted=True).load("bad.Bad")


@pytest.mark.parametrize(
    ("auto_map", "found"),
    [
        (None, None),
        ({}, None),
        ({"AutoTokenizer": "a.B"}, "a.B"),
        ({"AutoTokenizer": ["a.Slow", "a.Fast"]}, "a.Fast"),
        ({"AutoTokenizer": ["a.Slow", None]}, "a.Slow"),
        ({"AutoConfig": "a.B"}, None),
        (["a.Slow", None], "a.Slow"),
    ],
)
def test_reference_of_an_auto_class(auto_map: object, found: str | None) -> None:
    assert reference({"auto_map": auto_map}, "AutoTokenizer") == found


def test_nothing_else_in_the_source_loads_remote_code() -> None:
    guilty = []
    for path in (SOURCE / "octavo").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [node.id] if isinstance(node, ast.Name) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            if "get_class_from_dynamic_module" in names:
                guilty.append(path.name)
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "trusted") and _is(node.value, True):
                guilty.append(f"{path.name}:{node.value.lineno}")
            if isinstance(node, ast.Dict):
                pairs = zip(node.keys, node.values, strict=True)
                guilty += [path.name for k, v in pairs if _is(k, "trust_remote_code") and not _is(v, False)]
    assert set(guilty) == {"remote_code.py"}


def test_transformers_is_never_left_to_ask_whether_to_trust() -> None:
    """Left out, the flag makes Transformers ask on the terminal; so every ``from_pretrained`` says False.

    The one of ``tokenizer.py`` takes it from its callers.
    """
    seen = set()
    for path in (SOURCE / "octavo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_pretrained":
                said = [keyword for keyword in node.keywords if keyword.arg == "trust_remote_code"]
                assert path.name == "tokenizer.py" or (said and _is(said[0].value, False)), path
                seen.add(path.name)
    assert "tokenizer.py" in seen


def _is(node: ast.AST | None, value: object) -> bool:
    return (isinstance(node, ast.Constant) and node.value is value) or (
        isinstance(node, ast.Constant) and isinstance(value, str) and node.value == value
    )
