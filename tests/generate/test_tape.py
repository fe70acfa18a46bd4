"""A recorded function gives what the function gives, or is not replayed at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from meshloom.model.tape import Replay


class _Counting:
    """Appends to memory, and tells the mean of what is there."""

    def __init__(self) -> None:
        self.memory, self.length, self.weight = torch.zeros(2, 20), 0, torch.randn(2, 2)
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.memory.narrow(1, self.length, 1).copy_((functional.dropout(x, 0.5, False) @ self.weight.t())[:, :1])
        seen = self.memory[:, : self.length + 1]
        torch.zeros(3).add_(1)  # nobody uses it
        return seen.mean(dim=1, keepdim=True) + torch.arange(self.length + 1).sum()


def test_a_function_that_counts_is_replayed() -> None:
    plain, replayed, replay = _Counting(), _Counting(), Replay()
    replayed.weight = plain.weight
    for step in range(12):
        x = torch.full((2, 2), float(step + 1))
        expected = plain_call(plain, x)
        got = replay(replayed, x)
        replayed.length = plain.length
        torch.testing.assert_close(got, expected)
    assert replay.why_not is None
    assert replayed.calls == 3, "two to record, one to check"


def plain_call(plain: _Counting, x: Tensor) -> Tensor:
    out = plain(x)
    plain.length += 1
    return out


def _by_value(x: Tensor) -> Tensor:
    return x + 1 if x.sum() > 0 else x - 1


def _random(x: Tensor) -> Tensor:
    return x + torch.rand(2)


class _Doubling:
    def __init__(self) -> None:
        self.count = 1

    def __call__(self, x: Tensor) -> Tensor:
        self.count *= 3
        return x * self.count


class _Squaring:
    """Counts by one when it is recorded, and otherwise later."""

    def __init__(self) -> None:
        self.numbers = iter((1, 2, 5, 9, 20, 30))

    def __call__(self, x: Tensor) -> Tensor:
        return x * next(self.numbers)


class _Other:
    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.count += 1
        return x.exp() if self.count % 2 else x.sin()


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: _by_value, "asks for values"),
        (lambda: _random, "draws random numbers"),
        (_Doubling, "it used 3, then 9"),
        (_Squaring, "gives something else"),
        (_Other, "it called"),
    ],
)
def test_what_is_not_the_same_each_time_is_never_replayed(make: Callable[[], Callable[..., Tensor]], told: str) -> None:
    replay, function, plain = Replay(), make(), make()
    for step in range(6):
        x = torch.full((2,), step - 2.5)
        torch.manual_seed(step)
        expected = plain(x)
        torch.manual_seed(step)
        torch.testing.assert_close(replay(function, x), expected)
    assert replay.why_not is not None
    assert told in replay.why_not
