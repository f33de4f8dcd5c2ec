"""The benchmarks over an engine without a model, and over a server made of canned answers."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import statistics
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from bench import make_workload
from octavo import cli
from octavo.bench import floor, offline, plot, report, serve, startup
from octavo.bench.floor import Floor
from octavo.config import EngineConfig
from octavo.core.engine import EngineCore
from octavo.errors import OctavoError
from octavo.runtime.stub import StubWorker
from tools import tiny

SMALL = ("--input-len", "20", "--output-len", "6", "--num-prompts", "5", "--rounds", "2")


@pytest.fixture
def _stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "make_core", lambda config: EngineCore(config, StubWorker(64, 512)))
    monkeypatch.setattr(floor, "measure", lambda config: Floor(1e9, 1e12, 10**6, 10**5, 10**4, 100, rows=2))


@pytest.mark.usefixtures("_stub")
def test_throughput_prints_a_table_and_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    assert cli.main(["bench", "throughput", "stub", *SMALL, "--json", str(out)]) == 0
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert (row["requests"], row["rounds"]) == (5, 2)
    assert row["output_tok_s"]["median"] > 0
    assert 0 < row["kv_waste_percent"]["median"] < 60
    assert "ttft_ms" not in row
    assert row["floor_percent"] > 0
    assert "5 x (20 -> 6)" in capsys.readouterr().out


@pytest.mark.usefixtures("_stub")
def test_throughput_of_one_request_reports_first_token_and_decode_speed(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    assert cli.main(["bench", "throughput", "stub", *SMALL, "--num-prompts", "1", "--json", str(out)]) == 0
    (row,) = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert row["ttft_ms"]["median"] > 0
    assert row["decode_tok_s"]["median"] > 0


def test_the_floor_is_bytes_over_bandwidth_or_operations_over_their_rate() -> None:
    slow_memory = Floor(bandwidth=1e3, rate=1e9, read=2000, layers=900, head=100, kv_bytes=10, rows=2)
    # The prompt reads the weights once; 4 steps read them and K and V of 11, 12, 13 and 14 tokens.
    assert slow_memory.seconds([10], 5) == pytest.approx(2 + 4 * 2 + 0.01 * (11 + 12 + 13 + 14))
    assert slow_memory.seconds([10], 1) == pytest.approx(2)
    assert slow_memory.seconds([10, 10, 10], 2) == pytest.approx(2 + 2 * 2 + 0.01 * 3 * 11)  # two go together
    slow_products = Floor(bandwidth=1e12, rate=1e3, read=2000, layers=900, head=100, kv_bytes=0, rows=8)
    assert slow_products.seconds([10, 20], 3) == pytest.approx(2 * (30 * 0.9 + 2 * 0.1) + 2 * 2 * 2 * 1.0)


def test_the_floor_counts_experts_that_are_chosen() -> None:
    floor = Floor(bandwidth=1.0, rate=1e9, read=100, layers=1, head=1, kv_bytes=0, rows=2, experts=800, share=0.25)
    assert floor.read_by(1) == 100  # with a quarter of the experts
    assert floor.read_by(2) == 100 + 800 * (0.75 - 0.75**2)
    assert floor.read_by(1000) == pytest.approx(100 + 800 * 0.75)
    assert floor.seconds([1, 1], 3) == pytest.approx(3 * floor.read_by(2))


@pytest.mark.parametrize("small", [False, True])
def test_the_rate_of_products_is_measured(monkeypatch: pytest.MonkeyPatch, small: bool) -> None:
    monkeypatch.setattr(floor, "PROBE_SECONDS", 0.001)
    monkeypatch.setattr(floor, "PROBE_SIZE", 256)
    assert 1e6 < floor.product_rate("cpu", "float32", small) < 1e15


@pytest.mark.usefixtures("_stub")
def test_latency_counts_every_step_and_request(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    assert cli.main(["bench", "latency", "stub", *SMALL, "--json", str(out)]) == 0
    rows = {row["what"]: row for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    assert rows["request"]["samples"] == rows["first token"]["samples"] == 10
    assert rows["step"]["samples"] >= 2 * 6
    assert rows["first token"]["ms"]["p50"] < rows["request"]["ms"]["p50"]


def test_startup_names_the_phases_of_both_processes(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "measure", functools.partial(startup.measure, worker="stub"))
    out, folder = tmp_path / "rows.json", tiny.make(tmp_path / "model")
    assert cli.main(["bench", "startup", str(folder), "--json", str(out)]) == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    api = {row["phase"]: row["seconds"] for row in rows if row["process"] == "api"}
    engine = {row["phase"]: row["seconds"] for row in rows if row["process"] == "engine"}
    assert list(api) == ["python", "import", "config", "tokenizer", "wait for the engine", "ready", "first token"]
    assert list(engine) == ["python", "import", "config", "weights", "warm-up"]
    assert all(seconds > 0 for seconds in (*api.values(), engine["python"], engine["import"]))
    assert api["ready"] == pytest.approx(sum(list(api.values())[:5]))
    assert sum(engine.values()) < api["ready"]  # they run beside each other
    assert "wait for the engine" in capsys.readouterr().out


def test_a_request_that_is_refused_fails_the_benchmark() -> None:
    core = EngineCore(EngineConfig.of(model="stub"), StubWorker(64, 128))
    with pytest.raises(OctavoError, match="refused"):
        offline.run(core, [[1] * 500], 4)


def test_kv_waste_is_the_share_of_allocated_slots_without_a_token() -> None:
    core = EngineCore(EngineConfig.of(model="stub", block_size=16), StubWorker(64, 128))
    result = offline.run(core, [[5] * 8], 1)  # one step: a page of 16 slots with 8 tokens
    assert result.kv_waste == pytest.approx(0.5)


def test_pages_of_the_throughput_workload_waste_under_four_percent() -> None:
    core = EngineCore(EngineConfig.of(model="stub"), StubWorker(8192, 2048))
    case = make_workload.CASES["A"]
    result = offline.run(core, case.rounds()[1]["prompts"], case.max_tokens)
    assert result.kv_waste < 0.04


def test_percentiles_are_nearest_ranks() -> None:
    found = report.percentiles([float(n) for n in range(1, 101)])
    assert (found["p50"], found["p90"], found["p99"], found["max"], found["mean"]) == (50, 90, 99, 100, 50.5)
    assert report.percentiles([3.0])["p99"] == 3.0


def test_a_table_leaves_out_columns_that_no_row_has() -> None:
    text = report.table([{"a": "x", "b": {"min": 1.5}}, {"a": "y"}], {"A": "a", "B": "b.min", "C": "c"})
    assert text.splitlines()[0].split() == ["A", "B"]
    assert text.splitlines()[-1].split() == ["y", "-"]


class _Canned(BaseHTTPRequestHandler):
    """Streams three pieces of text and the usage; a prompt whose first id is odd gets ``odd``: a status and a body."""

    odd: tuple[int, bytes] | None = None

    def do_GET(self) -> None:
        self._send(200, "application/json", b'{"data": [{"id": "canned"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "canned"
        if self.odd is not None and body["prompt"][0] % 2:
            self._send(self.odd[0], "application/json", self.odd[1])
            return
        events = [{"choices": [{"text": "x"}]}] * 3
        events.append({"choices": [], "usage": {"completion_tokens": body["max_tokens"]}})
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        self._send(200, "text/event-stream", text.encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Canned) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def bench_serve(url: str, out: Path, *argv: str) -> int:
    sizes = ("--input-len", "4", "--output-len", "3", "--num-prompts", "8", "--concurrency", "2")
    return cli.main(["bench", "serve", "--base-url", url, *sizes, "--json", str(out), *argv])


def test_serve_reports_totals_and_percentiles(url: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    assert bench_serve(url, out, "--request-rate", "500") == 0
    totals, *times = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert (totals["requests"], totals["failed"]) == (8, 0)
    assert {row["what"]: row["samples"] for row in times} == {"TTFT": 8, "TPOT": 8, "ITL": 16, "E2E": 8}


def test_serve_runs_each_rate_counts_goodput_and_draws_the_times(url: str, tmp_path: Path) -> None:
    out, picture = tmp_path / "rows.json", tmp_path / "times.svg"
    goals = ("--goodput", "ttft:60000", "e2e:0")
    assert bench_serve(url, out, "--request-rate", "300,900", "--plot", str(picture), *goals, "--burstiness", "2") == 0
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    totals = [row for row in rows if "wall_s" in row]
    assert [row["case"].rpartition(" at ")[2] for row in totals] == ["300/s", "900/s"]
    assert [row["goodput_s"] for row in totals] == [0, 0]
    tree = ET.parse(picture)
    lines = list(tree.iter("{http://www.w3.org/2000/svg}polyline"))
    assert len(lines) == 4 * 2
    texts = [one.text for one in tree.iter("{http://www.w3.org/2000/svg}text")]
    assert {"TTFT, ms", "TPOT, ms", "ITL, ms", "E2E, ms", totals[0]["case"]} <= set(texts)


def test_goodput_counts_requests_that_keep_every_goal() -> None:
    fast = serve.Answer(prompt_tokens=1, output_tokens=3, times=[0.1, 0.2, 0.3], seconds=0.3)
    slow = serve.Answer(prompt_tokens=1, output_tokens=3, times=[0.1, 0.2, 0.9], seconds=0.9)
    rows = serve.summary("x", [fast, slow], 2.0, {"ttft": 150, "itl": 500})
    assert rows[0]["goodput_s"] == 0.5
    assert serve.summary("x", [fast, slow], 2.0, {"ttft": 150})[0]["goodput_s"] == 1.0
    assert serve.summary("x", [fast, slow], 2.0, {"tpot": 99})[0]["goodput_s"] == 0


def test_arrivals_have_the_rate_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def gaps(burstiness: float) -> list[float]:
        loop, clock, times = asyncio.get_running_loop(), [0.0], []
        monkeypatch.setattr(loop, "time", lambda: clock[0])

        async def sleep(seconds: float) -> None:
            clock[0] += seconds

        monkeypatch.setattr(asyncio, "sleep", sleep)
        async for _ in serve._paced(serve.Load([[1]] * 4000, 1, 50.0, burstiness, 0)):
            times.append(clock[0])
        monkeypatch.undo()
        return [b - a for a, b in itertools.pairwise(times)]

    for burstiness, spread in ((1.0, 1.0), (0.25, 2.0)):
        found = asyncio.run(gaps(burstiness))
        assert statistics.fmean(found) == pytest.approx(1 / 50, rel=0.1)
        assert statistics.stdev(found) == pytest.approx(spread / 50, rel=0.15)


@pytest.mark.parametrize("most", [0.0, 0.03, 1, 7, 99.5, 1234])
def test_an_axis_holds_every_value_in_few_steps(most: float) -> None:
    step, end = plot._scale(most)
    assert end >= most
    assert end / step <= 6.000001


@pytest.mark.parametrize(
    "odd",
    [
        (400, b'{"error": {"message": "odd"}}'),
        (200, b'data: {"error": {"message": "odd"}}\n\n'),
        (200, b"data: {no JSON\n\n"),
        (200, b"data: 5\n\n"),
    ],
)
def test_serve_fails_when_a_request_does(
    odd: tuple[int, bytes], url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_Canned, "odd", odd)
    out = tmp_path / "rows.json"
    assert bench_serve(url, out) == 1
    assert 0 < json.loads(out.read_text(encoding="utf-8"))["rows"][0]["failed"] < 8


def test_serve_without_a_server_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_serve("http://127.0.0.1:9", tmp_path / "rows.json") == 2
    said = capsys.readouterr().err
    assert "listed at http://127.0.0.1:9/v1/models" in said
    assert "Is the server up?" in said


def test_no_success_at_all_is_an_error() -> None:
    with pytest.raises(OctavoError, match="all 1 requests failed; the first: boom"):
        serve.summary("x", [serve.Answer(prompt_tokens=1, error="boom")], 1.0)
