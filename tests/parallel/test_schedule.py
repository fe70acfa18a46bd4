"""Schedules: complete, possible, of the known bubble, and within the known memory."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshloom.errors import PlanError
from meshloom.parallel.schedule import (
    SCHEDULES,
    Action,
    bubble,
    draw,
    gpipe,
    one_forward_one_backward,
    play,
    zero_bubble,
)


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 6), st.integers(1, 6), st.integers(1, 3))
def test_every_pass_once_and_possible(name: str, ranks: int, groups: int, chunks: int) -> None:
    chunks = 1 if name == "zero-bubble" else chunks
    micro_batches = groups * ranks  # which interleaving asks for
    schedule = SCHEDULES[name](ranks, micro_batches, chunks)
    play(schedule)
    seen = Counter(action for actions in schedule for action in actions)
    assert set(seen.values()) == {1}
    backward = ("input", "weight") if name == "zero-bubble" else ("backward",)
    assert set(seen) == {
        Action(kind, stage, mb)  # type: ignore[arg-type]
        for kind in ("forward", *backward)
        for stage in range(ranks * chunks)
        for mb in range(micro_batches)
    }
    assert all(action.stage % ranks == rank for rank, actions in enumerate(schedule) for action in actions)


@given(st.integers(1, 8), st.integers(1, 24))
def test_bubbles(ranks: int, micro_batches: int) -> None:
    expected = (ranks - 1) / (micro_batches + ranks - 1)  # Narayanan et al. 2021, section 2.2
    assert bubble(gpipe(ranks, micro_batches)) == pytest.approx(expected)
    assert bubble(one_forward_one_backward(ranks, micro_batches)) == pytest.approx(expected)
    assert bubble(zero_bubble(ranks, micro_batches)) <= expected + 1e-12


def test_interleaving_divides_the_bubble_by_its_stages() -> None:
    idle = {}
    for chunks in (1, 2, 4):
        slots = play(SCHEDULES["interleaved"](4, 16, chunks))
        makespan = max(row[-1].end for row in slots)
        idle[chunks] = (makespan - 3 * 16 * chunks) / chunks  # a pass through one of `chunks` stages is so much shorter
    assert idle == {1: 9, 2: pytest.approx(4.5), 4: pytest.approx(2.25)}
    assert bubble(SCHEDULES["zero-bubble"](4, 16, 1)) < bubble(SCHEDULES["1f1b"](4, 16, 1)) / 2


@given(st.integers(1, 8), st.integers(1, 24))
def test_what_a_rank_holds(ranks: int, micro_batches: int) -> None:
    for name in ("1f1b", "zero-bubble"):
        for rank, actions in enumerate(SCHEDULES[name](ranks, micro_batches, 1)):
            held = most = 0
            for action in actions:
                held += {"forward": 1, "backward": -1, "weight": -1, "input": 0}[action.kind]
                most = max(most, held)
            assert most <= min(micro_batches, ranks - rank if name == "1f1b" else ranks)


def test_an_impossible_order_is_named() -> None:
    backward_first = [[Action("backward", 0, 0), Action("forward", 0, 0)]]
    with pytest.raises(PlanError, match="rank 0 waits for ever before B0"):
        play(backward_first)
    with pytest.raises(PlanError, match="expected micro-batches in groups of pp4, got 6"):
        SCHEDULES["interleaved"](4, 6, 2)


def test_the_picture() -> None:
    assert draw(one_forward_one_backward(2, 2)) == (
        "rank 0 |F0   F1             B0   B0        B1   B1\nrank 1 |     F0.1 B0.1 B0.1 F1.1 B1.1 B1.1"
    )
