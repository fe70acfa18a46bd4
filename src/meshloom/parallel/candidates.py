"""From logits that are cut over the vocabulary to the tokens with the highest ones: full logits exist on no rank.

Each rank of the tensor-parallel group finds the best of its own entries, and only those are gathered.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from meshloom.parallel.vocab import CutLogits

_functional = torch.ops._c10d_functional
_all_reduce_in_place_op = _functional.all_reduce_.default  # by these names a recording knows what it may call plainly
_wait_op = _functional.wait_tensor.default
_LOW = 0xFFFFFFFF  # the lower half of an int64


class Candidates(NamedTuple):
    """The tokens with the highest logits, highest first, of equal ones the smaller id first.

    `log_total` is the log of the sum of exp(logit) over the whole vocabulary: exp(score - log_total) is a probability.
    """

    scores: Tensor  # (B, K) float32
    ids: Tensor  # (B, K) int64
    log_total: Tensor  # (B,) float32


def most_likely(logits: Tensor | CutLogits) -> Tensor:
    """The token with the highest logit, the smallest id of several; (B, V) or its part -> (B,) int64.

    Parts meet in one maximum over the group, which is the same on all of its ranks: of numbers whose upper half orders
    as the logit does, and whose lower half falls as the id grows.
    """
    if not isinstance(logits, CutLogits):
        return logits.argmax(dim=-1)
    assert logits.part.group is not None
    scores, places = logits.local.max(dim=-1)
    bits = (scores.float() + 0.0).view(torch.int32)  # 0 and -0 are equal
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # of floats below 0 larger bits mean smaller numbers
    falling = _LOW - logits.part.range[0] - places
    best = falling.add_(ordered.long(), alpha=_LOW + 1)
    _wait_op(_all_reduce_in_place_op(best, "max", logits.part.group.group_name))
    return _LOW - (best & _LOW)


def candidates(logits: Tensor | CutLogits, count: int, *, temperature: float = 1.0) -> Candidates:
    """The `count` best tokens of logits (B, V), or of all if there are no more, after a division by `temperature`.

    Every rank of the tensor-parallel group must call this at the same point; all get the same.
    """
    cut = isinstance(logits, CutLogits)
    local = (logits.local if isinstance(logits, CutLogits) else logits).float() / temperature
    scores, ids = local.topk(min(count, local.size(-1)), dim=-1)
    total = local.logsumexp(dim=-1)
    if cut:
        assert isinstance(logits, CutLogits)
        size, degree = logits.part.size, logits.part.degree
        most = min(count, -(-size // degree))  # the parts of the vocabulary may differ by one
        missing = most - scores.size(-1)
        scores = functional.pad(scores, (0, missing), value=float("-inf"))
        ids = functional.pad(ids + logits.part.range[0], (0, missing), value=size)
        packed = torch.cat([scores.double(), ids.double(), total.double().unsqueeze(-1)], dim=-1)  # ids are exact
        found = _gathered(packed, logits)
        scores = found[..., :most].transpose(0, 1).flatten(1).float()  # (B, tp · K)
        ids = found[..., most:-1].transpose(0, 1).flatten(1).long()
        total = found[..., -1].logsumexp(dim=0).float()
        count = min(count, size)
    ids, order = ids.sort(dim=-1)
    scores, order = scores.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return Candidates(scores[:, :count], ids.gather(-1, order)[:, :count], total)


def broadcast(x: Tensor, source: int, group: dist.ProcessGroup) -> Tensor:
    """x of the rank at place `source` of the group, on all of them."""
    result: Tensor = _functional.wait_tensor(_functional.broadcast(x.contiguous(), source, group.group_name))
    return result


def _gathered(x: Tensor, logits: CutLogits) -> Tensor:
    """The ranks' x (…), stacked: (tp, …)."""
    assert logits.part.group is not None
    degree = logits.part.degree
    gathered = _functional.all_gather_into_tensor(x.contiguous(), degree, logits.part.group.group_name)
    result: Tensor = _functional.wait_tensor(gathered).unflatten(0, (degree, -1))
    return result
