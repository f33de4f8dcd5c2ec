"""`octavo plan` for several devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.cli import main
from tools import tiny


def planned(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    main(["plan", str(folder), "--gpu", "l4", "--json", *options])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_devices_that_share_a_model_count_as_one_of_all_their_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.make(tmp_path, "llama")
    one, two = planned(folder, capsys), planned(folder, capsys, "--tensor-parallel-size", "2")
    assert two["machine"]["name"] == f"2 x {one['machine']['name']}"
    assert two["machine"]["memory"] == 2 * one["machine"]["memory"]
    assert two["machine"]["bandwidth"] == 2 * one["machine"]["bandwidth"]


def test_bytes_for_the_cache_are_of_each_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny.make(tmp_path, "llama")
    options = ("--kv-cache-memory-bytes", "1M")
    one = planned(folder, capsys, *options)
    two = planned(folder, capsys, *options, "--tensor-parallel-size", "2")
    assert two["cache"]["budget"] == 2 * one["cache"]["budget"] > 0
