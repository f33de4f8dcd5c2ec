"""Grammars in the engine core, over the stub worker: its tokens are bytes, and masks change them."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from octavo.config import EngineConfig
from octavo.core import compiler, grammar, trial
from octavo.core.engine import EngineCore
from octavo.core.grammar import Constraint
from octavo.core.vocabulary import Vocabulary
from octavo.errors import ModelError, OctavoError
from octavo.runtime.stub import VOCAB, StubWorker
from octavo.structured import GrammarSpec, Guide, StructuredOutputsParams
from octavo.types import Request, TokenOutput
from tests.core import stub_engine
from tests.core.stub_engine import collect, expected, run
from tests.frontend.fakes import byte_level
from tests.waiting import PATIENCE

TOKENIZER = byte_level()  # ids below 256 are bytes, in the order of GPT-2's alphabet
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["a", "bb"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


def load() -> Vocabulary:
    return Vocabulary.of(TOKENIZER, VOCAB, ())


@pytest.fixture(autouse=True)
def _time_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "COMPILE_SECONDS", PATIENCE)


@pytest.fixture(params=[False, True], ids=["in turn", "overlap"])
def core(request: pytest.FixtureRequest) -> Iterator[EngineCore]:
    made = make(overlap=request.param)
    yield made
    made.close()


def make(*, overlap: bool = False, pages: int = 64, **options: Any) -> EngineCore:
    flat = {"model": "stub", "max_num_seqs": 4, "max_num_batched_tokens": 32, **options}
    return EngineCore(EngineConfig.of(**flat), StubWorker(pages, 256), overlap=overlap, vocabulary=load)


def make_request(
    core: EngineCore, id: str, tokens: list[int], *, grammar: GrammarSpec | None = None, **sampling: Any
) -> Request:
    guide = None if grammar is None else Guide(whole=grammar)
    return stub_engine.make_request(core, id, tokens, **{"guide": guide, **sampling})


def spec(**given: Any) -> GrammarSpec:
    return StructuredOutputsParams(**given).spec()


def text_of(tokens: list[int]) -> str:
    return str(TOKENIZER.decode(tokens))


def ask(core: EngineCore, requests: dict[str, GrammarSpec | None], **sampling: Any) -> dict[str, str]:
    """Texts by id; asserts that each request ended with "stop" or, without a grammar, by its length."""
    for number, (id, wanted) in enumerate(requests.items()):
        refusal = core.add(
            make_request(core, id, [number + 1] * 5, **{"max_tokens": 120, "grammar": wanted, **sampling})
        )
        assert refusal is None, refusal
    outputs = run(core)
    ends = {output.id: output for output in outputs if output.finish_reason is not None}
    for id, wanted in requests.items():
        assert ends[id].finish_reason == ("length" if wanted is None else "stop"), ends[id]
    assert core.stats().pages_used == 0
    return {id: text_of(tokens) for id, tokens in collect(outputs).items()}


def refusal_of(core: EngineCore, wanted: GrammarSpec) -> TokenOutput:
    """The terminal message of a request whose grammar is refused."""
    found = core.add(make_request(core, "refused", [1, 2, 3], grammar=wanted))
    outputs = [found] if found is not None else run(core)
    assert [(o.finish_reason, o.status) for o in outputs] == [("error", 400)], outputs
    return outputs[0]


def test_every_kind_of_grammar_holds(core: EngineCore) -> None:
    texts = ask(
        core,
        {
            "json": spec(json=SCHEMA, whitespace_pattern=" ?"),
            "compact": spec(json=SCHEMA, disable_any_whitespace=True),
            "regex": spec(regex=r"[a-c]{3,5}-\d{2}x"),
            "choice": spec(choice=["yes", 'no "way"', "é €\n"]),
            "lark": spec(grammar='start: "<" B+ ">"\nB: /b{2}/'),
            "gbnf": spec(grammar='root ::= "x" [0-9]{1,4} ("b" | "c")'),
            "none": None,
        },
    )
    for name in ("json", "compact"):
        value = json.loads(texts[name])
        assert list(value) == ["name", "age", "kind", "tags"]
        assert len(value["name"]) <= 6 and 0 <= value["age"] <= 99
        assert value["kind"] in ("a", "bb") and len(value["tags"]) <= 3
    assert not re.search(r'\s(?=(?:[^"]*"[^"]*")*[^"]*$)', texts["compact"])
    assert re.fullmatch(r"[a-c]{3,5}-\d{2}x", texts["regex"])
    assert texts["choice"] in ("yes", 'no "way"', "é €\n")
    assert re.fullmatch(r"<(bb)+>", texts["lark"])
    assert re.fullmatch(r"x\d{1,4}[bc]", texts["gbnf"])
    assert texts["none"] == text_of(expected([7] * 5, 120))


def test_a_text_does_not_depend_on_overlap_or_on_the_batch() -> None:
    kinds = (spec(json=SCHEMA, disable_any_whitespace=True), spec(regex="(ab|cd){4}"))
    wanted = {f"r{i}": kinds[i % 2] for i in range(8)}
    answers = []
    for overlap in (False, True):
        core = make(overlap=overlap)
        answers.append(ask(core, wanted))
        core.close()
    core = make(max_num_seqs=1)
    assert answers[0] == answers[1] == ask(core, wanted)
    core.close()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_preempted_request_goes_on_inside_its_grammar(overlap: bool) -> None:
    wanted = {f"r{i}": spec(regex=r"(abc|de){40}f") for i in range(4)}
    calm = make(overlap=overlap, max_num_seqs=4)
    tight = make(overlap=overlap, pages=17, max_num_seqs=4)
    texts = ask(tight, wanted, max_tokens=200)
    assert tight.stats().preemptions > 0
    assert texts == ask(calm, wanted, max_tokens=200)
    for core in (calm, tight):
        core.close()


def test_the_last_token_of_a_text_is_part_of_it_and_the_end_comes_apart(core: EngineCore) -> None:
    core.add(make_request(core, "a", [1], grammar=spec(choice=["ab"])))
    outputs = run(core)
    assert text_of([token for output in outputs for token in output.token_ids]) == "ab"
    assert (outputs[-1].token_ids, outputs[-1].finish_reason) == ([], "stop")


def test_a_text_that_is_complete_at_the_limit_ended_by_itself(core: EngineCore) -> None:
    assert ask(core, {"a": spec(choice=["ab"])}, max_tokens=2) == {"a": "ab"}


def test_the_limit_cuts_a_text_that_is_not_complete(core: EngineCore) -> None:
    core.add(make_request(core, "a", [1], max_tokens=2, grammar=spec(choice=["abc"])))
    outputs = run(core)
    assert outputs[-1].finish_reason == "length"
    assert not core._grammars.live


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (GrammarSpec("json_schema", '{"type": "object", "uniqueItems": true}'), "uniqueItems"),
        (GrammarSpec("json_schema", '{"type": "nothing"}'), "Invalid type"),
        (GrammarSpec("json_schema", "false"), "Unsatisfiable"),
        (GrammarSpec("json_schema", '{"$ref": "http://127.0.0.1:1/x"}'), "does not fetch"),
        (GrammarSpec("regex", "("), "unclosed group"),
        (GrammarSpec("regex", "(?=a)b"), "look-a"),
        (GrammarSpec("lark", "start: undefined"), "undefined"),
        (GrammarSpec("gbnf", 'root ::= ("a"'), "no GBNF"),
        (GrammarSpec("gbnf", "root ::= missing"), "GBNF"),
        (GrammarSpec("gbnf", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000), "recursion"),
    ],
)
def test_a_bad_grammar_is_refused_with_its_reason_and_the_next_request_works(wanted: GrammarSpec, words: str) -> None:
    core = make()
    first, again = refusal_of(core, wanted), refusal_of(core, wanted)
    assert words.lower() in first.error.lower()
    assert "<state>" not in first.error
    assert again.error == first.error
    assert ask(core, {"next": spec(choice=["ok"])}) == {"next": "ok"}
    core.close()


def test_a_tokenizer_that_cannot_be_loaded_refuses_grammars_and_nothing_else() -> None:
    def fail() -> Vocabulary:
        raise ModelError("there is no tokenizer.", "Bring one.")

    config = EngineConfig.of(model="stub", max_num_seqs=4, max_num_batched_tokens=32)
    core = EngineCore(config, StubWorker(64, 256), overlap=False, vocabulary=fail)
    assert "no tokenizer" in refusal_of(core, spec(choice=["ok"])).error
    ask(core, {"plain": None})
    core.close()


def test_what_kept_a_grammar_from_being_compiled_once_does_not_refuse_it_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: trial.Trial, spec: GrammarSpec) -> str:
        raise OctavoError("The process for it did not start.")

    core = make()
    with monkeypatch.context() as patch:
        patch.setattr(trial.Trial, "refusal", fail)
        assert "did not start" in refusal_of(core, spec(choice=["ok"])).error
    assert ask(core, {"again": spec(choice=["ok"])}) == {"again": "ok"}
    core.close()


def test_where_no_thread_can_start_grammars_are_refused_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    core = make()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        assert "can't start" in refusal_of(core, spec(choice=["ok"])).error
        ask(core, {"plain": None})
    assert ask(core, {"later": spec(choice=["ok"])}) == {"later": "ok"}
    core.close()


# Chains of references that overflow an ordinary stack: 8 MiB hold about a thousand levels.
DEPTH = 3000
CHAINS = {
    "lark rules": GrammarSpec(
        "lark", "start: r0\n" + "".join(f'r{i}: "x" r{i + 1}\n' for i in range(DEPTH)) + f'r{DEPTH}: "y"\n'
    ),
    "lark terminals": GrammarSpec(
        "lark", "start: R0\n" + "".join(f'R{i}: "x" R{i + 1}\n' for i in range(DEPTH)) + f'R{DEPTH}: "y"\n'
    ),
    "json references": GrammarSpec(
        "json_schema",
        json.dumps(
            {
                "$defs": {
                    **{f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(DEPTH)},
                    f"d{DEPTH}": {},
                },
                "$ref": "#/$defs/d0",
            }
        ),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_long_chain_of_references_does_not_overflow_the_stack(name: str) -> None:
    core = make()
    core.add(make_request(core, "deep", [1], max_tokens=5, grammar=CHAINS[name]))
    assert collect(run(core)).keys() == {"deep"}
    assert ask(core, {"next": spec(choice=["ok"])}) == {"next": "ok"}
    core.close()


@pytest.mark.parametrize("bomb", ["(a{400}){400}", "x" * 100_000, "(a|aa){5000}"])
def test_a_costly_grammar_does_not_block_other_requests(
    core: EngineCore, bomb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core.add(make_request(core, "warm", [3], max_tokens=2, grammar=spec(choice=["ok"])))
    run(core)
    phases = [_Phase(trial.Trial, "refusal", monkeypatch), _Phase(compiler.Compiler, "_compile", monkeypatch)]
    core.add(make_request(core, "bomb", [1], max_tokens=3, grammar=spec(regex=bomb)))
    ended = ["plain"]
    while "bomb" not in ended:
        if "plain" in ended:
            core.add(make_request(core, "plain", [2], max_tokens=100))
        ended = [output.id for output in core.step() if output.finish_reason is not None]
        for phase in phases:
            phase.steps += phase.on
    assert sum(phase.steps for phase in phases) >= 20
    for phase in phases:
        assert phase.steps >= 20 or phase.seconds < 0.5, vars(phase)  # thousands where nothing else runs
    run(core)


class _Phase:
    """A method of the thread that compiles: whether it is at work, for how long it was, and steps meanwhile."""

    def __init__(self, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.on, self.steps, self.seconds = False, 0, 0.0
        method = getattr(owner, name)

        def timed(*given: Any) -> Any:
            self.on, began = True, time.monotonic()
            try:
                return method(*given)
            finally:
                self.on, self.seconds = False, time.monotonic() - began

        monkeypatch.setattr(owner, name, timed)


def test_a_slow_mask_puts_its_request_aside_and_changes_no_text(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"a": spec(regex="[xy]{8}z"), "slow": spec(regex="[ab]{5}c"), "plain": None}
    calm = ask(core, wanted)
    fill, defer, slow, put_aside = Constraint.fill, core.scheduler.defer, [], threading.Semaphore(0)

    def late(self: Constraint) -> None:
        """Not ready before its request was put aside for it."""
        if self.stale and self._grammar is core._grammars._cache.get(wanted["slow"]):
            slow.append(threading.current_thread().name)
            put_aside.acquire(timeout=PATIENCE)
        fill(self)

    def counted(item: int) -> None:
        defer(item)
        put_aside.release()

    monkeypatch.setattr(Constraint, "fill", late)
    monkeypatch.setattr(core.scheduler, "defer", counted)
    assert ask(core, wanted) == calm
    assert core.stats().preemptions >= 4
    assert [name.startswith("octavo-mask-slow") for name in slow] == [False, True, True, True, True]


def test_a_mask_that_comes_just_after_it_was_due_is_not_taken_for_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between sampling and setting its request aside the mask gets ready; the token was sampled without it."""
    wanted = {"a": spec(regex="[xy]{30}z"), "plain": None}
    calm = make()
    texts = ask(calm, wanted)
    calm.close()
    core = make()
    monkeypatch.setattr("octavo.core.grammar.GRACE_SECONDS", 0.0)
    put_aside = EngineCore._put_aside

    def later(self: EngineCore, *given: Any) -> Any:
        time.sleep(0.005)
        return put_aside(self, *given)

    monkeypatch.setattr(EngineCore, "_put_aside", later)
    assert ask(core, wanted) == texts
    assert core.stats().preemptions > 0
    core.close()


def test_abort_while_a_grammar_compiles_answers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make()
    go = threading.Event()
    compile = compiler.Compiler.compile

    def wait(self: compiler.Compiler, spec: GrammarSpec) -> Any:
        go.wait(PATIENCE)
        return compile(self, spec)

    monkeypatch.setattr(compiler.Compiler, "compile", wait)
    core.add(make_request(core, "a", [1], grammar=spec(choice=["ok"])))
    core.add(make_request(core, "b", [1], grammar=spec(choice=["ok"])))
    assert core.has_work() and core.stats().waiting == 2
    assert core.step() == []
    twice = core.add(make_request(core, "a", [1]))
    assert twice is not None and twice.status == 400
    assert [(o.id, o.finish_reason) for o in core.abort(["a", "a"])] == [("a", "abort")]
    go.set()
    assert collect(run(core)).keys() == {"b"}
    assert not core._grammars.live
    core.close()


def test_requests_that_compile_count_as_waiting() -> None:
    core = make(max_waiting=1)
    core.add(make_request(core, "a", [1], grammar=spec(choice=["ok"])))
    refusal = core.add(make_request(core, "b", [1]))
    assert refusal is not None and refusal.status == 503
    run(core)
    core.close()


def test_a_thousand_schemas_keep_the_cache_within_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "CACHE_BYTES", 4 << 20)
    core = make()
    for i in range(1000):
        core.add(make_request(core, str(i), [1], max_tokens=1, grammar=spec(json={"const": i})))
    ends = [output for output in run(core, check=False) if output.finish_reason is not None]
    assert len(ends) == 1000
    cache = core._grammars._cache
    assert 10 < len(cache) < 100 and cache.size <= 4 << 20
    assert not core._grammars.live and not core._grammars._building
    core.close()


def test_one_grammar_is_compiled_once_for_all_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    compile = compiler.Compiler.compile
    monkeypatch.setattr(compiler.Compiler, "compile", lambda self, spec: (seen.append(spec), compile(self, spec))[1])
    core = make()
    ask(core, {str(i): spec(choice=["ok"]) for i in range(6)})
    ask(core, {"later": spec(choice=["ok"])})
    assert len(seen) == 1
    core.close()
