"""Linear layers cut over a tensor-parallel group, and the two collectives at the borders of a cut region.

Column then row is Megatron-LM's pair (Shoeybi et al. 2019, section 3): the first layer's output features and the
second's input features are cut alike, so one all-reduce in forward and one in backward serve both. Columns that read
the same tensor, such as query, key and value, enter their region together: their gradients are added up on the rank
before the group sums them, and the sum is under way while the first of them computes its weight's gradient. Works on
real, meta and fake tensors. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

_functional = torch.ops._c10d_functional
_all_reduce_op = _functional.all_reduce.default
_all_reduce_in_place_op = _functional.all_reduce_.default
_wait_op = _functional.wait_tensor.default


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


class _EnterByProduct(torch.autograd.Function):
    """The product of the first column that reads x, and x itself for the columns that read it after.

    Backward runs when the gradients of all of them are there; the weight's gradient is computed while the sum of the
    input's is under way.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group_name: str, input_major: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.group_name, ctx.input_major, ctx.has_bias = group_name, input_major, bias is not None
        entered = x.detach()  # of one storage, but no view: x keeps `entered`, which must not keep x
        ctx.save_for_backward(entered, weight)
        return _product(entered, weight, bias, input_major), entered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_out, of_entered = grads
        if of_out is None:  # nobody used this column's output
            assert of_entered is not None
            return all_reduce(of_entered, ctx.group_name), None, None, None, None
        flat = of_out.reshape(-1, of_out.size(-1))  # (B·T, O/tp)
        back = weight.t() if ctx.input_major else weight  # (O/tp, I)
        if of_entered is None:
            of_x = flat @ back
        else:
            of_x = torch.addmm(of_entered.reshape(-1, of_entered.size(-1)), flat, back)
        of_x = _all_reduce_in_place_op(of_x, "sum", ctx.group_name)
        of_weight = of_bias = None
        if ctx.needs_input_grad[1]:
            rows = x.reshape(-1, x.size(-1))  # (B·T, I)
            of_weight = rows.t() @ flat if ctx.input_major else flat.t() @ rows
        if ctx.has_bias and ctx.needs_input_grad[2]:
            of_bias = flat.sum(0)
        return _wait_op(of_x).view(x.shape), of_weight, of_bias, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, input_major: bool) -> Tensor:
    if not input_major:
        return functional.linear(x, weight, bias)
    if not torch.is_grad_enabled():  # one call in the place of three, to the same kernel
        return functional.linear(x, weight.t(), bias)
    flat = x.reshape(-1, x.size(-1))
    out = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
    return out.view(*x.shape[:-1], out.size(-1))


def all_reduce(x: Tensor, group_name: str, reduction: str = "sum") -> Tensor:
    """x reduced over the group, in new memory; no gradient passes."""
    result: Tensor = _wait_op(_all_reduce_op(x.contiguous(), reduction, group_name))
    return result


def enter_region(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x as every rank of `group` holds it, on its way into a cut region: its gradient is summed over the group."""
    result: Tensor = _EnterRegion.apply(x, group.group_name)  # type: ignore[no-untyped-call]
    return result


def leave_region(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over `group` of each rank's part, on every rank; x must be a fresh product: the sum takes its memory."""
    if torch.compiler.is_compiling():  # which finds out by itself what may take whose memory
        result: Tensor = _LeaveRegion.apply(x, group.group_name)  # type: ignore[no-untyped-call]
        return result
    # Nothing happens in backward, and a product's backward needs not its result: so autograd need not know.
    _wait_op(_all_reduce_in_place_op(x.detach(), "sum", group.group_name))
    return x


class Border(nn.Module):
    """A crossing into or out of a region that lies outside of the cut layers.

    It is a module of its own, so that whoever watches the model's ops knows which are not the model's.
    """

    def __init__(self, crossing: Any, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.crossing, self.group = crossing, group

    def forward(self, x: Tensor) -> Tensor:
        """x on the other side."""
        result: Tensor = self.crossing(x, self.group)
        return result


Crossing = Callable[[Tensor], Tensor]


class _Entered(NamedTuple):
    """x inside of a region, as it was at `version`; its first column, which would enter it again, is `owner`."""

    tensor: Tensor
    owner: nn.Module
    group_name: str
    version: int


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


class ColumnParallelLinear(CutLinear):
    """(…, I) -> (…, O/tp): this rank's output features; the input is the same on every rank.

    `enter` is set where the input is a part of the sequence: what gathers it.
    """

    enter: Crossing | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (…, I) -> (…, O/tp)."""
        if self.enter is not None:
            return _product(self.enter(x), self.weight, self.bias, self.input_major)
        if not (x.requires_grad and torch.is_grad_enabled()):
            return _product(x, self.weight, self.bias, self.input_major)
        group_name = self.group.group_name
        # A compiler sees no Python attributes, and autocast no products inside of autograd functions; a leaf is kept
        # alive by what is computed from it, so it must not keep that.
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type) or x.is_leaf:
            return _product(enter_region(x, self.group), self.weight, self.bias, self.input_major)
        known: _Entered | None = getattr(x, "entered_region", None)
        # The owner enters anew: where activations are recomputed, it must do again what it did before.
        if known is None or known.owner is self or known.group_name != group_name or known.version != x._version:
            out, entered = _EnterByProduct.apply(x, self.weight, self.bias, group_name, self.input_major)  # type: ignore[no-untyped-call]
            x.entered_region = _Entered(entered, self, group_name, x._version)  # type: ignore[attr-defined]
            result: Tensor = out
            return result
        return _product(known.tensor, self.weight, self.bias, self.input_major)


class RowParallelLinear(CutLinear):
    """(…, I/tp) -> (…, O): this rank's input features; the result is summed, then the bias added once.

    `leave` is set where each rank goes on with its part of the sequence: what makes its part of the sum.
    """

    leave: Crossing | None = None
    bias_in_sum: Tensor | None = None  # (O): `add_bias_once` sets it

    def add_bias_once(self) -> None:
        """Let the group's first rank add the bias in its product and others zeros: one op less, and no gradient."""
        if isinstance(self.bias, nn.Parameter):  # else the layer is another stage's
            bias = self.bias.detach()
            self.bias_in_sum = bias if self.group.rank() == 0 else torch.zeros_like(bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (…, I/tp) -> (…, O)."""
        if self.bias_in_sum is not None:
            return leave_region(_product(x, self.weight, self.bias_in_sum, self.input_major), self.group)
        if self.leave is not None:
            out = self.leave(_product(x, self.weight, None, self.input_major))
        else:
            out = leave_region(_product(x, self.weight, None, self.input_major), self.group)
        return out if self.bias is None else out + self.bias
