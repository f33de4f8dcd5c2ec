"""Stand-ins for tests of the frontend: two tokenizers of the usual kinds, and an engine that says what it is told."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as LibTokenizer

from octavo.errors import EngineDead
from octavo.frontend.client import EngineState
from octavo.frontend.inputs import InputProcessor, Prepared
from octavo.sampling_params import SamplingParams
from octavo.types import EngineInfo, Request, Stats, TokenOutput

SPECIAL = ("<s>", "</s>", "<|end|>")


class FakeTokenizer:
    """The `hub.tokenizer.Tokenizer` protocol over the tokenizers library."""

    def __init__(self, lib: LibTokenizer, *, bos: bool = False, chat_template: str | None = None) -> None:
        self.lib = lib
        self.special_ids = frozenset(i for t in SPECIAL if (i := lib.token_to_id(t)) is not None)
        self.vocab_size = lib.get_vocab_size(with_added_tokens=True)
        self.bos_id = lib.token_to_id("<s>")
        self.eos_id = lib.token_to_id("</s>")
        self.chat_template = chat_template
        self.chat_templates = {} if chat_template is None else {"default": chat_template}
        self.special_tokens = {"bos_token": "<s>", "eos_token": "</s>"}
        self._bos = bos
        self.decoded = 0  # ids passed to decode, in all

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = self.lib.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if self._bos and add_special_tokens else list(ids)

    def encode_all(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        return [self.encode(text, add_special_tokens=add_special_tokens) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.decoded += len(ids)
        return str(self.lib.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def id_to_token(self, token_id: int) -> str | None:
        return self.lib.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self.lib.token_to_id(token)

    def for_transformers(self) -> FakeTokenizer:
        return self


def byte_level(**options: Any) -> FakeTokenizer:
    """Byte-level BPE: 256 bytes, some merges that join parts of characters, special and added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: i for i, symbol in enumerate(alphabet)}
    merges = []

    def merge(left: str, right: str) -> str:
        merges.append((left, right))
        vocab.setdefault(left + right, len(vocab))
        return left + right

    he = merge("h", "e")
    merge(merge(he, "l"), merge("l", "o"))
    merge("Ġ", "w")
    merge("ð", "Ł")  # the first two bytes of most emoji
    lib = LibTokenizer(models.BPE(vocab=vocab, merges=merges))
    lib.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lib.decoder = decoders.ByteLevel()
    return _with_added(lib, options)


def sentencepiece(**options: Any) -> FakeTokenizer:
    """Llama 2's kind: metaspace, byte fallback, and a decoder that strips one space at the start."""
    vocab: dict[str, int] = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for piece in [f"<0x{b:02X}>" for b in range(256)] + [
        "▁",
        *"abcdehlorw.,",
        "lo",
        "he",
        "▁w",
        "▁he",
        "▁a",
        "ll",
        "é",
    ]:
        vocab[piece] = len(vocab)
    merges = [("l", "o"), ("h", "e"), ("▁", "w"), ("▁", "he"), ("▁", "a"), ("l", "l")]
    lib = LibTokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    lib.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    lib.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_added(lib, options)


def _with_added(lib: LibTokenizer, options: dict[str, Any]) -> FakeTokenizer:
    lib.add_special_tokens(list(SPECIAL))
    lib.add_tokens([AddedToken("<tool>", normalized=False)])
    return FakeTokenizer(lib, **options)


def info(**changes: Any) -> EngineInfo:
    """What a small engine says of itself."""
    facts: dict[str, Any] = {
        "max_model_len": 64,
        "num_pages": 100,
        "page_size": 4,
        "vocab_size": 300,
        "hash_key": b"k" * 32,
        "dtype": "float32",
        "device": "cpu",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_logprobs": 20,
        "prefix_caching": True,
    }
    return EngineInfo(**(facts | changes))


def prompt_of(request: Request) -> list[int]:
    """The ids of a request's prompt."""
    return array("i", request.token_ids).tolist()


def prepared(inputs: InputProcessor, prompt: Any, params: SamplingParams | None = None, **options: Any) -> Prepared:
    """The request "r" for ``prompt``."""
    ((text, ids),) = inputs.encode_prompts([prompt])
    return inputs.process_ids("r", ids, params, text=text, **options)


Script = Callable[[Request], list[TokenOutput]]


class FakeClient:
    """An `EngineClient` that answers each request with the outputs its script makes, one per turn of the loop.

    A script's list without a terminal output leaves the request hanging until it is aborted.
    """

    def __init__(self, script: Script, engine_info: EngineInfo | None = None) -> None:
        self.info = engine_info or info()
        self.stats = Stats()
        self.requests: list[Request] = []
        self.aborted: list[str] = []
        self.closed = False
        self.dead: EngineDead | None = None
        self.script = script
        self._ends: dict[str, asyncio.Event] = {}

    def engines(self) -> list[EngineState]:
        return [EngineState(self.dead is None, self.stats)]

    async def submit(self, request: Request) -> AsyncGenerator[list[TokenOutput], None]:
        if self.dead is not None:
            raise self.dead
        self.requests.append(request)
        self._ends[request.id] = asyncio.Event()
        return self._answer(request)

    async def _answer(self, request: Request) -> AsyncGenerator[list[TokenOutput], None]:
        end = self._ends[request.id]
        for output in self.script(request):
            await asyncio.sleep(0)
            if self.dead is not None:
                raise self.dead
            if end.is_set():
                break
            yield [output]
            if output.finish_reason is not None:
                return
        await end.wait()
        yield [TokenOutput(id=request.id, finish_reason="abort")]

    async def abort(self, ids: Sequence[str]) -> None:
        self.aborted += ids
        for one in ids:
            if one in self._ends:
                self._ends[one].set()

    async def health(self) -> Stats:
        if self.dead is not None:
            raise self.dead
        return Stats(running=len(self.requests))

    async def reset_prefix_cache(self) -> None:
        pass

    async def close(self) -> None:
        self.closed = True
