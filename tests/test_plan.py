"""Plan: its text form, the layout of ranks, and what it refuses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshloom import Plan
from meshloom.errors import PlanError
from meshloom.plan import AXES

degrees = st.integers(1, 5)
plans = st.builds(Plan, tp=degrees, cp=degrees, dp=degrees, pp=degrees, sequence_parallel=st.booleans())


@given(plans)
def test_text_form_is_read_back(plan: Plan) -> None:
    assert Plan.parse(str(plan)) == plan


@given(plans, st.data())
def test_coordinates_and_ranks_are_inverse(plan: Plan, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, plan.world_size - 1))
    assert plan.rank(**plan.coordinate(rank)) == rank


@given(plans)
def test_groups_of_an_axis_hold_each_rank_once(plan: Plan) -> None:
    for axis in AXES:
        groups = plan.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(plan.world_size))
        assert {len(group) for group in groups} == {plan.degrees[axis]}
        assert all(plan.group(axis, rank) == group for group in groups for rank in group)


def test_tensor_parallel_ranks_are_neighbours() -> None:
    plan = Plan.parse("tp2.pp2.dp2")
    assert plan.groups("tp") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert plan.groups("dp") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert plan.groups("pp") == [(0, 4), (1, 5), (2, 6), (3, 7)]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tp0", "tp"),
        ("tp2.tp4", "tp twice"),
        ("x2", "'x2'"),
        ("", "''"),
        ("dp-1", "'dp-1'"),
        ("dp99999999", "dp99999999"),
    ],
)
def test_a_bad_text_is_named(text: str, named: str) -> None:
    with pytest.raises(PlanError, match=named):
        Plan.parse(text)


def test_a_wrong_world_size_is_told_with_what_to_write() -> None:
    with pytest.raises(PlanError, match=r"tp2 × dp2 = 4 ranks, but 8 were started; write tp2\.dp4"):
        Plan.parse("tp2.dp2").with_world_size(8)


def test_numbers_that_cannot_be() -> None:
    with pytest.raises(PlanError, match="num_micro_batches"):
        Plan(num_micro_batches=0)
    with pytest.raises(PlanError, match="schedule"):
        Plan(schedule="zigzag")  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="from 0 to 3, got 4"):
        Plan(dp=4).coordinate(4)
