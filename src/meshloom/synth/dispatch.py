"""Watch the ops of a step below autograd and hand them to a `TraceBuilder`.

Every op is seen once, after composite ops have been taken apart. Dependencies follow storages: a view reads and
writes its part of the storage it shares. Scopes of `record_function` tell the phase, module hooks the module; a
backward op belongs to the module whose forward made its autograd node. Memory is that of storages: an op allocates
those that it is the first to write, and releases those that nobody holds once it is over.
"""

from __future__ import annotations

import gc
from bisect import bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meshloom.chakra import cost
from meshloom.chakra.build import Region, TraceBuilder
from meshloom.chakra.trace import CommType
from meshloom.errors import PlanError
from meshloom.model.step import PHASE
from meshloom.parallel.fake import tensors_among
from meshloom.parallel.pipeline import MESSAGE
from meshloom.synth.known import Results, as_kernels_lay_it, results_of, signature
from meshloom.synth.memory import Memory


class Group(NamedTuple):
    """The ranks of a process group and the axis of the plan that it lies along."""

    ranks: tuple[int, ...]
    axis: str


# op -> what it is, and where its input tensors stand among the arguments; the output is what it returns or changes
_COLLECTIVES: dict[str, tuple[CommType, int]] = {
    "_c10d_functional::all_reduce": (CommType.ALL_REDUCE, 0),
    "_c10d_functional::all_reduce_": (CommType.ALL_REDUCE, 0),
    "_c10d_functional::all_gather_into_tensor": (CommType.ALL_GATHER, 0),
    "_c10d_functional::reduce_scatter_tensor": (CommType.REDUCE_SCATTER, 0),
    "_c10d_functional::all_to_all_single": (CommType.ALL_TO_ALL, 0),
    "_c10d_functional::broadcast": (CommType.BROADCAST, 0),
    "c10d::allreduce_": (CommType.ALL_REDUCE, 0),
    "c10d::broadcast_": (CommType.BROADCAST, 0),
    "c10d::_allgather_base_": (CommType.ALL_GATHER, 1),
    "c10d::_reduce_scatter_base_": (CommType.REDUCE_SCATTER, 1),
}


_DEVICE = torch.ops.prim.device.default


class _Facts(NamedTuple):
    """What a trace tells of an op; numbers mean its tensor arguments and, after those, its results."""

    name: str
    cost: cost.Cost
    inputs: list[cost.Tensor]
    outputs: list[cost.Tensor]
    dtype: str
    changed: list[int]
    reads: list[tuple[int, int, int]]  # which one, and the bytes of its storage
    writes: list[tuple[int, int, int]]


class _Known(NamedTuple):
    """What is known of an op on tensors of some shapes; without results it must be asked each time."""

    results: Results | None
    facts: _Facts


_REDUCTIONS = ("sum", "avg", "product", "min", "max")  # in the order of torch's RedOpType


class StepWatcher(TorchDispatchMode):
    """Hands every op that runs within it to `builder`; `groups` names each process group's ranks and axis."""

    def __init__(self, builder: TraceBuilder, groups: Mapping[str, Group], paths: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._builder = builder
        self._groups = groups
        self._paths = paths
        self.marks: list[tuple[str, int]] = []  # each phase that began, and how many nodes there were
        self.memory = Memory()
        self._known: dict[Hashable, _Known] = {}
        self._scopes: list[str] = []
        self._next: Callable[..., int] | None = None  # adds the node that was seen last, once it is known what it frees
        self._num_nodes = self._released = 0
        self._modules: list[str] = []
        self._made_in: tuple[list[int], list[str]] = ([], [])  # autograd sequence number from which -> module

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """These tensors are there before anything runs, and stay."""
        for tensor in tensors:
            self.memory.hold(tensor.untyped_storage())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within this, ops and modules are seen."""
        handles = [
            module_hooks.register_module_forward_pre_hook(self._enter_module),
            # a stage of a pipeline ends its forward with an exception
            module_hooks.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        was_on = gc.isenabled()
        gc.freeze()  # what is collected below, where a phase ends, then takes no time
        gc.disable()  # and nothing is released at a moment that depends on other things
        try:
            with self:
                yield
            self._flush()
        finally:
            gc.unfreeze()
            if was_on:
                gc.enable()
            for handle in handles:
                handle.remove()

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        self._modules.append(self._paths.get(id(module), self._modules[-1] if self._modules else ""))
        self._note_module()

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        self._modules.pop()
        self._note_module()

    def _note_module(self) -> None:
        numbers, modules = self._made_in
        numbers.append(torch._C._autograd._get_sequence_nr())
        modules.append(self._modules[-1] if self._modules else "")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to say so at every op takes time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # what fake tensors are asked for most often
        kwargs = kwargs or {}
        if func.namespace == "aten":
            return self._compute(func, args, kwargs)
        name = func._schema.name
        if name == "profiler::_record_function_enter_new":
            self._scopes.append(args[0])
            if args[0].startswith(PHASE):
                self._flush()
                self.marks.append((args[0].removeprefix(PHASE), self._num_nodes))
        elif name == "profiler::_record_function_exit" and self._scopes.pop().startswith(PHASE):
            gc.collect()
            self._flush()
        if func.namespace in ("profiler", "prim"):
            return func(*args, **kwargs)
        if func.namespace not in ("c10d", "_c10d_functional"):
            return self._compute(func, args, kwargs)
        out = func(*args, **kwargs)
        if name == "_c10d_functional::wait_tensor":
            # On fake tensors this returns other memory; in truth it is the same.
            self.memory.alias(out.untyped_storage(), args[0].untyped_storage())
        elif name in _COLLECTIVES:
            self._communicate(name, args, kwargs, out)
        elif name in ("c10d::send", "c10d::recv_"):
            self._message(name, args)
        else:
            raise PlanError(f"{name} is a collective that synthesis does not know")
        return out

    def _attrs(self) -> dict[str, Any]:
        phase = next((scope.removeprefix(PHASE) for scope in reversed(self._scopes) if scope.startswith(PHASE)), "")
        module = self._modules[-1] if self._modules else ""
        node = torch._C._current_autograd_node()
        if phase == "backward" and node is not None:
            numbers, modules = self._made_in
            place = bisect_right(numbers, node._sequence_nr()) - 1
            module = modules[place] if place >= 0 else ""
        return {"phase": phase, "module": module}

    def _add(self, node: Callable[..., int]) -> None:
        """Note a node, which is added when the next one comes."""
        self._flush()
        self._next = partial(node, memory_allocated=self.memory.allocated() or "")
        self._num_nodes += 1

    def _flush(self) -> None:
        self._released += self.memory.released()
        if self._next is not None:
            self._next(memory_released=self._released or "")
            self._released = 0
        self._next = None

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op that is no communication, or what it did before on tensors like these, and note it."""
        seen = signature(func, args, kwargs)
        inputs = tensors_among((*args, *kwargs.values())) if seen is None else seen[1]
        known = self._known.get(seen[0]) if seen is not None else None
        if known is not None and known.results is not None:
            out, facts = known.results.make(inputs), known.facts
        else:
            before = [tensor.shape for tensor in inputs]
            out = as_kernels_lay_it(func, args, func(*args, **kwargs))
            facts = _facts(func, args, kwargs, inputs, out)
            if seen is not None and known is None:
                self._known[seen[0]] = _Known(results_of(func, inputs, before, out), facts)
        storages = [tensor.untyped_storage() for tensor in (*inputs, *tensors_among((out,)))]
        key = self.memory.key
        for place in facts.changed:
            key(storages[place], is_read=False)  # what is new is allocated, though it counts as read as well
        if facts.cost.op_class == "host":
            return out
        node = partial(
            self._builder.compute,
            facts.name,
            cost=facts.cost,
            inputs=facts.inputs,
            outputs=facts.outputs,
            reads=[Region(key(storages[place], is_read=True), begin, end) for place, begin, end in facts.reads],
            writes=[Region(key(storages[place], is_read=False), begin, end) for place, begin, end in facts.writes],
            lane="compute",
            dtype=facts.dtype,
            **self._attrs(),
        )
        self._add(node)
        return out

    def _communicate(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        comm_type, source = _COLLECTIVES[name]
        sent = [leaf for leaf in tree_leaves(args[source]) if isinstance(leaf, Tensor)]
        received = [
            leaf for leaf in tree_leaves(out if name.startswith("_c10d_f") else args[0]) if isinstance(leaf, Tensor)
        ]
        group = self._groups[_group_name(args, kwargs)]
        node = partial(
            self._builder.collective,
            name,
            comm_type=comm_type,
            ranks=group.ranks,
            axis=group.axis,
            num_bytes=sum(_shape(tensor).num_bytes for tensor in sent),
            output_bytes=sum(_shape(tensor).num_bytes for tensor in received),
            dtype=_dtype(sent),
            reduction=_reduction(name, args),
            reads=[self._region(tensor, is_read=True) for tensor in sent],
            writes=[self._region(tensor) for tensor in received],
            **self._attrs(),
        )
        self._add(node)

    def _message(self, name: str, args: Any) -> None:
        """A send or receive: which ranks it joins stands in the scope around it."""
        tensors, _, _, tag = args
        ends = next(scope.removeprefix(MESSAGE) for scope in reversed(self._scopes) if scope.startswith(MESSAGE))
        source, _, destination = ends.partition(">")
        regions = [self._region(tensor, is_read=name == "c10d::send") for tensor in tensors]
        node = partial(
            self._builder.message,
            name,
            source=int(source),
            destination=int(destination),
            tag=int(tag),
            num_bytes=sum(_shape(tensor).num_bytes for tensor in tensors),
            reads=regions if name == "c10d::send" else (),
            writes=regions if name == "c10d::recv_" else (),
            dtype=_dtype(tensors),
            comm_axis="pp",
            **self._attrs(),
        )
        self._add(node)

    def _region(self, tensor: Tensor, *, is_read: bool = False) -> Region:
        return Region(self.memory.key(tensor.untyped_storage(), is_read=is_read), *_extent(tensor))


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The bytes of its storage that the tensor looks at, from the first to behind the last."""
    begin = int(tensor.storage_offset()) * tensor.itemsize
    if not tensor.numel():
        return begin, begin
    extent = 1 + sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride()))
    return begin, begin + extent * tensor.itemsize


def _facts(func: Any, args: Any, kwargs: Any, inputs: Sequence[Tensor], out: Any) -> _Facts:
    """What a trace tells of an op."""
    results = tensors_among((out,))
    changed = list(_changed(func._schema, args, kwargs))
    more = [tensor for tensor in changed if not any(tensor is result for result in results)]
    among = [*inputs, *results]
    written = [*results, *more]
    shapes, outputs = [_shape(tensor) for tensor in inputs], [_shape(tensor) for tensor in written]
    name = func._schema.name
    return _Facts(
        name=name,
        cost=cost.cost(name, shapes, outputs),
        inputs=shapes,
        outputs=outputs,
        dtype=_dtype(written or list(inputs)),
        changed=[_place(tensor, inputs) for tensor in changed],
        reads=[(place, *_extent(tensor)) for place, tensor in enumerate(inputs)],
        writes=[(_place(tensor, among), *_extent(tensor)) for tensor in written],
    )


def _place(tensor: Tensor, among: Sequence[Tensor]) -> int:
    return next(place for place, other in enumerate(among) if other is tensor)


def _shape(tensor: Tensor) -> cost.Tensor:
    return cost.Tensor(tuple(tensor.shape), tensor.itemsize)


def _dtype(tensors: list[Tensor]) -> str:
    return str(tensors[0].dtype).removeprefix("torch.") if tensors else ""


def _changed(schema: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that the op changes in place, as its schema says."""
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _reduction(name: str, args: Any) -> str:
    """What a collective makes of several numbers: functional ones say it in text, c10d ops take torch's ReduceOp."""
    for arg in args[1:]:
        if isinstance(arg, str) and arg in _REDUCTIONS:
            return arg
        if isinstance(arg, torch.ScriptObject) and "ReduceOp" in str(arg._type()):
            return _REDUCTIONS[int(arg.op())]  # type: ignore[attr-defined]
    return "sum" if "reduce" in name else ""


def _group_name(args: Any, kwargs: Any) -> str:
    """The group's name: functional collectives take it as their last text, c10d ops take the group itself."""
    for arg in (*reversed(list(kwargs.values())), *reversed(args)):
        if isinstance(arg, str):
            return arg
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return str(dist.ProcessGroup.unbox(arg).group_name)
    raise AssertionError("a collective without a group")
