"""Tokens a second with and without drafts (``speculative_config``), in turn in one process, and how many drafts held.

    python bench/speculation.py [MODEL] --streams 1,8,64 --config '{"method": "ngram", "num_speculative_tokens": 5, …}'

Tasks that repeat their prompt (copy, edit, JSON) are greedy; stories, which repeat nothing, are drawn at a temperature,
each stream with a seed of its own. Seconds of processor time stand beside those of the clock: on a machine that does
other work, too, they are what can be compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from octavo import LLM, SamplingParams  # noqa: E402
from octavo.config import default_model  # noqa: E402

DEFAULT = '{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2}'
STOCK = [("hammer", 12, 4), ("screwdriver", 7, 19), ("saw", 22, 3), ("drill", 89, 2), ("glue", 5, 31), ("tape", 4, 60)]
SUBJECTS = ("a lighthouse keeper", "two friends and a boat", "a robot that paints", "a winter in the mountains")


def tasks() -> dict[str, list[str]]:
    """Beginnings of texts by task; streams take them in turn."""
    code = (ROOT / "src" / "octavo" / "sched" / "queue.py").read_text()
    text = (ROOT / "docs" / "life-of-a-request.md").read_text()[800:2200]
    stock = "\n".join(f"{i}. {name}, {price} euros, {count} left" for i, (name, price, count) in enumerate(STOCK, 1))
    begun = '[\n  {"name": "hammer", "price": 12, "count": 4},\n'
    return {
        "copy": [f"A text:\n\n{text}\n\nThe same text once more, word for word:\n\n"],
        "edit": [f"```python\n{code}\n```\n\nThe same file, its class named WaitingQueue:\n\n```python\n"],
        "JSON": [f"The stock:\n{stock}\n\nThe stock as JSON:\n\n{begun}"],
        "story": [f"This is a long story about {subject}. Once" for subject in SUBJECTS],
    }


def run(llm: LLM, prompts: list[str], count: int, drawn: bool) -> tuple[int, float, float]:
    """(tokens, seconds, seconds of processor time) of all ``prompts`` together."""
    wishes = [
        SamplingParams(max_tokens=count, temperature=0.8 if drawn else 0.0, seed=seed) for seed in range(len(prompts))
    ]
    llm.reset_prefix_cache()
    begin, busy = time.perf_counter(), time.process_time()
    found = llm.generate(prompts, wishes, use_tqdm=False)
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    return sum(len(one.outputs[0].token_ids) for one in found), seconds, busy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=default_model())
    parser.add_argument("--streams", default="1,8,64")
    parser.add_argument("--tasks", default="copy,edit,JSON,story")
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--config", default=DEFAULT)
    args = parser.parse_args()
    options: dict[str, Any] = {"max_num_seqs": 64, "max_model_len": 2048}
    plain, drafting = LLM(args.model, **options), LLM(args.model, speculative_config=json.loads(args.config), **options)
    print("task, streams: tokens/s without -> with drafts (ratio; by processor time), drafts that held")
    for (name, prompts), streams in itertools.product(tasks().items(), map(int, args.streams.split(","))):
        if name not in args.tasks.split(","):
            continue
        asked = list(itertools.islice(itertools.cycle(prompts), streams))
        before = drafting._engine().stats()
        runs: dict[LLM, list[tuple[int, float, float]]] = {plain: [], drafting: []}
        for _ in range(args.repeats):
            for llm, made in runs.items():
                made.append(run(llm, asked, args.max_tokens, name == "story"))
        now = drafting._engine().stats()
        drafted, held = now.draft_tokens - before.draft_tokens, now.accepted_tokens - before.accepted_tokens
        (slow, busy), (fast, less) = (
            [max(one[0] / one[at] for one in made) for at in (1, 2)] for made in runs.values()
        )
        print(
            f"{name:>6} {streams:3}: {slow:6.1f} -> {fast:6.1f} ({fast / slow:.2f}; {less / busy:.2f}), "
            f"{held} of {drafted}",
            flush=True,
        )


if __name__ == "__main__":
    main()
