"""What decides whether the environment of the two README commands is made anew."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from tools import _venv

TOOLS = Path(_venv.__file__).parent


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "csrc").mkdir()
    for name in ("pyproject.toml", "constraints.txt", "csrc/module.cpp", "README.md"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    # the fingerprint holds the path of _venv.py itself relative to the root
    (tmp_path / "tools").mkdir()
    return tmp_path


@pytest.fixture(autouse=True)
def _own_file(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = project / "tools" / "_venv.py"
    script.write_text("", encoding="utf-8")
    monkeypatch.setattr(_venv, "__file__", str(script))


@pytest.mark.parametrize(
    "name", ["pyproject.toml", "constraints.txt", "csrc/module.cpp", "csrc/new.h", "CMakeLists.txt"]
)
def test_a_change_of_what_is_installed_or_built_changes_the_fingerprint(project: Path, name: str) -> None:
    before = _venv.fingerprint(project)
    (project / name).write_text("changed", encoding="utf-8")
    assert _venv.fingerprint(project) != before


def test_a_change_of_anything_else_does_not(project: Path) -> None:
    before = _venv.fingerprint(project)
    (project / "README.md").write_text("changed", encoding="utf-8")
    assert _venv.fingerprint(project) == before


def test_the_stamp_of_the_same_content_stands_for_the_environment(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_venv, "VENV", project)
    monkeypatch.setattr(_venv, "PYTHON", project / "README.md")
    assert not _venv._is_current("abc", "")
    _venv._stamp("dev").write_text("abc", encoding="ascii")
    assert _venv._is_current("abc", "dev")
    assert _venv._is_current("abc", "")  # the dev extra holds all of the base
    assert not _venv._is_current("other", "dev")
    _venv._stamp("dev").unlink()
    _venv._stamp("").write_text("abc", encoding="ascii")
    assert not _venv._is_current("abc", "dev")


def test_the_compiler_named_in_the_environment_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert _venv.find_compiler() is None
    monkeypatch.setenv("CXX", f"{sys.executable} -O2")
    assert _venv.find_compiler() == sys.executable


def test_a_failed_setup_is_told_in_one_message_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(extra: str) -> None:
        raise _venv.SetupError("no room left.")

    monkeypatch.setattr(_venv, "prepare", fail)
    assert _venv.run("", ["-c", "pass"]) == 1
    assert "no room left." in capsys.readouterr().err


def test_the_exit_status_of_the_command_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_venv, "prepare", lambda extra: None)
    monkeypatch.setattr(_venv, "PYTHON", sys.executable)
    monkeypatch.setattr(_venv, "ROOT", Path.cwd())
    assert _venv.run("", ["-c", "raise SystemExit(7)"]) == 7


@pytest.mark.parametrize("script", ["_venv.py", "try.py", "test.py", "check.py", "imports.py", "size.py"])
def test_the_scripts_need_the_standard_library_alone(script: str) -> None:
    allowed = sys.stdlib_module_names | {"_venv"}
    for node in ast.walk(ast.parse((TOOLS / script).read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= allowed
