"""What choosing an engine costs, in processor time of a request, and what it brings: ``python bench/router.py``.

`frontend.routing.Router` alone, over prompts of conversations that share a beginning; then a short request as a whole,
through `Balancer` and through `CoreClient`, over stub engines that compute nothing; then the share of prompt tokens
that the caches of several engines have, with this choice and with engines taken in turn.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import secrets
import statistics
import time
from array import array

from octavo.cache.prefix import KEY_BYTES, page_hashes
from octavo.config import EngineConfig
from octavo.frontend.balancer import Balancer, open_engines
from octavo.frontend.fleet import Processes
from octavo.frontend.routing import Router
from octavo.types import Request, Sampling

ROUNDS = 5


def pick(engines: int, pages: int, *, count: int = 5000) -> float:
    """Seconds for one choice among ``engines``, of a prompt with ``pages`` pages of which the last are new."""
    rng, router = random.Random(0), Router(32, 16)
    shared = secrets.token_bytes(KEY_BYTES * (pages // 2))
    prompts = [shared + secrets.token_bytes(KEY_BYTES * (pages - pages // 2)) for _ in range(count)]
    loads = [float(rng.randrange(32)) for _ in range(engines)]
    began = time.process_time()
    for prompt in prompts:
        router.pick(prompt, loads)
    return (time.process_time() - began) / count


async def request(engines: int, *, count: int = 2000) -> float:
    """Seconds of this process for one request of one token."""
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 4096}
    config = EngineConfig.of(model="stub", device="cpu", data_parallel_size=engines, **limits)
    source = Processes(config, "stub", log_level="error", hash_key=b"k" * 32)
    client = await open_engines(source, engines)
    tokens = array("i", range(100)).tobytes()
    hashes = page_hashes(client.info.hash_key, b"", tokens, client.info.page_size)

    async def one(id: str) -> None:
        sampling = Sampling(max_tokens=1)
        async for _ in await client.submit(Request(id=id, token_ids=tokens, page_hashes=hashes, sampling=sampling)):
            pass

    async def several(first: int) -> None:
        for i in range(first, count, 32):
            await one(str(i))

    began = time.process_time()
    await asyncio.gather(*(several(i) for i in range(32)))
    spent = time.process_time() - began
    await client.close()
    return spent / count


async def hits(engines: int, *, in_turn: bool) -> tuple[float, list[int]]:
    """Share of prompt tokens found in caches, and output tokens of each engine.

    Twelve conversations an engine, of six turns each, that begin with the same 256 tokens; 8 requests an engine at
    once.
    """
    limits = {"max_num_seqs": 64, "max_num_batched_tokens": 2048}
    config = EngineConfig.of(model="stub", device="cpu", data_parallel_size=engines, **limits)
    client = await Balancer(Processes(config, "stub", log_level="error", hash_key=b"k" * 32), engines).start()
    if in_turn:
        turn = itertools.cycle(range(engines))
        client._router.pick = lambda page_hashes, loads: next(turn)  # type: ignore[method-assign]
    rng, ids, gate = random.Random(0), itertools.count(), asyncio.Semaphore(8 * engines)
    shared = [rng.randrange(200) for _ in range(256)]

    async def conversation() -> None:
        history = list(shared)
        for _ in range(6):
            history += [rng.randrange(200) for _ in range(40)]
            tokens = array("i", history).tobytes()
            hashes = page_hashes(client.info.hash_key, b"", tokens, client.info.page_size)
            sampling = Sampling(max_tokens=60)
            one = Request(id=str(next(ids)), token_ids=tokens, page_hashes=hashes, sampling=sampling)
            async with gate:
                async for batch in await client.submit(one):
                    history += [token for output in batch for token in output.token_ids]
            await asyncio.sleep(rng.random() * 0.2)

    await asyncio.gather(*(conversation() for _ in range(12 * engines)))
    stats = await client.health()
    each = [engine.stats.generation_tokens for engine in client.engines()]
    await client.close()
    return stats.cached_tokens / stats.prompt_tokens, each


def main() -> None:
    for engines, pages in ((2, 8), (8, 64), (100, 64), (800, 64), (100, 8192)):
        best = statistics.median(pick(engines, pages, count=200 if pages > 1000 else 5000) for _ in range(ROUNDS))
        print(f"choice among {engines:3} engines, {pages:4} pages: {best * 1e6:6.1f} us")
    for engines in (1, 2, 1, 2):
        best = statistics.median(asyncio.run(request(engines)) for _ in range(ROUNDS))
        print(f"request of one token over {engines} engines: {best * 1e6:6.1f} us")
    for engines, in_turn in itertools.product((2, 4), (False, True)):
        share, each = asyncio.run(hits(engines, in_turn=in_turn))
        way = "in turn" if in_turn else "by prefix"
        print(f"{engines} engines {way}: {share:.1%} of prompt tokens cached; output tokens {each}")


if __name__ == "__main__":
    main()
