"""The order of sequences: permutations and turns as pure functions."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshloom.train.order import TURNS, mixed, permuted, turns


@settings(deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**63))
def test_a_permutation_is_one(size: int, seed: int) -> None:
    found = permuted(np.arange(size, dtype=np.uint64), size, seed=seed)
    assert sorted(found.tolist()) == list(range(size))


@settings(deadline=None)
@given(st.integers(1, 10**12), st.integers(0, 1000), st.data())
def test_a_place_does_not_depend_on_what_else_is_asked(size: int, seed: int, data: st.DataObject) -> None:
    indices = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)), np.uint64)
    together = permuted(indices, size, seed=seed)
    alone = [int(permuted(indices[place : place + 1], size, seed=seed)[0]) for place in range(len(indices))]
    assert together.tolist() == alone
    assert (together < size).all()


def test_seeds_give_other_orders_and_every_place_comes_first() -> None:
    first = Counter(int(permuted(np.zeros(1, np.uint64), 10, seed=seed)[0]) for seed in range(3000))
    assert sorted(first) == list(range(10))
    # 300 each are expected; 4.4 standard deviations of a binomial
    assert max(abs(count - 300) for count in first.values()) < 73
    orders = {tuple(permuted(np.arange(6, dtype=np.uint64), 6, seed=seed).tolist()) for seed in range(5000)}
    assert len(orders) > 700  # of 720


def test_mixed_tells_order_and_sign_apart() -> None:
    assert len({mixed(1, 2), mixed(2, 1), mixed(1), mixed(2), mixed(1, 2, 0), mixed(-1)}) == 6


@settings(deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_turns_follow_the_weights_at_every_place(weights: list[float]) -> None:
    table = turns(weights)
    shares = table.in_all / table.in_all.sum()
    assert shares == pytest.approx(np.array(weights) / sum(weights), abs=(len(weights) + 1) / TURNS)
    counts = np.zeros(len(weights))
    for position in range(0, 3 * len(table.whose), 997):
        source, before = table.at(position)
        counts[source] = before
        assert abs(before - position * shares[source]) < len(weights)


def test_turns_count_on_through_periods() -> None:
    table = turns([0.7, 0.3])
    counts = [0, 0]
    for position in range(2 * TURNS + 10):
        source, before = table.at(position)
        assert before == counts[source]
        counts[source] += 1
    assert [table.at(position)[0] for position in range(10)].count(0) == 7
    assert min(turns([1.0, 1e-12]).in_all) == 1, "a source that is named comes at some time"
