"""The certificate: loss and every gradient of a parallel model beside those of the model it was made from."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from meshloom.parallel.data import synced_gradients
from meshloom.parallel.fake import experts_of_known_shape
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.pipeline import Pipeline
from meshloom.parallel.shard import shard_of

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}
_SMALL = 1e-2  # a gradient that is 0 but for rounding, as a key's bias has, is held against this share of the largest


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """How far the parallel model is from the single one: the loss relative to the loss, the worst gradient relative to
    the largest entry of its tensor (at least a hundredth of the largest of all), and whose gradient that is."""

    loss: float
    gradient: float
    parameter: str
    num_parameters: int  # on this rank
    share: float  # of the single model's, that this rank holds

    def passes(self, tolerance: float) -> bool:
        """Whether both are within the tolerance."""
        return self.loss <= tolerance and self.gradient <= tolerance


class InDouble(TorchDispatchMode):
    """Within this, what is float64 stays so: transformers computes losses and norms in float32, whatever the model's
    type, and two orders of summation then differ by 1e-7 although they are equal."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("dtype") is torch.float32 and args and getattr(args[0], "dtype", None) is torch.float64:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


@contextmanager
def _in_double(model: nn.Module) -> Iterator[None]:
    with InDouble(), experts_of_known_shape(model):  # type: ignore[no-untyped-call]  # other experts know no float64
        yield


def backward_all(model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Forward and backward of all micro-batches; returns their mean loss, gradients are left on the parameters."""
    if isinstance(model, Pipeline):
        return model.run(batches)
    losses = []
    for index, batch in enumerate(batches):
        with synced_gradients(model, sync=index == len(batches) - 1):
            loss: Tensor = model(**batch).loss / len(batches)
            loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def certify(single: nn.Module, parallel: nn.Module, batches: Sequence[Mapping[str, Tensor]], mesh: Mesh) -> Certificate:
    """Compare the two on `batches`, all micro-batches of the step, of which this rank takes those of its place in dp.

    Both models hold the same weights; neither may have dropout. The worst of all ranks is returned on each.
    """
    in_double = next(single.parameters()).dtype is torch.float64
    with _in_double(single) if in_double else nullcontext():
        want = float(backward_all(single, [_copy(batch) for batch in batches]))
    degree, index = mesh.degree("dp"), mesh.index("dp")
    each = len(batches) // degree
    mine = [_copy(batch) for batch in batches[index * each : (index + 1) * each]]
    with _in_double(parallel) if in_double else nullcontext():
        loss = backward_all(parallel, mine).detach().double()
    if "dp" in mesh.groups:
        dist.all_reduce(loss, group=mesh.groups["dp"])
        loss /= degree
    gradients = {name: parameter.grad for name, parameter in single.named_parameters()}
    largest = max((float(g.abs().max()) for g in gradients.values() if g is not None and g.numel()), default=0.0)
    inner = parallel.model if isinstance(parallel, Pipeline) else getattr(parallel, "module", parallel)
    worst, where, held = 0.0, "", 0
    for name, parameter in inner.named_parameters():
        held += parameter.numel()
        expected, shard = gradients[name], shard_of(parameter)
        if expected is None:
            expected = torch.zeros(1, dtype=parameter.dtype)
        elif shard is not None:
            expected = shard.take(expected, mesh.index("tp"), mesh.degree("tp"))
        got = torch.zeros_like(expected) if parameter.grad is None else parameter.grad
        scale = max(float(expected.abs().max()) if expected.numel() else 0.0, _SMALL * largest)
        error = float((got - expected).abs().max()) / scale if scale and expected.numel() else 0.0
        if error > worst or error != error:
            worst, where = error, name
    whole = sum(parameter.numel() for parameter in single.parameters())
    mine_certificate = Certificate(
        loss=abs(float(loss) - want) / max(abs(want), 1e-30),
        gradient=worst,
        parameter=where,
        num_parameters=held,
        share=held / max(1, whole),
    )
    everyone: list[Certificate | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine_certificate)
    return max((item for item in everyone if item is not None), key=lambda item: (item.gradient, item.loss))


def rounding(single: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """The worst error of the gradients that `single`, in float32, has by itself: against the same model in float64.

    Relative to the same scales as a certificate's. It has the gradients of the same batches already. Infinite where
    the model does not run in float64.
    """
    gradients = {name: parameter.grad for name, parameter in single.named_parameters() if parameter.grad is not None}
    twin = copy.deepcopy(single).double()
    twin.zero_grad()
    try:
        with experts_of_known_shape(twin):  # others know no float64
            backward_all(twin, [_copy(batch) for batch in batches])
    except RuntimeError:
        return float("inf")
    largest = max((float(g.abs().max()) for g in gradients.values() if g.numel()), default=0.0)
    worst = 0.0
    for name, parameter in twin.named_parameters():
        if name in gradients and parameter.grad is not None and parameter.numel():
            scale = max(float(parameter.grad.abs().max()), _SMALL * largest)
            worst = max(worst, float((gradients[name] - parameter.grad).abs().max()) / scale if scale else 0.0)
    return worst


def _copy(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Some models change their batch."""
    return {name: value.clone() for name, value in batch.items()}
