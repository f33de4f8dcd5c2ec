"""A process that compiles a grammar before the engine does: ``python -m octavo.core.trial``.

It is killed when it takes too long, and has a limit on its memory, so a grammar that would keep a thread busy for hours
or eat all memory ends there. Frames on its standard input and output are msgpack behind their length; the first tells
the vocabulary. It ends when its standard input does, so it never outlives the engine.
"""

from __future__ import annotations

import contextlib
import os
import queue
import resource
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from octavo.errors import OctavoError
from octavo.structured import GrammarSpec

COMPILE_SECONDS = 5.0  # a grammar that takes longer, its first mask included, is refused
START_SECONDS = 30.0  # for the process to start and to read the vocabulary
MEMORY_BYTES = 1 << 30  # of address space for a grammar, beyond what the process has when it is ready
_LENGTH = struct.Struct("<I")
_ROOT = str(Path(__file__).resolve().parents[2])  # where octavo is, wherever this process found it


class _Vocabulary(msgspec.Struct, array_like=True):
    tokens: list[bytes]
    special: list[int]
    ends: list[int]
    memory: int


class Trial:
    """The engine's end. The process starts with the first grammar, and again after one that it did not survive."""

    def __init__(self, tokens: list[bytes], special: list[int], ends: list[int]) -> None:
        self._hello = msgspec.msgpack.encode(_Vocabulary(tokens, special, ends, MEMORY_BYTES))
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._start()

    def refusal(self, spec: GrammarSpec) -> str:
        """Compiles ``spec`` there; why it is refused, empty if it is not. Raises `OctavoError` if that says nothing."""
        if self._process is None:
            self._start()
        try:
            if self._process is None or self._ask(b"", START_SECONDS) is None:
                self.close()
                raise OctavoError("The grammar was not compiled: the process for it did not start.", "Try again.")
            answer = self._ask(msgspec.msgpack.encode(spec), COMPILE_SECONDS)
        except OSError:
            answer = b""
        if answer:
            return msgspec.msgpack.decode(answer, type=str)
        self.close()
        if answer is None:
            return f"The grammar took more than {COMPILE_SECONDS:g} s to compile. Simplify it."
        return f"The grammar took more than {MEMORY_BYTES >> 20} MiB to compile, or broke the compiler. Simplify it."

    def kill(self) -> None:
        """Ends the process for good, from any thread; `close` must follow."""
        self._stopped = True
        if (process := self._process) is not None:
            process.kill()

    def close(self) -> None:
        """Ends the process; from the thread that calls `refusal`."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def _start(self) -> None:
        if self._stopped:
            return
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "octavo.core.trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what a process says that runs out of memory helps nobody
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH"))))},
        )
        with contextlib.suppress(OSError):  # `refusal` finds out
            _write(self._process.stdin, self._hello)

    def _ask(self, frame: bytes, seconds: float) -> bytes | None:
        """The answer: None if there is none in time, empty if the process is gone."""
        process = self._process
        if process is None or process.stdout is None:
            return b""
        _write(process.stdin, frame)
        if not select.select([process.stdout], [], [], seconds)[0]:
            return None
        return _read(process.stdout)


def _write(pipe: IO[bytes] | None, frame: bytes) -> None:
    if pipe is not None:
        pipe.write(_LENGTH.pack(len(frame)) + frame)
        pipe.flush()


def _read(pipe: IO[bytes]) -> bytes:
    """A frame; empty at the end."""
    head = pipe.read(_LENGTH.size)
    return pipe.read(_LENGTH.unpack(head)[0]) if len(head) == _LENGTH.size else b""


# --- the process ------------------------------------------------------------------------------------------------------


def _serve(jobs: queue.SimpleQueue[bytes], vocabulary: _Vocabulary) -> None:
    from octavo.core.matcher import check, make_tokenizer

    tokenizer = make_tokenizer(vocabulary.tokens, vocabulary.special, vocabulary.ends, _greedy(vocabulary))
    _limit_memory(vocabulary.memory)
    while True:
        frame = jobs.get()
        answer = ""
        if frame:  # an empty one asks whether the process is ready
            try:
                answer = check(tokenizer, msgspec.msgpack.decode(frame, type=GrammarSpec))
            except BaseException as error:  # a panic of llguidance is no Exception
                answer = f"The grammar could not be compiled: {type(error).__name__}."
        _write(sys.stdout.buffer, msgspec.msgpack.encode(answer))


def _greedy(vocabulary: _Vocabulary) -> Callable[[str | bytes], list[int]]:
    """Spells a text with the longest tokens. A model would choose others; a grammar does not know the difference."""
    ids = {token: id for id, token in enumerate(vocabulary.tokens)}
    for id in vocabulary.special:
        ids.pop(vocabulary.tokens[id], None)
    longest = min(max(map(len, ids), default=1), 64)

    def encode(text: str | bytes) -> list[int]:
        rest = text.encode() if isinstance(text, str) else text
        found = []
        while rest:
            size = next((n for n in range(min(longest, len(rest)), 0, -1) if rest[:n] in ids), 0)
            if size:
                found.append(ids[rest[:size]])
            rest = rest[size or 1 :]
        return found

    return encode


def _limit_memory(more: int) -> None:
    with contextlib.suppress(OSError, ValueError):  # macOS cannot
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))


def main() -> None:
    from octavo.core.matcher import STACK_BYTES

    vocabulary = msgspec.msgpack.decode(_read(sys.stdin.buffer), type=_Vocabulary)
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.stack_size(STACK_BYTES)
    threading.Thread(target=_serve, args=(jobs, vocabulary), daemon=True).start()
    while head := sys.stdin.buffer.read(_LENGTH.size):
        jobs.put(sys.stdin.buffer.read(_LENGTH.unpack(head)[0]))
    os._exit(0)


if __name__ == "__main__":
    main()
