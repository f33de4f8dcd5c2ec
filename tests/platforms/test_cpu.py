"""What the CPU says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from octavo import platforms
from octavo.config import MemoryOptions
from octavo.platforms import cpu


@pytest.mark.parametrize(
    ("info", "fast"),
    [
        ("processor : 0\nflags : fpu avx2 avx512f avx512_bf16 amx_tile\n", True),
        ("flags\t\t: fpu sse2 amx_bf16\n", True),
        ("processor : 0\nFeatures : fp asimd bf16 i8mm\n", True),
        ("flags : fpu avx2 avx512f\nbugs : bf16\n", False),
        ("", False),
    ],
)
def test_bfloat16_is_fast_where_the_processor_has_instructions_for_it(
    info: str, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(info)
    monkeypatch.setattr(cpu, "CPU_INFO", tmp_path / "cpuinfo")
    assert cpu.CpuPlatform().fast_bfloat16 is fast


def test_without_cpuinfo_bfloat16_counts_as_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CPU_INFO", tmp_path / "none")
    assert cpu.CpuPlatform().fast_bfloat16 is False


def test_engines_and_ranks_of_one_machine_share_its_memory() -> None:
    whole, why = platforms.select("cpu").kv_budget(MemoryOptions(), lambda: None)
    part, _ = platforms.select("cpu", rank=1, ranks=2, engines=3).kv_budget(MemoryOptions(), lambda: None)
    assert abs(part - whole / 6) <= 1
    assert why.startswith("10%")
    asked = MemoryOptions(kv_cache_memory_bytes=5 << 20)
    assert platforms.select("cpu", engines=3).kv_budget(asked, lambda: None)[0] == 5 << 20
