"""The ways a linear layer can be cut: a table from style name to the function that makes this rank's part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from meshloom.parallel.linear import ColumnParallelLinear, RowParallelLinear
from meshloom.parallel.shard import Shard, Share, mark


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape:
    """What a linear layer looks like, whichever class it is of."""

    in_features: int
    out_features: int
    input_major: bool  # weight (in, out) as in HF's Conv1D


def linear_shape(module: nn.Module) -> LinearShape | None:
    """The shape of a linear layer, None if the module is none: `nn.Linear`, or Conv1D by its nx, nf and weight."""
    if isinstance(module, nn.Linear):
        return LinearShape(in_features=module.in_features, out_features=module.out_features, input_major=False)
    nx, nf, weight = (getattr(module, name, None) for name in ("nx", "nf", "weight"))
    if isinstance(nx, int) and isinstance(nf, int) and isinstance(weight, Tensor) and weight.shape == (nx, nf):
        return LinearShape(in_features=nx, out_features=nf, input_major=True)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which part of a layer a rank takes: of `num_blocks` blocks part `index` of `degree`, shared by `num_copies`.

    `share` says how many of the features' units each rank holds; without it they are divided one by one.
    """

    num_blocks: int
    num_copies: int
    share: Share | None = None
    group: dist.ProcessGroup
    index: int
    degree: int

    def shard(self, dim: int, size: int) -> Shard:
        """How a parameter of `size` entries in `dim` is cut there."""
        block = size // self.num_blocks
        if self.num_copies > 1:
            unit = block // (self.degree // self.num_copies)
            return Shard(dim=dim, num_blocks=self.num_blocks, num_copies=self.num_copies, unit=unit)
        if self.share is None:
            return Shard(dim=dim, num_blocks=self.num_blocks)
        unit = block // self.share.num_units
        return Shard(dim=dim, num_blocks=self.num_blocks, unit=unit, num_groups=self.share.num_groups)


Style = Callable[[nn.Module, LinearShape, Part], nn.Module]


def _column(module: Any, shape: LinearShape, part: Part) -> nn.Module:
    index, degree = part.index, part.degree
    weight_shard = part.shard(1 if shape.input_major else 0, shape.out_features)
    bias_shard = part.shard(0, shape.out_features)
    bias = None if module.bias is None else bias_shard.take(module.bias.detach(), index, degree)
    weight = weight_shard.take(module.weight.detach(), index, degree)
    cut = ColumnParallelLinear(weight, bias, part.group, shape.input_major)
    mark(cut.weight, weight_shard)
    if cut.bias is not None:
        mark(cut.bias, bias_shard)
    return cut


def _row(module: Any, shape: LinearShape, part: Part) -> nn.Module:
    shard = part.shard(0 if shape.input_major else 1, shape.in_features)
    bias = None if module.bias is None else module.bias.detach().clone()
    weight = shard.take(module.weight.detach(), part.index, part.degree)
    cut = RowParallelLinear(weight, bias, part.group, shape.input_major)
    mark(cut.weight, shard)
    return cut


def cut_linear(style: str, module: Any, part: Part) -> nn.Module:
    """This rank's part of a linear layer, in a style of `STYLES`; what was frozen stays frozen."""
    shape = linear_shape(module)
    assert shape is not None, module
    cut = STYLES[style](module, shape, part)
    for name, parameter in cut.named_parameters():
        parameter.requires_grad_(getattr(module, name).requires_grad)
    return cut


STYLES: dict[str, Style] = {"column": _column, "row": _row}
