"""Data parallel: gradients averaged over the group in buckets, while the backward pass still runs.

Real runs use torch's DistributedDataParallel. Its C++ reducer does not run on fake tensors, so `ReducerTwin` does the
same in Python for synthesis: the same buckets, in the same order, with the same ops. A test holds the two equal.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _DEFAULT_FIRST_BUCKET_BYTES, _compute_bucket_assignment_by_size
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from meshloom.parallel.mesh import Mesh
from meshloom.parallel.pipeline import Pipeline

# What DistributedDataParallel uses when it is not told otherwise: a small first bucket, so that the first
# all-reduce starts early, then 25 MiB.
_BUCKET_BYTES = (int(_DEFAULT_FIRST_BUCKET_BYTES), 25 * 1024 * 1024)


def data_parallel(model: nn.Module, mesh: Mesh) -> nn.Module:
    """`model` with its gradients averaged over the data-parallel group; itself where that has one rank, or it does so
    itself."""
    group = mesh.groups.get("dp")
    if group is None or isinstance(model, Pipeline):  # which reduces after its last backward pass
        return model
    unused: frozenset[str] | None = getattr(model, "unused_parameters", frozenset())
    # Those that no gradient reaches stay as they are on every rank; where values decide, each step looks.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(unused or ()))
    if isinstance(next(model.parameters()), FakeTensor):
        return ReducerTwin(model, group, unused or frozenset())
    device_ids = [mesh.device.index] if mesh.device.type == "cuda" else None
    with warnings.catch_warnings():
        # torch 2.13 renames broadcast_buffers, and 2.11 does not know the new name
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=device_ids,
            process_group=group,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            # as experts that get no token of this rank's batch
            find_unused_parameters=unused is None,
        )


@contextmanager
def synced_gradients(model: nn.Module, sync: bool) -> Iterator[None]:
    """Within this, backward averages gradients if `sync`; before the last micro-batch it only adds them up."""
    if sync or not isinstance(model, (DistributedDataParallel, ReducerTwin)):
        yield
    else:
        with model.no_sync():
            yield


def settle_buckets(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Let DistributedDataParallel lay its buckets as it does after its first backward pass; nothing else is changed.

    A run that goes on after some steps so adds gradients up in the order of the run before, to the bit.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    devices = [model.device] if model.device is not None and model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        model(**batch).loss.backward()
    model.zero_grad(set_to_none=True)


class ReducerTwin(nn.Module):
    """DistributedDataParallel in Python, for fake tensors.

    The first backward reduces everything in one bucket and notes in which order gradients become ready; from the
    second on, buckets follow that order, as DDP's do after it rebuilds them.
    """

    def __init__(self, module: nn.Module, group: dist.ProcessGroup, unused: frozenset[str]) -> None:
        super().__init__()
        self.module = module
        self._group = group
        self._sync = True
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad and name not in unused]
        self._parameters_in_order: list[Tensor] = [parameter for _, parameter in reversed(named)]
        self._buckets = [list(range(len(self._parameters_in_order)))]
        self._ready: list[Tensor] = []
        self._flat: dict[int, Tensor] = {}
        self._works: list[Any] = []
        self._rebuilt = False
        for parameter in self._parameters_in_order:
            parameter.register_post_accumulate_grad_hook(self._on_gradient)

    @property
    def buckets(self) -> list[Tensor]:
        """The memory through which gradients are averaged, held from one step to the next."""
        return list(self._flat.values())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped module returns."""
        return self.module(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within this, backward leaves gradients as they are."""
        self._sync, before = False, self._sync
        try:
            yield
        finally:
            self._sync = before

    def _on_gradient(self, parameter: Tensor) -> None:
        if not self._sync:
            return
        if not self._ready:
            Variable._execution_engine.queue_callback(self._finish)
        self._ready.append(parameter)
        place = {id(p): index for index, p in enumerate(self._parameters_in_order)}
        index = place[id(parameter)]
        number = next(number for number, bucket in enumerate(self._buckets) if index in bucket)
        self._copy_in(number, index)
        ready = {place[id(p)] for p in self._ready}
        # Buckets go out in their order, as every rank must send them alike.
        while len(self._works) < len(self._buckets) and ready.issuperset(self._buckets[len(self._works)]):
            bucket = self._flat[len(self._works)]
            self._works.append(dist.all_reduce(bucket, group=self._group, async_op=True))

    def _copy_in(self, number: int, index: int) -> None:
        bucket = self._buckets[number]
        sizes = [self._parameters_in_order[i].numel() for i in bucket]
        parameter = self._parameters_in_order[index]
        if number not in self._flat:
            self._flat[number] = parameter.new_empty(sum(sizes))
        begin = sum(sizes[: bucket.index(index)])
        view = self._flat[number][begin : begin + parameter.numel()].view_as(parameter)
        assert parameter.grad is not None
        torch.mul(parameter.grad, 1.0 / self._group.size(), out=view)
        parameter.grad = view

    def _finish(self) -> None:
        for work in self._works:
            work.wait()
        if not self._rebuilt:
            self._parameters_in_order = list(self._ready)
            buckets, _ = _compute_bucket_assignment_by_size(self._ready, list(_BUCKET_BYTES))
            self._buckets = [list(bucket) for bucket in buckets]
            self._rebuilt = True
            # DistributedDataParallel makes them here too, and keeps them
            sizes = [sum(self._ready[index].numel() for index in bucket) for bucket in self._buckets]
            self._flat = {number: self._ready[0].new_empty(size) for number, size in enumerate(sizes)}
        self._ready, self._works = [], []
