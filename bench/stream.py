"""What streaming costs: a server whose engine computes nothing, 256 clients, and the processor time of a token.

    python bench/stream.py [--clients 256] [--tokens 256] [--rounds 5] [--endpoint chat|completions]
                           [--engines 1] [--api-processes 1]

Server and engine are processes of their own; this one reads the sockets and counts events. Processor time (user and
system) of the API processes is the figure that other load on the machine changes least. Needs psutil.
"""

from __future__ import annotations

import argparse
import json
import re
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import tiny

SERVE = """
import json, sys
from octavo.config import EngineConfig, ServerConfig
from octavo.server.run import serve
config = EngineConfig.of(**json.loads(sys.argv[1]))
server = ServerConfig(port=0, disable_log_requests=True, api_server_count=int(sys.argv[2]))
sys.exit(serve(config, server, worker="stub"))
"""
MARK, LAST = b"data: ", b"data: [DONE]\n\n"
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
PROMPT = "Say something long."
POLL = 0.002  # seconds between looks at the sockets: clients elsewhere would not be woken by the server's processor


class Server(NamedTuple):
    """A running server: where it listens, and its processes."""

    address: tuple[str, int]
    apis: list[psutil.Process]
    cores: list[psutil.Process]


@contextmanager
def serving(clients: int, tokens: int, engines: int = 1, apis: int = 1) -> Iterator[Server]:
    """A server with stub engines, each with room for all clients at once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.tokenizer(folder, 256 + len(tiny.SPECIAL))  # the stub knows 256: bytes, no merges
        (folder / "config.json").write_text(json.dumps(tiny.config()))
        room = clients * (tokens + 64)
        options = {
            "model": name,
            "max_num_seqs": clients,
            "max_num_batched_tokens": 4096,
            "max_model_len": tokens + 64,
            "kv_cache_memory_bytes": 4 * 2 * room,
            "data_parallel_size": engines,
            "device": "cpu",
        }
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, json.dumps(options), str(apis)],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        try:
            address, parent = _address(process), psutil.Process(process.pid)
            cores = _children(parent, "octavo.core.process")
            yield Server(address, _children(parent, "octavo.server.api_process") or [parent], cores)
        finally:
            process.terminate()
            process.wait()


def _children(parent: psutil.Process, module: str) -> list[psutil.Process]:
    return [child for child in parent.children() if module in child.cmdline()]


def _address(process: subprocess.Popen[bytes]) -> tuple[str, int]:
    """Reads the server's log up to the line that says where it listens."""
    assert process.stderr is not None
    seen = b""
    for line in process.stderr:
        seen += line
        if found := re.search(rb" at http://([\d.]+):(\d+)/v1", line):
            return found[1].decode(), int(found[2])
    raise SystemExit(seen.decode(errors="replace"))


class Round(NamedTuple):
    """What one round took. ``events`` are those of all clients but the last of each, which is no token."""

    events: int
    tokens: int
    wall: float
    api: float
    core: float


def request_for(endpoint: str, tokens: int) -> bytes:
    """A streamed request over HTTP/1.1."""
    asked: dict[str, Any] = {"max_tokens": tokens, "temperature": 0, "stream": True}
    asked |= {"messages": [{"role": "user", "content": PROMPT}]} if endpoint == "chat" else {"prompt": PROMPT}
    body = json.dumps(asked).encode()
    head = f"POST {PATHS[endpoint]} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


def measure(server: Server, request: bytes, clients: int, tokens: int) -> Round:
    """All clients ask at once and read to the end."""
    sockets = [socket.create_connection(server.address) for _ in range(clients)]
    api, core, start = _cpu(server.apis), _cpu(server.cores), time.perf_counter()
    for one in sockets:
        one.sendall(request)
    events = read(sockets)
    wall = time.perf_counter() - start
    return Round(events - clients, clients * tokens, wall, _cpu(server.apis) - api, _cpu(server.cores) - core)


def read(sockets: list[socket.socket]) -> int:
    """Events of all streams, read to their ends."""
    selector = selectors.DefaultSelector()
    tails: dict[int, bytes] = {}
    for one in sockets:
        one.setblocking(False)
        selector.register(one, selectors.EVENT_READ)
        tails[one.fileno()] = b""
    events = 0
    while tails:
        time.sleep(POLL)
        for key, _ in selector.select(30) or _late():
            data = tails[key.fd] + key.fileobj.recv(1 << 18)  # type: ignore[union-attr]
            cut = data.rfind(b"\n\n") + 2
            events += data.count(MARK, 0, cut)
            if LAST in data:
                selector.unregister(key.fileobj)
                del tails[key.fd]
                key.fileobj.close()  # type: ignore[union-attr]
            else:
                tails[key.fd] = data[cut:] if cut > 1 else data
    return events


def _late() -> Any:
    raise SystemExit("nothing came for 30 seconds")


def _cpu(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return float(sum(one.user + one.system for one in times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--endpoint", choices=PATHS, default="chat")
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--api-processes", type=int, default=1)
    args = parser.parse_args()
    request = request_for(args.endpoint, args.tokens)
    with serving(args.clients, args.tokens, args.engines, args.api_processes) as server:
        rounds = [measure(server, request, args.clients, args.tokens) for _ in range(args.rounds + 1)][1:]
    for one in rounds:
        print(
            f"{one.tokens / one.wall:8.0f} tokens/s, {one.events / one.tokens:.3f} events a token, processor time of a "
            f"token: API {one.api / one.tokens * 1e6:5.1f} us, engine {one.core / one.tokens * 1e6:5.1f} us"
        )
    best = statistics.median(one.api / one.tokens for one in rounds) * 1e6
    print(f"median: {best:.1f} us of API processes a token, {1e6 / best:.0f} tokens/s of a whole core")


if __name__ == "__main__":
    main()
