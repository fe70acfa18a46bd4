"""This rank's stages of a pipeline: the model's own forward, begun late and ended early, and the runner of a schedule.

Every stage runs the whole model's forward code. Layers before the stage hand on what came from the stage before; after
the stage's last layer the forward ends. So masks, positions and whatever else a model computes on its way is computed
where it is needed, and only what `flow` finds to cross the border is sent. Parameters that no part of the stage uses
are hollow: one element stretched to their shape. A parameter that stages on several ranks use (tied embeddings) is held
by each of them, and its gradients are summed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.profiler import record_function
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_unflatten

from meshloom.errors import PlanError
from meshloom.parallel.answers import Answers
from meshloom.parallel.average import average_gradients
from meshloom.parallel.fake import fake_copy
from meshloom.parallel.flow import Flow, Output, find_embeddings, held, trace_flow
from meshloom.parallel.mesh import Mesh
from meshloom.parallel.schedule import SCHEDULES, Action, play
from meshloom.parallel.stages import Stages

Phase = Callable[[str], AbstractContextManager[Any]]
MESSAGE = "message:"  # the prefix of scopes that name the ranks of a message, which PyTorch's traces count in its group


class _StageOver(Exception):
    """Raised after a stage's last layer: the rest of the forward belongs to other stages."""


class Pipeline(nn.Module):
    """This rank's stages of `model`, which is changed in place; `run` trains them on micro-batches.

    `stages` may have been found before the model's layers were cut, since that changes neither names nor flow. With
    `answers`, of a forward that decides by values, the shapes at borders may too: each message tells its shape before
    it. Every rank of the mesh must build it at the same point: it creates process groups.
    """

    def __init__(self, model: nn.Module, *, mesh: Mesh, stages: Stages, answers: Answers | None = None) -> None:
        super().__init__()
        plan = mesh.plan
        self.mesh, self.index, self.num_ranks = mesh, mesh.index("pp"), plan.pp
        self.num_stages = plan.pp * plan.virtual_stages
        self.depends_on_values = answers is not None
        self.flow, self.bounds = stages.flow, stages.bounds
        self.crossing = [self.flow.crossing(bound) for bound in self.bounds]
        self._sent = frozenset(output.layer for outputs in self.crossing for output in outputs)
        groups = [*mesh.groups.values(), *mesh.parts.values()]
        self._skeleton = (_skeleton(model, groups),)  # in a tuple: it is no part of this module
        self._known_shapes: dict[Any, Mapping[Output, Any]] = {}
        self._known_orders: dict[int, list[Action]] = {}
        self._hollows: list[tuple[nn.Module, str]] = []  # modules, and names of their parameters held elsewhere
        self._embeddings = find_embeddings(model)
        self.shared = self._share(model)
        self._install(model)
        self.model = model
        self._running: tuple[int, Mapping[Output, Tensor], dict[Output, Tensor]] | None = None
        self._called, self._within = 0, False  # calls of layers in the running forward; whether one runs now

    # -- which parameters this rank holds

    def _share(self, model: nn.Module) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
        """Hollow what other ranks hold; the parameters that several hold, each with the group of its holders."""
        holders = self._holders(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        held = {name: parameter for name, parameter in model.named_parameters() if self.index in holders[name]}
        groups: dict[tuple[int, ...], Any] = {}
        for name in sorted(holders):  # every rank makes every group, in one order
            where = tuple(sorted(holders[name]))
            if len(where) > 1 and where not in groups:
                groups[where] = self.mesh.part("pp", where)
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and names[id(parameter)] not in held:
                    del module._parameters[name]
                    module.__dict__[name] = _hollow(parameter)
                    self._hollows.append((module, name))
        for module in model.modules():
            if next(module.parameters(), None) is None and _hollows_in(module, self._hollows):
                # it may ask one of its parameters for the device or dtype
                module.__dict__["parameters"] = partial(_hollow_parameters, module, self._hollows)
        shared = []
        for name, parameter in held.items():
            where = tuple(sorted(holders[name]))
            if len(where) > 1:
                shared.append((parameter, groups[where]))
                parameter.counted_elsewhere = self.index != where[0]  # type: ignore[attr-defined]
        return shared

    def _holders(self, model: nn.Module) -> dict[str, set[int]]:
        """Parameter -> the pipeline ranks whose stages use it; what nobody uses stays on the first."""
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        holders: dict[str, set[int]] = {name: set() for name in names.values()}
        for stage in range(self.num_stages):
            begin, end = self.bounds[stage], self.bounds[stage + 1]
            used = set().union(*self.flow.parameters[begin : self._end_of(stage)])
            for path in self.flow.layers[begin:end]:
                used |= {names[id(parameter)] for parameter in model.get_submodule(path).parameters()}
            for name in used:
                holders[name].add(stage % self.num_ranks)
        # on other values the forward may use what it did not use here
        unused = set(range(self.num_ranks)) if self.depends_on_values else {0}
        return {name: where or unused for name, where in holders.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Pipeline:
        """Hollow tensors move to other devices and dtypes as parameters do."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for module, name in self._hollows:
            hollow = module.__dict__[name]
            module.__dict__[name] = fn(hollow.new_zeros(())).expand(hollow.shape)
        return self

    def _end_of(self, stage: int) -> int:
        """The part after the last one of a stage: the last stage has what follows the layers, too."""
        return self.bounds[stage + 1] + (stage == self.num_stages - 1)

    # -- the forward of one stage

    def _install(self, model: nn.Module) -> None:
        for path in dict.fromkeys((*self.flow.layers, *self.flow.unreached)):
            layer = model.get_submodule(path)
            layer.forward = partial(self._layer, path, layer.forward)

    def _layer(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the next call of a layer does in the running stage: its work, or handing on what was received."""
        if self._running is None or self._within:  # a layer that is computed again in backward, or calls another
            return forward(*args, **kwargs)
        stage, received, made = self._running
        index, self._called = self._called, self._called + 1
        expected = self.flow.layers[index] if index < len(self.flow.layers) else "no layer"
        if path != expected:
            raise PlanError(
                f"pipeline parallel: expected {expected} to run next, as on the example, but {path} does; layers must "
                "run in the same order for every batch"
            )
        begin, end = self.bounds[stage], self.bounds[stage + 1]
        if not begin <= index < end:
            return self._pass(index, received, args, kwargs)
        self._within = True
        try:
            out = forward(*args, **kwargs)
        finally:
            self._within = False
        if index in self._sent:
            now = dict(held(args, kwargs)) if self.flow.puts[index] else {}
            for leaf, value in enumerate(tree_leaves((out, [now[place] for place in self.flow.puts[index]]))):
                made[Output(index, leaf)] = value
        if index == end - 1 and stage < self.num_stages - 1:
            raise _StageOver
        return out

    def _pass(self, index: int, received: Mapping[Output, Tensor], args: Any, kwargs: Any) -> Any:
        spec = self.flow.returns[index]
        first = args[0] if args else None
        hidden = (
            first
            if isinstance(first, Tensor)
            else next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        )
        if spec.is_leaf():  # most layers return one tensor
            return received.get(Output(index, 0), hidden)
        leaves = [
            received.get(Output(index, leaf), hidden if Output(index, leaf) in self.flow.shapes else None)
            for leaf in range(spec.num_leaves)
        ]
        for leaf in range(spec.num_leaves):
            if Output(index, leaf) in received.keys() & self.flow.written:  # autograd lets nobody write into a leaf
                leaves[leaf] = received[Output(index, leaf)].clone()
        out, puts = tree_unflatten(leaves, spec)
        arguments = dict(enumerate(args)) | kwargs
        for place, value in zip(self.flow.puts[index], puts, strict=True):
            arguments[place.argument][place.key] = value
        return out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise PlanError: one rank has no whole forward."""
        raise PlanError(
            "pipeline parallel: expected micro-batches for a schedule, got one forward of one rank; call "
            "meshloom.train_step, or .run(micro_batches) and .loss_of(batch)"
        )

    def pass_stage(self, stage: int, batch: Mapping[str, Tensor], received: Mapping[Output, Tensor]) -> list[Tensor]:
        """What `stage` sends on; of the last stage [loss], or [logits] of a batch without labels."""
        made: dict[Output, Tensor] = dict(received)
        self._running, self._called = (stage, received, made), 0
        looked_up = frozenset().union(*self.flow.looked_up[self.bounds[stage] : self._end_of(stage)])
        for embedding, name in self._embeddings:  # the head may share the rows, which is no reason to look any up
            embedding.idle = name not in looked_up and not self.depends_on_values
        try:
            result = self.model(**batch)
        except _StageOver:
            return [made[output] for output in self.crossing[stage + 1]]
        finally:
            self._running = None
        return [result.logits if result.loss is None else result.loss]

    # -- the schedule

    def run(
        self,
        micro_batches: Sequence[Mapping[str, Tensor]],
        *,
        phase: Phase = lambda name: nullcontext(),
        seed: Tensor | None = None,
    ) -> Tensor:
        """Forward and backward of all micro-batches; returns their mean loss (), the same on every rank.

        Gradients are left on the parameters, summed over stages that share one, averaged over data parallel. They are
        `seed` times as large, () float32, if it is given.
        """
        runner = _Runner(self, micro_batches, phase, seed)
        for action in self._order(len(micro_batches)):
            runner.act(action)
        runner.finish()
        with phase("backward"):
            self._reduce()
        with phase("forward"):  # the last stage tells the others
            dist.all_reduce(runner.loss, group=self.mesh.groups["pp"])
        return runner.loss

    def loss_of(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss () of one batch, forward only, the same on every rank."""
        runner = _Runner(self, [batch], lambda name: nullcontext(), None)
        for stage in range(self.index, self.num_stages, self.num_ranks):
            runner.act(Action(kind="forward", stage=stage, micro_batch=0))
        runner.finish()
        dist.all_reduce(runner.loss, group=self.mesh.groups["pp"])
        return runner.loss

    def _order(self, num_micro_batches: int) -> list[Action]:
        """This rank's actions; an impossible order raises PlanError, before anything is sent."""
        if num_micro_batches not in self._known_orders:
            plan = self.mesh.plan
            schedule = SCHEDULES[plan.schedule](plan.pp, num_micro_batches, plan.virtual_stages)
            play(schedule)
            self._known_orders[num_micro_batches] = schedule[self.index]
        return self._known_orders[num_micro_batches]

    def _reduce(self) -> None:
        for parameter, group in self.shared:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=group)
        data_group = self.mesh.groups.get("dp")
        if data_group is not None:
            if self.depends_on_values:
                self._fill_gradients(data_group)
            average_gradients([p for p in self.parameters() if p.grad is not None], data_group)

    def _fill_gradients(self, group: dist.ProcessGroup) -> None:
        """Zeros where another rank's batch used a parameter and this rank's did not, as an expert without tokens."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        used = torch.tensor([parameter.grad is not None for parameter in parameters], device=self.mesh.device).int()
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)
        for parameter, by_any in zip(parameters, used.tolist(), strict=True):
            if by_any and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def know_shapes(self, batch: Mapping[str, Tensor], flow: Flow) -> None:
        """Batches of these shapes have the flow `flow`, which was found on one of them."""
        self._known_shapes[tuple((name, tuple(value.shape)) for name, value in batch.items())] = flow.shapes

    def shapes(self, batch: Mapping[str, Tensor]) -> Mapping[Output, tuple[tuple[int, ...], torch.dtype]]:
        """Shapes of what crosses borders for a batch of these shapes, from a fake forward of the whole model."""
        key = tuple((name, tuple(value.shape)) for name, value in batch.items())
        if key not in self._known_shapes:
            with _disable_current_modes():
                example = {
                    name: torch.empty(value.shape, dtype=value.dtype, device="meta") for name, value in batch.items()
                }
                try:
                    flow = trace_flow(self._skeleton[0], example)
                except Exception:  # whatever a forward does on meta that it does not on fake tensors
                    flow = trace_flow(fake_copy(self._skeleton[0]), example)
                self._known_shapes[key] = flow.shapes
        return self._known_shapes[key]


class _Runner:
    """One step of a pipeline on one rank."""

    def __init__(
        self, pipeline: Pipeline, micro_batches: Sequence[Mapping[str, Tensor]], phase: Phase, seed: Tensor | None
    ) -> None:
        self.pipeline, self.micro_batches, self.phase, self.seed = pipeline, micro_batches, phase, seed
        self.mesh = pipeline.mesh
        self.group = self.mesh.groups["pp"]
        assert self.mesh.back_group is not None
        self.back_group = self.mesh.back_group
        self.ranks = self.mesh.plan.group("pp", self.mesh.rank)
        self.received: dict[tuple[int, int], dict[Output, Tensor]] = {}
        self.made: dict[tuple[int, int], list[Tensor]] = {}
        self.pending: list[tuple[Any, Tensor]] = []  # sends under way, with what they send
        self.waiting: dict[tuple[int, int], tuple[list[Tensor], list[Tensor | None]]] = {}  # for weight gradients
        with phase("forward"):
            self.loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)  # one type on every rank

    def act(self, action: Action) -> None:
        """Run one action of the schedule."""
        self.pending = [(work, sent) for work, sent in self.pending if not work.is_completed()]  # that need not be held
        if action.kind == "forward":
            with self.phase("forward"):
                self._forward(action.stage, action.micro_batch)
        elif action.kind == "backward":
            with self.phase("backward"):
                self._backward(action.stage, action.micro_batch)
        elif action.kind == "input":
            with self.phase("backward"):
                self._input_gradients(action.stage, action.micro_batch)
        else:
            with self.phase("backward"):
                self._weight_gradients(action.stage, action.micro_batch)

    def finish(self) -> None:
        """Wait until everything that was sent has left."""
        for work, _ in self.pending:
            work.wait()
        self.pending.clear()

    def _forward(self, stage: int, mb: int) -> None:
        batch = self.micro_batches[mb]
        received: dict[Output, Tensor] = {}
        if stage:
            shapes = self.pipeline.flow.shapes if self.pipeline.depends_on_values else self.pipeline.shapes(batch)
            for place, output in enumerate(self.pipeline.crossing[stage]):
                shape, dtype = shapes[output]
                if self.pipeline.depends_on_values:
                    shape = self._receive_shape(len(shape), stage - 1, mb, place)
                tensor = torch.empty(shape, dtype=dtype, device=self.mesh.device)
                self._receive(tensor, stage - 1, mb, place, self.group)
                received[output] = tensor.requires_grad_(dtype.is_floating_point)
        made = self.pipeline.pass_stage(stage, batch, received)
        if stage == self.pipeline.num_stages - 1:
            made = [made[0] / len(self.micro_batches)]
            self.loss = self.loss + made[0].detach()
        else:
            for place, tensor in enumerate(made):
                if self.pipeline.depends_on_values:
                    told = torch.tensor(list(tensor.shape), device=self.mesh.device)
                    self._send(told, stage + 1, mb, place, self.group)
                self._send(tensor.detach(), stage + 1, mb, place, self.group)
        self.received[stage, mb], self.made[stage, mb] = received, made

    def _receive_shape(self, num_dims: int, stage: int, mb: int, place: int) -> tuple[int, ...]:
        told = torch.empty(num_dims, dtype=torch.long, device=self.mesh.device)
        self._receive(told, stage, mb, place, self.group)
        return tuple(told.tolist())

    def _gradients(self, stage: int, mb: int) -> tuple[list[Tensor], list[Tensor | None]]:
        """What the stage made that needs a gradient, and those gradients, from the stage after."""
        made = [tensor for tensor in self.made[stage, mb] if tensor.is_floating_point()]
        if stage == self.pipeline.num_stages - 1:
            return made, [self.seed]
        roots: list[Tensor] = []
        gradients: list[Tensor | None] = []
        for place, tensor in enumerate(made):
            gradient = torch.empty_like(tensor, requires_grad=False, memory_format=torch.contiguous_format)
            self._receive(gradient, stage + 1, mb, place, self.back_group)
            if tensor.requires_grad:
                roots.append(tensor)
                gradients.append(gradient)
        return roots, gradients

    def _backward(self, stage: int, mb: int) -> None:
        roots, gradients = self._gradients(stage, mb)
        torch.autograd.backward(roots, gradients)
        received = self.received.pop((stage, mb))
        del self.made[stage, mb]
        self._send_back(stage, mb, [tensor.grad for tensor in received.values() if tensor.requires_grad], received)

    def _send_back(
        self, stage: int, mb: int, gradients: Sequence[Tensor | None], received: Mapping[Output, Tensor]
    ) -> None:
        inputs = [tensor for tensor in received.values() if tensor.requires_grad]
        for place, (tensor, gradient) in enumerate(zip(inputs, gradients, strict=True)):
            self._send(
                torch.zeros_like(tensor) if gradient is None else gradient, stage - 1, mb, place, self.back_group
            )

    def _input_gradients(self, stage: int, mb: int) -> None:
        roots, gradients = self._gradients(stage, mb)
        received = self.received[stage, mb]
        inputs = [tensor for tensor in received.values() if tensor.requires_grad]
        if inputs:
            found = torch.autograd.grad(roots, inputs, gradients, retain_graph=True, allow_unused=True)
            self._send_back(stage, mb, found, received)
        self.waiting[stage, mb] = roots, gradients

    def _weight_gradients(self, stage: int, mb: int) -> None:
        roots, gradients = self.waiting.pop((stage, mb))
        weights = [parameter for parameter in self.pipeline.parameters() if parameter.requires_grad]
        torch.autograd.backward(roots, gradients, inputs=weights)
        del self.received[stage, mb], self.made[stage, mb]

    def _send(self, tensor: Tensor, stage: int, mb: int, place: int, group: dist.ProcessGroup) -> None:
        peer = self.ranks[stage % len(self.ranks)]
        tensor = tensor.contiguous()
        with record_function(f"{MESSAGE}{self.mesh.rank}>{peer}"):
            work = dist.isend(tensor, dst=peer, group=group, tag=self._tag(stage, mb, place))
        if not isinstance(tensor, FakeTensor):  # which never leaves, and need not be held
            self.pending.append((work, tensor))

    def _receive(self, tensor: Tensor, stage: int, mb: int, place: int, group: dist.ProcessGroup) -> None:
        peer = self.ranks[stage % len(self.ranks)]
        mine = stage + 1 if group is self.group else stage - 1
        with record_function(f"{MESSAGE}{peer}>{self.mesh.rank}"):
            work = dist.irecv(tensor, src=peer, group=group, tag=self._tag(mine, mb, place))
        if work is not None:
            work.wait()

    def _tag(self, stage: int, mb: int, place: int) -> int:
        """The same number on both ends: which stage receives, which micro-batch, which of its tensors."""
        return (stage * len(self.micro_batches) + mb) * 16 + place


def _hollow(parameter: Tensor) -> Tensor:
    """A tensor of the parameter's shape that holds one element."""
    return torch.zeros((), dtype=parameter.dtype, device=parameter.device).expand(parameter.shape)


def _hollows_in(module: nn.Module, hollows: Sequence[tuple[nn.Module, str]]) -> list[tuple[nn.Module, str]]:
    inside = set(module.modules())
    return [(owner, name) for owner, name in hollows if owner in inside]


def _hollow_parameters(
    module: nn.Module, hollows: Sequence[tuple[nn.Module, str]], recurse: bool = True
) -> Iterator[Tensor]:
    """What `module.parameters()` gives where all of them are held elsewhere."""
    return (vars(owner)[name] for owner, name in _hollows_in(module, hollows) if recurse or owner is module)


def _skeleton(model: nn.Module, groups: Sequence[dist.ProcessGroup | None]) -> nn.Module:
    """A copy of the model whose parameters take no memory."""
    with _disable_current_modes():
        memo: dict[int, Any] = {id(group): group for group in groups}  # shared, not copied
        for module in model.modules():
            for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
                if isinstance(value, Tensor):
                    empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
                    memo[id(value)] = nn.Parameter(empty) if isinstance(value, nn.Parameter) else empty
        return copy.deepcopy(model, memo)
