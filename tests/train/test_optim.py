"""Schedules of the learning rate: where they begin, stay and end."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshloom.train.optim import LearningRateSchedule, learning_rate

SCHEDULES: tuple[Any, ...] = get_args(LearningRateSchedule)


@given(
    schedule=st.sampled_from(SCHEDULES),
    warmup=st.integers(0, 50),
    more=st.integers(1, 200),
    lowest=st.floats(0, 1),
)
def test_climbs_to_the_peak_and_never_climbs_again(schedule: Any, warmup: int, more: int, lowest: float) -> None:
    total = warmup + more
    rates = [
        learning_rate(schedule, step, peak=2.0, warmup_steps=warmup, num_steps=total, lowest=lowest)
        for step in range(total)
    ]
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[max(0, warmup - 1)] == pytest.approx(2.0)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert min(rates[warmup:]) >= 2.0 * lowest - 1e-9


@pytest.mark.parametrize(
    ("schedule", "step", "rate"),
    [
        ("constant", 99, 1.0),
        ("linear", 10, 1.0),
        ("linear", 55, 0.5),
        ("cosine", 55, 0.5),
        ("cosine", 10 + 30, 0.75),
        ("wsd", 79, 1.0),
        ("wsd", 90, 0.5),
        ("linear", 4, 0.5),
    ],
)
def test_closed_forms(schedule: Any, step: int, rate: float) -> None:
    assert learning_rate(schedule, step, peak=1.0, warmup_steps=10, num_steps=100) == pytest.approx(rate)
