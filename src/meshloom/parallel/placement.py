"""Where the tensors that a rank holds lie in those of the whole model, under the whole model's names.

What initialises, loads and saves a rank's part goes by this alone: it need not know why a parameter was cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor, nn

from meshloom.parallel.mesh import Mesh
from meshloom.parallel.pipeline import Pipeline
from meshloom.parallel.shard import shard_of

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """A tensor that holds the index `ranges` (begin, end) of `dim` of a whole of `shape`, one after the other."""

    tensor: Tensor
    shape: Shape
    dim: int
    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def whole(cls, tensor: Tensor) -> Placed:
        """A tensor that is all of itself."""
        shape = tuple(tensor.shape)
        return cls(tensor=tensor, shape=shape, dim=0, ranges=((0, shape[0]),) if shape else ((0, 1),))

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left out."""
        return not self.shape or self.ranges == ((0, self.shape[self.dim]),)

    def like(self, tensor: Tensor) -> Placed:
        """Another tensor that lies where this one does."""
        return replace(self, tensor=tensor)

    def boxes(self) -> list[tuple[Shape, Shape, Tensor]]:
        """(offsets in the whole, sizes, the part of the tensor) of each range that holds anything."""
        if not self.shape:
            return [((), (), self.tensor)]
        found, place = [], 0
        for begin, end in self.ranges:
            offsets = (*(0 for _ in self.shape[: self.dim]), begin, *(0 for _ in self.shape[self.dim + 1 :]))
            sizes = (*self.shape[: self.dim], end - begin, *self.shape[self.dim + 1 :])
            if prod(sizes) or not prod(self.shape):
                found.append((offsets, sizes, self.tensor.narrow(self.dim, place, end - begin)))
            place += end - begin
        return found

    def put(self, flat: Tensor, begin: int) -> None:
        """Copy into the tensor what it holds of `flat`, which is the whole, flattened, from element `begin` on.

        The tensor must be contiguous.
        """
        size = self.shape[self.dim] if self.shape else 1
        inner = prod(self.shape[self.dim + 1 :])
        row, end = size * inner, begin + flat.numel()
        held = self.tensor.view(-1, sum(stop - start for start, stop in self.ranges), inner)
        at = begin
        while at < end:
            outer, within = divmod(at, row)
            count = 0 if within else (end - at) // row
            if count:  # whole rows: all of them at once
                rows = flat[at - begin : at - begin + count * row].view(count, size, inner)
                place = 0
                for start, stop in self.ranges:
                    held[outer : outer + count, place : place + stop - start] = rows[:, start:stop]
                    place += stop - start
                at += count * row
                continue
            until = min(end, (outer + 1) * row)
            place = 0
            for start, stop in self.ranges:
                low, high = outer * row + start * inner, outer * row + stop * inner
                first, last = max(at, low), min(until, high)
                if first < last:
                    there = place * inner + first - low
                    held[outer].view(-1)[there : there + last - first] = flat[first - begin : last - begin]
                place += stop - start
            at = until


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A flat tensor of the elements of another from its element `begin` on, which lies in a whole as `placed`."""

    tensor: Tensor
    placed: Placed
    begin: int

    @property
    def shape(self) -> Shape:
        """That of the whole."""
        return self.placed.shape

    def like(self, tensor: Tensor) -> Run:
        """Another tensor that lies where this one does."""
        return replace(self, tensor=tensor)

    def boxes(self) -> list[tuple[Shape, Shape, Tensor]]:
        """(offsets in the whole, sizes, the part of the tensor) of each block of elements."""
        placed, found, place = self.placed, [], 0
        if not placed.shape:
            return [((), (), self.tensor.view(()))]
        for offsets, sizes in _blocks(tuple(placed.tensor.shape), self.begin, self.begin + self.tensor.numel()):
            block = self.tensor[place : place + prod(sizes)].view(sizes)
            place += block.numel()
            low, first = offsets[placed.dim], 0  # of a range, counted in what is held
            for begin, end in placed.ranges:
                start, stop = max(low, first), min(low + sizes[placed.dim], first + end - begin)
                if start < stop:
                    where = (*offsets[: placed.dim], begin + start - first, *offsets[placed.dim + 1 :])
                    what = (*sizes[: placed.dim], stop - start, *sizes[placed.dim + 1 :])
                    found.append((where, what, block.narrow(placed.dim, start - low, stop - start)))
                first += end - begin
        return found


def _blocks(shape: Shape, begin: int, end: int) -> list[tuple[Shape, Shape]]:
    """(offsets, sizes) of the blocks of a tensor that hold its elements `begin` to `end`, in their order."""
    found: list[tuple[Shape, Shape]] = []
    inner = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    at = begin
    while at < end:
        dim = next(dim for dim, size in enumerate(inner) if at % size == 0 and at + size <= end)
        offsets = tuple(at // size % length for size, length in zip(inner, shape, strict=True))
        count = min((end - at) // inner[dim], shape[dim] - offsets[dim])
        found.append((offsets, (*(1 for _ in shape[:dim]), count, *shape[dim + 1 :])))
        at += count * inner[dim]
    return found


def placed_parameters(model: nn.Module, mesh: Mesh, shapes: Mapping[str, Shape]) -> dict[str, Placed]:
    """The parameters that this rank holds of a cut model, by the names that `shapes`, of the whole model, has for them.

    A parameter that stands in several places has its first name, as in `named_parameters`.
    """
    inner = model.model if isinstance(model, Pipeline) else model
    assert isinstance(inner, nn.Module)
    found: dict[str, Placed] = {}
    for name, parameter in inner.named_parameters():
        shape, shard = shapes[name], shard_of(parameter)
        if shard is None:
            found[name] = Placed.whole(parameter)
            continue
        ranges = tuple(shard.ranges(shape[shard.dim], mesh.index("tp"), mesh.degree("tp")))
        found[name] = Placed(tensor=parameter, shape=shape, dim=shard.dim, ranges=ranges)
        expected = shard.shape(shape, mesh.index("tp"), mesh.degree("tp"))
        assert tuple(parameter.shape) == expected, (name, parameter.shape, expected)
    return found
