"""Choosing tokens: the same that transformers' warpers leave in, and drawn as often as they are likely."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from meshloom.errors import UsageError
from meshloom.generate.sample import Sampler, Sampling, draw
from meshloom.parallel.candidates import candidates, most_likely
from meshloom.parallel.vocab import CutLogits, Part


@given(seed=st.integers(0, 999), top_k=st.integers(0, 40), top_p=st.floats(0.05, 1.0), temperature=st.floats(0.2, 3.0))
def test_drawn_are_the_tokens_that_transformers_leaves_in(
    seed: int, top_k: int, top_p: float, temperature: float
) -> None:
    logits = torch.randn(1, 37, generator=torch.Generator().manual_seed(seed)) * 3
    scores = TemperatureLogitsWarper(temperature)(torch.zeros(1, 1), logits)  # type: ignore[arg-type]
    if top_k:
        scores = TopKLogitsWarper(top_k)(torch.zeros(1, 1), scores)  # type: ignore[arg-type]
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(torch.zeros(1, 1), scores)  # type: ignore[arg-type]
    expected = scores.softmax(dim=-1)[0]
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    found = candidates(logits, top_k or 37, temperature=temperature)
    uniform = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    rows = [part.expand(2000, *part.shape[1:]) for part in found]
    drawn = draw(type(found)(*rows), sampling, uniform)
    shares = torch.bincount(drawn, minlength=37) / 2000
    # at the edge of top-p, sums in another order may leave in one more or less
    torch.testing.assert_close(shares, expected, rtol=0, atol=2e-3)


def test_of_equal_logits_the_smallest_id_is_taken() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    assert most_likely(logits).tolist() == [1, 0]
    assert candidates(logits, 4).ids.tolist() == [[1, 3, 2, 0], [0, 1, 2, 3]]


def test_a_sequence_draws_the_same_in_every_batch() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(temperature=1.0, seed=7)
    together = Sampler(sampling, range(3), 4)
    alone = Sampler(sampling, range(2, 3), 4)
    for _ in range(4):
        assert together(logits)[2] == alone(logits[2:])[0]


def test_a_flat_distribution_is_drawn_from_whole() -> None:
    logits = torch.zeros(1, 5000)
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.9), range(1), 400)
    assert max(int(sampler(logits)) for _ in range(400)) > 2000, "more than the first candidates are left in"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"top_p": 0.0}, "above 0 and at most 1"),
        ({"top_p": 1.5}, "above 0 and at most 1"),
        ({"top_k": -1}, "at least 0"),
        ({"temperature": -0.1}, "at least 0"),
        ({"temperature": float("nan")}, "at least 0"),
    ],
)
def test_numbers_that_cannot_be(arguments: dict[str, float], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Sampling(**arguments)  # type: ignore[arg-type]


def test_parts_of_the_vocabulary_find_the_same_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """The maximum over ranks is that over their numbers; a collective in the place of gloo's takes it."""
    rows = torch.randn(40, 31, generator=torch.Generator().manual_seed(2)) * 4
    rows[0] = 0.0
    rows[1, ::3] = -0.0
    rows[2] = -5.0  # equal on all ranks, below 0
    rows[3] = rows[3].abs() + 1e30
    rows[4] = -rows[4].abs() - 1e30
    rows[5] = float("-inf")
    rows[6, 7] = rows[6, 20] = rows[6].max() + 1  # equal on two ranks
    found = []

    def keep(numbers: torch.Tensor, reduction: str, name: str) -> torch.Tensor:
        assert reduction == "max"
        found.append(numbers.clone())
        return numbers if len(found) < 3 else numbers.copy_(torch.stack(found).max(dim=0).values)

    class Group:
        group_name = "0"

    monkeypatch.setattr("meshloom.parallel.candidates._all_reduce_in_place_op", keep)
    monkeypatch.setattr("meshloom.parallel.candidates._wait_op", lambda tensor: tensor)
    for rank in range(3):
        part = Part(size=31, index=rank, degree=3, group=Group())  # type: ignore[arg-type]
        begin, end = part.range
        chosen = most_likely(CutLogits(rows[:, begin:end].contiguous(), part))
    assert chosen.tolist() == rows.argmax(dim=-1).tolist()
    assert chosen.dtype == torch.int64
