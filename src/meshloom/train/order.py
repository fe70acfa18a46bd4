"""Which sequence comes when: pure functions of the position, so that a run goes on from any place of its stream.

Nothing grows with the data: a permutation is computed index by index, and the table of turns has a fixed size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TURNS = 10_000  # positions after which turns repeat; the smallest share that they can express is 1 in that
_ROUNDS = 6


def permuted(indices: NDArray[np.uint64], size: int, *, seed: int) -> NDArray[np.uint64]:
    """Where a permutation of range(size), chosen by `seed`, sends `indices`.

    A Feistel network on the smallest even number of bits, walked until it falls into the range, four steps at most on
    average (Black and Rogaway 2002, section 4: cycle walking).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = [np.uint64(mixed(seed, number)) for number in range(_ROUNDS)]
    found = indices.astype(np.uint64)
    walking = np.arange(len(found))
    while len(walking):
        left, right = found[walking] >> half, found[walking] & low
        for key in keys:
            left, right = right, left ^ (_scrambled(right ^ key) & low)
        found[walking] = left << half | right
        walking = walking[found[walking] >= size]
    return found


def mixed(*numbers: int) -> int:
    """One number of 64 bits from several, such as a seed and a place; other numbers give unrelated ones."""
    state = np.zeros(1, np.uint64)
    for number in numbers:
        state = _scrambled(state ^ _scrambled(np.array([number % 2**64], np.uint64)))
    return int(state[0])


def _scrambled(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's step (Steele, Lea and Flood 2014): a bijection of 64 bits."""
    values = values + np.uint64(0x9E37_79B9_7F4A_7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58_476D_1CE4_E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D0_49BB_1331_11EB)
    return values ^ (values >> np.uint64(31))


class Turns(NamedTuple):
    """Whose turn it is at each position of a period, how many turns it had before, and how many it has in all."""

    whose: NDArray[np.int64]
    before: NDArray[np.int64]
    in_all: NDArray[np.int64]

    def at(self, position: int) -> tuple[int, int]:
        """The source whose turn it is at `position` of an endless stream, and how many turns it had before that."""
        periods, place = divmod(position, len(self.whose))
        source = int(self.whose[place])
        return source, periods * int(self.in_all[source]) + int(self.before[place])


def turns(weights: Sequence[float]) -> Turns:
    """Turns of sources by their weights, spread evenly: the next one goes to the source furthest behind its share.

    Every source has at least one turn in a period.
    """
    if len(weights) == 1:
        return Turns(np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1, np.int64))
    shares = np.asarray(weights, np.float64) / np.sum(np.asarray(weights, np.float64))
    in_all = np.maximum(1, np.floor(shares * TURNS)).astype(np.int64)
    owed = np.argsort(in_all - shares * TURNS, kind="stable")  # those that rounding took most from come first
    for place in range(TURNS - int(in_all.sum())):
        in_all[owed[place]] += 1
    period = int(in_all.sum())
    whose, before, had = np.zeros(period, np.int64), np.zeros(period, np.int64), np.zeros_like(in_all)
    for place in range(period):
        source = int(np.argmax(in_all * (place + 1) - had * period))
        whose[place], before[place] = source, had[source]
        had[source] += 1
    return Turns(whose, before, in_all)
