"""ZeRO-1: each data-parallel rank holds the optimizer's states of its share of the weights (Rajbhandari et al. 2020).

Weights lie one after the other in buckets, each cut into as many equal shares as there are ranks, with zeros at its end
where they do not come out even; so all ranks run the same ops. A step copies this rank's share of weights and averaged
gradients out of the model, lets the optimizer change it, and gathers everybody's shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_BYTES = 100 << 20  # of weights that are gathered at once

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class Piece(NamedTuple):
    """Elements `begin` to `end` of a flattened parameter, which lie in `share` from its element `at` on."""

    parameter: nn.Parameter
    begin: int
    end: int
    share: nn.Parameter
    at: int


class _Bucket(NamedTuple):
    parameters: list[nn.Parameter]
    share: nn.Parameter
    pieces: list[Piece]
    rest: list[Tensor]  # the zeros at its end, if there are any


class Zero(torch.optim.Optimizer):
    """An optimizer over `groups` of whole parameters, whose states are those that `make` keeps for this rank's shares.

    `state` is by share, not by parameter; `pieces` tells what of each parameter lies where. Every rank of `group` must
    step at the same point. A parameter without gradient keeps its values.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], *, group: dist.ProcessGroup, make: Make) -> None:
        self.group = group
        self._buckets = [_cut(group, parameters) for one in groups for parameters in _filled(one["params"])]
        buckets = iter(self._buckets)
        shares = [{**one, "params": [next(buckets).share for _ in _filled(one["params"])]} for one in groups]
        self._inner = make(shares)
        super().__init__([dict(one) for one in groups], dict(self._inner.defaults))
        self.state = self._inner.state
        self.pieces = {id(piece.parameter): piece for bucket in self._buckets for piece in bucket.pieces}

    @property
    def share_groups(self) -> list[dict[str, Any]]:
        """The groups of shares, as the optimizer has them that keeps the states."""
        return self._inner.param_groups

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change this rank's share of the weights, and let all ranks have those of all."""
        for mine, theirs in zip(self.param_groups, self._inner.param_groups, strict=True):
            theirs.update({name: value for name, value in mine.items() if name != "params"})
        if "found_inf" in vars(self):
            vars(self._inner)["found_inf"] = vars(self)["found_inf"]
        for bucket in self._buckets:
            _fill(bucket, self.group.rank())
        self._inner.step()
        functional = torch.ops._c10d_functional
        size, name = self.group.size(), self.group.group_name
        gathered = [functional.all_gather_into_tensor(bucket.share.detach(), size, name) for bucket in self._buckets]
        for bucket, flat in zip(self._buckets, gathered, strict=True):
            bucket.share.grad = None
            _spread(bucket, functional.wait_tensor(flat))


def _filled(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in buckets."""
    buckets: list[list[nn.Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        if size + parameter.nbytes > _BUCKET_BYTES and buckets[-1]:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size += parameter.nbytes
    return buckets


def _cut(group: dist.ProcessGroup, parameters: list[nn.Parameter]) -> _Bucket:
    size = -(-sum(parameter.numel() for parameter in parameters) // group.size())
    share = nn.Parameter(torch.zeros(size, dtype=parameters[0].dtype, device=parameters[0].device))
    low, high, at = group.rank() * size, (group.rank() + 1) * size, 0
    pieces = []
    for parameter in parameters:
        begin, end = max(at, low), min(at + parameter.numel(), high)
        if begin < end:
            pieces.append(Piece(parameter, begin - at, end - at, share, begin - low))
        at += parameter.numel()
    rest = size * group.size() - at
    return _Bucket(parameters, share, pieces, [share.new_zeros(rest)] if rest else [])


def _fill(bucket: _Bucket, rank: int) -> None:
    """Copy this rank's share of weights and gradients out of the model.

    All of a bucket is put in a row first, and so every rank runs the same ops, whichever parameters its share has.
    """
    share, size = bucket.share.detach(), bucket.share.numel()
    gradient = torch.empty_like(share)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket.parameters]
    for target, sources in ((share, bucket.parameters), (gradient, gradients)):
        target.copy_(torch.cat([*(source.detach().reshape(-1) for source in sources), *bucket.rest])[
            rank * size : (rank + 1) * size
        ])  # fmt: skip
    bucket.share.grad = gradient


def _spread(bucket: _Bucket, flat: Tensor) -> None:
    """Put the weights that all ranks have changed back into the model."""
    sizes = [parameter.numel() for parameter in bucket.parameters]
    parts = flat[: sum(sizes)].split(sizes)
    held = [(p, part.view_as(p)) for p, part in zip(bucket.parameters, parts, strict=True) if p.grad is not None]
    if held:
        torch._foreach_copy_([p.detach() for p, _ in held], [part for _, part in held])
