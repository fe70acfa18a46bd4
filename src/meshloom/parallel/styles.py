"""The ways a linear layer can be cut: a table from style name to the function that makes this rank's part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from meshloom.parallel.linear import ColumnParallelLinear, RowParallelLinear
from meshloom.parallel.shard import Shard, mark


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
    """Which part of a layer a rank takes: of `num_blocks` blocks part `index` of `degree`, shared by `num_copies`."""

    num_blocks: int
    num_copies: int
    group: dist.ProcessGroup
    index: int
    degree: int


Style = Callable[[nn.Module, LinearShape, Part], nn.Module]


def _column(module: Any, shape: LinearShape, part: Part) -> nn.Module:
    index, degree = part.index, part.degree
    weight_shard = Shard(dim=1 if shape.input_major else 0, num_blocks=part.num_blocks, num_copies=part.num_copies)
    bias_shard = Shard(dim=0, num_blocks=part.num_blocks, num_copies=part.num_copies)
    bias = None if module.bias is None else bias_shard.take(module.bias.detach(), index, degree)
    weight = weight_shard.take(module.weight.detach(), index, degree)
    cut = ColumnParallelLinear(weight, bias, part.group, shape.input_major)
    mark(cut.weight, weight_shard)
    if cut.bias is not None:
        mark(cut.bias, bias_shard)
    return cut


def _row(module: Any, shape: LinearShape, part: Part) -> nn.Module:
    shard = Shard(dim=0 if shape.input_major else 1, num_blocks=part.num_blocks)
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
