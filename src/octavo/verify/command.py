"""The command ``octavo verify``: loads a model in Transformers, then here, and says where they differ."""

from __future__ import annotations

import argparse
import gc
import sys
import unicodedata
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from octavo.config import EngineConfig
from octavo.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from octavo.config import ModelConfig
    from octavo.hub.files import ModelFiles
    from octavo.verify.compare import Comparison, Expected

MAX_PROMPT = 512  # tokens of a prompt that are used
SHOWN = 34  # columns of a prompt in the table

PROMPTS = (
    "The capital of France is",
    "Water boils at a lower temperature on a mountain, because",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n",
    '{"name": "Ada Lovelace", "born": 1815, "fields": ["mathematics", "computing"], "notes": "',
    "Il pleut depuis trois jours, et la rivière commence à",
    "昔々あるところに、おじいさんと",
    "Q: A train leaves at 14:05 and arrives at 16:50. How long does the journey take?\nA:",
    """\
Printing spread through Europe within a few decades. Before it, a book was copied by hand, which took weeks and cost as
much as a small house; a library of two hundred volumes was a treasure. After it, a press could print more pages in a
day than a scribe wrote in a year. Prices fell, errors spread as fast as corrections, and for the first time two people
far apart could point to the same page of the same edition. What followed from this was""",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this command beside the engine's, of which ``--dtype`` is float32 unless given."""
    group = parser.add_argument_group("verify", "Here --dtype is float32 unless it is given.")
    group.add_argument("--prompts", metavar="FILE", help="a text with one prompt a line (default: built-in ones)")
    group.add_argument("--max-tokens", type=int, default=32, metavar="N", help="tokens after each prompt (default: 32)")
    group.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(dtype="float32")


@dataclass(frozen=True)
class Report:
    """``differs_first`` names the first layer that differs, where one was looked for."""

    model: str
    implementation: str
    reference: str
    dtype: str
    device: str
    passed: bool
    prompts: list[dict[str, Any]]
    differs_first: str | None


def run(config: EngineConfig, *, prompts: str | None, max_tokens: int, json: bool) -> int:
    """Compares and prints; returns 0 if all prompts pass, 1 if one does not. Raises `OctavoError` if nothing can be."""
    if not 1 <= max_tokens <= 4096:
        raise ConfigError(f"--max-tokens is {max_tokens}.", "Give a number from 1 to 4096.")
    texts = list(PROMPTS) if prompts is None else _read(Path(prompts))
    report = verify(config, texts, max_tokens)
    if json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report)).decode() + "\n")
    else:
        print(describe(report))
    return 0 if report.passed else 1


def verify(config: EngineConfig, texts: Sequence[str], max_tokens: int) -> Report:
    """Runs ``texts`` in Transformers and here. At no time are two copies of the model loaded unless they differ."""
    import torch

    from octavo import platforms
    from octavo.hub.configs import model_config
    from octavo.hub.files import find_files
    from octavo.verify.compare import compare
    from octavo.verify.subject import Subject

    files = find_files(config.model, weights=True)
    hf, pooler = files.read_config()
    if pooler is not None:
        raise ConfigError("verify compares texts, and this model embeds.", "Add --runner generate.")
    shape = model_config(hf, generation=files.generation, traced=True)
    platform = platforms.select(config.device.device)
    tokenizer = files.load_tokenizer()
    ids = [tokenizer.encode(text)[:MAX_PROMPT] for text in texts]
    with _said(f"Transformers, float32: {len(ids)} prompts"):
        expected = _expect(files, shape, platform.device, ids, max_tokens)
    with _said("octavo: loading"):
        subject = Subject(config)
    dtype: torch.dtype = subject.dtype
    if dtype is not torch.float32:
        with _said(f"Transformers, {config.model.dtype}: {len(ids)} prompts"):
            expected = _with_rounding(files, shape, dtype, platform.device, expected)
    with _said(f"octavo: {len(ids)} prompts"):
        answers = subject.greedy(ids, max_tokens)
        found = [compare(e, a, subject.logits(e.text)) for e, a in zip(expected, answers, strict=True)]
    failed = next((e for e, f in zip(expected, found, strict=True) if not f.passed), None)
    where = None
    if failed is not None:
        with _said("looking for the first layer that differs"):
            where = _locate(files, shape, platform.device, subject, failed)
    subject.close()
    return Report(
        model=config.model.model,
        implementation=type(subject.model).__name__,
        reference=shape.architecture,
        dtype=str(dtype).removeprefix("torch."),
        device=str(platform.device),
        passed=failed is None,
        prompts=[_entry(text, one) for text, one in zip(texts, found, strict=True)],
        differs_first=where,
    )


def describe(report: Report) -> str:
    """A table and a verdict, for people."""
    head = (
        f"{report.model}: {report.implementation} in {report.dtype} on {report.device}"
        f" against Transformers' {report.reference}, eager, float32"
    )
    lines = [head, "", f"{'prompt':{SHOWN}} {'tokens':>6}  {'text':22} {'error':>9} {'allowed':>9}"]
    for one in report.prompts:
        text = one["verdict"] if one["differs_at"] is None else f"{one['verdict']} at token {one['differs_at']}"
        mark = "" if one["passed"] else "  <-"
        start = fitted(one["prompt"].replace("\n", " "), SHOWN)
        lines.append(f"{start} {one['tokens']:>6}  {text:22} {one['error']:9.2e} {one['allowed']:9.2e}{mark}")
    passed = sum(one["passed"] for one in report.prompts)
    lines += ["", f"{passed} of {len(report.prompts)} prompts pass."]
    if report.differs_first is not None:
        lines.append(f"The first part that differs: {report.differs_first}.")
    return "\n".join(lines)


def fitted(text: str, width: int) -> str:
    """``text`` on ``width`` columns of a terminal, cut off or filled with spaces; wide characters take two."""
    sizes = [0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in text]
    if sum(sizes) > width:
        kept = bisect(list(accumulate(sizes)), width - 1)
        text, sizes = text[:kept] + "…", [*sizes[:kept], 1]
    return text + " " * (width - sum(sizes))


def _expect(
    files: ModelFiles, shape: ModelConfig, device: torch.device, prompts: list[list[int]], count: int
) -> list[Expected]:
    import torch

    from octavo.verify.compare import Expected
    from octavo.verify.reference import Reference

    oracle = Reference(files, shape, torch.float32, device)
    answers = [oracle.greedy(prompt, count) for prompt in prompts]
    expected = [Expected(p, a, oracle.logits(p + a)) for p, a in zip(prompts, answers, strict=True)]
    del oracle
    gc.collect()  # modules refer to each other
    return expected


def _with_rounding(
    files: ModelFiles, shape: ModelConfig, dtype: torch.dtype, device: torch.device, expected: list[Expected]
) -> list[Expected]:
    from octavo.verify.compare import Expected
    from octavo.verify.reference import Reference

    rounding = Reference(files, shape, dtype, device)
    return [Expected(one.prompt, one.tokens, one.exact, rounding.logits(one.text)) for one in expected]


def _locate(files: ModelFiles, shape: ModelConfig, device: torch.device, subject: Any, failed: Expected) -> str:
    from octavo.verify.compare import EXACT
    from octavo.verify.layers import first_difference
    from octavo.verify.reference import Reference

    oracle = Reference(files, shape, subject.dtype, device)
    tolerance = EXACT if failed.rounded is None else ROUNDED_LAYER
    theirs, ours = (oracle.model, oracle.logits), (subject.model, subject.logits)
    layers = oracle.model.config.get_text_config().num_hidden_layers
    return first_difference(theirs, ours, failed.text, layers, tolerance)


ROUNDED_LAYER = 0.05  # of the largest logit: more than 16 bits lose in a few layers


def _entry(text: str, one: Comparison) -> dict[str, Any]:
    return {"prompt": text, **asdict(one), "passed": one.passed}


def _read(path: Path) -> list[str]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts: {path} cannot be read: {error}.", "Give a text file in UTF-8.") from None
    if not lines:
        raise ConfigError(f"--prompts: {path} has no line with text.", "Give one prompt a line.")
    return lines


@contextmanager
def _said(what: str) -> Iterator[None]:
    """Tells on standard error what goes on, if somebody watches it."""
    watched = sys.stderr.isatty()
    if watched:
        print(f"\r\x1b[K{what} …", end="", file=sys.stderr, flush=True)
    yield
    if watched:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
