"""A small module that needs all features of a cut tensor, such as a norm over every head: it runs on them gathered.

Each rank gathers the features, runs the module on the whole, and keeps its own part of the result. That costs a
gather of the activation, where the module computes little: the linear layers before and after it stay cut.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_functional = torch.ops._c10d_functional


class _GatherFeatures(torch.autograd.Function):
    """Forward: (…, I/tp) -> (…, I). Backward: what all ranks' parts of the result send back, this rank's features.

    Where `num_copies` neighbours hold the same part, each gets all of its gradient divided by their number: it is
    summed over them later.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str, index: int, degree: int, num_copies: int) -> Tensor:
        ctx.given = group_name, index, num_copies, x.size(-1)
        first = x.movedim(-1, 0).contiguous()
        whole = _functional.wait_tensor(_functional.all_gather_into_tensor(first, degree, group_name))
        parts: Tensor = whole.view(degree, *first.shape)[::num_copies].flatten(0, 1)
        return parts.movedim(0, -1).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        group_name, index, num_copies, size = ctx.given
        total = _functional.wait_tensor(_functional.all_reduce(grads[0].contiguous(), "sum", group_name))
        return total.narrow(-1, index // num_copies * size, size) / num_copies, None, None, None, None


def gather_around(module: nn.Module, group: dist.ProcessGroup, index: int, degree: int, num_copies: int) -> None:
    """Make `module`, (…, I) -> (…, I), take and give this rank's features (…, I/tp); its parameters stay whole."""
    around = partial(_whole, forward=module.forward, group=group, index=index, degree=degree, num_copies=num_copies)
    module.forward = around
    module.gathers_over = group  # type: ignore[assignment]


def is_gathered(module: nn.Module) -> bool:
    """Whether `gather_around` changed the module."""
    return "gathers_over" in vars(module)


def _whole(
    x: Tensor,
    *,
    forward: Callable[[Tensor], Tensor],
    group: dist.ProcessGroup,
    index: int,
    degree: int,
    num_copies: int,
) -> Tensor:
    size = x.size(-1)
    whole = _GatherFeatures.apply(x, group.group_name, index, degree, num_copies)  # type: ignore[no-untyped-call]
    return forward(whole).narrow(-1, index // num_copies * size, size)
