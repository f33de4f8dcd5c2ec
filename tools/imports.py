"""Checks that imports inside octavo go downwards only, and that torch stays out of the folders that must not know it.

    server -> frontend -> [types, config]  <-  core -> sched -> cache
                                                 |
                                                 +-> runtime -> models -> layers -> parallel -> kernels -> platforms
                                                        +---------+-> hub

The frontend knows of the rest only `cache.prefix` and five modules of `hub`. An import inside a function counts too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src" / "octavo"

# Importable by all; they import only each other.
LEAVES = {"errors", "types", "sampling_params", "speculation", "structured", "config", "log", "parent", "vllm_options"}
# These see both sides.
JOINS = {"", "__main__", "llm", "async_llm", "cli", "options", "plan_command", "terminal", "bench", "verify"}
BELOW: dict[str, set[str]] = {
    "platforms": set(),
    "kernels": {"platforms", "_cpu"},
    "parallel": {"kernels", "platforms"},
    "layers": {"parallel", "kernels", "platforms"},
    "hub": set(),
    "models": {"layers", "parallel", "kernels", "platforms", "hub"},
    "runtime": {"models", "layers", "parallel", "kernels", "platforms", "hub"},
    "cache": set(),
    "sched": {"cache"},
    "core": {"sched", "cache", "runtime", "models", "layers", "parallel", "kernels", "platforms", "hub"},
    "frontend": {"cache.prefix", "hub.tokenizer", "hub.configs", "hub.files", "hub.live", "hub.pooling"},
    "server": {"frontend", "async_llm", "hub.machines"},
}
NO_TORCH = {"cache", "sched", "frontend", "server", "hub", "async_llm", "options", "terminal", *LEAVES}
NO_TORCH_AT_IMPORT = {"", "__main__", "cli", "llm", "plan_command", "bench"}  # importing octavo costs milliseconds


def check(source: Path = SOURCE) -> list[str]:
    """One line for each import of the package at ``source`` that breaks the rule."""
    return [problem for path in sorted(source.rglob("*.py")) for problem in _check_file(source, path)]


def _check_file(source: Path, path: Path) -> Iterator[str]:
    parts = path.relative_to(source).with_suffix("").parts
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    home = module.split(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    at_import = {id(node) for node in _run_at_import(tree)}
    for node in ast.walk(tree):
        for line, target in _targets(node, parts):
            problem = _judge(home, target, id(node) in at_import)
            if problem:
                yield f"{path.relative_to(source.parent.parent)}:{line}: {problem}"


def _judge(home: str, target: str, at_import: bool) -> str | None:
    """Why ``home`` may not import ``target`` (an absolute module name), or None."""
    top, _, rest = target.partition(".")
    if top == "torch":
        if home in NO_TORCH:
            return f"{home} must not import torch"
        if home in NO_TORCH_AT_IMPORT and at_import:
            return f"{home or 'octavo'} may import torch only inside a function"
    if top != "octavo" or home in JOINS:
        return None
    other = rest.split(".")[0]
    if other in ("", home) or other in LEAVES:
        return None
    if home in LEAVES:
        return f"{home} may import {', '.join(sorted(LEAVES - {home}))} only, not {target}"
    if home not in BELOW:
        return f"{home} has no place in the order of folders: name it in tools/imports.py"
    if any(rest == below or rest.startswith(below + ".") for below in BELOW[home]):
        return None
    return f"{home} may not import {target}"


def _targets(node: ast.AST, parts: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of everything that ``node`` imports. ``from a import b`` counts as ``a.b``."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield node.lineno, alias.name
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = ("octavo", *parts[:-1])
            base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
        for alias in node.names:
            yield node.lineno, f"{base}.{alias.name}"


def _run_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: outside functions and outside ``if TYPE_CHECKING``."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            todo.extend(node.orelse)
            continue
        todo.extend(ast.iter_child_nodes(node))


def main() -> int:
    problems = check()
    print("\n".join(problems) or "imports: all go downwards")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
