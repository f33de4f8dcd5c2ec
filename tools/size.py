"""Prints lines of Python by folder, and the files and functions that are long. Something to look at, not a gate."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONG_FILE, LONG_FUNCTION = 400, 60


def sizes(root: Path = ROOT) -> tuple[Counter[str], list[str]]:
    """(lines by folder, remarks on long files and functions) of the Python and C++ sources under ``root``."""
    lines: Counter[str] = Counter()
    remarks = []
    for path in sorted(p for top in ("src", "csrc", "tools", "bench", "tests") for p in (root / top).rglob("*")):
        if path.suffix not in (".py", ".cpp", ".h", ".hpp"):
            continue
        name = path.relative_to(root)
        text = path.read_text(encoding="utf-8")
        count = text.count("\n")
        lines[_folder(name)] += count
        if name.parts[0] == "src" and path.suffix == ".py":
            remarks += _remarks(name, text, count)
    return lines, remarks


def _folder(name: Path) -> str:
    if name.parts[0] != "src":
        return name.parts[0]
    return f"octavo/{name.parts[2]}" if len(name.parts) > 3 else "octavo"


def _remarks(name: Path, text: str, count: int) -> list[str]:
    relaxed = "kernels" in name.parts
    out = [f"{name}: {count} lines"] if count > (600 if relaxed else LONG_FILE) else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
            length = node.end_lineno - node.lineno + 1
            if length > (120 if relaxed else LONG_FUNCTION):
                out.append(f"{name}:{node.lineno}: {node.name} has {length} lines")
    return out


def main() -> int:
    lines, remarks = sizes()
    for folder, count in sorted(lines.items()):
        print(f"{folder:20} {count:6,}")
    print(f"{'octavo, all':20} {sum(n for f, n in lines.items() if f.startswith('octavo')):6,}")
    if remarks:
        print("long:", *remarks, sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
