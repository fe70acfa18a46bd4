"""Gradients averaged over data parallel in one go, where no backward pass is left to hide the communication behind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_BYTES = 25 << 20  # what DistributedDataParallel sends at once


def average_gradients(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Average gradients over the group, in buckets as large as DistributedDataParallel's."""
    buckets: list[list[Tensor]] = [[]]
    size = 0
    for parameter in parameters:
        assert parameter.grad is not None
        if size + parameter.grad.nbytes > _BUCKET_BYTES and buckets[-1]:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter.grad)
        size += parameter.grad.nbytes
    works = []
    for bucket in buckets:
        flat = torch.cat([gradient.flatten() for gradient in bucket]) / group.size()
        works.append((dist.all_reduce(flat, group=group, async_op=True), flat, bucket))
    for work, flat, bucket in works:
        if work is not None:
            work.wait()
        parts = flat.split([gradient.numel() for gradient in bucket])
        torch._foreach_copy_(bucket, [part.view_as(gradient) for part, gradient in zip(parts, bucket)])
