"""Cases on a peer of octavo, inside the peer's own environment; `bench/cpu.py` runs it. Prints a line of JSON for each.

    python bench/cpu_peers.py llama.cpp|vllm|transformers MODEL WORKLOAD CASES ROUNDS

bfloat16, greedy, the end-of-sequence token ignored. An engine answers `generate(prompts, max_tokens)` with the time of
the first token and how many tokens each prompt got.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int], tuple[float, list[int]]]
THREADS = len(os.sched_getaffinity(0))


def llama_cpp(model: str) -> Generate:
    """Through llama-cpp-python's batch calls: all requests decode together, as in llama-server's slots."""
    import llama_cpp as ll
    import numpy as np

    batch_size, sequences = 2048, 64
    ll.llama_backend_init()
    loading = ll.llama_model_default_params()
    loading.n_gpu_layers = 0
    loaded = ll.llama_model_load_from_file(model.encode(), loading)
    vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(loaded))
    settings = ll.llama_context_default_params()
    settings.n_batch, settings.n_ubatch = batch_size, 512
    settings.n_threads = settings.n_threads_batch = THREADS
    batch = ll.llama_batch_init(batch_size, 0, 1)
    contexts: dict[int, Any] = {}

    def context(count: int) -> Any:
        if count not in contexts:
            for other in contexts.values():
                ll.llama_free(other)
            contexts.clear()
            settings.n_seq_max, settings.n_ctx, settings.kv_unified = count, count * 512 if count > 1 else 4096, False
            contexts[count] = ll.llama_init_from_model(loaded, settings)
        return contexts[count]

    def decode(ctx: Any, items: list[tuple[int, int, int, bool]]) -> list[int]:
        """Of (token, position, sequence, wants a token): the tokens that are wanted."""
        out = []
        for first in range(0, len(items), batch_size):
            part = items[first : first + batch_size]
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wants) in enumerate(part):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wants
                batch.seq_id[i][0] = sequence
            if ll.llama_decode(ctx, batch):
                raise RuntimeError("llama_decode failed")
            for i, item in enumerate(part):
                if item[3]:
                    row = np.ctypeslib.as_array(ll.llama_get_logits_ith(ctx, i), shape=(vocab,))
                    out.append(int(row.argmax()))
        return out

    def generate(prompts: list[list[int]], max_tokens: int) -> tuple[float, list[int]]:
        if len(prompts) > sequences:
            raise RuntimeError(f"{len(prompts)} requests are more than {sequences} sequences")
        ctx = context(len(prompts))
        ll.llama_memory_clear(ll.llama_get_memory(ctx), True)
        tokens = decode(ctx, [(t, i, s, i == len(p) - 1) for s, p in enumerate(prompts) for i, t in enumerate(p)])
        first = time.perf_counter()
        for step in range(max_tokens - 1):
            tokens = decode(ctx, [(t, len(prompts[s]) + step, s, True) for s, t in enumerate(tokens)])
        return first, [max_tokens] * len(prompts)

    return generate


def vllm(model: str) -> Generate:
    """Through the engine's steps, which show when the first token is there."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{THREADS - 1}" if THREADS > 1 else "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that its time and memory are seen here
    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=4096,
        max_num_seqs=64,
        max_num_batched_tokens=4096,
    ).llm_engine
    made = [0]

    def generate(prompts: list[list[int]], max_tokens: int) -> tuple[float, list[int]]:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        for prompt in prompts:
            made[0] += 1
            engine.add_request(str(made[0]), {"prompt_token_ids": prompt}, params)
        counts, first = [], 0.0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if not first and output.outputs[0].token_ids:
                    first = time.perf_counter()
                if output.finished:
                    counts.append(len(output.outputs[0].token_ids))
        return first, counts

    return generate


def transformers(model: str) -> Generate:
    """generate() on one padded batch."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(THREADS)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    times: list[float] = []

    class Watch:
        def put(self, value: Any) -> None:
            times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def generate(prompts: list[list[int]], max_tokens: int) -> tuple[float, list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        times.clear()
        streamer = Watch() if len(prompts) == 1 else None
        with torch.inference_mode():
            out = loaded.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                streamer=streamer,
            )
        return times[1] if len(times) > 1 else time.perf_counter(), [out.shape[1] - longest] * len(prompts)

    return generate


def busy() -> tuple[float, float]:
    """CPU seconds of the machine, and of this process and its children that have ended."""
    with open("/proc/stat", encoding="ascii") as file:
        ticks = [int(word) for word in file.readline().split()[1:9]]
    own = os.times()
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), own.user + own.system


def measure(generate: Generate, case: dict[str, Any], rounds: int) -> dict[str, float]:
    """Medians of the timed rounds, after a warm-up."""
    count = case["max_tokens"]
    rows: list[dict[str, float]] = []
    for number, turn in enumerate(case["rounds"][: rounds + 1]):
        prompts, before, start = turn["prompts"], busy(), time.perf_counter()
        if number == 0:
            generate(prompts, min(count, 16))
            continue
        first, counts = generate(prompts, count)
        seconds, after = time.perf_counter() - start, busy()
        if counts != [count] * len(prompts):
            raise RuntimeError(f"answers have {sorted(set(counts))} tokens instead of {count}")
        row = {
            "output_tok_s": sum(counts) / seconds,
            "total_tok_s": (sum(counts) + sum(map(len, prompts))) / seconds,
            "others_cpu_percent": 100 * ((after[0] - before[0]) - (after[1] - before[1])) / seconds / THREADS,
        }
        if len(prompts) == 1:
            row |= {"ttft_ms": 1000 * (first - start)}
            row |= {"decode_tok_s": (count - 1) / (start + seconds - first)} if count > 1 else {}
        rows.append(row)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]} | {"peak_rss_mib": peak}


def main() -> None:
    name, model, workload, cases, rounds = sys.argv[1:]
    generate = {"llama.cpp": llama_cpp, "vllm": vllm, "transformers": transformers}[name](model)
    with open(workload, encoding="utf-8") as file:
        found = json.load(file)
    for case in cases.split(","):
        print(json.dumps(measure(generate, found[case], int(rounds))), flush=True)


if __name__ == "__main__":
    main()
