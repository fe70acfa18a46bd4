"""Traces of all ranks from one pass: ranks that run the same thing share it, and only their groups differ."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from meshloom.chakra.build import TraceBuilder, group_id
from meshloom.chakra.trace import Node, NodeType, Trace
from meshloom.chakra.wire import StoredNodes
from meshloom.model.build import build_model, example_batch
from meshloom.model.config import Objective
from meshloom.model.step import make_optimizer, train_step
from meshloom.parallel.apply import check_plan, parallelize
from meshloom.parallel.data import data_parallel
from meshloom.parallel.mesh import Mesh, make_mesh
from meshloom.parallel.pipeline import Pipeline
from meshloom.plan import Axis, Plan
from meshloom.synth.dispatch import Group, StepWatcher
from meshloom.synth.world import fake_world


def synthesise(
    config: Any,
    objective: Objective,
    *,
    plan: Plan,
    micro_batch: int,
    seq_length: int,
    max_grad_norm: float = 1.0,
    model_name: str = "",
) -> dict[int, Trace]:
    """The traces of a training step of `config` on every rank of `plan`, by rank; nothing is computed.

    `micro_batch` sequences of `seq_length` tokens a rank and micro-batch. Raises PlanError if the model cannot take
    the plan.
    """
    model = build_model(config, objective, seed=0, device="meta")
    check_plan(model, plan, example_batch(objective, micro_batch=1, seq_length=8, device="meta"))
    # Ranks of the same place in the pipeline have the same part of the work: one role each.
    roles = [
        _one_rank(
            config,
            objective,
            plan=plan,
            rank=plan.rank(pp=place),
            micro_batch=micro_batch,
            seq_length=seq_length,
            max_grad_norm=max_grad_norm,
            model_name=model_name,
        )
        for place in range(plan.pp)
    ]
    return {rank: stamp(roles[plan.coordinate(rank)["pp"]], plan, rank) for rank in range(plan.world_size)}


def _one_rank(
    config: Any,
    objective: Objective,
    *,
    plan: Plan,
    rank: int,
    micro_batch: int,
    seq_length: int,
    max_grad_norm: float,
    model_name: str,
) -> Trace:
    builder = TraceBuilder(
        rank=rank, world_size=plan.world_size, source="synth", plan=str(plan), step=1, model=model_name or None
    )
    with fake_world(rank, plan.world_size):
        mesh = make_mesh(plan, torch.device("cpu"))  # the mesh counts ranks in real tensors
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = parallelize(
                build_model(config, objective, seed=0),
                plan=plan,
                mesh=mesh,
                example=example_batch(objective, micro_batch=1, seq_length=8),
            ).train()
            inner = model.model if isinstance(model, Pipeline) else model
            paths = {id(module): path for path, module in inner.named_modules()}
            # The learning rate is no matter here: nothing is computed.
            optimizer = make_optimizer(model, learning_rate=1e-4, weight_decay=0.1)
            model = data_parallel(model, mesh)
            watcher = StepWatcher(builder, _groups(mesh), paths)
            # The first step makes the optimizer's states and learns the order of the gradients; all others
            # are like the second.
            for context in (nullcontext(), watcher.watching()):
                batches = [
                    example_batch(objective, micro_batch=micro_batch, seq_length=seq_length)
                    for _ in range(plan.num_micro_batches)
                ]
                with context:
                    train_step(model, optimizer, batches, mesh=mesh, max_grad_norm=max_grad_norm)
    return builder.finish()


def _groups(mesh: Mesh) -> dict[str, Group]:
    groups: dict[str, Group] = {
        group.group_name: Group(mesh.plan.group(axis, mesh.rank), axis) for axis, group in mesh.groups.items()
    }
    parts = [(axis, group) for (axis, _), group in mesh.parts.items()]
    for axis, part in [*parts, ("pp", mesh.back_group)]:
        if part is not None:
            groups[part.group_name] = Group(tuple(dist.get_process_group_ranks(part)), axis)
    return groups


def stamp(trace: Trace, plan: Plan, rank: int) -> Trace:
    """`trace` as `rank` would have it: the same nodes, with this rank's groups and peers in the place of the role's.

    Both have the same place in the pipeline, so along each axis the ranks are the role's with this rank's other
    coordinates.
    """
    where = plan.coordinate(rank)

    def moved(other: int, axis: Axis) -> int:
        return plan.rank(**{**where, axis: plan.coordinate(other)[axis]})

    def own(node: Node) -> Node:
        axis = node.get("comm_axis")
        if axis is None:
            return node
        if node.type is NodeType.COMM_COLL:
            ranks = [moved(other, axis) for other in node.get("comm_ranks")]
            told: dict[str, Any] = {"comm_ranks": ranks, "pg_name": group_id(ranks, plan.world_size)}
        else:
            told = {name: moved(node.get(name), axis) for name in ("comm_src", "comm_dst")}
        return msgspec.structs.replace(node, attrs={**node.attrs, **told})

    nodes = StoredNodes.of(own(node) for node in trace.nodes)
    return Trace(nodes=nodes, attrs={**trace.attrs, "rank": rank}, version=trace.version)
