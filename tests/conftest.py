"""What all tests share."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

import pytest

with contextlib.suppress(ImportError):  # tests of kernels run on machines that have little besides PyTorch
    from hypothesis import HealthCheck, settings

    # The same examples on every machine, and no example fails because the machine was slow.
    settings.register_profile("octavo", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("octavo")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """octavo keeps nothing of a test for later starts of the user's models, in child processes neither."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTAVO_CACHE", str(tmp_path_factory.mktemp("octavo-cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def importable() -> Iterator[None]:
    """Processes that tests start find the package where the tests found it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(entry for entry in sys.path if entry))
        yield


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A job in the background of a plain shell ignores Ctrl-C, and so would the tests of it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
