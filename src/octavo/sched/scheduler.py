"""Decides what a step computes. Pure Python over counters and pages; never sees a tensor or a text.

A step hands out at most ``max_tokens`` tokens: first one to every sequence that decodes, so that a long prompt cannot
stall a stream, then chunks to prompts under way, then to waiting requests, first come, first served within a priority,
and with speculation then to drafts, which take no page from anybody.
When pages run out, the latest arrival of the lowest priority is preempted: its pages are released (their content stays
findable until it is overwritten) and it is recomputed later. The same happens to it when a request of higher priority
finds no row or no pages. The first in line can always run: the pool holds at least
one longest sequence (the engine sees to that), and everybody else can be preempted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from octavo.cache.pages import Page, PagePool
from octavo.sched.drafts import Lookup, may_draft
from octavo.sched.item import Item
from octavo.sched.prefixes import Prefixes
from octavo.sched.queue import Queue
from octavo.sched.sequence import SequenceState, Status
from octavo.speculation import Speculation
from octavo.types import PageGrant, Request, RowStart, Stats, StepPlan, StepResult, TokenLogprobs, TokenOutput


@dataclass(frozen=True)
class SchedulerLimits:
    """``max_len`` is the longest sequence; ``max_rows`` and ``max_tokens`` bound one step. With ``enough_tokens`` of
    prompts in a step it admits no further request, which would gain nothing by it and make the others wait.
    With ``speculation`` each plan is to be committed before the next is scheduled; a step of more than ``draft_tokens``
    has no drafts."""

    max_rows: int
    max_tokens: int
    max_len: int
    page_size: int
    num_pages: int
    prefix_caching: bool = True
    enough_tokens: int | None = None
    speculation: Speculation | None = None
    draft_tokens: int = 0


@dataclass
class Counters:
    """Totals since the start; see `types.Stats`."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    preemptions: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    slots_allocated: int = 0
    slots_filled: int = 0


class Scheduler:
    """`add` and `abort` requests, `schedule` a plan, `commit` its result; plans are committed in their order."""

    def __init__(self, limits: SchedulerLimits, hash_key: bytes) -> None:
        self.limits = limits
        self.pool = PagePool(limits.num_pages)
        self.counters = Counters()
        self._sequences: dict[str, SequenceState] = {}
        self._waiting = Queue()  # without those that wait for a page of another, who are in `_prefixes`
        self._num_waiting = 0  # in both
        self._running: list[SequenceState] = []  # in the order of admission
        self._free_rows = list(range(limits.max_rows - 1, -1, -1))
        self._ended: list[int] = []
        self._prefixes = Prefixes(self.pool, limits.page_size, hash_key, enabled=limits.prefix_caching)
        self._launched: list[list[Item]] = []  # plans not committed yet, oldest first
        self._arrivals = 0

    # --- requests -------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queues a request; its prompt is shorter than ``max_len`` and its id is new."""
        seq = SequenceState(request, self._arrivals, self.limits.max_len)
        self._arrivals += 1
        self._sequences[seq.id] = seq
        self._wait(seq)

    def abort(self, ids: Iterable[str]) -> list[TokenOutput]:
        """Ends requests; unknown and finished ids are ignored. Their pages are free at once."""
        outputs = []
        for id in ids:
            seq = self._sequences.get(id)
            if seq is not None:
                self._finish(seq)
                outputs.append(TokenOutput(id=id, finish_reason="abort", cached=seq.cached))
        return outputs

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    def has_work(self) -> bool:
        """Whether a request is unfinished or a plan uncommitted."""
        return bool(self._sequences) or bool(self._launched)

    def __contains__(self, id: str) -> bool:
        return id in self._sequences

    def reset_prefix_cache(self) -> None:
        """Nothing computed so far will be found again; running requests keep their pages but share no more of them."""
        self._waiting.push(self._prefixes.forget())
        for seq in self._running:
            seq.published = self.limits.max_len  # above any page count: offers none of its pages any more

    # --- a step ---------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step, or None if there is nothing to compute now."""
        if self._num_waiting:
            self._make_way()
        items: list[Item] = []
        grants: list[PageGrant] = []
        budget = self.limits.max_tokens
        decodes, chunks = [], []
        preemptions = self.counters.preemptions
        for seq in self._running:
            known = len(seq.tokens) + seq.inflight
            if known - seq.computed > 1:
                chunks.append(seq)
            elif known < seq.limit or not seq.inflight:  # else what is in flight is the last, whatever its value
                decodes.append(seq)
        for seq in (*decodes, *chunks):
            if budget == 0:
                break
            count = min(seq.todo, budget)
            if seq.status is not Status.RUNNING:
                continue  # preempted for an earlier one
            if seq.computed + count <= seq.capacity or self._grow(seq, count, grants):
                items.append(Item.of(seq, count))
                budget -= count
        if self.counters.preemptions > preemptions:
            items, budget = self._without_preempted(items)
        starts: list[RowStart] = []
        if self._num_waiting:
            self._admit(budget, items, starts)
        if self.limits.speculation is not None:
            self._suppose(self.limits.speculation, items, grants)
        return self._plan(items, starts, grants)

    def commit(self, result: StepResult) -> list[TokenOutput]:
        """Reads back the oldest uncommitted plan: appends tokens, publishes pages, ends what has ended."""
        outputs: list[TokenOutput] = []
        place = 0
        for index, item in enumerate(self._launched.pop(0)):
            if item.seq.status is not Status.DONE and not item.deferred:
                outputs += self._commit(item, result, place, result.prompt_logprobs.get(index, []))
            place += item.samples
        return outputs

    # --- between a step's launch and its sampling -----------------------------------------------------------

    def constrained(self) -> list[tuple[int, str]]:
        """(item, request id) of the latest plan that sample under a guide, without those that have ended since."""
        return [
            (index, item.seq.id)
            for index, item in enumerate(self._launched[-1])
            if item.samples and item.seq.sampling.guide is not None and item.seq.status is Status.RUNNING
        ]

    def defer(self, index: int) -> None:
        """Item ``index`` of the latest plan, the only one not committed, is not sampled after all.

        What it sampled means nothing; its request is preempted and waits until `resume`.
        """
        item = self._launched[-1][index]
        item.deferred = True
        item.seq.inflight -= item.samples
        item.seq.held = True
        self._preempt(item.seq)

    def resume(self, id: str) -> None:
        """A deferred request may run again; unknown and finished ids are ignored."""
        if id in self._sequences:
            self._sequences[id].held = False

    def end(self, id: str) -> None:
        """Ends a request for a reason that the scheduler cannot know; unknown and finished ids are ignored."""
        if id in self._sequences:
            self._finish(self._sequences[id])

    def fail_running(self, cause: str, status: int) -> list[TokenOutput]:
        """Ends every request that is in a launched or running state, with an error; waiting ones stay."""
        self._launched.clear()
        outputs = []
        for seq in list(self._running):
            self._finish(seq)
            outputs.append(TokenOutput(id=seq.id, finish_reason="error", error=cause, status=status))
        for seq in self._sequences.values():
            seq.inflight = 0
        return outputs

    def stats(self) -> Stats:
        """Gauges of now and counters since the start."""
        return Stats(
            running=len(self._running),
            waiting=self._num_waiting,
            pages_used=self.limits.num_pages - self.pool.num_free,
            pages_total=self.limits.num_pages,
            **vars(self.counters),
        )

    def check(self) -> None:
        """Asserts the invariants between sequences, rows and pages; for tests and debugging."""
        self.pool.check()
        refs = [0] * self.limits.num_pages
        for seq in self._running:
            assert seq.status is Status.RUNNING and seq.row >= 0, f"{seq.id} is {seq.status} among the running"
            assert seq.committed <= seq.computed <= seq.known, f"{seq.id}: {seq.committed} {seq.computed} {seq.known}"
            assert len(seq.pages) * self.limits.page_size >= seq.computed, f"{seq.id} computed beyond its pages"
            for page in seq.pages:
                refs[page.id] += 1
        assert refs == [page.refs for page in self.pool.pages], "reference counts do not match the running sequences"
        rows = [seq.row for seq in self._running]
        assert sorted(rows + self._free_rows) == list(range(self.limits.max_rows)), "a row is lost or used twice"
        waiting = sum(seq.status is Status.WAITING for seq in self._sequences.values())
        assert waiting == self._num_waiting, f"{waiting} waiting, {self._num_waiting} counted"
        queued = [*self._waiting.waiting(), *self._prefixes.waiting()]
        assert waiting == sum(seq.status is Status.WAITING for seq in queued), "a request waits nowhere, or twice"
        assert len(self._sequences) == waiting + len(rows), "a sequence is neither waiting nor running"

    # --- parts of a step ------------------------------------------------------------------------------------

    def _without_preempted(self, items: list[Item]) -> tuple[list[Item], int]:
        """Items that still hold, and the budget they leave; some were preempted after they had their turn."""
        for item in items:
            if not item.holds:
                item.seq.inflight -= item.samples
        items = [item for item in items if item.holds]
        return items, self.limits.max_tokens - sum(item.count for item in items)

    def _grow(self, seq: SequenceState, count: int, grants: list[PageGrant]) -> bool:
        """Gives ``seq`` pages for ``count`` more tokens; preempts others if need be. False: it was preempted itself."""
        missing = -(-(seq.computed + count) // self.limits.page_size) - len(seq.pages)
        while missing > self.pool.num_free:
            victim = max(self._running, key=lambda s: s.order)
            self._preempt(victim)
            grants[:] = [g for g in grants if g.row not in self._ended]
            if victim is seq:
                return False
        self._grant(seq, missing, grants)
        return True

    def _grant(self, seq: SequenceState, count: int, grants: list[PageGrant]) -> None:
        first = len(seq.pages)
        self._take(seq, count)
        grants.append(PageGrant(seq.row, first, [page.id for page in seq.pages[first:]]))

    def _take(self, seq: SequenceState, count: int) -> None:
        seq.pages.extend(self.pool.take(count))
        seq.capacity = len(seq.pages) * self.limits.page_size

    def _admit(self, budget: int, items: list[Item], starts: list[RowStart]) -> None:
        passed: list[SequenceState] = []
        enough = self.limits.enough_tokens or self.limits.max_tokens
        room = enough - sum(item.count for item in items if item.count > 1)
        while min(budget, room) > 0 and self._free_rows and (seq := self._waiting.pop()) is not None:
            if not seq.ready:
                passed.append(seq)
                continue
            hit, awaited = self._prefixes.find(seq)
            if awaited is not None:
                self._prefixes.wait(seq, awaited)
                continue
            if self._pages_for(seq, hit) > self.pool.num_free:
                passed.append(seq)
                break
            self._num_waiting -= 1
            items.append(self._start(seq, hit, budget, starts))
            budget, room = budget - items[-1].count, room - items[-1].count
        self._waiting.push(passed)

    def _make_way(self) -> None:
        """The first in line takes the place of a running request of lower priority, one in each step."""
        first = self._waiting.first()
        if first is None or not first.ready or not self._running:
            return
        victim = max(self._running, key=lambda seq: seq.order)
        if first.order[0] >= victim.order[0]:
            return
        hit, awaited = self._prefixes.find(first)
        if awaited is None and (not self._free_rows or self._pages_for(first, hit) > self.pool.num_free):
            self._preempt(victim)

    def _pages_for(self, seq: SequenceState, hit: list[Page]) -> int:
        """Free pages that admitting ``seq`` takes, ``hit`` being those with its prefix.

        They are for all that is known and one token more, if there will be one: a smaller reserve would admit what the
        next step preempts.
        """
        needed = -(-min(seq.known + 1, seq.limit) // self.limits.page_size) - len(hit)
        return needed + sum(page.refs == 0 for page in hit)

    def _start(self, seq: SequenceState, hit: list[Page], budget: int, starts: list[RowStart]) -> Item:
        first = seq.preemptions == 0
        self.pool.reuse(hit)
        seq.start(self._free_rows.pop(), hit, self.limits.page_size)
        count = min(seq.todo, budget)
        self._take(seq, -(-(seq.computed + count) // self.limits.page_size) - len(hit))
        self._running.append(seq)
        self._prefixes.claim(seq, len(hit))
        if first:
            self.counters.prompt_tokens += seq.prompt_len
            self.counters.cached_tokens += seq.cached
        starts.append(RowStart(seq.row, list(seq.tokens), seq.prompt_len, [p.id for p in seq.pages], seq.sampling))
        return Item.of(seq, count)

    def _suppose(self, speculation: Speculation, items: list[Item], grants: list[PageGrant]) -> None:
        """Lets those who sample after a single token go on by drafts, where nobody else is in need of the room."""
        room = self.limits.draft_tokens - sum(item.count for item in items)
        for item in items:
            seq = item.seq
            most = min(room, seq.limit - seq.known)
            if item.count > 1 or most <= 0 or not may_draft(seq.sampling, len(seq.tokens) - seq.prompt_len):
                continue
            if seq.lookup is None:
                seq.lookup = Lookup(speculation)
            drafts = seq.lookup.propose(seq.tokens, most)
            missing = -(-(seq.computed + len(drafts)) // self.limits.page_size) - len(seq.pages)
            if drafts and missing <= self.pool.num_free:
                if missing > 0:
                    self._grant(seq, missing, grants)
                item.suppose(drafts)
                room -= len(drafts)

    def _plan(self, items: list[Item], starts: list[RowStart], grants: list[PageGrant]) -> StepPlan | None:
        if not items:
            return None
        items.sort(key=Item.place)  # stable
        self._launched.append(items)
        ended, self._ended = self._ended, []
        told = enumerate(items if self.limits.speculation is not None else ())
        self.counters.steps += 1
        self.counters.slots_allocated += sum([seq.capacity for seq in self._running])
        self.counters.slots_filled += sum([seq.computed for seq in self._running])
        return StepPlan(
            starts=starts,
            pages=grants,
            rows=[item.seq.row for item in items],
            counts=[item.count for item in items],
            computed=[item.first for item in items],
            samples=[item.samples for item in items],
            ended=ended,
            inputs={b: tokens for b, item in told if (tokens := item.inputs)},
        )

    def _commit(self, item: Item, result: StepResult, place: int, scores: list[TokenLogprobs]) -> list[TokenOutput]:
        """Takes in an item that has its samples at ``place`` of ``result``."""
        seq = item.seq
        count, end = item.take(result, place)
        accepted = max(count - 1, 0)
        if item.holds:
            seq.committed += item.count - len(item.drafts) + accepted
            if seq.committed >= (seq.published + 1) * self.limits.page_size:
                self._waiting.push(self._prefixes.publish(seq))
        self.counters.generation_tokens += count
        if seq.lookup is not None and item.drafts:
            self.counters.draft_tokens += len(item.drafts)
            self.counters.accepted_tokens += accepted
            seq.lookup.judge(len(seq.tokens), accepted)
        outputs = item.outputs(result, place, count, end, scores)
        if end is not None:
            self._finish(seq)
        return outputs

    # --- bookkeeping ----------------------------------------------------------------------------------------

    def _preempt(self, seq: SequenceState) -> None:
        self._vacate(seq)
        self.pool.release(seq.preempt())
        self.counters.preemptions += 1
        self._wait(seq)

    def _finish(self, seq: SequenceState) -> None:
        if seq.status is Status.RUNNING:
            self._vacate(seq)
        else:
            self._num_waiting -= 1  # its entry in the queue is stale from here on
        self.pool.release(seq.finish())
        del self._sequences[seq.id]

    def _vacate(self, seq: SequenceState) -> None:
        self._running.remove(seq)
        self._free_rows.append(seq.row)
        self._ended.append(seq.row)
        self._waiting.push(self._prefixes.release(seq))

    def _wait(self, seq: SequenceState) -> None:
        self._num_waiting += 1
        self._waiting.push([seq])
