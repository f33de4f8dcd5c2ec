"""Builds octavo._cpu in place (src/octavo/), for work on the kernels from a checkout.

    python tools/build_native.py [--clean]

Needs a C++17 compiler, and cmake, ninja and nanobind in the running interpreter's environment.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "native"


def build(folder: Path, *settings: str) -> list[Path]:
    """Builds the extension in ``folder``, with ``settings`` of cmake's; returns its files."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise SystemExit("cmake was not found; install it with: pip install cmake ninja nanobind")
    configure = (cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}")
    for command in ((*configure, *settings), (cmake, "--build", str(folder))):
        if subprocess.run(command, env={**os.environ, "PATH": path}).returncode:
            raise SystemExit(1)
    return sorted(folder.glob("_cpu*.so"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clean", action="store_true", help="build from nothing")
    if parser.parse_args().clean:
        shutil.rmtree(BUILD, ignore_errors=True)
    for built in build(BUILD):
        # A new file, not new bytes in the old one: a running interpreter may have that mapped.
        target = ROOT / "src" / "octavo" / built.name
        shutil.copy2(built, target.with_suffix(".tmp"))
        os.replace(target.with_suffix(".tmp"), target)
        print(target.relative_to(ROOT))


if __name__ == "__main__":
    main()
