"""Builds the C++ kernels with a program that holds them against plain loops, `tools/check_kernels.cpp`, and runs it.

    python tools/check_kernels.py [--arm | --threads]

--arm builds for 64-bit Arm and runs in an emulator, if the machine is another (Debian: g++-aarch64-linux-gnu and
qemu-user); --threads builds with the thread sanitizer. Ends with the program's exit status, 0 if all kernels agree.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=fast", "-fno-math-errno", "-Wall", "-Wextra")
# Objects by name: the file of csrc, and flags of its own.
OBJECTS = {
    **{name: (name,) for name in ("pool", "order", "blocks")},
    "baseline": ("isa", "-DOCTAVO_ISA=baseline"),
    "amx": ("isa", "-DOCTAVO_ISA=amx_emulated", "-DOCTAVO_EMULATED_AMX"),
}
ARM_OBJECTS = {"dotprod": ("isa", "-DOCTAVO_ISA=neon_dotprod", "-march=armv8.2-a+dotprod")}
THREADS = ("-g", "-fsanitize=thread")


def build(compiler: str, folder: Path, *more: str) -> str:
    """The program's path."""
    folder.mkdir(parents=True, exist_ok=True)
    arm = "aarch64" in compiler or platform.machine() == "aarch64"
    objects = []
    for name, (source, *flags) in {**OBJECTS, **(ARM_OBJECTS if arm else {})}.items():
        objects.append(str(folder / f"{name}.o"))
        file = str(ROOT / "csrc" / f"{source}.cpp")
        subprocess.run((compiler, *FLAGS, *more, *flags, "-c", file, "-o", objects[-1]), check=True)
    program = str(folder / "check")
    check = str(ROOT / "tools" / "check_kernels.cpp")
    subprocess.run((compiler, *FLAGS, *more, check, *objects, "-pthread", "-o", program), check=True)
    return program


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--arm", action="store_true", help="for 64-bit Arm")
    kind.add_argument("--threads", action="store_true", help="under the thread sanitizer")
    arguments = parser.parse_args()
    if not arguments.arm or platform.machine() == "aarch64":
        more = THREADS if arguments.threads else ()
        return subprocess.run((build("g++", ROOT / "build" / "check", *more),)).returncode
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        raise SystemExit("the compiler or the emulator is missing: apt-get install g++-aarch64-linux-gnu qemu-user")
    return subprocess.run((emulator, build(compiler, ROOT / "build" / "arm", "-static"))).returncode


if __name__ == "__main__":
    sys.exit(main())
