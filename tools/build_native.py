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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clean", action="store_true", help="build from nothing")
    if parser.parse_args().clean:
        shutil.rmtree(BUILD, ignore_errors=True)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        print("cmake was not found; install it with: pip install cmake ninja nanobind", file=sys.stderr)
        return 1
    env = {**os.environ, "PATH": path}
    configure = (cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}")
    for command in (configure, (cmake, "--build", str(BUILD))):
        if subprocess.run(command, env=env).returncode:
            return 1
    for built in BUILD.glob("_cpu*.so"):
        # A new file, not new bytes in the old one: a running interpreter may have that mapped.
        target = ROOT / "src" / "octavo" / built.name
        shutil.copy2(built, target.with_suffix(".tmp"))
        os.replace(target.with_suffix(".tmp"), target)
        print(target.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
