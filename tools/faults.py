"""Runs every test of faults at full size: ``python tools/faults.py [pytest arguments]``. Takes some minutes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/e2e/faults",
    "tests/e2e/test_serve_faults.py",
    "tests/e2e/test_scale_out_faults.py",
    "tests/server/test_wire.py",
    "tests/core/test_engine.py",
)


def main() -> int:
    env = {**os.environ, "OCTAVO_FAULTS_FULL": "1"}
    command = (sys.executable, "-m", "pytest", "-q", "-o", "timeout=600", *TESTS, *sys.argv[1:])
    return subprocess.run(command, cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
