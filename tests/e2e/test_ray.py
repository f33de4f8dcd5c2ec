"""``octavo serve`` on a Ray cluster of two nodes on loopback; needs Ray: pip install 'octavo[ray]'."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.serving import Server
from tests.e2e.test_scale_out_faults import health, under_load
from tests.waiting import ended, until

ray = pytest.importorskip("ray", reason="needs Ray: pip install 'octavo[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SERVE = (
    "import sys; from octavo import log; from octavo.config import EngineConfig, ServerConfig;"
    "from octavo.server.run import serve; from octavo.cli import _guarded; import argparse; log.configure('info');"
    "config = EngineConfig.of(model=sys.argv[1], max_num_seqs=8, max_num_batched_tokens=256, data_parallel_size=2,"
    " device='cpu', distributed_executor_backend='ray');"
    "work = lambda args: serve(config, ServerConfig(port=0, api_server_count=int(sys.argv[2])), worker='stub');"
    "sys.exit(_guarded(work, argparse.Namespace(log_level='info')))"
)  # MODEL API_PROCESSES


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        made.add_node(num_cpus=1)
        patch.setenv("RAY_ADDRESS", made.address)
        yield made
        made.shutdown()


def cores() -> list[psutil.Process]:
    """Engines that actors have started."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        parent = process.parent() if "octavo.core.process" in " ".join(process.info["cmdline"] or ()) else None
        if parent is not None and "EngineActor" in " ".join(parent.cmdline()):
            found.append(process)
    return found


class Head(Server):
    """A server whose engines are elsewhere."""

    def children(self, module: str) -> list[psutil.Process]:
        return cores() if module == "octavo.core.process" else super().children(module)


@pytest.fixture
def server(cluster: Any, model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Head]:
    made = Head(["-c", SERVE, str(model), str(getattr(request, "param", 1))], tmp_path / "log")
    yield made
    made.process.kill()
    made.process.wait()
    assert all(ended(core, 30) for core in made.cores)


def test_engines_are_placed_on_both_nodes_and_one_that_dies_comes_back(server: Head) -> None:
    first, second = server.cores
    nodes = {core.parents()[1].pid for core in (first, second)}
    assert len(nodes) == 2
    ends = asyncio.run(under_load(server, 40, first.kill))
    assert set(ends) == {"length", "ENG001"}
    assert ends["length"] >= 16
    until(lambda: health(server) == "ok", 60)
    assert len(cores()) == 2
    assert asyncio.run(under_load(server, 16)) == {"length": 16}
    server.process.terminate()
    assert server.process.wait(20) == 0
    assert all(ended(core, 20) for core in [first, second, *cores()])


@pytest.mark.parametrize("server", [2], indirect=True)
def test_several_api_processes_share_engines_that_come_back(server: Head) -> None:
    assert asyncio.run(under_load(server, 40, server.cores[0].kill)).keys() == {"length", "ENG001"}
    until(lambda: {health(server) for _ in range(8)} == {"ok"}, 60)
    assert asyncio.run(under_load(server, 16)) == {"length": 16}
    server.process.terminate()
    assert server.process.wait(20) == 0
    assert all(ended(process, 20) for process in [*server.cores, *server.apis, *cores()])


def test_an_engine_of_a_node_that_vanishes_waits_for_another_node(server: Head, cluster: Any) -> None:
    extra = cluster.worker_nodes.copy().pop()
    cluster.remove_node(extra, allow_graceful=False)
    until(lambda: health(server) == "degraded", 60)
    assert asyncio.run(under_load(server, 16)) == {"length": 16}
    cluster.add_node(num_cpus=1)
    until(lambda: health(server) == "ok", 90)
    assert server.get("/metrics").text.count("octavo:engine_running{") == 2


def test_a_killed_head_leaves_no_engine(server: Head) -> None:
    server.process.kill()
    assert all(ended(core, 30) for core in server.cores)


def test_another_version_on_a_node_is_refused_with_both_named(cluster: Any, model: Path, tmp_path: Path) -> None:
    import octavo

    source = Path(octavo.__file__).parent
    other = tmp_path / "src" / "octavo"
    shutil.copytree(source, other, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    text = (other / "__init__.py").read_text()
    (other / "__init__.py").write_text(re.sub(r'__version__ = ".*"', '__version__ = "9.9.9"', text))
    path = os.pathsep.join([str(other.parent), *(entry for entry in sys.path if entry and entry != str(source.parent))])
    node = cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": path})
    try:
        command = [sys.executable, "-c", SERVE, str(model), "1"]
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=120, check=False)
    finally:
        cluster.remove_node(node)
    assert done.returncode == 2, done.stderr
    assert f"has octavo 9.9.9, this machine has octavo {octavo.__version__}" in done.stderr
    assert cores() == []


def test_too_few_machines_are_refused_at_once(cluster: Any, model: Path) -> None:
    command = [sys.executable, "-m", "octavo", "serve", str(model), "--port", "0", "--device", "cpu"]
    command += ["--distributed-executor-backend", "ray", "--data-parallel-size", "9"]
    began = time.monotonic()
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "9 engines do not fit on machines with [1, 1] CPUs" in done.stderr
    assert time.monotonic() - began < 60
