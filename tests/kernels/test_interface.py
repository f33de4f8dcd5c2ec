"""Python and the C++ extension agree on what is called, and an extension of other sources is told from ours."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

import octavo
from octavo.errors import ConfigError

_cpu: Any = pytest.importorskip("octavo._cpu", reason="the C++ extension is not built")
STUB = Path(octavo.__file__).with_name("_cpu.pyi")
MODULE = Path(__file__).parents[2] / "csrc" / "module.cpp"
PINNED = (2, "d3b349ce")


def declared() -> Iterator[tuple[str, ast.FunctionDef]]:
    """Every function of the stub by its name, methods behind their class."""
    for node in ast.parse(STUB.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{one.name}", one) for one in node.body if isinstance(one, ast.FunctionDef))


def test_the_extension_takes_as_many_arguments_as_its_stub_says() -> None:
    assert {name for name in dir(_cpu) if name[0] != "_"} - {"INTERFACE"} == {
        name.split(".")[0] for name, _ in declared()
    }
    for name, node in declared():
        found: Any = _cpu
        for part in name.split("."):
            found = getattr(found, part)
        if hasattr(found, "__nb_signature__"):
            assert len(re.findall(r"\barg\d*: |\bself\b", found.__nb_signature__[0][0])) == len(
                node.args.posonlyargs
            ), name


def test_the_number_of_the_interface_is_raised_with_every_change_of_it() -> None:
    """After a change: raise `INTERFACE` in csrc/module.cpp and kernels/cpu_choice.py, then write both down here."""
    from octavo.kernels.cpu_choice import INTERFACE

    text = "\n".join(f"{name}{ast.unparse(node.args)}" for name, node in declared())
    assert (INTERFACE, sha256(text.encode()).hexdigest()[:8]) == PINNED
    assert f"INTERFACE = {INTERFACE};" in MODULE.read_text(encoding="utf-8")


@pytest.mark.parametrize("built", [PINNED[0] - 1, PINNED[0] + 1])
def test_an_extension_of_other_sources_is_named_with_what_to_do(built: int) -> None:
    from octavo.kernels.cpu_choice import check_interface

    with pytest.raises(ConfigError, match=f"interface {built}, not {PINNED[0]}") as caught:
        check_interface(built)
    assert "tools/build_native.py" in caught.value.remedy
    check_interface(_cpu.INTERFACE)
