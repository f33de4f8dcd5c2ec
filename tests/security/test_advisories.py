"""Fifteen classes of advisories that engines of this kind have had, and the tests that keep octavo from them.

`TESTS` names those that live with the code they are about; the others are here. The last test runs this file without
the source's assert statements (``python -O``): nothing that keeps anybody safe may be one.
"""

from __future__ import annotations

import ast
import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from octavo.config import EngineConfig
from octavo.core.constraint import Grammar
from octavo.core.grammar import _Cache
from octavo.errors import EngineDead
from octavo.frontend import core_client
from octavo.frontend.core_process import CoreProcess, spawn
from octavo.frontend.parse.registry import TOOLS as TOOLS_OF_MODELS
from octavo.frontend.parse.registry import Formats
from octavo.structured import GrammarSpec
from tests.e2e.serving import STUB, running
from tests.frontend.fakes import info
from tests.server.fake import Server
from tests.waiting import PATIENCE, until
from tools import tiny

ROOT = Path(__file__).resolve().parents[2]
OPTIMISED = "OCTAVO_TEST_OPTIMISED"

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
TEXT = {"prompt": "hello", "max_tokens": 2}
GENERATING: dict[str, dict[str, Any]] = {
    "/v1/completions": TEXT,
    "/v1/chat/completions": CHAT | {"max_tokens": 2},
    "/v1/responses": {"input": "hi", "max_output_tokens": 2},
    "/v1/messages": CHAT | {"max_tokens": 2},
}
RENDERING: dict[str, dict[str, Any]] = {
    **{path: body for path, body in GENERATING.items() if path != "/v1/completions"},
    "/v1/messages/count_tokens": CHAT,
    "/tokenize": CHAT,
    "/render": {"body": CHAT},
}

TESTS: dict[int, tuple[str, ...]] = {
    1: ("core/test_transport.py::test_a_message_that_is_not_of_the_protocol_is_dropped_and_the_next_one_arrives",),
    2: (
        "core/test_transport.py::test_a_peer_without_the_public_key_is_not_heard",
        "core/test_process.py::test_the_sockets_lie_in_a_private_folder_that_goes_away",
    ),
    3: ("core/test_transport.py::test_a_peer_that_is_gone_is_reported_when_a_message_cannot_be_delivered",),
    4: (
        "hub/test_checkpoint.py::test_a_pickle_of_anything_but_tensors_is_refused",
        "hub/test_checkpoint.py::test_a_damaged_safetensors_file_is_refused",
        "hub/test_gguf.py::test_flipped_bits_give_an_error_or_a_model_but_nothing_else",
    ),
    5: (),
    6: (
        "hub/test_remote_code.py::test_no_loader_runs_code_of_the_repo_without_the_flag",
        "hub/test_remote_code.py::test_nothing_else_in_the_source_loads_remote_code",
        "hub/test_remote_code.py::test_transformers_is_never_left_to_ask_whether_to_trust",
    ),
    7: ("hub/test_remote_code.py::test_no_loader_runs_code_of_the_repo_without_the_flag",),
    8: (
        "frontend/parse/test_formats.py::test_a_malformed_call_is_content_and_nothing_of_it_is_lost",
        "frontend/parse/test_formats.py::test_any_text_reads_the_same_however_it_is_cut",
    ),
    9: (
        "core/test_trial.py::test_a_grammar_that_would_take_hours_is_ended_in_time",
        "core/test_trial.py::test_a_grammar_that_takes_too_much_memory_is_ended",
        "core/test_grammar.py::test_a_costly_grammar_does_not_block_other_requests",
        "core/test_hostile_grammars.py::test_a_hostile_grammar_costs_little_to_compile_and_to_follow",
        "e2e/test_structured.py::test_a_grammar_bomb_leaves_the_server_serving",
    ),
    10: (
        "core/test_grammar.py::test_a_thousand_schemas_keep_the_cache_within_its_limit",
        "server/test_responses.py::test_the_store_is_bounded_and_forgets_the_least_recently_used",
        "server/test_dashboard.py::test_the_history_is_bounded",
    ),
    11: (
        "frontend/test_chat.py::test_a_template_that_runs_away_is_stopped",
        "frontend/test_chat.py::test_a_template_cannot_leave_the_sandbox",
    ),
    12: ("server/test_dashboard.py::test_a_page_names_no_other_server_and_writes_no_html_from_data",),
    13: (
        "server/test_guard.py::test_an_unexpected_exception_is_500_without_its_text",
        "core/test_process.py::test_an_exception_in_the_loop_becomes_one_dead_message_and_exit_code_1",
    ),
    14: (
        "server/test_protocol.py::test_a_bad_field_is_refused_by_name_and_the_next_request_works",
        "server/test_openapi.py::test_the_limits_that_are_described_hold",
        "e2e/test_serve.py::test_a_huge_body_and_a_huge_header_are_refused",
        "server/test_endpoint.py::test_a_dead_engine_is_500_for_requests_and_503_for_health",
    ),
    15: (
        "server/test_keys.py::test_every_known_key_is_compared_whichever_fits",
        "server/test_keys.py::test_users_with_different_keys_never_share_cached_pages_and_one_user_does",
        "server/test_guard.py::test_the_key_guards_every_route_but_health_ping_and_empty_pages",
        "server/test_extras.py::test_prefixes_are_shared_within_one_salt_and_one_key",
    ),
}


def run(work: Callable[[], Coroutine[Any, Any, None]], seconds: float = 2 * PATIENCE) -> None:
    asyncio.run(asyncio.wait_for(work(), seconds))


reads_source = pytest.mark.skipif(OPTIMISED in os.environ, reason="the source is the same there")


@cache
def trees() -> list[tuple[Path, ast.Module]]:
    paths = [path for folder in ("src", "tools", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in paths]


def test_every_class_has_tests_and_those_that_are_named_exist() -> None:
    assert list(TESTS) == list(range(1, 16))
    here = {name: Path(__file__) for name in dir(sys.modules[__name__])}
    for number, names in TESTS.items():
        assert names or any(f"_{number}_" in name for name in here), number
        for name in names:
            file, _, function = name.partition("::")
            assert f"def {function}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name


# --- 1 to 5: what comes from outside is data --------------------------------------------------------------------------


@reads_source
def test_1_nothing_is_deserialised_that_could_be_code() -> None:
    guilty = []
    for path, tree in trees():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            bad = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"} & set(names)
            bad |= {"recv_pyobj", "send_pyobj"} & {getattr(node, "attr", "")}
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "yaml":
                bad |= {f"yaml.{node.attr}"} - {"yaml.SafeLoader", "yaml.MappingNode", "yaml.YAMLError"}  # data alone
            bad |= {"yaml by name"} if isinstance(node, ast.ImportFrom) and node.module == "yaml" else set()
            if isinstance(node, ast.Call):
                bad |= {"eval", "exec"} & {getattr(node.func, "id", "")}
                if ast.unparse(node.func) == "torch.load":
                    safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
                    bad |= set() if safe else {"torch.load"}
            guilty += [(str(path.relative_to(ROOT)), name) for name in bad]
    assert guilty == []


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoreProcess]:
    folder = tmp_path_factory.mktemp("stub")
    tiny.tokenizer(folder)
    tiny.write_json(folder / "config.json", tiny.config())
    made = spawn(EngineConfig.of(model=str(folder)), "stub", log_level="error")
    made.wait_ready()
    yield made
    made.stop()


def test_2_an_engine_listens_on_no_network_and_in_a_folder_of_the_users_own(core: CoreProcess) -> None:
    process = psutil.Process(core.process.pid)
    assert process.net_connections("inet") == []
    folder = Path(core.address.removeprefix("ipc://")).parent
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.stat().st_uid == os.getuid()


@reads_source
def test_3_no_socket_is_bound_to_every_interface_or_published_to_whoever_listens() -> None:
    """The address of HTTP is the user's; it is the option's help that names 0.0.0.0."""
    guilty = []
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in ("PUB", "XPUB", "PULL", "REP"):
                guilty.append((path.name, node.attr))
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                wild = node.value.strip() in ("0.0.0.0", "::") or "tcp://*" in node.value
                guilty += [(path.name, node.value)] if wild else []
    assert guilty == []


@pytest.mark.parametrize("path", GENERATING)
@pytest.mark.parametrize("field", ["prompt_embeds", "prompt_embeddings", "mm_processor_kwargs", "lora_path"])
def test_5_tensors_and_files_of_a_client_are_not_taken(path: str, field: str) -> None:
    async def work() -> None:
        refused = await Server(max_model_len=4096).post(path, GENERATING[path] | {field: "gAN9cQAu"})
        assert refused.status_code == 400

    run(work)


# --- 7 and 8 ----------------------------------------------------------------------------------------------------------


@reads_source
def test_7_asserts_only_state_what_is_known() -> None:
    """Invariants in ``check`` methods, and what a type checker cannot see; no condition on what came from outside."""
    guilty = []
    for path, tree in trees():
        if path.parts[-2] in ("tools", "bench") or "kernels" in path.parts or "verify" in path.parts:
            continue
        checks = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "check"]
        allowed = {id(inner) for node in checks for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Assert) or id(node) in allowed:
                continue
            text = ast.unparse(node.test)
            if not (text.endswith(" is not None") or text.startswith("isinstance(")):
                guilty.append(f"{path.relative_to(ROOT)}:{node.lineno} {text}")
    assert guilty == []


@pytest.mark.parametrize(
    "text",
    [
        "[go(x=__import__('os').system('touch {file}'))]",
        "[go(x=open('{file}', 'w'))]",
        '<tool_call>{{"name": "go", "arguments": __import__("os").system("touch {file}")}}</tool_call>',
        "[go(x=(lambda: open('{file}', 'w'))())]",
    ],
)
@pytest.mark.parametrize("tool", sorted(TOOLS_OF_MODELS))
def test_8_what_a_model_writes_is_never_run(tool: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "ran"
    parser = Formats(tool=tool).parser("", {"go": {}}, forced_calls=False)
    assert parser is not None
    parser.feed(text.format(file=file))
    parser.finish()
    assert not file.exists()


@pytest.mark.parametrize("tool", sorted(TOOLS_OF_MODELS))
@pytest.mark.parametrize(
    "unit", ["<", "[", "<tool_call>", '{"name": "go", "arguments": {', "[TOOL_CALLS]go", " \n", "\\"]
)
def test_9_reading_what_a_model_writes_takes_time_in_proportion(tool: str, unit: str) -> None:
    times = []
    for count in (20, 80):
        parser = Formats(tool=tool, reasoning="think").parser("", {"go": {}}, forced_calls=False)
        assert parser is not None
        began = time.thread_time()
        for _ in range(count):
            parser.feed(unit * 500)
        parser.finish()
        times.append(time.thread_time() - began)
    assert times[1] < 8 * times[0] + 1.0  # four times as much, where a square would be sixteen times


@pytest.mark.parametrize("refused", [False, True])
def test_10_ten_thousand_schemas_stay_within_the_bytes_of_the_cache(refused: bool) -> None:
    kept = _Cache(1 << 20)
    grammar = Grammar(None, np.zeros(8, np.int32), 20_000, lambda text: [])
    for i in range(10_000):
        kept.put(GrammarSpec("json_schema", f'{{"const": {i}}}'), "No." if refused else grammar)
    assert kept.size <= 1 << 20
    assert 40 < len(kept) < 2_000


def test_9_a_hostile_field_name_costs_no_time() -> None:
    async def work() -> None:
        server = Server()
        for name in ("`" * 2_000_000, " - at `$" * 300_000, "a" * 5_000_000):
            began = time.process_time()
            refused = await server.post("/v1/completions", TEXT | {name: 1})
            assert refused.status_code == 400
            assert len(refused.content) < 2000
            assert time.process_time() - began < 10  # a tenth where nothing else runs; a hostile pattern takes hours

    run(work)


# --- 11: templates ----------------------------------------------------------------------------------------------------

BOMB = "{% if messages[0].content == 'boom' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
BOMB += "{% endfor %}{% endif %}ok"


def _boom(body: Any) -> Any:
    """``body`` with the content that sets the bomb off."""
    if isinstance(body, dict):
        return {key: "boom" if key in ("content", "input") else _boom(value) for key, value in body.items()}
    return [_boom(one) for one in body] if isinstance(body, list) else body


@pytest.mark.parametrize("path", RENDERING)
def test_11_a_template_that_runs_away_is_stopped_at_every_endpoint_while_others_are_served(path: str) -> None:
    async def work() -> None:
        server = Server(template=BOMB, max_model_len=4096)
        assert (await server.post(path, RENDERING[path])).status_code == 200
        bomb = asyncio.create_task(server.post(path, _boom(RENDERING[path])))
        await asyncio.sleep(0.01)
        assert (await server.post("/v1/completions", TEXT)).status_code == 200
        assert (await bomb).status_code == 400  # in time, where the template itself would take an hour

    run(work)


@pytest.mark.parametrize("path", RENDERING)
@pytest.mark.parametrize(
    "extra", [{"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}]
)
def test_11_a_template_of_a_client_is_taken_nowhere(path: str, extra: dict[str, Any]) -> None:
    async def work() -> None:
        body = RENDERING[path]
        sent = {"body": CHAT | extra} if path == "/render" else body | extra
        assert (await Server(max_model_len=4096).post(path, sent)).status_code == 400

    run(work)


# --- 12: no URL is fetched --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RENDERING)
def test_12_no_address_that_a_client_names_is_asked(path: str) -> None:
    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
            parts: list[Any] = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "input_image", "image_url": url},
                {"type": "image", "source": {"type": "url", "url": url}},
                {"type": "input_audio", "input_audio": {"url": url}},
                {"type": "file", "file": {"file_url": url}},
            ]
            for part in parts:
                turns: list[Any] = [{"role": "user", "content": [part]}]
                body: Any = {"input": turns} if path == "/v1/responses" else RENDERING[path] | {"messages": turns}
                body = {"body": {"messages": turns}} if path == "/render" else body
                refused = await Server(max_model_len=4096).post(path, body)
                assert refused.status_code == 400, part
            with pytest.raises(BlockingIOError):
                listener.accept()

    run(work)


@reads_source
def test_12_the_server_has_no_client_for_http() -> None:
    guilty = []
    for path, tree in trees():
        if not {"server", "frontend", "core", "sched", "runtime"} & set(path.parts):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                banned = ("urllib.request", "http.client", "httpx", "requests", "aiohttp", "huggingface_hub")
                guilty += [(path.name, name) for name in names if name.startswith(banned)]
    assert guilty == []


# --- 13: errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*RENDERING, "/v1/completions"])
def test_13_an_error_shows_nothing_of_the_inside_at_any_endpoint(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("secret at 0x7f00dead in /home/user/model")

    async def work() -> None:
        server = Server(max_model_len=4096)
        for inside in (server.llm.renderer, server.llm.inputs):
            for method in ("render", "encode", "encode_texts", "process_ids"):
                if hasattr(inside, method):
                    monkeypatch.setattr(inside, method, fail)
        response = await server.post(path, RENDERING.get(path, TEXT))
        assert response.status_code == 500
        assert "0x7f00dead" not in response.text
        assert "ValueError" not in response.text
        assert response.headers["x-request-id"] in response.text

    run(work)


# --- 14: bounds -------------------------------------------------------------------------------------------------------

HUGE: list[Any] = [10**30, -(10**30), 2**63, 1e300, -1e300, "x", [], {}, True]
NUMBERS = ("temperature", "top_p", "top_k", "min_p", "seed", "min_tokens", "presence_penalty", "frequency_penalty")
NUMBERS += ("repetition_penalty", "truncate_prompt_tokens", "priority")
OWN = {
    "/v1/completions": ("n", "max_tokens", "logprobs", "prompt_logprobs", "best_of"),
    "/v1/chat/completions": ("n", "max_tokens", "max_completion_tokens", "top_logprobs", "prompt_logprobs"),
    "/v1/responses": ("max_output_tokens", "top_logprobs"),
    "/v1/messages": ("max_tokens",),
}
LISTS: dict[str, Any] = {
    "logit_bias": {str(i): 1 for i in range(250)} | {str(10**9 + i): 1 for i in range(2000)},
    "bad_words": ["x" * 50] * 2000,
    "stop_token_ids": [10**12],
    "allowed_token_ids": [10**12],
    "cache_salt": "s" * 100_000,
    "structured_outputs": {"regex": "a" * 1_000_000},
}


@pytest.mark.parametrize("path", GENERATING)
def test_14_every_number_is_bounded_and_the_next_request_works(path: str) -> None:
    async def work() -> None:
        server = Server(max_model_len=4096)
        for field in (*NUMBERS, *OWN[path]):
            for value in HUGE:
                sent = len(server.fake.requests)
                body = GENERATING[path] | {field: value}
                response = await server.post(path, body)
                assert response.status_code in (200, 400), (field, value, response.text)
                assert len(server.fake.requests) - sent <= 1, (field, value)
                if isinstance(value, str | list | dict | bool):
                    assert response.status_code == 400, (field, value)
        for field, value in LISTS.items():
            response = await server.post(path, GENERATING[path] | {field: value})
            assert response.status_code == 400, (field, response.text[:200])
        assert (await server.post(path, GENERATING[path])).status_code == 200

    run(work)


@pytest.mark.parametrize("path", [*GENERATING, "/tokenize", "/detokenize", "/render", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("unit", ["[", '{"a":', '{"messages":[', '{"tools":[{"function":{"parameters":'])
def test_14_deep_nesting_is_refused(path: str, unit: str) -> None:
    async def work() -> None:
        server = Server()
        for text in (unit * 100_000, '{"messages":' + unit * 100_000, '{"body":' + unit * 100_000):
            response = await server.http.post(path, content=text.encode())
            assert response.status_code == 400
        closed = '{"messages": [{"role": "user", "content": ' + "[" * 900 + "]" * 900 + "}]}"
        assert (await server.http.post(path, content=closed.encode())).status_code == 400

    run(work)


def test_14_health_is_a_heartbeat_of_the_engines_loop(core: CoreProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is stopped has an open socket, and does not answer."""
    process = psutil.Process(core.process.pid)

    async def work() -> None:
        client = core_client.CoreClient(core, info())
        await client.health()
        process.suspend()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(core_client, "HEARTBEAT_SECONDS", 0.3)
                with pytest.raises(EngineDead):
                    await client.health()
        finally:
            process.resume()
        await client.health()

    run(work)


# --- a server on a socket ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server with a stub for its engine and the keys a and b."""
    folder = tmp_path_factory.mktemp("guarded")
    tiny.tokenizer(folder)
    tiny.write_json(folder / "config.json", tiny.config())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OCTAVO_API_KEY", "a,b")
        with running(["-c", STUB, str(folder)], folder / "log") as made:
            yield made


def test_15_what_one_key_has_cached_another_does_not_find(guarded: Any) -> None:
    def cached(key: str) -> int:
        body = {"prompt": list(range(1, 100)), "max_tokens": 1}
        headers = {"authorization": f"Bearer {key}"}
        usage = guarded.post("/v1/completions", body, headers=headers).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached("a") == 0
    assert cached("a") > 60
    assert cached("b") == 0
    assert cached("b") > 60


def test_14_a_client_that_stops_reading_holds_up_nobody(guarded: Any) -> None:
    headers = {"authorization": "Bearer a"}
    port = int(guarded.url.rpartition(":")[2])
    short = {"prompt": [5], "max_tokens": 2}
    long = b'{"prompt": [5, 6], "max_tokens": 2000, "n": 8, "stream": true, "logprobs": 20, "return_token_ids": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer a\r\ncontent-length: %d\r\n\r\n"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", port))
        slow.sendall(head % len(long) + long)
        for _ in range(5):
            answer = httpx.post(f"{guarded.url}/v1/completions", json=short, headers=headers, timeout=30)
            assert answer.status_code == 200  # long before the slow one is cut off, which is after a minute
    with httpx.Client(headers=headers, timeout=PATIENCE) as client:
        until(lambda: client.get(f"{guarded.url}/load").json()["kv_cache_usage"] == 0)


# --- all of it without asserts ----------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
@pytest.mark.skipif(OPTIMISED in os.environ, reason="this is that run")
def test_7_everything_holds_under_python_o() -> None:
    env = {**os.environ, OPTIMISED: "1"}
    command = [sys.executable, "-O", "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    quiet = ["-W", "ignore::pytest.PytestConfigWarning"]  # pytest rewrites the asserts of tests, which so hold
    done = subprocess.run([*command, *quiet], cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "5 skipped" in done.stdout


@pytest.mark.skipif(OPTIMISED not in os.environ, reason="only there")
def test_7_that_run_has_no_asserts() -> None:
    assert sys.flags.optimize == 1
    with pytest.raises(AssertionError):
        assert not sys.flags.optimize
