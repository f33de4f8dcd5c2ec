"""``octavo serve`` from the first to the last second: one API process, which is this one, and its engines.

With several API processes this one looks after them and the engines (`server.supervisor`), and each runs a `Session`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import uvicorn
import uvloop

import octavo
from octavo.async_llm import AsyncLLM
from octavo.config import EngineConfig, ServerConfig
from octavo.errors import OctavoError
from octavo.frontend.chat import WantedFormat, check_variables, load_template
from octavo.frontend.parse.registry import check_names
from octavo.log import get_logger
from octavo.server import address
from octavo.server.app import DOCS, build_app
from octavo.server.edge import Edge
from octavo.server.files.store import FileStore
from octavo.server.keys import Keys
from octavo.server.service import Service, formats_of, served_names
from octavo.server.tracing import Tracing
from octavo.server.wire import Protocol

if TYPE_CHECKING:
    from octavo.frontend.fleet import Source

ANSWER_SECONDS = 0.5  # for requests that were just aborted to write their last byte
TRACE_SECONDS = 2.0  # for the last spans to be sent


def serve(config: EngineConfig, server: ServerConfig, *, worker: Literal["real", "stub"] = "real") -> int:
    """Serves until told to stop; returns the exit code: 0 after a signal, 1 when the engine died.

    Raises `OctavoError` for whatever prevents the start.
    """
    check_names(server.tool_call_parser, server.reasoning_parser)
    with contextlib.ExitStack() as stack:
        if server.files_dir is None:
            folder = Path(tempfile.gettempdir()) / f"octavo-files-{secrets.token_hex(16)}"  # made when there is a file
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            server = dataclasses.replace(server, files_dir=str(folder))
        check_variables(server.default_chat_template_kwargs)
        Edge.of(server)
        address.tls(server)
        if server.api_server_count != 1:
            from octavo.server.supervisor import supervise

            return supervise(config, server, worker=worker)
        (listener,) = stack.enter_context(address.listeners(server))
        return run(Session(config, server, worker, listener))


def run(session: Session) -> int:
    """Runs ``session`` in an event loop of its own; returns its exit code."""
    code = uvloop.run(session.run())
    if _Threads.busy():
        os._exit(code)  # the interpreter would wait for them
    return code


class _Threads(ThreadPoolExecutor):
    """The event loop's threads. One that is busy with a long text does not hold up the end."""

    PREFIX = "octavo-serve"

    def __init__(self) -> None:
        super().__init__(thread_name_prefix=self.PREFIX)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=True)

    @classmethod
    def busy(cls) -> bool:
        """Whether a thread goes on after `shutdown`; idle ones end at once."""
        left = [thread for thread in threading.enumerate() if thread.name.startswith(cls.PREFIX)]
        for thread in left:
            thread.join(0.1)
        return any(thread.is_alive() for thread in left)


class Session:
    """One API process's work, from its start to its end.

    ``engines`` are those that another process looks after; by default this one starts and ends its own. ``announce``
    is told what is served, in a few lines, once it is.
    """

    def __init__(
        self,
        config: EngineConfig,
        server: ServerConfig,
        worker: Literal["real", "stub"],
        listener: socket.socket,
        *,
        engines: Source | None = None,
        announce: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self._config, self._server, self._worker, self._listener = config, server, worker, listener
        self._keys = Keys.given(server, os.environ)
        self._engines, self._announce = engines, announce
        traces, names = server.otlp_traces_endpoint, served_names(config.model, server.served_model_name)
        self._tracing = None if traces is None else Tracing(traces, names[0])
        self._stop = asyncio.Event()  # a signal, or the engine's death
        self._hurry = asyncio.Event()  # a second signal
        self._drain = server.drain_seconds
        self._code = 0

    async def run(self) -> int:
        asyncio.get_running_loop().set_default_executor(_Threads())
        with signals(self._signalled):
            llm = await self._start()
            if llm is None:
                return self._code
            try:
                await self._serve(llm)
            finally:
                await llm.close()
        return self._code

    async def _start(self) -> AsyncLLM | None:
        """The engine once it is ready; None if a signal came before."""
        template = self._server.chat_template
        starting = asyncio.create_task(
            AsyncLLM.start(
                self._config,
                chat_template=load_template(template) if template is not None else None,
                content_format=cast("WantedFormat", self._server.chat_template_content_format),
                template_variables=self._server.default_chat_template_kwargs,
                worker=self._worker,
                log_level=self._server.log_level,
                on_death=self._engine_died,
                engines=self._engines,
            )
        )
        stopped = asyncio.create_task(self._stop.wait())
        await asyncio.wait((starting, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if starting.done():
            return starting.result()
        starting.cancel()
        await asyncio.wait((starting,))
        if not starting.cancelled() and starting.exception() is None:
            await starting.result().close()
        return None

    async def _serve(self, llm: AsyncLLM) -> None:
        names = served_names(self._config.model, self._server.served_model_name)
        options = self._server
        formats = formats_of(llm, tool=options.tool_call_parser, reasoning=options.reasoning_parser)
        get_logger().info("tool calls: %s; reasoning: %s", formats.tool or "not read", formats.reasoning or "not read")
        files = None if options.files_dir is None else FileStore(Path(options.files_dir))
        limit = self._config.limits.max_waiting
        tracing = self._tracing
        service = Service(llm, names, formats, max_waiting=limit, files=files, tracing=tracing)
        app = build_app(
            service,
            keys=self._keys,
            log_requests=not options.disable_log_requests,
            echo_ids=options.enable_request_id_headers,
            without=DOCS if options.disable_fastapi_docs else frozenset(),
        )
        banner = _banner(service, options, self._listener, guarded=self._keys.any)
        http = _Http(_http_config(Edge.of(options).around(app), address.tls(options)), lambda: self._announce(banner))
        ending = asyncio.create_task(self._end(service, http))
        gc.collect()
        gc.freeze()  # what is there now stays: looking through it again and again would hold up the streams
        await http.serve([self._listener])
        ending.cancel()
        if tracing is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(tracing.close), TRACE_SECONDS)

    async def _end(self, service: Service, http: _Http) -> None:
        """Waits for the reason to stop; then drains, answers what is left and lets the HTTP server end."""
        await self._stop.wait()
        drained = asyncio.create_task(service.drained(self._drain))
        hurried = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((drained, hurried), return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()
        hurried.cancel()
        await service.llm.close()
        await service.drained(ANSWER_SECONDS)
        http.should_exit = True

    def _signalled(self, number: int) -> None:
        if self._stop.is_set():
            self._hurry.set()
            return
        if number == signal.SIGINT:
            self._drain = 0.0
        get_logger().info("stopping on %s", signal.Signals(number).name)
        self._stop.set()

    def _engine_died(self, error: OctavoError) -> None:
        get_logger().error("%s: %s", error.id, error)
        self._code, self._drain = 1, ANSWER_SECONDS
        self._stop.set()


@contextlib.contextmanager
def signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Calls ``handle`` in the running event loop with each SIGINT and SIGTERM."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handle, number)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


class _Http(uvicorn.Server):
    """uvicorn without its own handling of signals, and with our lines once the socket is open."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._started = started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._started()


def _http_config(app: Any, tls: Mapping[str, Any]) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Protocol,
        loop="none",
        lifespan="off",
        ws="none",
        log_config=None,
        log_level="error",  # what clients do wrong is no line of the log
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
        timeout_keep_alive=60,  # longer than clients keep theirs, or they reuse a connection that is being closed
        backlog=2048,
        **tls,
    )


def _banner(service: Service, server: ServerConfig, listener: socket.socket, *, guarded: bool) -> str:
    """What is served, where, within which limits, and a line to paste."""
    info, name, hidden = service.llm.info, service.names[0], server.disable_fastapi_docs
    body: dict[str, Any]
    url = address.url_of(server, listener)
    key = ' -H "authorization: Bearer $OCTAVO_API_KEY"' if guarded else ""
    if service.llm.inputs.embeds:
        path, body = "/v1/embeddings", {"model": name, "input": "Hello"}
    elif service.llm.renderer.template is None:
        path, body = "/v1/completions", {"model": name, "prompt": "Hello"}
    else:
        path, body = "/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": "Hi"}]}
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    limits = (
        f"{info.max_model_len} tokens a request, {info.max_num_seqs} requests at once, "
        f"{info.num_pages * info.page_size} tokens of KV cache"
    )
    lines = [
        f"octavo {octavo.__version__} serves {name} at {url}/v1",
        f"  {info.dtype} on {info.device}; {limits}",
        f"  for clients of OpenAI {url}/v1, of Anthropic {url}" + ("" if hidden else f"; every endpoint: {url}/docs"),
        f"  {address.curl(server)} {url}{path} -H 'content-type: application/json'{key} -d {data}",
    ]
    if not guarded and not address.is_private(server):
        lines.insert(1, "  warning: no --api-key: whoever reaches this address can use it")
    return "\n".join(lines)
