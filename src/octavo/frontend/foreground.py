"""What a call has that somebody waits for at a terminal: a bar, and an end by Ctrl-C that leaves the engine whole."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from octavo.frontend.outputs import RequestState

UseTqdm = bool | Callable[..., Any]  # a callable makes the bar, as tqdm's own class does


class Progress:
    """A bar over prompts, or what else ``unit`` says, with the rate of tokens; or nothing."""

    def __init__(self, use_tqdm: UseTqdm, total: int, unit: str = "prompt") -> None:
        self._bar: Any = None
        if use_tqdm is not False and total:
            from tqdm.auto import tqdm

            make = tqdm if use_tqdm is True else use_tqdm
            self._bar = make(total=total, desc=f"Processed {unit}s", unit=unit, dynamic_ncols=True)
        self._tokens = 0
        self._began = time.monotonic()

    def add(self, state: RequestState, tokens: int) -> None:
        self._tokens += tokens
        if state.finished:
            self.advance(0)

    def advance(self, tokens: int) -> None:
        """One more is done."""
        self._tokens += tokens
        if self._bar is not None:
            rate = self._tokens / max(time.monotonic() - self._began, 1e-6)
            self._bar.set_postfix_str(f"{rate:.1f} tokens/s", refresh=False)
            self._bar.update(1)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Interrupts:
    """Delays Ctrl-C until `check` is called: a step that is cut in two would leave the engine broken.

    Pressing it a second time interrupts at once. A program that has a handler of its own is left alone.
    """

    def __init__(self) -> None:
        self._seen = False
        self._ours = False

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()  # the only one that may set a handler
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._ours = True
        return self

    def __exit__(self, *exc: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raises `KeyboardInterrupt` if Ctrl-C was pressed."""
        if self._seen:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: object) -> None:
        self._seen = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
