"""Runs the tests of the C++ extension under the address and undefined-behaviour sanitizers.

    python tools/sanitize.py [pytest arguments]

Builds apart (build/sanitize) and puts that build first on the path, so the normal one stays as it is. Needs gcc, and
cmake, ninja and nanobind in the running interpreter's environment. Ends with the exit status of pytest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import build_native

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
NAMES = ("kernels", "sampling", "layer", "blocks", "experts", "amx")
TESTS = tuple(f"tests/kernels/test_cpu_{name}.py" for name in NAMES)
FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined"


def package() -> Path:
    """Compiles the extension into a package that is otherwise links to the real one; returns its parent."""
    settings = ("-DCMAKE_BUILD_TYPE=Sanitize", f"-DCMAKE_CXX_FLAGS_SANITIZE={FLAGS}")
    extension = build_native.build(BUILD, *settings)
    package = BUILD / "path" / "octavo"
    shutil.rmtree(package.parent, ignore_errors=True)
    package.mkdir(parents=True)
    for item in (ROOT / "src" / "octavo").iterdir():
        if item.suffix != ".so" and item.name != "__pycache__":
            (package / item.name).symlink_to(item)
    for built in extension:
        shutil.copy2(built, package / built.name)
    return package.parent


def runtime(name: str) -> str:
    """The path of a sanitizer's library, which has to be loaded before everything else."""
    found = subprocess.run(("gcc", f"-print-file-name={name}"), check=True, capture_output=True, text=True)
    return found.stdout.strip()


def main() -> int:
    path = package()
    env = {
        **os.environ,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter and torch keep memory until the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    arguments = sys.argv[1:] or TESTS
    found = ("-o", f"pythonpath={path} {ROOT}", "-o", "timeout=1200", "-p", "no:cacheprovider")
    command = (sys.executable, "-m", "pytest", "-q", *found, *arguments)
    return subprocess.run(command, cwd=ROOT, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
