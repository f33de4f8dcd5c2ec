"""What grammars cost: the same requests with and without one, in turn, in one process.

    python bench/mask.py MODEL [--requests 64] [--tokens 64] [--rounds 5] [--temperature 0]

Throughput is that of whole rounds; processor time (user and system, all threads) changes less with other load. Each
request is held to a list of objects that does not end before the last token. Grammars and prompts are known to the
engine's caches after the first round, which does not count.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import time

from msgspec.structs import replace

from octavo import LLM, SamplingParams, StructuredOutputsParams

SCHEMA = {
    "type": "array",
    "minItems": 100_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}},
            "kind": {"enum": ["cat", "dog", "fish"]},
        },
        "required": ["name", "age", "tags", "kind"],
        "additionalProperties": False,
    },
}


def round_of(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> tuple[float, float]:
    """(wall, processor time) of a token, in seconds."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    results = llm.generate(prompts, params, use_tqdm=False)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    tokens = sum(len(output.token_ids) for result in results for output in result.outputs)
    if tokens != len(prompts) * (params.max_tokens or 0):
        raise SystemExit(f"{tokens} tokens came: an answer ended early")
    spent = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return wall / tokens, spent / tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    args = parser.parse_args()
    llm = LLM(args.model, max_num_seqs=args.requests, max_model_len=args.tokens + 64, kv_cache_memory_bytes=700 << 20)
    draw = random.Random(1)
    prompts = [[draw.randrange(100, 20_000) for _ in range(32)] for _ in range(args.requests)]
    plain = SamplingParams(
        temperature=args.temperature, top_p=args.top_p, max_tokens=args.tokens, ignore_eos=True, seed=1
    )
    held = replace(plain, structured_outputs=StructuredOutputsParams(json=SCHEMA, whitespace_pattern=" ?"))
    rounds = [(round_of(llm, prompts, plain), round_of(llm, prompts, held)) for _ in range(args.rounds + 1)][1:]
    for free, masked in rounds:
        print(
            f"free {1 / free[0]:6.1f} tokens/s, {free[1] * 1e3:6.2f} ms of processor time a token; "
            f"held {1 / masked[0]:6.1f} tokens/s, {masked[1] * 1e3:6.2f} ms"
        )
    wall = statistics.median(masked[0] / free[0] for free, masked in rounds)
    cpu = statistics.median(masked[1] / free[1] for free, masked in rounds)
    print(f"median of the ratios: {(wall - 1) * 100:+.1f} % wall, {(cpu - 1) * 100:+.1f} % processor time")


if __name__ == "__main__":
    main()
