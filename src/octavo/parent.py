"""Standard input as the tie of a process to the one that started it: its end, however the parent ended, ends both."""

from __future__ import annotations

import os
import shutil
import threading


def end_with_parent(folder: str = "") -> None:
    """From now on this process ends at once, with exit code 1, when its standard input does.

    ``folder`` is removed then: a parent that was killed cannot. A thread watches, so that a main thread which waits for
    a device or for another process does not matter. Nothing else may read standard input.
    """

    def watch() -> None:
        while os.read(0, 4096):
            pass
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, name="octavo-parent-watch", daemon=True).start()
