from __future__ import annotations

import pytest

from octavo.types import Stats
from tests.frontend.fakes import info
from tests.server.fake import CHAT, TEXT, Server, run


def test_tokenize_and_detokenize_are_inverse() -> None:
    async def work() -> None:
        server = Server()
        body = (await server.post("/tokenize", {"prompt": "hello wörld", "return_token_strs": True})).json()
        assert body["tokens"] == server.tokenizer.encode("hello wörld")
        assert (body["count"], body["max_model_len"]) == (len(body["tokens"]), 128)
        assert len(body["token_strs"]) == body["count"]
        assert (await server.post("/detokenize", {"tokens": body["tokens"]})).json() == {"prompt": "hello wörld"}
        chat = (await server.post("/tokenize", {"messages": CHAT["messages"]})).json()
        assert server.tokenizer.decode(chat["tokens"]) == "[user]hi[bot]"

    run(work)


def test_models_version_and_reset() -> None:
    async def work() -> None:
        server = Server()
        card, alias = (await server.http.get("/v1/models")).json()["data"]
        assert alias == card | {"id": "alias"}
        assert (await server.http.get("/v1/models/alias")).json() == alias
        assert (card["id"], card["object"], card["max_model_len"]) == ("m", "model", 128)
        assert (await server.http.get("/version")).json()["version"]
        assert (await server.post("/reset_prefix_cache", None)).json() == {"success": True}

    run(work)


def test_metrics_tell_the_share_of_the_floor_where_it_is_known() -> None:
    async def work() -> None:
        server = Server()
        assert "floor_share" not in (await server.http.get("/metrics")).text
        server.fake.info = info(weight_bytes=1000, kv_bytes=10, bandwidth=6000.0)
        assert 'octavo:floor_share{engine="0",model_name="m"} 0.0' in (await server.http.get("/metrics")).text
        server.fake.stats = Stats(steps=5, slots_filled=100, busy_seconds=2.0)
        text = (await server.http.get("/metrics")).text
        assert 'octavo:floor_share{engine="0",model_name="m"} 0.5' in text
        assert 'octavo:bytes_read_total{engine="0",model_name="m"} 6000.0' in text

    run(work)


def test_metrics_use_the_names_that_dashboards_know() -> None:
    async def work() -> None:
        server = Server()
        await server.post("/v1/completions", TEXT | {"n": 2})
        text = (await server.http.get("/metrics")).text
        samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        label, of_engine = '{model_name="m"}', '{engine="0",model_name="m"}'
        for name in (
            "num_requests_running",
            "num_requests_waiting",
            "kv_cache_usage_perc",
            "prompt_tokens_total",
            "generation_tokens_total",
            "prefix_cache_hits_total",
            "spec_decode_num_draft_tokens_total",
            "spec_decode_num_accepted_tokens_total",
        ):
            assert f"vllm:{name}{of_engine}" in samples
        for name in (
            "time_to_first_token_seconds",
            "e2e_request_latency_seconds",
            "request_queue_time_seconds",
            "request_prefill_time_seconds",
            "request_decode_time_seconds",
            "request_inference_time_seconds",
        ):
            assert samples[f"vllm:{name}_count{label}"] == "1.0"
        names = ("e2e_request_latency", "request_queue_time", "request_prefill_time", "request_decode_time")
        whole, *parts = [float(samples[f"vllm:{name}_seconds_sum{label}"]) for name in names]
        assert sum(parts) == pytest.approx(whole)
        assert min(parts[0], parts[2]) > 0
        assert samples[f"vllm:request_params_n_sum{label}"] == "2.0"
        assert samples[f"vllm:request_params_max_tokens_sum{label}"] == "5.0"
        assert samples['vllm:request_success_total{finished_reason="length",model_name="m"}'] == "2.0"
        assert samples[f"vllm:request_generation_tokens_sum{label}"] == "10.0"

    run(work)
