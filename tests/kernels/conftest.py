"""Runs each test of a file on one instruction set of the C++ extension after the other, on two threads.

A file says on which: ``pytestmark = pytest.mark.usefixtures("every_isa")``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

try:
    from octavo import _cpu
except ImportError:  # the files that need it are skipped
    NATIVE, EMULATED = [], []
else:
    NATIVE, EMULATED = _cpu.names(), _cpu.emulated()


@contextlib.contextmanager
def _using(isa: str) -> Iterator[str]:
    before, threads = _cpu.active(), _cpu.threads()
    _cpu.use(isa)
    _cpu.set_threads(2)
    try:
        yield isa
    finally:
        _cpu.use(before)
        _cpu.set_threads(threads)


@pytest.fixture(params=[*NATIVE, *EMULATED])
def every_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with _using(request.param) as isa:
        yield isa


@pytest.fixture(params=NATIVE)
def native_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Those of this processor, for kernels that are the same where AMX is emulated."""
    with _using(request.param) as isa:
        yield isa


@pytest.fixture(params=[name for name in (*NATIVE, *EMULATED) if name.startswith("amx")])
def amx_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with _using(request.param) as isa:
        yield isa
