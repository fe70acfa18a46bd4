"""Linear layers cut over a tensor-parallel group, and the two collectives at the borders of a cut region.

Column then row is Megatron-LM's pair (Shoeybi et al. 2019, section 3): the first layer's output features and the
second's input features are cut alike, so one all-reduce in forward and one in backward serve both. Works on real,
meta and fake tensors. Knows nothing of models.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

_functional = torch.ops._c10d_functional


class _EnterRegion(torch.autograd.Function):
    """Forward: nothing. Backward: sum the gradients that the ranks' parts of the region send back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.group_name), None


class _LeaveRegion(torch.autograd.Function):
    """Forward: sum the ranks' parts. Backward: nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group_name: str) -> Tensor:
        return all_reduce(x, group_name)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def all_reduce(x: Tensor, group_name: str, reduction: str = "sum") -> Tensor:
    """x reduced over the group, in new memory; no gradient passes."""
    result: Tensor = _functional.wait_tensor(_functional.all_reduce(x.contiguous(), reduction, group_name))
    return result


def enter_region(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x as every rank of `group` holds it, on its way into a cut region: its gradient is summed over the group."""
    result: Tensor = _EnterRegion.apply(x, group.group_name)  # type: ignore[no-untyped-call]
    return result


class Entrance:
    """Where a cut region begins: layers that get the same tensor enter with it once, so its gradient is summed once.

    Query, key and value then cost one all-reduce in backward, not three.
    """

    always = False  # enter even where there is no gradient to sum

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._last: tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x (…, I), whole on every rank -> the same x, within the region."""
        if not self.always and not (x.requires_grad and torch.is_grad_enabled()):
            return x
        if torch.compiler.is_compiling():  # it merges equal calls itself
            return self.enter(x)
        if self._last is not None:
            before, version, entered = self._last
            known = entered()
            if before() is x and version == x._version and known is not None:
                return known
        result = self.enter(x)
        self._last = weakref.ref(x), x._version, weakref.ref(result)
        return result

    def enter(self, x: Tensor) -> Tensor:
        """x within the region."""
        return enter_region(x, self.group)


def leave_region(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over `group` of each rank's part x; every rank goes on with the same tensor."""
    result: Tensor = _LeaveRegion.apply(x, group.group_name)  # type: ignore[no-untyped-call]
    return result


class Border(nn.Module):
    """A crossing into or out of a region that lies outside of the cut layers.

    It is a module of its own, so that whoever watches the model's ops knows which are not the model's.
    """

    def __init__(self, crossing: Any, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.crossing, self.group = crossing, group

    def forward(self, x: Tensor) -> Tensor:
        """x on the other side."""
        result: Tensor = self.crossing.apply(x, self.group)
        return result


class CutLinear(nn.Module):
    """A slice of a linear layer. `input_major`: the weight is (in, out), as in HF's Conv1D, and not (out, in)."""

    def __init__(self, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup, input_major: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.group = group
        self.input_major = input_major

    def extra_repr(self) -> str:
        """Shapes of this rank's part."""
        return f"weight={tuple(self.weight.shape)}, input_major={self.input_major}, bias={self.bias is not None}"

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not self.input_major:
            return functional.linear(x, self.weight, bias)
        flat = x.reshape(-1, x.size(-1))
        out = flat @ self.weight if bias is None else torch.addmm(bias, flat, self.weight)
        return out.view(*x.shape[:-1], out.size(-1))


class ColumnParallelLinear(CutLinear):
    """(…, I) -> (…, O/tp): this rank's output features; the input is the same on every rank."""

    def __init__(self, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup, input_major: bool) -> None:
        super().__init__(weight, bias, group, input_major)
        self.entrance = Entrance(group)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, I) -> (…, O/tp)."""
        return self._product(self.entrance(x), self.bias)


class RowParallelLinear(CutLinear):
    """(…, I/tp) -> (…, O): this rank's input features; the result is summed, then the bias added once."""

    leave = staticmethod(leave_region)  # how the sum is made; with sequence parallel, each rank keeps its tokens of it

    def forward(self, x: Tensor) -> Tensor:
        """x (…, I/tp) -> (…, O)."""
        out = self.leave(self._product(x, None), self.group)
        return out if self.bias is None else out + self.bias
