"""Inputs that are kept and filled in place are those that would be made anew."""

from __future__ import annotations

import dataclasses

import torch

from octavo.kernels.metadata import AttentionMetadata
from octavo.kernels.select import REFERENCE
from octavo.platforms.cpu import CpuPlatform
from octavo.runtime.inputs import HostSteps, StepInputs, lay_out, send
from octavo.runtime.tables import Tables
from octavo.types import PageGrant, RowStart, Sampling, StepPlan

PAGE = 4
SAMPLING = Sampling(max_tokens=9)


def plan_of(rows: list[int], counts: list[int], computed: list[int], **more: object) -> StepPlan:
    given = {"starts": [], "pages": [], "samples": [1] * len(rows), "ended": [], **more}
    return StepPlan(rows=rows, counts=counts, computed=computed, **given)  # type: ignore[arg-type]


PROMPTS = plan_of(
    [0, 2],
    [3, 7],
    [0, 0],
    starts=[RowStart(0, [5, 6, 7], 3, [8], SAMPLING), RowStart(2, [1, 2, 3, 4, 5, 6, 7], 7, [3, 9], SAMPLING)],
)
NEXT = plan_of([2, 0], [1, 1], [7, 3])
GROWN = plan_of([2, 0], [1, 1], [8, 4], pages=[PageGrant(2, 2, [1]), PageGrant(0, 1, [6])])


def started() -> Tables:
    """Rows 0 and 2 have been prefilled, and have sampled 100 and 102."""
    tables = Tables(3, 12, PAGE, 10, torch.device("cpu"))
    lay_out(PROMPTS, tables, PAGE)
    tables.last_token[:3] = torch.tensor([100, 101, 102])
    return tables


def values(inputs: StepInputs | AttentionMetadata) -> dict[str, object]:
    found = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
    return {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in found.items()}


def test_filled_in_place_or_made_anew_inputs_are_the_same() -> None:
    kept_tables, tables = started(), started()
    steps = HostSteps(kept_tables, PAGE)
    for plan in (NEXT, GROWN):
        kept = steps.fill(plan)
        made = send(lay_out(plan, tables, PAGE), tables, CpuPlatform())
        made.take_in(REFERENCE, tables)
        assert kept is not None
        for name in ("token_ids", "positions", "logits_at", "sampled_rows"):
            assert values(kept)[name] == values(made)[name], name
        got, expected = values(kept.attention), values(made.attention)
        assert got.pop("max_seq") == kept_tables.max_len >= expected.pop("max_seq")  # type: ignore[operator]
        assert got == expected
    assert values(made)["token_ids"] == [102, 100]


def test_other_plans_are_left_as_they_are() -> None:
    tables = started()
    steps, before = HostSteps(tables, PAGE), tables.host_table.copy()
    chunk, silent = plan_of([2, 0], [1, 2], [7, 3]), plan_of([2], [1], [7], samples=[0])
    known = plan_of([2], [1], [6], pages=[PageGrant(2, 2, [1])])  # the last token of a prompt, not a sampled one
    assert [steps.fill(plan) for plan in (chunk, silent, known, PROMPTS)] == [None] * 4
    assert (tables.host_table == before).all()
