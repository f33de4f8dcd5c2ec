"""Kernels that are compiled before the first request, in copies of the process."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("triton")

from octavo.kernels import rehearsal


def _note(folder: Path, number: int) -> None:
    (folder / str(number)).touch(exist_ok=False)
    if number == 3:
        raise ValueError("its process ends; the others go on with what is left")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_each_job_is_done_once_by_some_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    rehearsal.share([partial(_note, tmp_path, number) for number in range(50)])
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == list(range(50))
