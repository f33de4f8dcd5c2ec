"""Sets up octavo for development, then runs all checks and all tests: ``python3 tools/test.py [arguments of pytest]``.

Needs Python 3.11 or newer and nothing else. Without arguments, the files of tests are shared out to two processes;
where there is a GPU they run in one, as each would take its memory. With arguments, only pytest runs, with these and no
others: in one process, if they do not say ``-n 2 --dist loadfile``.
"""

from __future__ import annotations

import os
import shutil
import sys

import _venv

IN_TWO = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]  # tests of a file share what its fixtures start


def main(argv: list[str]) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # small tests gain nothing from more
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes would compile the package, each for itself
    checked = 0 if argv else _venv.run("dev", ["tools/check.py"])
    tested = _venv.run("dev", ["-m", "pytest", *(argv or ([] if has_gpu() else IN_TWO))])
    if checked:
        print("tools/check.py failed; its findings stand above the tests' output", file=sys.stderr)
    return tested or checked


def has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
