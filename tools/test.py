"""Sets up octavo for development, then runs all checks and all tests: ``python3 tools/test.py [arguments of pytest]``.

Needs Python 3.11 or newer and nothing else. With arguments, only pytest runs.
"""

from __future__ import annotations

import os
import sys

import _venv


def main(argv: list[str]) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", str(min(os.cpu_count() or 1, 2)))  # small tests gain nothing from more
    checked = 0 if argv else _venv.run("dev", ["tools/check.py"])
    tested = _venv.run("dev", ["-m", "pytest", *argv])
    if checked:
        print("tools/check.py failed; its findings stand above the tests' output", file=sys.stderr)
    return tested or checked


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
