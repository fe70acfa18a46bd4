"""Which token follows: the likeliest, or one drawn by temperature, top-k and top-p, in Hugging Face's order.

Random numbers belong to a sequence and a place in it, not to a step or a rank, so equal seeds give equal tokens on
every plan and in every batch. Drawing inverts the distribution over candidates that stand in one order everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from meshloom.errors import UsageError
from meshloom.parallel.candidates import Candidates, candidates, most_likely
from meshloom.parallel.vocab import CutLogits

_ENOUGH = 1024  # candidates that hold top-p of the probability but for the flattest distributions
_APART = 1 << 20  # seeds of sequences: those of one run and of the next have nothing in common


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen: temperature 0 takes the likeliest; top_k 0 and top_p 1 leave all tokens in.

    Raises UsageError where a number cannot be.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature {self.temperature}: expected a number of at least 0; 0 takes the likeliest")
        if self.top_k < 0:
            raise UsageError(f"top-k {self.top_k}: expected a whole number of at least 0; 0 leaves all tokens in")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p}: expected a number above 0 and at most 1; 1 leaves all tokens in")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


class Sampler:
    """Chooses the tokens of one batch, step after step: call it with the logits of the last position.

    `sequences` are the numbers of the batch's sequences in the whole run, by which their random numbers are found.
    """

    def __init__(self, sampling: Sampling, sequences: range, num_steps: int) -> None:
        self.sampling = sampling
        self.step = 0
        rows = [
            torch.rand(
                num_steps,
                generator=torch.Generator().manual_seed(sampling.seed * _APART + number),
                dtype=torch.float64,
            )
            for number in (sequences if not sampling.is_greedy else ())
        ]
        self.uniforms = torch.stack(rows, dim=1) if rows else None  # (steps, B)

    def __call__(self, logits: Tensor | CutLogits) -> Tensor:
        """(B, V), or this rank's part, -> (B,) int64."""
        if self.uniforms is None:
            return most_likely(logits)
        found = self._candidates(logits)
        uniform = self.uniforms[self.step].to(found.scores.device)
        self.step += 1
        return draw(found, self.sampling, uniform)

    def _candidates(self, logits: Tensor | CutLogits) -> Candidates:
        sampling = self.sampling
        size = logits.part.size if isinstance(logits, CutLogits) else logits.size(-1)
        if sampling.top_k:
            return candidates(logits, sampling.top_k, temperature=sampling.temperature)
        if sampling.top_p < 1:
            found = candidates(logits, _ENOUGH, temperature=sampling.temperature)
            # Asked on the host: all ranks have the same numbers, and must come to the same answer.
            held = (found.scores.cpu().double() - found.log_total.cpu().double().unsqueeze(-1)).exp().sum(dim=-1)
            if size <= _ENOUGH or bool((held >= sampling.top_p).all()):
                return found
        return candidates(logits, size, temperature=sampling.temperature)


def draw(found: Candidates, sampling: Sampling, uniform: Tensor) -> Tensor:
    """One token of each row (B,), where `uniform` (B,) in [0, 1) falls among those that top-k and top-p leave in."""
    scores = found.scores.double()
    total = scores.logsumexp(dim=-1) if sampling.top_k else found.log_total.double()  # top-p counts what top-k left
    probabilities = (scores - total.unsqueeze(-1)).exp()  # (B, K), falling
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = torch.where(before < sampling.top_p, probabilities, 0.0)
    reached = kept.cumsum(dim=-1)
    target = uniform.unsqueeze(-1) * reached[:, -1:]
    place = (reached <= target).sum(dim=-1, keepdim=True)
    last = (kept > 0).sum(dim=-1, keepdim=True) - 1
    return found.ids.gather(-1, torch.minimum(place, last)).squeeze(-1)
