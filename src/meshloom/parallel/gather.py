"""A small module that needs all features of a cut tensor, such as a norm over every head: it runs on them gathered.

Each rank gathers the features, runs the module on the whole, and keeps its own part of the result. That costs a
gather of the activation, where the module computes little: the linear layers before and after it stay cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_functional = torch.ops._c10d_functional


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Which features rank `index` of a group holds: `held` are the units of each rank, the size of a unit is the same.

    `num_copies` neighbours hold the same.
    """

    group: dist.ProcessGroup
    index: int
    held: Sequence[int]
    num_copies: int

    def begin(self, size: int) -> int:
        """Where this rank's `size` features begin among all."""
        unit = size // self.held[self.index]
        before = self.held[: self.index - self.index % self.num_copies : self.num_copies]
        return sum(before) * unit


class _GatherFeatures(torch.autograd.Function):
    """Forward: (…, I/tp) -> (…, I). Backward: what all ranks' parts of the result send back, this rank's features.

    Where neighbours hold the same part, each gets all of its gradient divided by their number: it is summed over them
    later. Parts of other sizes travel padded to that of the largest.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, features: Features) -> Tensor:
        ctx.features, ctx.size = features, x.size(-1)
        degree, unit = len(features.held), x.size(-1) // features.held[features.index]
        most = max(features.held)
        first = x.movedim(-1, 0).contiguous()  # (I/tp, …)
        if len(set(features.held)) > 1:
            padded = first.new_zeros(most * unit, *first.shape[1:])
            padded[: first.size(0)] = first
            first = padded
        whole = _functional.wait_tensor(
            _functional.all_gather_into_tensor(first, degree, features.group.group_name)
        ).view(degree, *first.shape)
        ranks = range(0, degree, features.num_copies)
        parts: Tensor = torch.cat([whole[rank, : features.held[rank] * unit] for rank in ranks])
        return parts.movedim(0, -1).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        features: Features = ctx.features
        reduced = _functional.all_reduce(grads[0].contiguous(), "sum", features.group.group_name)
        begin = features.begin(ctx.size)
        return _functional.wait_tensor(reduced).narrow(-1, begin, ctx.size) / features.num_copies, None


def gather_around(module: nn.Module, features: Features) -> None:
    """Make `module`, (…, I) -> (…, I), take and give this rank's features (…, I/tp); its parameters stay whole."""
    module.forward = partial(_whole, forward=module.forward, features=features)
    module.gathers_over = features.group  # type: ignore[assignment]


def is_gathered(module: nn.Module) -> bool:
    """Whether `gather_around` changed the module."""
    return "gathers_over" in vars(module)


def _whole(x: Tensor, *, forward: Callable[[Tensor], Tensor], features: Features) -> Tensor:
    whole = _GatherFeatures.apply(x, features)  # type: ignore[no-untyped-call]
    begin = features.begin(x.size(-1))
    return forward(whole).narrow(-1, begin, x.size(-1))
