"""How a parameter is cut over a tensor-parallel group: which index ranges of the whole a rank holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """How a parameter is cut: along `dim`, each of its `num_blocks` equal blocks by itself.

    A fused query-key-value weight has three blocks: each rank holds its part of all three. Where there are fewer heads
    than ranks, `num_copies` neighbours hold the same part. A unit of `unit` entries, such as a head, is never divided;
    where the degree does not divide the units, the first ranks hold one more. A block may fall into `num_groups`
    groups, each of them divided among as many ranks of its own.
    """

    dim: int
    num_blocks: int = 1
    num_copies: int = 1
    unit: int = 1
    num_groups: int = 1

    def ranges(self, size: int, index: int, degree: int) -> list[tuple[int, int]]:
        """The ranges (begin, end) of a dim of `size` entries that part `index` of `degree` holds, one a block."""
        ranks = degree // self.num_copies // self.num_groups
        group, place = divmod(index // self.num_copies, ranks)
        block = size // self.num_blocks
        units = block // self.num_groups // self.unit
        each, more = divmod(units, ranks)
        begin = (group * units + place * each + min(place, more)) * self.unit
        end = begin + (each + (place < more)) * self.unit
        return [(number * block + begin, number * block + end) for number in range(self.num_blocks)]

    def shape(self, shape: Sequence[int], index: int, degree: int) -> tuple[int, ...]:
        """The shape of part `index` of `degree` of a whole of `shape`."""
        held = sum(end - begin for begin, end in self.ranges(shape[self.dim], index, degree))
        return (*shape[: self.dim], held, *shape[self.dim + 1 :])

    def take(self, tensor: Tensor, index: int, degree: int) -> Tensor:
        """Part `index` of `degree` of the whole, in memory of its own."""
        ranges = self.ranges(tensor.size(self.dim), index, degree)
        parts = [tensor.narrow(self.dim, begin, end - begin) for begin, end in ranges]
        return (
            torch.cat(parts, dim=self.dim) if len(parts) > 1 else parts[0].clone(memory_format=torch.contiguous_format)
        )

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole of all parts, in the order of their ranks. The inverse of `take`."""
        pieces = [part.chunk(self.num_blocks, dim=self.dim) for part in parts[:: self.num_copies]]
        return torch.cat([piece for block in zip(*pieces, strict=True) for piece in block], dim=self.dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """How many of `num_units` heads or features each rank holds: alike, or the first ranks one more.

    Where fewer keys and values than ranks are shared by neighbours, the units come in `num_groups` groups, each divided
    among the ranks that share its key.
    """

    num_units: int
    num_groups: int = 1

    def held(self, index: int, degree: int) -> int:
        """The units of rank `index` of `degree`."""
        ranks = degree // self.num_groups
        each, more = divmod(self.num_units // self.num_groups, ranks)
        return each + (index % ranks < more)

    def of(self, size: int, index: int, degree: int) -> int:
        """What is left on rank `index` of a dim of `size` entries."""
        return size * self.held(index, degree) // self.num_units


def shard_of(parameter: Tensor) -> Shard | None:
    """How a parameter was cut, or None if every rank of the tensor-parallel group holds all of it."""
    return getattr(parameter, "tensor_shard", None)


def mark(parameter: nn.Parameter, shard: Shard) -> nn.Parameter:
    """Note on the parameter how it was cut; returns it."""
    parameter.tensor_shard = shard  # type: ignore[attr-defined]
    return parameter
