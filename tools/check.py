"""Every check that needs no test run: format, lint, types, direction of imports. Sizes are only printed.

Exits 1 if one of them fails. With ``--fix`` it formats and applies safe fixes first.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

CHECKS: dict[str, list[str]] = {
    "format": ["ruff", "format", "--check", "--quiet", "."],
    "lint": ["ruff", "check", "--quiet", "."],
    "types": ["mypy", "--no-error-summary"],
}
SCRIPTS = {"imports": "tools/imports.py", "sizes": "tools/size.py"}
FIXES = (["ruff", "check", "--fix", "--quiet", "."], ["ruff", "format", "--quiet", "."])


def main(argv: list[str]) -> int:
    if argv not in ([], ["--fix"]):
        print(f"check.py: unknown arguments {' '.join(argv)}. The only one is --fix.", file=sys.stderr)
        return 2
    if argv:
        for fix in FIXES:
            _run(["-m", *fix])
    failed = [name for name, command in CHECKS.items() if not _timed(name, ["-m", *command])]
    failed += [name for name, script in SCRIPTS.items() if not _timed(name, [script])]
    print(f"check: {', '.join(failed)} failed" if failed else "check: all passed", flush=True)
    return 1 if failed else 0


def _timed(name: str, command: list[str]) -> bool:
    start = time.perf_counter()
    passed = _run(command)
    print(f"check: {name:8} {'ok' if passed else 'FAILED':7} {time.perf_counter() - start:5.1f} s", flush=True)
    return passed


def _run(command: list[str]) -> bool:
    return subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
