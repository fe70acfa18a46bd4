"""Traces of all ranks from a few passes: ranks that run the same thing share a role, and what repeats is captured once.

A role is a place in the pipeline and a kind of place on the tensor-parallel axis (where a vocabulary is cut unevenly
there are two). Roles of the middle of a pipeline are captured once; they differ in the order of passes and in peers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import meshloom
from meshloom.chakra.build import TraceBuilder
from meshloom.chakra.trace import Trace
from meshloom.chakra.wire import StoredNodes, whole_frames
from meshloom.errors import PlanError, UsageError
from meshloom.model.build import example_batch
from meshloom.model.config import Objective
from meshloom.model.scale import LossScale
from meshloom.model.step import Batch, Precision, make_optimizer, train_step
from meshloom.parallel.apply import cut_model, find_cut
from meshloom.parallel.data import ReducerTwin, data_parallel
from meshloom.parallel.fake import fake_copy
from meshloom.parallel.flow import Flow, find_layers, trace_flow
from meshloom.parallel.mesh import Mesh, make_mesh
from meshloom.parallel.pairs import Discovery
from meshloom.parallel.pipeline import Pipeline
from meshloom.parallel.stages import Stages, layer_costs
from meshloom.plan import Plan
from meshloom.synth.dispatch import Group, StepWatcher
from meshloom.synth.folder import ROLES_FILE, RoleOfRanks, whole_folder, write_file
from meshloom.synth.forked import run_all
from meshloom.synth.image import Carry, Image, held_bytes, peak_bytes, stamp
from meshloom.synth.parts import Captured, NotAlike, captured, enough_micro_batches, parts_of, standing_for
from meshloom.synth.reduced import (
    Reduced,
    bounds_of,
    few_replicas,
    reduce_pipeline,
    same,
    stages_of,
    tensor_kinds,
    unlike_layers,
    with_layers,
)
from meshloom.synth.subject import build, without_data
from meshloom.synth.world import fake_world

_PRODUCTS = ("gemm", "attention")
_FEW_LAYERS = 3  # of a model that shows what the layers of a larger one cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """The training step that is synthesised; `micro_batch` sequences of `seq_length` tokens a rank and micro-batch."""

    config: Any
    objective: Objective
    plan: Plan
    micro_batch: int
    seq_length: int
    max_grad_norm: float = 1.0
    precision: Precision = "fp32"
    fused: bool = True
    zero: int = 0  # 1: optimizer states are shared over data parallel
    model_name: str = ""
    styles: Mapping[str, str] = field(default_factory=dict)  # a plan written by hand

    def __post_init__(self) -> None:
        if self.precision == "fp16" and not self.fused:
            raise UsageError("fp16 with an optimizer of several ops: expected the fused one, which skips overflows")
        if self.zero and self.plan.dp == 1:
            raise PlanError(f"zero 1: expected a plan of several dp ranks, which share the states, got {self.plan}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Role:
    """What some ranks of a plan run alike."""

    ranks: tuple[int, ...]
    reduced: Reduced
    place: int  # in the pipeline
    step: Captured
    standing: Sequence[int]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def num_nodes(self) -> int:
        """How many nodes its traces have."""
        parts = parts_of(self.reduced.whole, self.place)
        return sum(len(self.step.parts[part.standing(self.standing)]) for part in parts)

    @property
    def num_flops(self) -> int:
        """Floating-point operations of the products and attention of each of its ranks."""
        of_part = {
            part: sum(line.node.attrs["num_ops"] for line in lines if line.node.attrs.get("op_class") in _PRODUCTS)
            for part, lines in self.step.parts.items()
        }
        return sum(of_part[part.standing(self.standing)] for part in parts_of(self.reduced.whole, self.place))

    @property
    def peak_bytes(self) -> int:
        """The most bytes that each of its ranks holds at one time."""
        whole = self.reduced.whole
        return peak_bytes(self.step, whole, [part.standing(self.standing) for part in parts_of(whole, self.place)])

    def image(self) -> Image:
        """The nodes of its ranks' traces, as bytes."""
        plan = self.reduced.whole
        carry = Carry(
            group=lambda group: self.reduced.group(group, self.place),
            module=lambda path, chunk: self.reduced.module(path, chunk, self.place),
        )
        return stamp(self.step, plan, self.place, self.standing, carry)

    def trace(self, rank: int, image: Image) -> Trace:
        """The trace of `rank`, one of its ranks, from its image; the nodes have memory of their own."""
        return Trace(nodes=image.nodes(rank), attrs=self.attrs(rank, image))

    def attrs(self, rank: int, image: Image) -> dict[str, Any]:
        """The facts of the trace of `rank`."""
        memory = {"memory_held": held_bytes(self.step, self.reduced.whole), "memory_peak": image.peak_bytes}
        return {**self.facts, "rank": rank, **memory}


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """The roles of a plan, ordered by their first rank; together they have each rank once.

    `notes` tell what could not be shared or stamped out, and why.
    """

    plan: Plan
    roles: tuple[Role, ...]
    notes: tuple[str, ...] = ()

    def write(self, folder: Path, *, roles_only: bool = False, num_processes: int = 1) -> int:
        """Write every rank's file, or with `roles_only` that of each role's first rank and `ranks.json`.

        What stood at `folder` is replaced. Returns how many bytes were written; raises FolderError.
        """
        with whole_folder(folder) as part:
            shares = [self.roles[number::num_processes] for number in range(min(num_processes, len(self.roles)))]
            jobs = [partial(_write_roles, share, part, roles_only) for share in shares]
            sizes = run_all(jobs, num_processes=num_processes)
            if roles_only:
                table = [RoleOfRanks(f"rank{role.ranks[0]}.et", role.ranks[0], list(role.ranks)) for role in self.roles]
                (part / ROLES_FILE).write_bytes(msgspec.json.encode(table))
        return sum(int(size) for size in sizes)

    def traces(self) -> Iterator[tuple[int, Trace]]:
        """(rank, trace) of every rank, role by role."""
        for role in self.roles:
            image = role.image()
            for rank in role.ranks:
                yield rank, role.trace(rank, image)


def _write_roles(roles: Sequence[Role], folder: Path, first_only: bool) -> bytes:
    """Write the files of the roles' ranks; how many bytes, as text."""
    total = 0
    for role in roles:
        image = role.image()
        for rank in role.ranks[:1] if first_only else role.ranks:
            more = {"role_size": len(role.ranks)} if first_only else {}
            total += write_file(folder, rank, {**role.attrs(rank, image), **more}, image.turn_to(rank))
    return str(total).encode()


def synthesise(
    config: Any,
    objective: Objective = "causal",
    *,
    plan: Plan,
    micro_batch: int,
    seq_length: int,
    max_grad_norm: float = 1.0,
    precision: Precision = "fp32",
    fused: bool = True,
    zero: int = 0,
    model_name: str = "",
    styles: Mapping[str, str] | None = None,
) -> dict[int, Trace]:
    """The traces of a training step of `config` on every rank of `plan`, by rank; nothing is computed.

    `config` may also be a model that was written by hand: an nn.Module whose forward takes `input_ids` and `labels`,
    (B, S) int64, and returns what has a `loss`; it is left as it is. `zero` 1 shares optimizer states over dp.
    `micro_batch` sequences of `seq_length` tokens a rank and micro-batch; AdamW `fused` or not. Raises PlanError if the
    model cannot take the plan.
    """
    step = Step(
        config=config,
        objective=objective,
        plan=plan,
        micro_batch=micro_batch,
        seq_length=seq_length,
        max_grad_norm=max_grad_norm,
        precision=precision,
        fused=fused,
        zero=zero,
        model_name=model_name,
        styles=styles or {},
    )
    return dict(sorted(find_roles(step).traces()))


def find_roles(step: Step, *, stamped: bool = True, num_processes: int = 1) -> Roles:
    """The roles of a step, each captured; without `stamped` every part of each is captured for itself.

    So many passes run at once, in processes that are forked: only a process that does nothing else may ask for that.
    Raises PlanError if the model cannot take the plan.
    """
    if not stamped:
        return _capture(step, same(step.plan), step.config, (), num_processes)
    notes: list[str] = []
    reduced, config = _reduced(step, notes)
    fewer = replace(reduced.plan, num_micro_batches=enough_micro_batches(reduced.plan))
    try:
        return _capture(step, replace(reduced, plan=fewer), config, notes, num_processes)
    except NotAlike as reason:
        notes.append(f"every micro-batch is captured by itself: {reason}")
    return _capture(step, same(step.plan), step.config, notes, num_processes)


Cut = tuple[Discovery, Stages | None]


def _reduced(step: Step, notes: list[str]) -> tuple[Reduced, Any]:
    """What is captured in the place of the plan and the model."""
    plan = step.plan
    few: Callable[[Plan], Plan] = (lambda whole: whole) if step.zero else few_replicas  # shares depend on all of them
    small = few(plan)
    if plan.pp <= 3:
        return replace(same(plan), plan=small), step.config
    why = (
        "a plan written by hand may name one layer"
        if step.styles
        else unlike_layers(build(step.config, step.objective, device="meta"), step.config)
    )
    if why:
        notes.append(f"every stage is captured by itself: {why}")
        return replace(same(plan), plan=small), step.config
    shallow = with_layers(step.config, _FEW_LAYERS)
    model = build(shallow, step.objective, device="meta")
    example = example_batch(step.objective, micro_batch=1, seq_length=8, device="meta")
    flow = flow_of(model, example)
    bounds = bounds_of(layer_costs(model, flow), step.config.num_hidden_layers, plan)
    reduced = reduce_pipeline(plan, bounds)
    if reduced.plan.pp == plan.pp:
        return replace(same(plan), plan=small), step.config
    assert reduced.num_layers is not None
    config = with_layers(step.config, sum(reduced.num_layers))
    prefix = find_layers(model)[0].removesuffix("0")
    return replace(reduced, plan=few(reduced.plan), layers=prefix), config


def flow_of(model: nn.Module, example: Batch) -> Flow:
    """What flows through the model, on meta if it can run there, which is faster than on fake tensors."""
    try:
        return trace_flow(model, example)
    except Exception:  # whatever a forward does on meta that it does not on fake tensors
        return trace_flow(fake_copy(model), example)


def _cut_of(model: nn.Module, plan: Plan, example: Batch, told: Plan, styles: Mapping[str, str]) -> Cut:
    """How `plan` cuts the model; what is wrong is said of the plan `told`."""
    try:
        return find_cut(model, plan, example, styles)
    except PlanError as error:
        raise PlanError(str(error).replace(f"plan {plan}", f"plan {told}")) from error


def _capture(step: Step, reduced: Reduced, config: Any, notes: Sequence[str], num_processes: int) -> Roles:
    """The roles, from passes of the reduced plan."""
    plan, whole = reduced.plan, reduced.whole
    # Sequence parallel compares op by op with what fake tensors do.
    with FakeTensorMode() if plan.sequence_parallel else nullcontext():
        device = "cpu" if plan.sequence_parallel else "meta"
        model = build(config, step.objective, device=device)
        example = example_batch(step.objective, micro_batch=1, seq_length=8, device=device)
        probe = plan if plan.pp == 1 else replace(plan, schedule="gpipe", num_micro_batches=1)
        found, stages = _cut_of(model, probe, example, whole, step.styles)
    if stages is not None and reduced.num_layers is not None:
        stages = stages_of(stages, reduced.num_layers)
    flow = None
    if stages is not None and not plan.sequence_parallel:  # what crosses borders is then the same on every rank
        batch = example_batch(step.objective, micro_batch=step.micro_batch, seq_length=step.seq_length, device=device)
        flow = flow_of(model, batch)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    given = _Given(cut=(found, stages), flow=flow, shapes=shapes)
    del model

    def capture(place: int, tensor: int) -> bytes:
        return msgspec.msgpack.encode(_one_rank(step, config, plan, place, tensor, given))

    # Places of the pipeline first, at once; then other kinds of places of tp, where there are any.
    places = range(plan.pp)
    firsts = run_all([partial(capture, place, 0) for place in places], num_processes=num_processes)
    known = {(place, 0): _Told.decode(told) for place, told in zip(places, firsts)}
    others = [(place, kind) for place in places for kind in sorted({*known[place, 0].kinds} - {0})]
    more = run_all([partial(capture, *other) for other in others], num_processes=num_processes)
    known |= {other: _Told.decode(told) for other, told in zip(others, more)}
    steps = {key: told.captured(plan, *key) for key, told in known.items()}
    roles = []
    for place in range(whole.pp):
        stand = reduced.stands_for[place]
        kinds = known[stand, 0].kinds
        for kind in dict.fromkeys(kinds):
            ranks = [
                whole.rank(pp=place, dp=replica, tp=tensor)
                for replica in range(whole.dp)
                for tensor in range(whole.tp)
                if kinds[tensor] == kind
            ]
            roles.append(
                Role(
                    ranks=tuple(ranks),
                    reduced=reduced,
                    place=place,
                    step=steps[stand, kind],
                    standing=standing_for(steps[stand, kind], whole.num_micro_batches),
                    facts=_facts(step),
                )
            )
    return Roles(plan=whole, roles=tuple(roles), notes=tuple(notes))


class _Given(NamedTuple):
    """What every rank's pass needs, found once."""

    cut: Cut
    flow: Flow | None  # of a micro-batch through a pipeline
    shapes: dict[str, tuple[int, ...]]  # of the whole parameters


class _Told(msgspec.Struct, frozen=True):
    """What the pass of one rank tells: the nodes as in a file, where phases began, memory, and which places of tp run
    the same."""

    nodes: bytes
    marks: list[tuple[str, int]]
    held_bytes: int
    batch_bytes: int
    kinds: tuple[int, ...]

    @classmethod
    def decode(cls, data: bytes) -> _Told:
        """The inverse of msgpack's encoding."""
        return msgspec.msgpack.decode(data, type=cls)

    def captured(self, plan: Plan, place: int, tensor: int) -> Captured:
        """Its parts."""
        nodes = list(StoredNodes(self.nodes, whole_frames(self.nodes)))
        rank = plan.rank(pp=place, tp=tensor)
        return captured(nodes, self.marks, plan, rank, held_bytes=self.held_bytes, batch_bytes=self.batch_bytes)


def _facts(step: Step) -> dict[str, Any]:
    named = {"model": step.model_name} if step.model_name else {}
    return {
        "source": "synth",
        "world_size": step.plan.world_size,
        "plan": str(step.plan),
        "step": 1,
        "num_tokens": step.micro_batch * step.seq_length * step.plan.dp * step.plan.num_micro_batches,
        **named,
        "meshloom_version": meshloom.__version__,
    }


def _one_rank(step: Step, config: Any, plan: Plan, place: int, tensor: int, given: _Given) -> _Told:
    """The step of the rank at these places of pp and tp of `plan`."""
    rank = plan.rank(pp=place, tp=tensor)
    with fake_world(rank, plan.world_size):
        mesh = make_mesh(plan, torch.device("cpu"))  # the mesh counts ranks in real tensors
        with FakeTensorMode(allow_non_fake_inputs=True), without_data():
            example = example_batch(step.objective, micro_batch=1, seq_length=8)
            model = build(config, step.objective)
            model = cut_model(model, plan=plan, mesh=mesh, example=example, cut=given.cut).train()
            inner = model.model if isinstance(model, Pipeline) else model
            # The learning rate is no matter here: nothing is computed.
            shared_by = mesh.groups["dp"] if step.zero else None
            optimizer = make_optimizer(
                model, learning_rate=1e-4, weight_decay=0.1, fused=step.fused, shared_by=shared_by
            )
            model = data_parallel(model, mesh)
            scale = LossScale(mesh.device) if step.precision == "fp16" else None
            run = partial(
                train_step, mesh=mesh, max_grad_norm=step.max_grad_norm, precision=step.precision, scale=scale
            )
            # The first step makes the optimizer's states and learns the order of the gradients; all others are like
            # the second.
            if isinstance(model, ReducerTwin):
                run(model, optimizer, _batches(step, 1))
            else:
                _make_states(optimizer)
            batches = _batches(step, plan.num_micro_batches)
            if isinstance(model, Pipeline) and given.flow is not None:
                model.know_shapes(batches[0], given.flow)
            builder = TraceBuilder(rank=rank, world_size=plan.world_size, source="synth")
            watcher = StepWatcher(
                builder, groups_of(mesh), {id(module): path for path, module in inner.named_modules()}
            )
            watcher.hold([*_held(model, optimizer), *(value for batch in batches for value in batch.values())])
            with watcher.watching():
                run(model, optimizer, batches)
            batch_bytes = sum(value.nbytes for value in batches[0].values())
            held = watcher.memory.held_bytes - plan.num_micro_batches * batch_bytes
            missing = getattr(step.config, "num_hidden_layers", 0) - getattr(config, "num_hidden_layers", 0)
            return _Told(
                nodes=StoredNodes.of(builder.finish().nodes).framed().tobytes(),
                marks=watcher.marks,
                held_bytes=held + _buffer_bytes(inner) * missing,
                batch_bytes=batch_bytes,
                kinds=tensor_kinds(inner, given.shapes, plan),
            )


def _batches(step: Step, count: int) -> list[Batch]:
    one = partial(example_batch, step.objective, micro_batch=step.micro_batch, seq_length=step.seq_length)
    return [one() for _ in range(count)]


def _make_states(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer make its states, as its first step does."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _held(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What a rank holds between steps."""
    weights = [*model.parameters(), *model.buffers()]
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    buckets = model.buckets if isinstance(model, ReducerTwin) else []
    return [*weights, *gradients, *states, *buckets]


def _buffer_bytes(model: nn.Module) -> int:
    """Bytes of the buffers of a layer, which stages hold of all layers; 0 where there are no layers."""
    layers = find_layers(model)
    return sum(buffer.nbytes for buffer in model.get_submodule(layers[0]).buffers()) if layers else 0


def groups_of(mesh: Mesh) -> dict[str, Group]:
    """Ranks and axis of each process group of a mesh, by its name."""
    groups: dict[str, Group] = {
        group.group_name: Group(mesh.plan.group(axis, mesh.rank), axis) for axis, group in mesh.groups.items()
    }
    parts = [(axis, group) for (axis, _), group in mesh.parts.items()]
    for axis, part in [*parts, ("pp", mesh.back_group)]:
        if part is not None:
            groups[part.group_name] = Group(tuple(dist.get_process_group_ranks(part)), axis)
    return groups
